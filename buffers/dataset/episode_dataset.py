"""EpisodeDataset: what all stores of whole episodes share, and what each implements."""

from __future__ import annotations

import contextlib
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from buffers.compression import Codec, Compress, checked_choice
from buffers.dataset.composing.extension import Extension
from buffers.dataset.episode_info import EpisodeInfo, checked_info
from buffers.dataset.episode_source import Rows
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.saved_store import SavedStore
from buffers.dataset.verification import check_episode
from buffers.evictor import Evictor, FIFOEvictor
from buffers.fields import Fields
from buffers.table import EpisodeTable, TableRow, Windows
from buffers.utils import integer

__all__ = ["EpisodeDataset"]


class EpisodeDataset(SavedStore):
    """Episodes in, windows out.

    A store implements `_allocate`, `_write`, `_read` and `_erase`. There, data is flat: `name -> array`, by the names
    of `fields` ("obs/image" for nested dicts).

    Args:
        capacity: In steps, over all episodes.
        info: Fields and checks; if it has `fields`, room is made for them now.
        evictor: Chooses the episode that leaves when room is needed; the oldest by default.
        compress: For a store that can: which fields are compressed.
    """

    #: False if `_write` may fail (a full disk): then no episode is evicted before the new one is written.
    evicts_before_writing = True
    #: Whether `_check` may refuse values, so that writers call it for rows of open episodes, too.
    refuses_values = False
    #: Whether threads may call `_read` while another adds and evicts. If not, they take turns.
    reads_beside_writers = False
    #: How fields are compressed, by name.
    codecs: Mapping[str, Codec] = {}

    def __init__(
        self,
        capacity: int,
        info: EpisodeDatasetInfo | None = None,
        evictor: Evictor | None = None,
        compress: Compress | None = None,
    ) -> None:
        super().__init__(capacity)
        if info is not None and not isinstance(info, EpisodeDatasetInfo):
            raise TypeError(f"`info` must be an EpisodeDatasetInfo, found {type(info).__name__}.")
        if evictor is not None and not isinstance(evictor, Evictor):
            raise TypeError(f"`evictor` must be an Evictor, found {type(evictor).__name__}.")
        self.evictor = FIFOEvictor() if evictor is None else evictor
        told = None if info is None else info.compress
        if told is not None and compress is not None:
            raise ValueError("`compress` is given twice, as an argument and in `info`: leave one out.")
        given = compress if told is None else told
        #: Which fields are compressed, and how, as it was given.
        self.compress = checked_choice({} if given is None else given)
        if info is not None:
            self.verification_mode = info.verification_mode
        #: Whether another dataset is extended by this one.
        self.is_behind = False
        if info is not None and info.fields is not None:
            self.settle_fields(info.fields)
        if info is not None and info.late_fields is not None:
            for name, kind in info.late_fields.items():
                self.add_late_field(name, kind)

    @abstractmethod
    def _allocate(self, fields: Fields) -> None:
        """Make room for the fields; called before all else, and again if the first episode could not be stored."""

    @abstractmethod
    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        """Copy a checked episode `name -> (L, *shape)`, for which there is room.

        `start` is the step id of its first row. Both kinds of ids ascend; step ids may skip between episodes.
        """

    @abstractmethod
    def _erase(self, episode_id: int, start: int, length: int) -> None:
        """Free the room of an episode."""

    def _check(self, episode: dict[str, np.ndarray]) -> None:
        """ValueError for an episode whose values the store cannot keep."""

    def _keep_info(self, episode_id: int, info: EpisodeInfo | None) -> None:
        """Keep the info of the episode that is about to be written."""
        # An addition that failed may have left another.
        self._infos.pop(episode_id, None)
        if info:
            self._infos[episode_id] = info

    def _find_info(self, row: TableRow) -> EpisodeInfo:
        """The info of an episode, {} if it has none."""
        return self._infos.get(row[2], {})

    def check_writable(self) -> None:
        """RuntimeError if nothing can be added or evicted here."""

    def _publish(self, row: TableRow) -> None:
        """Show an episode, which is stored and the last row of the table, to other processes."""

    def _announce(self) -> None:
        """Tell other processes that episodes leave because another is about to come."""

    def start_of_next(self, length: int) -> int:
        """The step id at which an episode of `length` rows will begin."""
        return self.table.next_start

    def lacks_room(self, start: int, length: int) -> bool:
        """Whether an episode must be evicted before `length` rows can be stored from step id `start` on."""
        return self.table.num_steps + length > self.capacity

    def read_stored(
        self, windows: Windows, out: Rows | None = None, names: Iterable[str] | None = None
    ) -> tuple[Rows, np.ndarray | None]:
        """As `EpisodeSource.read_stored`."""
        if self.reads_beside_writers:
            return super().read_stored(windows, out, names)
        with self._lock:
            # If another thread has evicted some since the draw, read nothing: the batch is read again with others.
            lives = np.isin(windows.episode, self.table.ids)
            if lives.all():
                return super().read_stored(windows, out, names)
            return self.empty_batch(windows, names) if out is None else out, lives

    def add_episode(self, episode: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> int:
        """Store a complete episode, evicting others if there is no room. It can be drawn at once.

        Args:
            episode: `field -> (L, *shape)` arrays, tensors, or lists of L rows, which may be nested; copied.
            info: What else is known of it, for `episode_info`: a flat dict of int, float, bool and str, or numpy's
                scalars, of up to 4,096 bytes as JSON.

        Returns:
            The episode's id.

        Raises:
            TypeError: A value that is no tensor, array or list of numbers; in `info`, no number, bool or string.
            ValueError: No rows, fields of unequal length, more rows than the capacity, or other fields than the
                dataset's; an `info` that is too large, or that a file format of your own does not keep. The dataset is
                unchanged.
        """
        kept = None if info is None else checked_info(info)
        with self._lock:
            self.check_writable()
            self.check_info(kept or {})
            fields = self.fields
            if fields is None:
                fields = Fields.from_episode(episode)
            arrays = fields.arrays(episode)
            check_episode(fields, arrays, self.verification_mode)
            rows = dict(zip(fields.names, arrays, strict=True))
            if self._fields is not None:
                return self.add(rows, info=kept)
            # The first episode settles the fields, unless it cannot be stored.
            self._check_length(len(arrays[0]))
            self.check(rows)
            self.settle_fields(fields)
            try:
                return self.add(rows, info=kept)
            except Exception:
                self._fields = None
                raise

    def add(self, episode: dict[str, np.ndarray], cut: int = 0, info: EpisodeInfo | None = None) -> int:
        """`add_episode` for flat arrays `name -> (L, *shape)` that fit the fields, which are known.

        `cut` says which piece of a longer stream it is, see `table/cut.py`. `info` has passed `checked_info` and
        `check_info`.
        """
        with self._lock:
            self.check_writable()
            if self.extension is not None:
                return self.extension.add(self, episode, cut, info)
            return self.store(episode, cut, info)

    def episode_info(self, episode_id: int) -> dict[str, int | float | bool | str]:
        """A copy of what `add_episode` was given as `info` with an episode; {} if that was nothing.

            >>> from buffers.dataset import RingBufferDataset
            >>> dataset = RingBufferDataset(capacity=1_000)
            >>> episode_id = dataset.add_episode({"obs": np.zeros(5)}, info={"task": "open drawer", "success": True})
            >>> dataset.episode_info(episode_id)
            {'task': 'open drawer', 'success': True}

        Args:
            episode_id: As `add_episode` returns it, and batches have it with `include=("episode",)`.

        Raises:
            ValueError: There is no such episode.
            RuntimeError: Its file has been removed; or this is not the process that made a dataset in memory.
        """
        table, number = EpisodeTable(), integer("episode_id", episode_id, -sys.maxsize)
        table.show(self.table)
        position = table.position(number)
        info = None if position is None else self._find_info(table.episode(position))
        # An episode that leaves meanwhile leaves the table first.
        table.show(self.table)
        if info is None or table.position(number) is None:
            ids = table.ids
            live = f": {len(ids)} episodes live, with ids from {ids[0]} to {ids[-1]}" if len(ids) else ": none live"
            raise ValueError(f"`episode_id`={number} is not there{live}.")
        return dict(info)

    def check_info(self, info: EpisodeInfo) -> None:
        """ValueError for an info that this dataset, or one behind it, cannot keep."""
        if self.extension is not None:
            self.extension.other.check_info(info)

    def settle_fields(self, fields: Fields) -> None:
        """Set the fields, here and in the dataset behind, and make room for them; ValueError if others are set."""
        if self.extension is not None:
            self.extension.other.settle_fields(fields)
        if self._fields is None:
            if self.late.in_batches is not None:
                fields.with_others(self.late.in_batches)
            self._allocate(fields)
            self._fields = fields
            return
        conflict = fields.conflict_with(self._fields)
        if conflict is not None:
            raise ValueError(f"The fields differ from those of the dataset: {conflict}.")

    def tell_fields(self, fields: Fields) -> None:
        """As `settle_fields`."""
        self.settle_fields(fields)

    def check(self, rows: dict[str, np.ndarray]) -> None:
        """ValueError for rows whose values this dataset, or one behind it, cannot keep."""
        self._check(rows)
        if self.extension is not None:
            self.extension.other.check(rows)

    @property
    def episode_capacity(self) -> int:
        """The most steps of an episode that can be added, here or to the dataset behind this one."""
        return self.capacity if self.extension is None else max(self.capacity, self.extension.other.episode_capacity)

    @contextlib.contextmanager
    def prepared(self, episode: dict[str, np.ndarray]) -> Iterator[bool]:
        """Until it ends, `lacks_room` is about this episode; yields False if there can never be room for it."""
        yield len(next(iter(episode.values()))) <= self.capacity

    def store(self, episode: dict[str, np.ndarray], cut: int = 0, info: EpisodeInfo | None = None) -> int:
        """As `add`, but not to the dataset behind."""
        self._check(episode)
        #: The cut of the episode that is being stored.
        self.cut = cut
        length = len(next(iter(episode.values())))
        self._check_length(length)
        start = self.start_of_next(length)
        if self.late.by_name and not self.has_circular_ids:
            self.late.check_span(start + length - self.table.oldest_start)
        for sampler in self._listeners or ():
            sampler.episode_added((start, length, self.table.next_id, cut), dict(info or {}))
        if self.evicts_before_writing:
            self.make_room(start, length)
        self._keep_info(self.table.next_id, info)
        self._write(episode, start, self.table.next_id)
        if not self.evicts_before_writing:
            self.make_room(start, length)
        if self.late.by_name:
            self.late.fill(start, length)
        episode_id = self.table.append(length, start, cut)
        self._next_told = episode_id + 1
        self._publish((start, length, episode_id, cut))
        return episode_id

    def make_room(self, start: int, length: int, keep: int | None = None) -> bool:
        """Evict until `length` rows can be stored from step id `start` on; False if episode `keep` is in the way."""
        is_first_in_first_out = type(self.evictor) is FIFOEvictor
        while self.lacks_room(start, length):
            position = 0 if is_first_in_first_out else self._position(self.evictor.evict(self))
            if keep is not None and int(self.table.ids[position]) == keep:
                return False
            self._announce()
            self.evict(position, makes_room=True)
        return True

    def _tell(self, row: TableRow) -> None:
        """As `LabelledSource._tell`."""
        for sampler in self._listeners:
            sampler.episode_added(row, dict(self._find_info(row) or {}))

    def evict(self, position: int, makes_room: bool = False) -> None:
        """Evict the episode at a valid position of the table; the caller holds the lock."""
        row = self.table.episode(position)
        start, length, episode_id, _ = row
        if self.unsaved is not None:
            self.unsaved.leaving(start, length)
        self._erase(episode_id, start, length)
        self.table.remove(position)
        self._infos.pop(episode_id, None)
        self.num_dismissed += not makes_room
        if self.late.by_name:
            self.late.release(row, position, self.table)
        for sampler in self._listeners or ():
            sampler.episode_removed(row)

    def _check_length(self, length: int) -> None:
        if length > self.episode_capacity:
            raise ValueError(
                f"An episode of {length} steps does not fit a `capacity` of {self.episode_capacity} steps."
            )

    def evict_episode(self, episode_index: int) -> None:
        """Remove the episode with this index, as in `get_episode`; ValueError if there is none."""
        with self._lock:
            self.check_writable()
            self.evict(self._position(episode_index))

    def _find_fields(self) -> None:
        fields = None if self.extension is None else self.extension.other.fields
        if fields is not None:
            self.settle_fields(fields)

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

        An episode is added to both, or, if one refuses it, to neither. Once this dataset is full, an addition also
        brings episodes from `other` that are not here, with new ids, but never so many that the newest would leave. An
        empty `other` first gets a copy of what is here.

        An episode longer than the capacity here goes to `other` only, with one warning, and `add_episode` returns -1.
        Extend before a buffer takes its first step. For three levels, extend the largest first.

        Args:
            other: The larger dataset.
            other_batch_size: Episodes that are drawn from `other` at a time.
            other_num_workers: Processes that read them ahead, so that adding does not wait for the disk.
            fetch_from_other_every: Draw at every such addition.
            seed: Of the draws from `other`; None takes one from the operating system.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An argument out of its range, fields that differ, or an `other` that leads back here.
            RuntimeError: One of the two cannot be added to, or this one is extended already.
        """
        if not isinstance(other, EpisodeDataset):
            raise TypeError(f"`other` must be an EpisodeDataset, found {type(other).__name__}.")
        self.check_writable()
        other.check_writable()
        extension = Extension(self, other, other_batch_size, other_num_workers, fetch_from_other_every, seed)
        with other._lock, self._lock:
            extension.begin(self)
            # An addition changes both.
            self.extension, self._lock = extension, other._lock
            other.is_behind = True
            self.refuses_values |= other.refuses_values

    def refill(self) -> int:
        """Fill free room with whole episodes of `other`, its newest first; returns how many.

        After a restart, `extend` an empty dataset in memory by the one on disk, then `refill` it. Nothing is evicted.
        RuntimeError if the dataset is not extended.
        """
        if self.extension is None:
            raise RuntimeError("There is nothing to refill from: call `extend(other)` first.")
        with self._lock:
            self.check_writable()
            return self.extension.refill(self)

    def end_workers(self) -> None:
        """End the workers that read from `other`; later additions start new ones."""
        if self.extension is not None:
            self.extension.end_workers()

    @property
    def info(self) -> EpisodeDatasetInfo:
        """Fields and checks, for another dataset of the same kind of episodes."""
        return EpisodeDatasetInfo(self.fields, self.verification_mode, self.late_fields)
