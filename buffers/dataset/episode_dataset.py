"""EpisodeDataset: the contract of a store of whole episodes, and all that is common to stores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from buffers.dataset.composing.extension import Extension
from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.verification import VerificationMode, check_episode
from buffers.evictor import Evictor, FIFOEvictor
from buffers.fields import Fields
from buffers.utils import ThreadLock

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
        evictor: Chooses the episode that leaves when room is needed; the oldest by default.
    """

    #: A store whose `_write` may fail (a full disk) sets this to False, and then loses no episode to one that it
    #: could not take.
    evicts_before_writing = True
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
        #: The larger dataset behind this one, see `extend`.
        self.extension: Extension | None = None
        #: Whether it is the larger one behind another.
        self.is_behind = False
        # Threads that add or evict take turns. Those that draw and read are not held up, and hold up none.
        self._lock = ThreadLock()
        if info is not None and info.fields is not None:
            self.settle_fields(info.fields)

    # What a store implements, beside `_read`.

    @abstractmethod
    def _allocate(self, fields: Fields) -> None:
        """Make room for the fields. Nothing else has been called before.

        It is called once, and again only if the first episode could not be stored.
        """

    @abstractmethod
    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        """Store an episode of L rows; room for it has been made, and its arrays are checked.

        Args:
            episode: `name -> (L, *shape)`, valid during the call only: copy.
            start: Step id of its first row. Step ids ascend, and may skip from one episode to the next.
            episode_id: Its id, larger than any before.
        """

    @abstractmethod
    def _erase(self, episode_id: int, start: int, length: int) -> None:
        """Give up the room of an episode."""

    def _check(self, episode: dict[str, np.ndarray]) -> None:
        """Refuse, by a ValueError, an episode that the store could not give back as it is. Refuses none by default."""

    def check_writable(self) -> None:
        """Refuse, by a RuntimeError, changes where none can be made. Refuses none by default."""

    def _publish(self, start: int, length: int, episode_id: int) -> None:
        """Called when an episode is stored and in the table: tell readers of it."""

    def _announce(self) -> None:
        """Called before episodes leave for one that is about to come: readers elsewhere may find nothing meanwhile."""

    def start_of_next(self, length: int) -> int:
        """The step id at which an episode of `length` rows will begin."""
        return self.table.next_start

    def lacks_room(self, start: int, length: int) -> bool:
        """Whether another episode has to leave before `length` rows can be stored from step id `start` on."""
        return self.table.num_steps + length > self.capacity

    # Episodes in: this is an `EpisodeSink`.

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
            self.check_writable()
            fields = self.fields
            if fields is None:
                fields = Fields.from_episode(episode)
            arrays = fields.arrays(episode)
            check_episode(fields, arrays, self.verification_mode)
            rows = dict(zip(fields.names, arrays, strict=True))
            if self._fields is None:
                return self._add_first(fields, rows)
            return self.store(rows) if self.extension is None else self.extension.add(self, rows)

    def _add_first(self, fields: Fields, rows: dict[str, np.ndarray]) -> int:
        """Settle the fields by an episode; one that cannot be stored does not."""
        self._check_length(len(rows[fields.names[0]]))
        self.check(rows)
        self.settle_fields(fields)
        try:
            return self.add(rows)
        except Exception:
            self._fields = None
            raise

    def add(self, episode: dict[str, np.ndarray]) -> int:
        """`add_episode` for flat arrays, `name -> (L, *shape)`, that fit the fields, which are settled."""
        with self._lock:
            self.check_writable()
            return self.store(episode) if self.extension is None else self.extension.add(self, episode)

    def settle_fields(self, fields: Fields) -> None:
        """Lay out the storage, here and behind; the same fields again are no error, others are a ValueError."""
        if self.extension is not None:
            self.extension.other.settle_fields(fields)
        if self._fields is None:
            self._allocate(fields)
            self._fields = fields
            return
        conflict = fields.conflict_with(self._fields)
        if conflict is not None:
            raise ValueError(f"The fields differ from those of the dataset: {conflict}.")

    def tell_fields(self, fields: Fields) -> bool:
        """Settle the fields before there is an episode."""
        self.settle_fields(fields)
        return True

    def check(self, rows: dict[str, np.ndarray]) -> None:
        """Refuse, by a ValueError, rows that this dataset, or one behind it, could not give back as they are."""
        self._check(rows)
        if self.extension is not None:
            self.extension.other.check(rows)

    @property
    def episode_capacity(self) -> int:
        """Steps of the longest episode that can be added: the capacity, or that of the dataset behind this one."""
        behind = 0 if self.extension is None else self.extension.other.episode_capacity
        return max(self.capacity, behind)

    # One dataset of a chain alone.

    def store(self, episode: dict[str, np.ndarray]) -> int:
        """`add`, but to this dataset only, whatever is behind it."""
        self._check(episode)
        length = len(next(iter(episode.values())))
        if length > self.capacity:
            self._check_length(length)
        start = self.start_of_next(length)
        if self.evicts_before_writing:
            self.make_room(start, length)
        self._write(episode, start, self.table.next_id)
        if not self.evicts_before_writing:
            self.make_room(start, length)
        episode_id = self.table.append(length, start)
        self._publish(start, length, episode_id)
        return episode_id

    def refuse(self, episode: dict[str, np.ndarray]) -> str | None:
        """Why this dataset, whatever is behind it, could not store an episode; None if it could."""
        try:
            self._check(episode)
        except ValueError as error:
            return str(error)
        return None

    def make_room(self, start: int, length: int, keep: int | None = None) -> bool:
        """Evict until `length` rows can be stored from step id `start` on; False if episode `keep` would have to go."""
        is_announced = False
        while self.lacks_room(start, length):
            if not is_announced:
                self._announce()
                is_announced = True
            position = self._choose_evicted()
            if keep is not None and int(self.table.ids[position]) == keep:
                # First in, first out: it is the oldest by now. Another evictor may let another go.
                if type(self.evictor) is FIFOEvictor or len(self.table) == 1:
                    return False
                position = 1 if position == 0 else 0
            self.evict(position)
            self._has_evicted = True
        return True

    def evict(self, position: int) -> None:
        """`evict_episode` for a position that is known to be good."""
        start, length, episode_id = self.table.episode(position)
        self._erase(episode_id, start, length)
        self.table.remove(position)
        self._num_evicted += 1

    def _check_length(self, length: int) -> None:
        if length > self.episode_capacity:
            raise ValueError(
                f"An episode of {length} steps does not fit a `capacity` of {self.episode_capacity} steps."
            )

    def _choose_evicted(self) -> int:
        """The position of the episode that the evictor lets go."""
        return 0 if type(self.evictor) is FIFOEvictor else self._position(self.evictor.evict(self))

    def evict_episode(self, episode_index: int) -> None:
        """Forget an episode: 0 is the oldest; negative numbers count from the newest. ValueError if it is not there."""
        with self._lock:
            self.check_writable()
            self.evict(self._position(episode_index))

    # Another dataset behind this one.

    def _find_fields(self) -> None:
        """Settle the fields, if the dataset behind this one knows them."""
        if self.extension is not None:
            self.extension.agree(self, None)

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

        From now on every added episode goes to both, or, if one refuses it, to neither. Once episodes have to leave
        here, an addition also brings whole episodes of `other`, each of them here once at most, and never so many that
        the newest would have to leave. What this dataset holds already is copied to `other` if that is empty.

        An episode that is longer than the capacity here is kept by `other` only, with one warning; `add_episode` then
        returns -1. Episodes that come back have new ids and step ids here.

        Extend before a buffer takes its first step, and, for three levels, the largest first.

        Args:
            other: Must not have an `other` of its own that leads back here.
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
        if not isinstance(other, EpisodeDataset):
            raise TypeError(f"`other` must be an EpisodeDataset, found {type(other).__name__}.")
        self.check_writable()
        other.check_writable()
        extension = Extension(self, other, other_batch_size, other_num_workers, fetch_from_other_every, seed)
        with other._lock, self._lock:
            extension.begin(self)
            # One lock for both, as an addition needs both.
            self.extension, self._lock = extension, other._lock
            other.is_behind = True
            self.refuses_values |= other.refuses_values

    def refill(self) -> int:
        """Fill the room that is left with whole episodes of the dataset behind this one, its newest among them.

        For a restart: `extend` an empty dataset in memory by the one on disk, then `refill` it. Nothing is evicted.

        Returns:
            How many episodes came.

        Raises:
            RuntimeError: The dataset is not extended.
        """
        if self.extension is None:
            raise RuntimeError("There is nothing to refill from: call `extend(other)` first.")
        with self._lock:
            self.check_writable()
            return self.extension.refill(self)

    def end_workers(self) -> None:
        """End the workers that read from the dataset behind this one; an addition that wants them starts others."""
        if self.extension is not None:
            self.extension.end_workers()

    @property
    def info(self) -> EpisodeDatasetInfo:
        """What another dataset needs to be told to hold the same episodes."""
        return EpisodeDatasetInfo(self.fields, self.verification_mode)
