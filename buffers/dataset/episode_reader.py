"""EpisodeReader: what can be read of a store: windows, episodes, and which fields they have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from buffers.conversion import as_array
from buffers.fields import Fields, TensorType, as_tensor
from buffers.late import LateFields
from buffers.loading.padding import shift
from buffers.table import EpisodeTable, Windows
from buffers.utils import integer

__all__ = ["EpisodeReader", "Rows"]

Rows = dict[str, torch.Tensor]


class EpisodeReader(IterableDataset, ABC):
    """Windows and episodes of a store, by the table of those that live; `capacity` is in steps over all."""

    device = torch.device("cpu")
    #: Values that were given after their rows were stored; None where members have them.
    late: LateFields | None = None
    #: Whether `_read` takes windows that begin before their episodes, and leaves the rows before those as they are.
    reads_before_episodes = False

    def __init__(self, capacity: int) -> None:
        self.capacity = integer("capacity", capacity, minimum=1)
        self.table = EpisodeTable()
        #: Of the ids that are gone: those that were not evicted, and those that were evicted without need of room.
        self.num_lost = self.num_dismissed = 0
        self._fields: Fields | None = None
        self._batch_fields: tuple[Fields | None, Fields | None, Fields | None] = (None, None, None)

    @abstractmethod
    def _read(self, windows: Windows, out: Rows) -> np.ndarray | None:
        """Copy windows into `out`.

        Args:
            windows: B windows of T rows; row t of window b is row `windows.step[b] + t` of its episode. They begin in
                their episodes, unless `reads_before_episodes`.
            out: `name -> (B, T, *shape)`, contiguous, for some or all of the fields. Padding need not be written.

        Returns:
            None if all were read, else bool `(B,)`, False for windows whose episode is gone: others replace them.
        """

    def stored_type(self, field: TensorType) -> TensorType:
        """The type as which a field is stored."""
        return field

    def _find_fields(self) -> None:
        """Set `_fields` if they can be known without an episode."""

    def compressed_bytes(self) -> dict[str, int]:
        """About how many bytes the compressed fields take, by name; without those that are not compressed."""
        return {}

    def which_are_whole(self, windows: Windows) -> np.ndarray | None:
        """After reading, which windows may have been overwritten meanwhile, as `_read` returns."""
        return None

    @property
    def fields(self) -> Fields | None:
        """The fields, None until they are known."""
        if self._fields is None:
            self._find_fields()
        return self._fields

    @property
    def late_fields(self) -> Fields | None:
        """The late fields that batches have; None if there are none."""
        return self.late.in_batches if self.late is not None else None

    @property
    def batch_fields(self) -> Fields | None:
        """The fields of a batch: stored ones, then late ones."""
        late = self.late_fields
        fields = self.fields if self._fields is None else self._fields
        if fields is None or late is None:
            return fields
        if self._batch_fields[0] is not fields or self._batch_fields[1] is not late:
            self._batch_fields = fields, late, fields.with_others(late)
        return self._batch_fields[2]

    def read(
        self, windows: Windows, out: Rows | None = None, names: Iterable[str] | None = None
    ) -> tuple[Rows, np.ndarray | None]:
        """Rows `name -> (B, T, *shape)`, and which windows were read, as `_read` returns.

        Into `out` if that is given, else of the fields in `names`, or of all that a batch has.
        """
        if self.late_fields is None:
            return self.read_stored(windows, out, names)
        found = list((self.batch_fields or ()) if names is None else names) if out is None else list(out)
        if self.late is None:
            return self.read_stored(windows, out, found)
        late, stored = [n for n in found if n in self.late], [n for n in found if n not in self.late]
        rows = self.empty_batch(windows, late) if out is None else {name: out[name] for name in late}
        # First, so that what finds out whether an episode has left meanwhile comes after.
        self.late.read(windows, rows)
        if not stored:
            return rows, self.which_are_whole(windows)
        others, was_read = self.read_stored(windows, None if out is None else {n: out[n] for n in stored}, stored)
        return {name: rows[name] if name in rows else others[name] for name in found}, was_read

    def read_stored(
        self, windows: Windows, out: Rows | None = None, names: Iterable[str] | None = None
    ) -> tuple[Rows, np.ndarray | None]:
        """As `read`, without late fields."""
        out = self.empty_batch(windows, names) if out is None else out
        if self.reads_before_episodes or not (windows.step < 0).any():
            return out, self._read(windows, out)
        was_read = self._read(windows.moved_between(0, windows.episode_length - 1), out)
        shift(windows, out)
        return out, was_read

    def empty_batch(self, windows: Windows, names: Iterable[str] | None = None) -> Rows:
        """Uninitialized memory for windows, `name -> (B, T, *shape)`, of the fields in `names` or of all stored."""
        leading = len(windows), windows.length
        return {name: self.empty(name, leading) for name in (self._fields or () if names is None else names)}

    def empty(self, name: str, leading: tuple[int, int]) -> torch.Tensor:
        """Uninitialized memory for a field, `(*leading, *shape)`."""
        fields = self.batch_fields
        assert fields is not None  # Windows are drawn from episodes, so there are fields.
        kind = fields[name]
        if self.device.type == "cpu":
            # numpy is faster, and asks for huge pages.
            return as_tensor(np.empty(leading + kind.shape, kind.numpy_dtype), kind)
        return torch.empty(leading + kind.shape, dtype=kind.dtype, device=self.device)

    def get_episode(self, episode_index: int) -> dict[str, Any]:
        """A copy of an episode, `field -> (L, *shape)`: 0 is the oldest; negative numbers count from the newest.

        Raises:
            ValueError: There is no such episode.
            RuntimeError: Its file has been removed.
        """
        while True:
            num_evicted = self.num_evicted
            episode_id = int(self.table.ids[self._position(episode_index)])
            episode = self.episode_of_id(episode_id)
            if episode is not None:
                return episode
            # If another thread has evicted one meanwhile, the index now means another episode.
            if self.num_evicted == num_evicted:
                raise RuntimeError(f"Episode {episode_id} is gone from the store.")

    def episodes(self) -> Iterator[dict[str, Any]]:
        """Copies of all episodes, oldest first, without those that are evicted meanwhile."""
        for episode_id in self.table.ids.tolist():
            episode = self.episode_of_id(episode_id)
            if episode is not None:
                yield episode

    def episode_of_id(self, episode_id: int) -> dict[str, Any] | None:
        """A copy of an episode, `field -> (L, *shape)`; None if it is gone."""
        rows = self.rows_of_id(episode_id)
        return None if rows is None or self._fields is None else self._fields.unflatten(rows)

    def arrays_of_id(self, episode_id: int) -> dict[str, np.ndarray] | None:
        """A copy of an episode as flat arrays, `name -> (L, *shape)`; None if it is gone."""
        rows = self.rows_of_id(episode_id)
        return None if rows is None else {name: as_array(name, tensor) for name, tensor in rows.items()}

    def rows_of_id(self, episode_id: int) -> Rows | None:
        """A copy of an episode as flat tensors, `name -> (L, *shape)`; None if it is gone."""
        table = EpisodeTable()
        table.show(self.table)
        position = table.position(episode_id)
        if position is None:
            return None
        length = table.episode(position)[1]
        rows, was_read = self.read_stored(table.windows(np.array([position]), np.zeros(1, np.int64), length))
        return {name: tensor[0] for name, tensor in rows.items()} if was_read is None else None

    def _position(self, episode_index: int) -> int:
        position = integer("episode_index", episode_index, minimum=-self.num_episodes)
        if position >= self.num_episodes:
            raise ValueError(f"`episode_index`={episode_index} is out of range: {self.num_episodes} episodes live.")
        return position % self.num_episodes

    @property
    def num_episodes(self) -> int:
        """Live episodes."""
        return len(self.table)

    @property
    def num_timesteps(self) -> int:
        """Steps of all live episodes."""
        return self.table.num_steps

    @property
    def num_evicted(self) -> int:
        """Episodes evicted so far."""
        return max(0, self.table.next_id - len(self.table) - self.num_lost)
