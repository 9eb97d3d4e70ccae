"""SavedStore: what a save needs of a dataset that holds episodes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.labelled_source import LabelledSource
from buffers.dataset.saving import Unsaved
from buffers.dataset.verification import VerificationMode
from buffers.disk import Directory
from buffers.saving import Pieces, Regions, Snapshot
from buffers.table import Int64Array
from buffers.utils import ThreadLock

if TYPE_CHECKING:
    from buffers.dataset.composing.extension import Extension
    from buffers.dataset.episode_dataset import EpisodeDataset
    from buffers.evictor import Evictor

__all__ = ["Arrays", "SavedStore"]

Arrays = dict[str, np.ndarray]
_PAUSE = 0.0005


class SavedStore(LabelledSource):
    """A source that holds episodes, and can be saved.

    A dataset of one's own needs none of this: its episodes are read one by one, and stored again when they come back.
    """

    evictor: Evictor
    extension: Extension | None = None
    verification_mode = VerificationMode.BASIC_CHECKS
    #: Whether its episodes are files, which are saved by links.
    has_files = False
    #: The most bytes of compressed rows; None if only steps bound them.
    capacity_bytes: int | None = None
    #: Whether `memory_of` finds memory.
    is_mapped = False

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        # By episode id, of those that have one.
        self._infos: dict[int, EpisodeInfo] = {}
        #: What a save has still to write; None if none is under way.
        self.unsaved: Unsaved | None = None

    @property
    def is_reader(self) -> bool:
        """Whether it only reads what another process writes: then its episodes are not saved."""
        return False

    @property
    def lock(self) -> ThreadLock:
        """Held by who adds or evicts."""
        return self._lock

    @property
    def stores(self) -> list[EpisodeDataset]:
        """As `EpisodeSource.stores`: this one, and those behind it."""
        behind = [] if self.extension is None else self.extension.other.stores
        return [self, *behind]  # type: ignore[list-item]

    def describe(self, stores: Sequence[object]) -> dict[str, Any]:
        """As `EpisodeSource.describe`."""
        extension = None if self.extension is None else self.extension.describe(stores)
        number = next(number for number, store in enumerate(stores) if store is self)
        return {"store": number, "extension": extension}

    def describe_store(self) -> dict[str, Any]:
        """What `made_as` needs, as JSON can hold it."""
        return {
            "kind": type(self).__name__,
            "capacity": self.capacity,
            "verification": self.verification_mode.value,
        }

    @classmethod
    def made_as(cls, told: Mapping[str, Any], info: EpisodeDatasetInfo) -> EpisodeDataset:
        """An empty store as `describe_store` has told."""
        return cls(told["capacity"], info)  # type: ignore[call-arg, return-value]

    def memory_of(self, start: int, num_rows: int) -> Arrays | None:
        """The memory of rows from step id `start` on, `name -> (num_rows, *shape)`; None if they have to be read."""
        return None

    def region_bytes(self, starts: Int64Array) -> Int64Array | None:
        """The bytes that the compressed fields of episodes with these first step ids take, `(n,)`; None without any."""
        return None

    def regions_of(self, starts: Int64Array, num_bytes: Int64Array) -> np.ndarray:
        """These bytes, uint8, of one episode behind the other; called under what keeps them from changing."""
        raise NotImplementedError

    def place_for(self, start: int, num_rows: int, regions: Regions | None = None) -> Arrays | None:
        """The memory to which episodes that begin there can be read, for `adopt`; None if there is none.

        `regions` are their compressed fields, which have no place there.
        """
        return None

    def adopt(self, episodes: Int64Array, infos: Mapping[int, EpisodeInfo], regions: Regions | None = None) -> None:
        """Take episodes `(n, 4)`, newer than all others, whose rows have been read to `place_for` them."""
        raise NotImplementedError

    def known_infos(self, ids: Int64Array) -> dict[int, EpisodeInfo]:
        """The infos of those of the episodes `(n,)` that have one, and not in their file."""
        return {n: self._infos[n] for n in ids.tolist() if n in self._infos} if self._infos else {}

    def begin_links(self, snapshot: Snapshot, store: int, rows: Int64Array) -> Pieces:
        """Link the files of episodes `(n, 4)` into a folder of a save; only where it `has_files`."""
        raise NotImplementedError

    def takes_links(self, suffix: str) -> bool:
        """Whether its episodes are files with this suffix."""
        return False

    def take_links(self, folders: Mapping[int, Directory], rows: Int64Array, number: int) -> None:
        """Hold the episodes `(n, 4)`, whose files are in folders by their ids; only where it `has_files`."""
        raise NotImplementedError

    def wait_for_save(self) -> None:
        """Wait until no save needs what is here."""
        while self.unsaved is not None and self.unsaved.rows.is_ours:
            time.sleep(_PAUSE)

    def begin_save(self, unsaved: Unsaved) -> None:
        """Tell what a save has still to write before it changes, until `end_save`."""
        self.late.keep_before_writes(unsaved.late.keep)
        self.unsaved = unsaved

    def end_save(self) -> None:
        """Forget what `begin_save` was given."""
        self.unsaved = None
        self.late.keep_before_writes(None)

    def restored(self, next_id: int, next_start: int, counts: Sequence[int]) -> None:
        """All that was saved is here: give later episodes the numbers that they would have had."""
        self.table.skip_to(next_id, next_start)
        self.num_lost, self.num_dismissed = counts
        self._next_told = self.table.next_id
