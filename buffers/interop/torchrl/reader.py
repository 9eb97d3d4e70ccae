"""Episodes of TorchRL's storages: one at a time, or in place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from buffers.dataset.episode_info import EpisodeInfo
from buffers.fields import Fields, as_tensor
from buffers.interop.base import Episode, FormatReader, Notes, chosen_fields
from buffers.interop.in_place import InPlaceDataset
from buffers.interop.torchrl.episodes import EpisodeTable, episode_table, first_gap
from buffers.interop.torchrl.layout import Options, StoredRows, locate
from buffers.interop.torchrl.memmaps import MemoryMapped
from buffers.interop.torchrl.rows import Plan, plan_of

__all__ = ["TorchRLDataset", "TorchRLReader"]


class _Source:
    """What is found in a directory: its columns, its episodes, and what becomes a field."""

    def __init__(self, path: str, options: Options, notes: Notes) -> None:
        located = locate(path)
        self.path = path
        self.columns = MemoryMapped(path, located.path)
        stored = StoredRows.of(self.columns, located, options)
        self.plan: Plan = plan_of(self.columns, options, notes)
        self.table: EpisodeTable = episode_table(self.columns, stored, options, self.plan.pairs, notes)
        self.metadata = {**stored.metadata, "observations": self.plan.observations}
        for name, kind in self.columns.unread.items():
            notes.add(f"`{name}` is {kind}, and is not read.")
        if located.path != path:
            _note_beside(path, notes)

    def __len__(self) -> int:
        return len(self.table.starts)

    def chosen(self, names: Sequence[str] | None) -> Fields:
        """The fields that are read; ValueError if one is not there."""
        return chosen_fields(self.path, self.plan.fields, names)

    def info(self, episode: int) -> EpisodeInfo:
        """The trajectory or environment of an episode, if there are several."""
        name = self.table.stream_name
        return {} if name is None else {name: int(self.table.streams[episode])}


def _note_beside(path: str, notes: Notes) -> None:
    sampler = os.path.join(path, "sampler")
    if os.path.isdir(sampler) and os.listdir(sampler):
        notes.add("`sampler`, with priorities for example, is not read.")
    if os.path.exists(os.path.join(path, "transform.t")):
        notes.add("`transform.t` is a pickle, and is not read.")


class TorchRLReader(FormatReader):
    """Episodes of a buffer of TorchRL, or of a memory-mapped TensorDict. See `read`."""

    format = "torchrl"

    def __init__(
        self,
        path: str,
        fields: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
        options: Options | None = None,
    ) -> None:
        super().__init__(path, fields, dtypes)
        self._source = _Source(path, options or Options(), self.notes)
        self._fields = self._source.chosen(self.fields)
        self.num_episodes = len(self._source)
        self.num_steps = int(self._source.table.lengths.sum()) + self.num_episodes
        self.metadata = self._source.metadata

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        source, fields = self._source, self._fields
        pairs = source.plan.pairs_of(fields)
        for episode in range(number, len(source)):
            rows = source.table.rows_of(episode)
            if (gap := first_gap(source.columns, pairs, rows)) is not None:
                raise gap
            arrays = {name: np.empty((len(rows) + 1, *kind.shape), kind.numpy_dtype) for name, kind in fields.items()}
            source.plan.copy(source.columns.flat_rows, rows, 0, len(rows) + 1, arrays)
            self._note_missing(arrays)
            leaves = {
                name: as_tensor(array, fields[name]) if array.dtype.kind == "V" else array
                for name, array in arrays.items()
            }
            yield Episode(fields.unflatten(leaves), source.info(episode))

    def close(self) -> None:
        """As `FormatReader.close`."""
        self._source.columns.close()

    def _note_missing(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            last = array[-1] if name.startswith("obs") and array.dtype.kind == "f" else None
            if last is not None and last.size > 1 and (np.isnan(last).all() or not last.any()):
                self.notes.add(
                    f"`{name}` is NaN, or all zeros, in the last row of some episodes, as TorchRL writes it where the "
                    "environment gave none."
                )


class TorchRLDataset(InPlaceDataset):
    """Episodes of a buffer of TorchRL, or of a memory-mapped TensorDict, read where they lie. See `open`.

    Attributes:
        notes: What the source does not have, or is not read.
    """

    format: ClassVar[str] = "torchrl"

    def __init__(self, path: str, fields: Sequence[str] | None = None, options: Options | None = None) -> None:
        self.notes, options = Notes(), options or Options()
        self._source = _Source(path, options, self.notes)
        infos = {number: info for number in range(len(self._source)) if (info := self._source.info(number))}
        lengths, given = (self._source.table.lengths + 1).tolist(), {"fields": fields, **vars(options)}
        super().__init__(path, self._source.chosen(fields), lengths, infos, given)

    def _open_file(self) -> MemoryMapped:
        return self._source.columns

    def _read_rows(
        self, file: MemoryMapped, episode: int, start: int, stop: int, out: Mapping[str, np.ndarray]
    ) -> None:
        self._source.plan.copy(file.flat_rows, self._source.table.rows_of(episode), start, stop, out)
