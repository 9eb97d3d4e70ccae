"""RingBufferDataset: episodes in memory, in one preallocated tensor a field."""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, final

import numpy as np
import torch

from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.episode_source import Rows
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.ring.rows import Kind, RingRows
from buffers.dataset.saved_store import Arrays
from buffers.evictor import Evictor, FIFOEvictor
from buffers.fields import Fields, TensorType
from buffers.sharing import PublishedTable, SharedArrays
from buffers.sharing.handover import Door, Owner, enter
from buffers.table import EpisodeTable, Int64Array, TableRow, Windows
from buffers.utils import Process, format_bytes, usable_device

__all__ = ["RingBufferDataset"]

_LARGEST_HALF = float(np.finfo(np.float16).max)


@final
class RingBufferDataset(EpisodeDataset):
    """Episodes in RAM or on a GPU; the oldest are overwritten by the newest.

    The row with step id s lies at offset `s % capacity`. An episode never wraps: one that does not fit before the end
    begins at offset 0, and step ids skip to the next multiple of the capacity:

        offset    0  1  2  3  4  5  6  7          capacity 8, episodes of 3, 4 and 3 rows: the third does not
        step id   8  9 10  3  4  5  6  .          fit behind the second, and overwrites the first

    So every episode is one slice. The rows left over at the end stay empty for a lap, so a ring may evict up to (its
    longest episode - 1) steps early. It always holds the newest episodes, whole.

        >>> dataset = RingBufferDataset(capacity=8)
        >>> for length in (3, 4, 3):
        ...     episode_id = dataset.add_episode({"obs": np.zeros(length)})
        >>> dataset.episode_lengths
        [4, 3]

    Args:
        capacity: In steps. Memory for all of them is reserved when the fields are known, and used as it is written.
        info: Fields and checks; if it has `fields`, memory is reserved now.
        evictor: `FIFOEvictor` or None; other datasets take any.
        device: Where episodes are stored and batches are made.
        half_precision: Whether to store float32 as float16 (up to 65,504). Batches are float32 again.

    Raises:
        ValueError: Another evictor than `FIFOEvictor`, or a device that is not available.
        MemoryError: The memory for `capacity` steps could not be allocated. More than there is in all is a warning.
    """

    reads_beside_writers = reads_before_episodes = has_circular_ids = True

    def __init__(
        self,
        capacity: int,
        info: EpisodeDatasetInfo | None = None,
        evictor: Evictor | None = None,
        device: torch.device | str = "cpu",
        half_precision: bool = False,
    ) -> None:
        if evictor is not None and type(evictor) is not FIFOEvictor:
            raise ValueError(
                f"A RingBufferDataset overwrites its oldest rows, so it can only use FIFOEvictor, found "
                f"{type(evictor).__name__}. IndividualFileDataset takes any evictor."
            )
        self.device = usable_device("device", device)
        self.half_precision = self.refuses_values = bool(half_precision)
        # Its memory holds the rows, too. None on a GPU.
        self._published: PublishedTable | None = None
        # Rows before this step id may be overwritten.
        self._oldest_step = 0
        # Of episodes with smaller ids, a copy of a reader does not know the info.
        self._first_info_id = 0
        # The process that adds episodes; in others, this dataset reads what that one publishes.
        self._writer = Process.number
        # Where other processes attach; and in those, who shares it.
        self._door: Door | None = None
        self._owner: Owner | None = None
        super().__init__(capacity, info, evictor)

    def _allocate(self, fields: Fields) -> None:
        kinds = self._kinds(fields)
        num_bytes = sum(kind.stored.nbytes for kind in kinds.values()) * self.capacity
        needs = f"A `capacity` of {self.capacity} steps needs {format_bytes(num_bytes)} on {self.device}"
        try:
            if self.device.type == "cpu":
                rows = RingRows.layout(kinds, self.capacity)
                # Episodes leave in order, so a published table of this size never has to move a live one.
                self._published = PublishedTable(SharedArrays({**rows, **PublishedTable.layout(self.capacity + 2)}))
            self._set_rows(fields)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise MemoryError(f"{needs}, which could not be allocated. Lower it.") from None
        total = _total_memory(self.device)
        if num_bytes > total:
            warnings.warn(f"{needs} once it is full, which has {format_bytes(total)} in all. Lower it.", stacklevel=2)

    def _kinds(self, fields: Fields) -> dict[str, Kind]:
        return {name: Kind(self.stored_type(field), field.dtype) for name, field in fields.items()}

    def _set_rows(self, fields: Fields) -> None:
        memory = None if self._published is None else self._published.memory
        self._rows = RingRows(self._kinds(fields), self.capacity, self.device, memory)

    def stored_type(self, field: TensorType) -> TensorType:
        """The type of a field in memory: float16 for float32 with `half_precision`, else the same."""
        if self.half_precision and field.dtype == torch.float32:
            return TensorType(field.shape, torch.float16)
        return field

    def _check(self, episode: dict[str, np.ndarray]) -> None:
        if not self.half_precision:
            return
        for name, rows in episode.items():
            if rows.dtype == np.float32 and (np.isfinite(rows) & (np.abs(rows) > _LARGEST_HALF)).any():
                raise ValueError(
                    f"Field `{name}` holds numbers beyond {_LARGEST_HALF:.0f}, which half_precision=True cannot store."
                )

    def check_writable(self) -> None:
        """RuntimeError in any process but the one that made the ring."""
        # Ask the kernel: `Process.number` is stale after a fork outside of Python, and a second writer destroys data.
        if os.getpid() != self._writer:
            raise RuntimeError("Only the process that made a RingBufferDataset can change it; this one reads along.")

    def _find_info(self, row: TableRow) -> EpisodeInfo:
        if Process.number != self._writer or row[2] < self._first_info_id:
            raise RuntimeError(
                "The info of episodes stays in the process that made a RingBufferDataset; this one reads along. Look "
                "it up there, or use an IndividualFileDataset."
            )
        return super()._find_info(row)

    def start_of_next(self, length: int) -> int:
        """The step id at which an episode of `length` rows will begin: the next, or the next multiple of capacity."""
        start = self.table.next_start
        num_left = -start % self.capacity
        return start if length <= (num_left or self.capacity) else start + num_left

    def lacks_room(self, start: int, length: int) -> bool:
        """Whether the oldest episode lies where `length` rows from step id `start` on will be written."""
        return self.table.oldest_start < start + length - self.capacity and len(self.table) > 0

    # Saves.

    @property
    def is_mapped(self) -> bool:  # type: ignore[override]
        """Whether the rows are in memory of the CPU."""
        return self.device.type == "cpu"

    def memory_of(self, start: int, num_rows: int) -> Arrays | None:
        """As `SavedStore.memory_of`."""
        return self._rows.memory(start % self.capacity, num_rows) or None

    def place_for(self, start: int, num_rows: int) -> Arrays | None:
        """As `SavedStore.place_for`, with the same step ids."""
        fits = start % self.capacity + num_rows <= self.capacity and start >= self.table.next_start
        return self.memory_of(start, num_rows) if fits and not self.lacks_room(start, num_rows) else None

    def adopt(self, episodes: Int64Array, infos: Mapping[int, EpisodeInfo]) -> None:
        """As `SavedStore.adopt`."""
        start, end = int(episodes[0, 0]), int(episodes[-1, :2].sum())
        for sampler in self._listeners or ():
            for row in map(tuple, episodes.tolist()):
                sampler.episode_added(row, dict(infos.get(row[2], {})))
        if self.late.by_name:
            self.late.fill(start, end - start)
        self._infos.update(infos)
        self.table.extend(episodes)
        if self._published is not None:
            self._published.add_rows(episodes, self.table)

    def describe_store(self) -> dict[str, Any]:
        """As `SavedStore.describe_store`."""
        own = {"device": str(self.device), "half_precision": self.half_precision}
        return {**super().describe_store(), **own}

    @classmethod
    def made_as(cls, told: Mapping[str, Any], info: EpisodeDatasetInfo) -> RingBufferDataset:
        """As `SavedStore.made_as`."""
        return cls(told["capacity"], info, None, told["device"], told["half_precision"])

    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        self._rows.write(start % self.capacity, episode)

    def _publish(self, row: TableRow) -> None:
        if self._published is not None:
            self._published.add(row, self.table)

    def _announce(self) -> None:
        if self._published is not None:
            self._published.announce()

    def _erase(self, episode_id: int, start: int, length: int) -> None:
        if start != self.table.oldest_start:
            raise ValueError("A RingBufferDataset can only evict its oldest episode, `episode_index`=0.")
        self._oldest_step = start + length
        if self._published is not None:
            self._published.retire(self._oldest_step)

    def _read(self, windows: Windows, out: Rows) -> np.ndarray | None:
        self._rows.gather(windows.start % self.capacity, windows.length, out)
        return self.which_are_whole(windows)

    def read_stored(
        self, windows: Windows, out: Rows | None = None, names: Iterable[str] | None = None
    ) -> tuple[Rows, np.ndarray | None]:
        """As `EpisodeSource.read_stored`."""
        if out is None:
            gathers = self._rows.item_gathers(len(windows.start), windows.length)
            if gathers:
                offsets = windows.start % self.capacity
                try:
                    rows = {name: gathers[name](offsets) for name in (gathers if names is None else names)}
                    return rows, self.which_are_whole(windows)
                except IndexError:
                    pass  # Padding reaches beyond an end of the ring.
        return super().read_stored(windows, out, names)

    def which_are_whole(self, windows: Windows) -> np.ndarray | None:
        """After reading: None if all are whole, else bool `(B,)`, False where rows may have been overwritten."""
        if self._published is None or Process.number == self._writer:
            oldest_step = self._oldest_step
        else:
            oldest_step = self._published.oldest_step
        if oldest_step <= windows.oldest_step:
            return None  # No episode has left since the draw.
        is_whole = windows.first_steps >= oldest_step
        return None if is_whole.all() else is_whole

    # Other processes of this host.

    def share(self, name: str) -> None:
        """Let other processes of this user and host `attach` to the ring, for as long as it exists.

        Args:
            name: 1 to 64 letters, digits, '.', '_' or '-'. It is a socket in a folder that only this user can enter:
                `$XDG_RUNTIME_DIR/buffers`, or `buffers-UID` in the folder for temporary files.

        Raises:
            ValueError: Another name, or a ring on a GPU.
            RuntimeError: Another ring is shared under the name, or this one under another; this is not the process that
                made the ring, or not Linux.
        """
        self.check_writable()
        self.check_workers()
        if self._door is not None and self._door.name != name:
            raise RuntimeError(f"The ring is shared already, as `{self._door.name}`.")
        ring = weakref.ref(self)
        self._door = self._door or Door(name, lambda: None if (alive := ring()) is None else alive._handed_over())

    @classmethod
    def attach(cls, name: str, timeout: float = 10.0) -> RingBufferDataset:
        """The live ring that another process shares under a name: torchrun's ranks, an evaluation.

        It draws what that process adds, without a copy; `num_workers` are its own. It cannot add, evict, update late
        fields, or draw by priorities. Once the other process has ended, or has given the ring up, drawing is a
        RuntimeError. Late fields that are added after this call are not seen.

        Args:
            name: As given to `share`.
            timeout: Seconds to wait for a ring of that name, and its first episode or fields.

        Raises:
            ValueError: A name that `share` would not take.
            RuntimeError: There is no such ring in time; or this is not Linux.
        """
        state, owner = enter(name, timeout)
        ring = cls.__new__(cls)
        ring.__setstate__({**state, "_owner": owner})
        return ring

    def _handed_over(self) -> dict[str, Any] | None:
        """What another process needs to attach; None while there are no fields."""
        with self._lock:
            if self._published is None or self._fields is None:
                return None
            return {**self.__getstate__(), "extension": None, "unsaved": None}

    def check_workers(self) -> None:
        """ValueError if the ring is on a GPU."""
        if self.device.type != "cpu":
            raise ValueError(f"A ring on {self.device} makes its batches there: workers cannot. Use `num_workers`=0.")

    def _refresh(self) -> None:
        if self._owner is not None:
            self._owner.check()
        if Process.number != self._writer and self._published is not None:
            self._published.follow(self.table)

    def has_news(self) -> bool:
        """As `EpisodeSource.has_news`."""
        return self._published is not None and Process.number != self._writer and self._published.has_news

    def __getstate__(self) -> dict[str, Any]:
        """A handle of a few kilobytes for a process that is being started; on a GPU, the data itself."""
        state = self.__dict__.copy()
        state["_door"] = None
        rows = state.pop("_rows", None)
        if self._published is None:
            columns = {} if rows is None else rows.columns
            state["tensors"] = {name: column.tensor for name, column in columns.items()}
        else:
            state["table"], state["_drawn_tables"], state["_infos"] = EpisodeTable(), {}, {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = state.pop("tensors", {})
        self.__dict__.update(state)
        # An unpickled ring is a reader, even in the writer's process; on a GPU it has its own data.
        self._writer = Process.number if self._published is None else -1
        if self._fields is not None:
            self._set_rows(self._fields)
        for name, tensor in tensors.items():
            self._rows.columns[name].tensor.copy_(tensor)
        self._refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> RingBufferDataset:
        """A ring of its own with the same episodes."""
        info = EpisodeDatasetInfo(self.fields, self.verification_mode)
        other = RingBufferDataset(self.capacity, info, None, self.device, self.half_precision)
        other.max_sampling_attempts = self.max_sampling_attempts
        with self._lock:
            for start, _, episode_id, cut in self.table.rows.tolist():
                episode = self.arrays_of_id(episode_id)
                if episode is not None:  # A reader finds one gone if the writer has overwritten it.
                    other.table.skip_to(episode_id, start)
                    other.add(episode, cut, self._infos.get(episode_id))
            other.num_lost, other.num_dismissed = self.num_lost, self.num_dismissed
            other.table.skip_to(self.table.next_id, self.table.next_start)
            other.late.copy_from(self.late, other.table)
            is_writer = Process.number == self._writer
            other._first_info_id = self._first_info_id if is_writer else self.table.next_id
        return other


def _total_memory(device: torch.device) -> float:
    """Bytes, used or not; infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    is_known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if is_known else math.inf
