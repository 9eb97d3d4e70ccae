"""LabelledSource: rows that get values after they were stored, and samplers that are told of episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from buffers.dataset.episode_source import EpisodeSource
from buffers.fields import Fields, TensorType
from buffers.late import LateFields, PriorityField
from buffers.loading.include import INCLUDABLE
from buffers.sampler import Listeners, Sampler
from buffers.table import TableRow
from buffers.utils import ThreadLock, integer

__all__ = ["LabelledSource"]


class LabelledSource(EpisodeSource):
    """A source with late fields of its own."""

    #: Whether the step ids that live are always within `capacity` of each other.
    has_circular_ids = False
    late: LateFields

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        # For adding and evicting. Drawing does not take it.
        self._lock = ThreadLock()
        self.late = LateFields(self.capacity, self.has_circular_ids, self.device, self.table)
        # Samplers that are told of episodes.
        self._listeners = Listeners()
        # The id of the first episode that they have not been told of.
        self._next_told = 0

    def add_late_field(self, name: str, type: TensorType, default: Any = 0) -> None:
        """Add a field whose values are given later, by step id. Batches have it like any other from then on.

            >>> from buffers.dataset import RingBufferDataset
            >>> from buffers.fields import Vector
            >>> dataset = RingBufferDataset(capacity=1_000)
            >>> episode_id = dataset.add_episode({"obs": np.zeros((50, 4))})
            >>> dataset.add_late_field("latent", Vector(8))
            >>> batch = next(iter(dataset.get_loader(batch_size=16, sequence_length=10, include=("index",))))
            >>> dataset.update(batch["index"], {"latent": batch["latent"] + 1})
            0

        Add it before iterating a loader with workers: those that run do not learn of it. "priority" is what a
        `PrioritizedSampler` draws by.

        Args:
            name: Of the field, not of one that steps have; up to 255 characters. It stands at the top level of a batch.
            type: Of one row.
            default: A number, or a row `(*shape)`: what rows hold until they are given values.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: There is such a field already, with another type or default; or the default does not fit. If
                type and default are the same, nothing changes: its values are kept.
        """
        if not isinstance(name, str) or not isinstance(type, TensorType):
            raise TypeError(f"A late field is a name and a TensorType, found {name!r:.60} and {type!r:.60}.")
        late = Fields({name: type})
        if "/" in name or name in INCLUDABLE or len(name) > 255:
            raise ValueError(f"`{name:.60}` cannot name a late field: `include` has it, it has a '/', or is too long.")
        with self._lock:
            if self.fields is not None:
                self.fields.with_others(late)
            self.late.add(name, type, default, self.table)

    def add_priorities(self, initial: float | str) -> PriorityField:
        """The late field "priority", which is added if it is missing: then batches do not have it."""
        with self._lock:
            return self.late.add_priorities(initial, self.table)

    def update(self, index: Any, values: Mapping[str, Any], source: Any = None) -> int:
        """Give rows new values of late fields. Batches that are made later have them, in workers too.

        Args:
            index: Step ids, `(B, T)` or of any other shape, as `include=("index",)` gives them; -1 for padding.
            values: `name -> (*index.shape, *shape)`: tensors, arrays or lists.
            source: Of a mixture only, see `MixtureDataset.update`.

        Returns:
            How many ids are of no episode that is stored; they are ignored.

        Raises:
            TypeError: An `index` that is not of integers.
            ValueError: A name that is no late field, or values of another shape or dtype, or priorities that are
                negative or not finite. Nothing has changed.
            RuntimeError: In another process than the one that made the dataset.
        """
        self.catch_up()
        return self.late.update(self.table, index, values)

    def annotate(self, episode_id: int, values: Mapping[str, Any]) -> None:
        """`update` for all rows of an episode, `name -> (L, *shape)`; ValueError if it is not stored."""
        start, length, *_ = self.table.row_of(integer("episode_id", episode_id, 0))
        if not length or self.late.update(self.table, np.arange(start, start + length), values):
            raise ValueError(f"There is no episode {episode_id}. Those that live have the ids {self.table.ids}.")

    def listen(self, sampler: Sampler) -> None:
        """Tell a sampler of each episode that comes or leaves from now on, as long as anything refers to it."""
        if not self._listeners:
            self._next_told = self.table.next_id
        self._listeners.add(sampler)

    def catch_up(self) -> None:
        """As `EpisodeSource.catch_up`."""
        if not (self.late.by_name or self._listeners) or not self.late.is_owner:
            return
        with self._draw_lock:
            self._refresh()
            table = self.table
            self.late.follow(table)
            if table.next_id == self._next_told:
                return
            rows = table.rows[table.ids >= self._next_told].tolist()
            for start, length, episode_id, cut in rows:
                self._tell((start, length, episode_id, cut))
            self._next_told = table.next_id

    def _tell(self, row: TableRow) -> None:
        """Tell samplers of an episode that another process has added."""
