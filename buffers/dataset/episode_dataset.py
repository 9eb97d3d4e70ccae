"""EpisodeDataset: the contract of a store of whole episodes, and all that is common to stores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.fields import Fields
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.verification import VerificationMode, check_episode
from buffers.evictor.base import Evictor
from buffers.evictor.fifo import FIFOEvictor
from buffers.utils import LocksOf

if TYPE_CHECKING:
    from buffers.dataset.extension import Extension

__all__ = ["EpisodeDataset"]


class EpisodeDataset(EpisodeSource):
    """Episodes in, windows out.

    A store of its own implements four methods and inherits the rest. Data is flat there: `name -> array`, the
    names being those of `fields` ("obs/image" for nested dicts).

        _allocate(fields)                 make room; called once, when the fields are known
        _write(episode, start, id)        store `name -> (L, *shape)` numpy arrays
        _read(windows, out)               fill `name -> (B, T, *shape)` tensors
        _erase(id, start, length)         forget an episode

    Args:
        capacity: In steps, over all episodes.
        info: What is known beforehand; with its `fields`, storage is laid out now.
        evictor: Chooses who leaves when room is needed; the oldest by default.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: `capacity` is not positive.
    """

    #: A store whose `_write` may fail (a full disk) sets this to False, and then loses no episode to one that it
    #: could not take.
    _evicts_before_writing = True
    #: Whether `_check` may refuse values for what they are, so that rows are shown to it before their episode ends.
    refuses_values = False

    def __init__(self, capacity: int, info: EpisodeDatasetInfo | None = None, evictor: Evictor | None = None) -> None:
        super().__init__(capacity)
        if info is not None and not isinstance(info, EpisodeDatasetInfo):
            raise TypeError(f"`info` must be an EpisodeDatasetInfo, found {type(info).__name__}.")
        if evictor is not None and not isinstance(evictor, Evictor):
            raise TypeError(f"`evictor` must be an Evictor, found {type(evictor).__name__}.")
        self.evictor = FIFOEvictor() if evictor is None else evictor
        self.verification_mode = VerificationMode.BASIC_CHECKS if info is None else info.verification_mode
        self._extension: Extension | None = None
        self._is_behind = False
        if info is not None and info.fields is not None:
            self.settle_fields(info.fields)

    # What a store implements, beside `_read`.

    @abstractmethod
    def _allocate(self, fields: Fields) -> None:
        """Make room for the fields. Nothing else has been called before, and it is called once."""

    @abstractmethod
    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        """Store an episode of L rows; room for it has been made, and its arrays are checked.

        Args:
            episode: `name -> (L, *shape)`, valid during the call only: copy.
            start: Step id of its first row. Step ids of successive episodes are contiguous.
            episode_id: Its id, larger than any before.
        """

    @abstractmethod
    def _erase(self, episode_id: int, start: int, length: int) -> None:
        """Give up the room of an episode."""

    def _check(self, episode: dict[str, np.ndarray]) -> None:
        """Refuse, by a ValueError, an episode that the store could not give back as it is. Refuses none by default."""

    def check_writable(self) -> None:
        """Refuse, by a RuntimeError, changes where none can be made. Refuses none by default."""

    # Episodes in.

    def add_episode(self, episode: Mapping[str, Any]) -> int:
        """Store a complete episode, evicting others if it needs their room. It can be drawn at once.

        Args:
            episode: `field -> (L, *shape)` arrays or tensors, or lists of L rows; nested as the steps are. Copied.

        Returns:
            The episode's id.

        Raises:
            TypeError: A value that is no tensor, array or list of numbers.
            ValueError: No rows, rows of unequal number, more than the capacity, or other fields than the dataset's.
                The dataset is as it was.
        """
        with self._lock:
            fields = self.fields
            if fields is None:
                fields = Fields.from_episode(episode)
            return self._take(fields, self._checked(fields, episode))

    def add(self, episode: dict[str, np.ndarray]) -> int:
        """`add_episode` for flat arrays that are known to fit the fields, which were settled before."""
        with self._lock:
            assert self._fields is not None
            return self._take(self._fields, episode)

    def _take(self, fields: Fields, arrays: dict[str, np.ndarray]) -> int:
        """`add_episode` for flat arrays that fit the fields, which are those of the dataset if it has any."""
        self.check_writable()
        return self._add(fields, arrays) if self._extension is None else self._extension.add(self, fields, arrays)

    def _add(self, fields: Fields, arrays: dict[str, np.ndarray]) -> int:
        """`_take`, here only."""
        self._check(arrays)
        length = len(arrays[fields.names[0]])
        if length > self.capacity:
            raise ValueError(f"An episode of {length} steps does not fit a `capacity` of {self.capacity} steps.")
        if self._fields is None:
            self.settle_fields(fields)
        if self._evicts_before_writing:
            self._make_room(length)
        start = self.index.next_start
        self._write(arrays, start, self.index.next_id)
        if not self._evicts_before_writing:
            self._make_room(length)
        episode_id = self.index.append(length)
        self._publish(start, length, episode_id)
        return episode_id

    def _publish(self, start: int, length: int, episode_id: int) -> None:
        """Called when an episode is stored, with its step id, rows and id."""

    def _make_room(self, length: int) -> None:
        if self.index.num_steps + length <= self.capacity:
            return
        self._announce()
        while self.index.num_steps + length > self.capacity:
            self._evict(self._choose_who_leaves())
        self._has_evicted = True

    def _announce(self) -> None:
        """Called before episodes leave for one that is about to come: readers elsewhere may find nothing meanwhile."""

    def _choose_who_leaves(self) -> int:
        """The position of the episode that the evictor lets go."""
        return 0 if type(self.evictor) is FIFOEvictor else self._position(self.evictor.evict(self))

    def _checked(self, fields: Fields, episode: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The episode as flat arrays, known to fit the fields."""
        arrays = fields.arrays(episode)
        check_episode(fields, arrays, self.verification_mode)
        return dict(zip(fields.names, arrays, strict=True))

    def check(self, rows: dict[str, np.ndarray]) -> None:
        """`_check`, also by the dataset behind this one."""
        self._check(rows)
        if self._extension is not None:
            self._extension.other.check(rows)

    def settle_fields(self, fields: Fields) -> None:
        """Lay out storage. The same fields again are no error.

        Raises:
            ValueError: They are not those that are settled already.
        """
        if self._fields is None:
            self._allocate(fields)
            self._fields = fields
            return
        conflict = fields.conflict_with(self._fields)
        if conflict is not None:
            raise ValueError(f"The fields differ: {conflict}.")

    # Episodes that leave.

    def evict_episode(self, episode_index: int) -> None:
        """Forget an episode.

        Args:
            episode_index: 0 is the oldest; negative numbers count from the newest.

        Raises:
            ValueError: There is no such episode.
        """
        with self._lock:
            self.check_writable()
            self._evict(self._position(episode_index))

    def _evict(self, position: int) -> None:
        index = self.index
        start, length, episode_id = index.episode(position)
        self._erase(episode_id, start, length)
        index.remove(position)
        self._num_evicted += 1

    # Another dataset behind this one.

    def _find_fields(self) -> None:
        """Settle the fields, if the dataset behind this one knows them."""
        if self._extension is not None:
            self._extension.agree(self)

    def extend(
        self,
        other: EpisodeDataset,
        other_batch_size: int = 64,
        other_num_workers: int | None = None,
        fetch_from_other_every: int = 1,
        *,
        seed: int | None = None,
    ) -> None:
        """Put a larger dataset behind this one: it keeps all episodes, and old ones come back from it.

            add_episode --> other (large: disk)  --.   drawn uniformly, by its own loader
                   |                               |
                   '------> this (small: memory) <-'   whole episodes; the oldest here leave

        From now on every added episode goes to both, or, if it cannot, to neither. Once episodes have to leave here,
        an addition also brings whole episodes of `other`, each of them here once at the most, and never so many that
        the newest would have to leave. What this dataset holds already is copied to `other` if that is empty.

        An episode that is longer than the capacity here is kept by `other` only, with one warning; `add_episode` then
        returns -1. Episodes that come back have new ids and step ids here.

        Extend before a buffer takes its first step, and, for three levels, the largest first.

        Args:
            other: Must not be a mixture, nor have an `other` of its own that leads back here.
            other_batch_size: Episodes that one addition draws from `other`.
            other_num_workers: Processes that read them beforehand, so that adding does not wait for the disk; 0, the
                default, reads them when they are wanted.
            fetch_from_other_every: An addition in so many brings episodes.
            seed: Of what is drawn from `other`; None takes it from the operating system.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An argument out of its range, or fields that differ.
            RuntimeError: One of the two cannot be added to, or this one is extended already.
        """
        from buffers.dataset.extension import Extension

        extension = Extension(self, other, other_batch_size, other_num_workers, fetch_from_other_every, seed)
        with LocksOf(self, other):
            extension.begin(self)
            # One for both, as an addition needs both: of two, Ctrl-C can leave one taken.
            self._extension, self._lock = extension, other._lock
            other._is_behind = True
            self.refuses_values |= other.refuses_values

    def refill(self) -> int:
        """Fill the room that is left with whole episodes of the dataset behind this one, its newest among them.

        For a restart: `extend` an empty dataset in memory by the one on disk, then `refill` it. Nothing is evicted.

        Returns:
            How many episodes came.

        Raises:
            RuntimeError: The dataset is not extended.
        """
        if self._extension is None:
            raise RuntimeError("There is nothing to refill from: call `extend(other)` first.")
        with self._lock:
            self.check_writable()
            return self._extension.refill(self)

    @property
    def episode_capacity(self) -> int:
        """Steps of the longest episode that can be added: the capacity, or that of the dataset behind this one."""
        behind = 0 if self._extension is None else self._extension.other.episode_capacity
        return max(self.capacity, behind)

    def end_workers(self) -> None:
        """End the workers that read from the dataset behind this one; an addition that wants them starts others."""
        if self._extension is not None:
            self._extension.end_workers()

    @property
    def info(self) -> EpisodeDatasetInfo:
        """What another dataset needs to be told to hold the same episodes."""
        return EpisodeDatasetInfo(self.fields, self.verification_mode)
