"""RingBufferDataset: episodes in memory, in one preallocated tensor a field."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch

from buffers.dataset.column import Column
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.fields import Fields, TensorType
from buffers.dataset.index import EpisodeIndex, Windows
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.shared import EpisodeLog, SharedArrays
from buffers.evictor.base import Evictor
from buffers.evictor.fifo import FIFOEvictor
from buffers.utils import Process, format_bytes

__all__ = ["RingBufferDataset"]

_MAX_READERS = 8
_LARGEST_HALF = float(np.finfo(np.float16).max)

# Whether they take places as arrays, not as tensors, and what reads each field from there.
Readers = tuple[bool, dict[str, Callable[[Any], torch.Tensor]]]


@final
class RingBufferDataset(EpisodeDataset):
    """Episodes in RAM or on a GPU; the oldest are overwritten by the newest.

    The row with step id s lies in slot `s % capacity`. An episode is contiguous but for the one that wraps:

        slot      0  1  2  3  4  5  6  7          capacity 8, episodes of 3, 4 and 3 rows: the first had
        step id   8  9  2  3  4  5  6  7          to leave, and the third wraps, in slots 7, 0 and 1

        >>> dataset = RingBufferDataset(capacity=8)
        >>> for length in (3, 4, 3):
        ...     episode_id = dataset.add_episode({"obs": np.zeros(length)})
        >>> dataset.episode_lengths
        [4, 3]

    Args:
        capacity: In steps. Memory is reserved when the fields are known, and used as it is written.
        info: What is known beforehand; with its `fields`, memory is reserved now.
        evictor: Only first in, first out is possible; the argument is there for the common signature.
        device: Where the episodes live and batches are made.
        half_precision: Store float32 as float16 (numbers up to 65,504) and give float32 back.

    Raises:
        ValueError: Another evictor than `FIFOEvictor`, or a device that is not there.
        MemoryError: The memory for `capacity` steps is not to be had.
    """

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
        self.device = _usable_device(device)
        self.half_precision = self.refuses_values = bool(half_precision)
        self._memory: SharedArrays | None = None
        self._log: EpisodeLog | None = None
        # The process that adds. In every other, this dataset reads what that one publishes.
        self._writer = Process.number
        super().__init__(capacity, info, evictor)

    def _allocate(self, fields: Fields) -> None:
        stored = {name: self._stored_type(tensor_type) for name, tensor_type in fields.items()}
        try:
            if self.device.type == "cpu":
                self._memory = SharedArrays(self._layout(stored))
            self._set_columns(fields, stored)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            size = format_bytes(sum(tensor_type.nbytes for tensor_type in stored.values()) * self.capacity)
            raise MemoryError(
                f"A `capacity` of {self.capacity} steps needs {size} on {self.device}, which cannot be had. Lower it."
            ) from None

    def _layout(self, stored: dict[str, TensorType]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        rows = {f"rows/{name}": ((self.capacity, *t.shape), t.numpy_dtype) for name, t in stored.items()}
        return {**rows, **EpisodeLog.layout(self.capacity)}

    def _set_columns(self, fields: Fields, stored: dict[str, TensorType]) -> None:
        if self._memory is not None:
            self._log = EpisodeLog(self._memory)
        self._readers: dict[tuple[int, int, int], Readers] = {}
        # Rows that can be written without the columns' help.
        self._num_ready = 0
        self._arrays: dict[str, np.ndarray] = {}
        self._columns: dict[str, Column] = {}
        for name, tensor_type in fields.items():
            array, pages = None, None
            if self._memory is not None:
                array, pages = self._memory[f"rows/{name}"], self._memory.huge_pages(f"rows/{name}")
                self._arrays[name] = array
            self._columns[name] = Column(self.capacity, stored[name], self.device, array, tensor_type.dtype, pages)

    def _stored_type(self, field: TensorType) -> TensorType:
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
        # Of the kernel, once an episode: who writes where another does destroys what both have.
        if os.getpid() != self._writer:
            raise RuntimeError("Only the process that made a RingBufferDataset can change it; this one reads along.")

    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        slot, end = start % self.capacity, 0
        for name, rows in episode.items():
            end = slot + len(rows)
            if end <= self._num_ready:
                self._arrays[name][slot:end] = rows
            else:
                self._columns[name].write(slot, len(rows), rows)
        if end > self._num_ready:
            self._num_ready = min(column.num_ready for column in self._columns.values())

    def _publish(self, start: int, length: int, episode_id: int) -> None:
        if self._log is None:
            return
        if self._log.newest_id < episode_id - 1:
            self._publish_untold(episode_id)
        self._log.add(start, length, episode_id, self.index)

    def _publish_untold(self, episode_id: int) -> None:
        """Tell of the episodes before one that readers have not been told of: Ctrl-C came in between."""
        assert self._log is not None  # Who calls has one.
        for untold in range(self._log.newest_id + 1, episode_id):
            position = self.index.position(untold)
            if position is not None:
                self._log.add(*self.index.episode(position), self.index)

    def _announce(self) -> None:
        if self._log is not None:
            self._log.announce()

    def _erase(self, episode_id: int, start: int, length: int) -> None:
        # The step ids of what lives follow one another, so the oldest begins so many before the next.
        if start != self.index.next_start - self.index.num_steps:
            raise ValueError("A RingBufferDataset can only evict its oldest episode, `episode_index`=0.")
        if self._log is not None:
            self._log.retire(start + length)

    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> np.ndarray | None:
        length, last_slot = windows.length, self.capacity - windows.length
        slots = windows.start % self.capacity
        wraps = slots > last_slot
        if wraps.any():
            self._read_with_wraps(slots, wraps.nonzero()[0], length, out)
        else:
            places = self._on_device(slots)
            for name, tensor in out.items():
                self._columns[name].read_windows(places, length, tensor)
        return self._which_are_whole(windows)

    def _prepare(self, windows: Windows) -> None:
        windows.places = self._places(windows)

    def _places(self, windows: Windows) -> np.ndarray | torch.Tensor | None:
        """Where windows begin, `(B,)`: an array; for a GPU a tensor, None if some wrap, which it could not tell."""
        slots = windows.start % self.capacity
        if self._log is not None:
            return slots
        return self._on_device(slots) if slots.max() <= self.capacity - windows.length else None

    def _read_new(self, windows: Windows) -> tuple[dict[str, torch.Tensor], np.ndarray | None]:
        # They are not kept: the windows may be a sampler's own, who draws them from another ring next.
        places, size = windows.places, (windows.start.size, windows.length, torch.get_num_threads())
        if places is None:
            places = self._places(windows)
        if places is None:
            return super()._read_new(windows)
        takes_arrays, readers = self._readers.get(size) or self._find_readers(size)
        if not takes_arrays and self._log is not None:
            places = torch.from_numpy(places)
        try:
            out = {name: read(places) for name, read in readers.items()}
        except (IndexError, RuntimeError):  # Some wrap: they begin behind the last place where one can that does not.
            return super()._read_new(windows)
        return out, self._which_are_whole(windows)

    def _find_readers(self, size: tuple[int, int, int]) -> Readers:
        """What reads each field: found once, as between two gathers the caches have lost whatever there is to ask.

        Args:
            size: Number of windows, their length, and torch's threads.
        """
        num, length, num_threads = size
        columns = self._columns
        # To change between numpy and torch within a batch takes longer than either alone.
        shares_work = num_threads > 1 and any(column.shares_work(num, length) for column in columns.values())
        if self._log is None or shares_work:
            found: Readers = False, {name: column.reader(num, length) for name, column in columns.items()}
        else:
            found = True, {name: column.item_reader(num, length) for name, column in columns.items()}
        if len(self._readers) == _MAX_READERS:
            self._readers.clear()
        self._readers[size] = found
        return found

    def _which_are_whole(self, windows: Windows) -> np.ndarray | None:
        """To be asked after reading: None if all are, else bool `(B,)`, False where it has been written over."""
        if self._log is None or Process.number == self._writer:
            return None
        is_whole = windows.start >= self._log.tail
        return None if is_whole.all() else is_whole

    def _read_with_wraps(
        self, slots: np.ndarray, wrapped: np.ndarray, length: int, out: dict[str, torch.Tensor]
    ) -> None:
        """Read all as if none wrapped, those that do from slot 0, which is then replaced by what they should be."""
        rows = self._on_device((slots[wrapped, None] + np.arange(length)) % self.capacity)
        slots[wrapped] = 0
        places, positions = self._on_device(slots), self._on_device(wrapped)
        for name, tensor in out.items():
            self._columns[name].read_windows(places, length, tensor)
            self._columns[name].read_rows(rows, positions, tensor)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    # Readers in other processes: everything is published as it is added, whether anyone reads or not.

    def check_workers(self) -> None:
        """Refuse worker processes where they cannot read."""
        if self.device.type != "cpu":
            raise ValueError(f"A ring on {self.device} makes its batches there: workers cannot. Use `num_workers`=0.")

    def _refresh(self) -> None:
        if Process.number != self._writer and self._log is not None:
            self._log.follow(self.index)

    def _num_changes(self) -> int:
        return 0 if self._log is None or Process.number == self._writer else self._log.num_changes

    def __getstate__(self) -> dict[str, Any]:
        """A handle for a reader in another process, a few kilobytes at any size; on a GPU, the data itself."""
        state = self.__dict__.copy()
        state.pop("_readers", None)
        if self._memory is not None:
            for name in ("index", "_columns", "_arrays", "_log"):
                state.pop(name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._memory is None:
            self._writer, self._readers = Process.number, {}
        else:
            assert self._fields is not None  # There is memory for them.
            self._set_columns(self._fields, {name: self._stored_type(t) for name, t in self._fields.items()})
            # Not the writer, even if it is the same process: one that is unpickled reads along.
            self.index, self._writer = EpisodeIndex(), -1
            self._refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> RingBufferDataset:
        """A ring of its own with the same episodes."""
        other = RingBufferDataset(self.capacity, self.info, None, self.device, self.half_precision)
        other.index, other._has_evicted = copy.deepcopy(self.index, memo), self._has_evicted
        other._num_evicted, other.max_sampling_attempts = self._num_evicted, self.max_sampling_attempts
        head, rows = self.index.next_start, self.index.num_steps
        if self._fields is not None:
            slots = torch.arange(head - rows, head, device=self.device) % self.capacity
            for name, column in self._columns.items():
                other._columns[name].take(column, slots)
        if other._log is not None:
            other._log.restate(other.index)
        return other


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device`={device!r} cannot be used: {str(error).splitlines()[0]}") from None
