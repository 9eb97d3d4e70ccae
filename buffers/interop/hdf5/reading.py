"""Reading the episodes of an HDF5 file: one at a time, or windows of them where they lie."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, final

import numpy as np

from buffers.interop.alignment import first_gap, unflattened
from buffers.interop.base import Episode, FormatReader, chosen_fields
from buffers.interop.hdf5.detection import layout_of
from buffers.interop.hdf5.file import HDF5File
from buffers.interop.hdf5.layout import Layout
from buffers.interop.in_place import InPlaceDataset

__all__ = ["HDF5Dataset", "HDF5Reader"]

# Of next observations, when a file is opened in place.
_MOST_COMPARED = 1 << 26
_REPEATED = (
    "The final observation of some episodes is equal to the one before. robomimic's converter writes it so for D4RL, "
    "where it does not know the final observation."
)


@final
class HDF5Reader(FormatReader):
    """Episodes of an HDF5 file; see `read`."""

    format: ClassVar[str] = "hdf5"

    def __init__(
        self,
        path: str,
        layout: str | None = None,
        mask: str | None = None,
        max_episode_steps: int | None = None,
        fields: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
        states: str | None = None,
    ) -> None:
        super().__init__(path, fields, dtypes)
        with HDF5File(path) as file:
            self.layout = layout_of(file, self.wants, layout, mask, max_episode_steps, states)
        if not all(self.layout.fields.below(name) for name in self.fields or ()):
            with HDF5File(path) as file:
                whole = layout_of(file, lambda name: True, layout, mask, max_episode_steps, states)
            chosen_fields(path, whole.fields, self.fields)
        self.metadata, self.notes = self.layout.metadata, self.layout.notes
        self.num_episodes = len(self.layout.lengths)
        self.num_steps = int(self.layout.lengths.sum()) + self.num_episodes

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        names = [name for name in self.layout.types if self.wants(name)]
        with HDF5File(self.path, self.layout.version) as file:
            for episode in range(number, len(self.layout.lengths)):
                num_rows = int(self.layout.lengths[episode]) + 1
                rows: dict[str, np.ndarray] = {}
                for name in names:
                    dtype, shape = self.layout.types[name]
                    rows[name] = np.empty((num_rows, *shape), dtype)
                    file.copy(self.layout.pieces(episode, name), 0, num_rows, rows[name])
                self._check_next(file, episode, rows)
                yield Episode(unflattened(rows), self.layout.infos.get(episode, {}))

    def _check_next(self, file: HDF5File, episode: int, rows: Mapping[str, np.ndarray]) -> None:
        """Compare next observations, of which only the last is read, with the observations that follow."""
        columns = self.layout.columns(episode)
        names = [name for name in rows if name in columns and columns[name].has_next]
        for name in names:
            *_, (_, stored, last, _) = self.layout.pieces(episode, name)
            assert stored is not None  # It has next observations.
            observations = rows[name][:-1]
            following, first = np.empty_like(observations), last - len(observations) + 1
            file.read(stored, first, following)
            if (gap := first_gap(observations, following)) is not None:
                found = f"`{stored.name}` of row {first + gap} is not the observation of the row behind it"
                advice = "Rows must be in the order of their episodes, with an end where one ends; next observations"
                raise self.damaged(found, f"{advice} that are otherwise must be taken out of the file")
        is_known = bool(names) and not self.layout.is_final_missing(episode)
        if is_known and all(_are_same(rows[name][-1], rows[name][-2]) for name in names):
            self.notes.add(_REPEATED)

    def check_first(self) -> None:
        """Compare next observations up to a bound of bytes. FormatError as when all are read."""
        row_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.layout.types.values())
        if any(column.has_next for column in self.layout.columns(0).values()):
            num = int((self.layout.lengths.cumsum() * row_bytes).searchsorted(_MOST_COMPARED)) + 1
            for _ in islice(self.read_from(0), num):
                pass


@final
class HDF5Dataset(InPlaceDataset):
    """Episodes of an HDF5 file where they lie; see `open`."""

    format: ClassVar[str] = "hdf5"

    def __init__(
        self,
        path: str,
        layout: str | None = None,
        mask: str | None = None,
        max_episode_steps: int | None = None,
        fields: Sequence[str] | None = None,
        states: str | None = None,
    ) -> None:
        reader = HDF5Reader(os.path.abspath(path), layout, mask, max_episode_steps, fields, states=states)
        reader.check_first()
        self.layout: Layout = reader.layout
        #: What the file does not have, or is not read.
        self.notes, self.metadata = reader.notes, reader.metadata
        chosen = chosen_fields(path, self.layout.fields, reader.fields)
        options: dict[str, Any] = {"layout": layout, "mask": mask, "max_episode_steps": max_episode_steps}
        options |= {"states": states, "fields": fields}
        super().__init__(reader.path, chosen, (self.layout.lengths + 1).tolist(), self.layout.infos, options)

    def _open_file(self) -> HDF5File:
        return HDF5File(self.path, self.layout.version)

    def _read_rows(self, file: HDF5File, episode: int, start: int, stop: int, out: Mapping[str, np.ndarray]) -> None:
        for name, rows in out.items():
            file.copy(self.layout.pieces(episode, name), start, stop, rows)


def _are_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Bit by bit, so that NaN equals itself."""
    return one.tobytes() == other.tobytes()
