"""Reading windows from episodes in a store of objects: all that a batch needs at once."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch

from buffers.dataset.files.directory import EpisodeFiles, FileName
from buffers.dataset.files.object_directory import ObjectDirectory
from buffers.dataset.files.serialization import EpisodeSerializationStrategy, has_offsets
from buffers.dataset.files.window_reader import Layout, Request, Target, WindowReader, ranges_of
from buffers.disk import DamagedEpisodeError
from buffers.fields import Fields
from buffers.objects import ObjectFile, Part
from buffers.table import Windows

__all__ = ["ObjectWindowReader", "window_reader"]


class ObjectWindowReader(WindowReader):
    """Reads the headers that a batch needs, those that are not known, and then the rows."""

    _directory: ObjectDirectory

    def __init__(self, directory: ObjectDirectory) -> None:
        super().__init__(directory)
        self._parts: list[Part] = []
        self._names: dict[ObjectFile, FileName] = {}

    def read(
        self, strategy: EpisodeSerializationStrategy, fields: Fields, windows: Windows, out: Mapping[str, torch.Tensor]
    ) -> dict[FileName, str | None]:
        """As `WindowReader.read`.

        ObjectStoreError if the store does not do it.
        """
        with self._lock:
            self._parts, self._names = [], {}
            self._expect(strategy, fields, windows)
            lost = super().read(strategy, fields, windows, out)
            for file, error in self._directory.files.fill(self._parts).items():
                name = self._names[file]
                lost[name] = str(error) if isinstance(error, DamagedEpisodeError) else None
            self._parts, self._names = [], {}
            return lost

    def _expect(self, strategy: EpisodeSerializationStrategy, fields: Fields, windows: Windows) -> None:
        """Let the directory read the headers, or the whole files, of episodes that are new here."""
        starts = (windows.start - windows.step).tolist()
        cuts = [0] * len(starts) if windows.cut is None else windows.cut.tolist()
        rows = zip(starts, windows.episode_length.tolist(), windows.episode.tolist(), cuts, strict=True)
        is_whole = not has_offsets(strategy)
        known = self._decoded if is_whole else self._layouts
        found = {row[2]: row for row in rows if row[2] not in known}
        names = [str(self._directory.name_of(*row)) for row in found.values()]
        if names:
            self._directory.expect(names, [length for _, length, _, _ in found.values()], fields, is_whole)

    def _read_rows(
        self, name: FileName, file: io.FileIO, layout: Layout, targets: list[Target], row: int, step: int, num_rows: int
    ) -> None:
        assert isinstance(file, ObjectFile)  # The directory opens no others.
        self._names[file] = name
        self._parts += [Part(file, offset, view) for offset, view in ranges_of(layout, targets, row, step, num_rows)]

    def _look_again(
        self, name: FileName, strategy: EpisodeSerializationStrategy, fields: Fields, error: DamagedEpisodeError
    ) -> str | None:
        # No parser has failed, in which a signal handler may have raised: the store has said what is there.
        if error.__cause__ is None:
            return str(error)
        return super()._look_again(name, strategy, fields, error)

    def _fill(self, requests: list[Request], lost: dict[FileName, str | None]) -> None:
        names: dict[ObjectFile, FileName] = {}
        parts = []
        for name, file, offset, data in requests:
            assert isinstance(file, ObjectFile)  # The directory opens no others.
            names[file] = name
            parts.append(Part(file, offset, memoryview(data)))
        for gone, error in self._directory.files.fill(parts).items():
            lost[names[gone]] = str(error) if isinstance(error, DamagedEpisodeError) else None


def window_reader(directory: EpisodeFiles) -> WindowReader:
    """What reads the episodes of a directory, or of a store."""
    return ObjectWindowReader(directory) if isinstance(directory, ObjectDirectory) else WindowReader(directory)
