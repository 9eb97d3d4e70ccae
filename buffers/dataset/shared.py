"""Memory that worker processes see, and how one writer publishes episodes to many readers without a lock.

    the writer (the trainer)                             a reader (a worker)

    1. tail = start of the oldest episode that stays     1. copy the log up to head, draw
    2. write rows, then the log entry                    2. copy rows
    3. head = number of episodes published               3. look at tail: keep what starts at or behind it

Retire before writing: rows are written over only after `tail` has passed their episode, so a reader that copied such
rows sees the new tail when it looks again, and draws others. A writer that is killed in the middle leaves rows that
are retired and not published, which nobody reads. The writer never waits for a reader.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from buffers.dataset.index import EpisodeIndex
from buffers.utils import format_bytes

__all__ = ["EpisodeLog", "SharedArrays"]

_PAGE = 4096
_HEAD, _TAIL, _ROOM = 0, 8, 16  # Words, each counter on a cache line of its own.
_START, _LENGTH, _ID = range(3)
_INITIAL_ROOM = 256
_NUM_COUNTERS = 24


def fence() -> None:
    """Order what this thread has stored and loaded before it against what comes after.

    x86-64 keeps stores in order and loads in order, which is all that is needed here; elsewhere the atomic operations
    of taking a lock do it: a new one, as a fork could leave a common one taken for ever. This is the only place that
    has to know.
    """
    threading.Lock().acquire()


class SharedArrays(Mapping[str, np.ndarray]):
    """Named arrays in one piece of anonymous memory that other processes can map. Pickling costs a few bytes.

    On Linux this is a memfd: it has no name, no place in `/dev/shm` and its limit, and is gone with the last process
    that maps it. Forked processes inherit it, others open its descriptor under `/proc`. Elsewhere it is torch's shared
    memory. Either way, pages take memory once they are touched.

    Args:
        layout: `name -> (shape, numpy dtype)`.

    Raises:
        MemoryError: The memory cannot be had.
    """

    def __init__(self, layout: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        self._layout = dict(layout)
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._layout.values()]
        self.num_bytes = sum(-(-size // _PAGE) * _PAGE for size in sizes) + _PAGE
        self._owner, self._descriptor = os.getpid(), -1
        try:
            if sys.platform == "linux":
                self._descriptor = os.memfd_create("buffers", os.MFD_CLOEXEC)
                os.ftruncate(self._descriptor, self.num_bytes)
                self._map()
            else:
                self._tensor = torch.empty(self.num_bytes, dtype=torch.uint8).share_memory_()
                self._lay_out(self._tensor.numpy())
        except (OSError, ValueError, OverflowError, RuntimeError) as error:
            raise MemoryError(f"{format_bytes(self.num_bytes)} of shared memory cannot be had: {error}") from None

    def _map(self) -> None:
        memory = mmap.mmap(self._descriptor, self.num_bytes)
        # Worth asking: kernels that allow it for shared memory then use huge pages, as they do for private memory.
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._lay_out(np.frombuffer(memory, np.uint8))

    def _lay_out(self, memory: np.ndarray) -> None:
        self._arrays, offset = {}, 0
        for name, (shape, dtype) in self._layout.items():
            size = math.prod(shape) * dtype.itemsize
            self._arrays[name] = (
                memory[offset : offset + size].view(dtype).reshape(shape) if size else np.empty(shape, dtype)
            )
            offset += -(-size // _PAGE) * _PAGE

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"layout": self._layout, "num_bytes": self.num_bytes}
        if sys.platform != "linux":
            return {**state, "tensor": self._tensor}
        if self._descriptor < 0:
            raise RuntimeError("Shared memory can only be handed on by the process that made it.")
        status = os.fstat(self._descriptor)
        return {**state, "handle": (os.getpid(), self._descriptor, status.st_dev, status.st_ino)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layout, self.num_bytes, self._descriptor = state["layout"], state["num_bytes"], -1
        if "tensor" in state:
            self._tensor = state["tensor"]
            self._lay_out(self._tensor.numpy())
            return
        owner, descriptor, *identity = state["handle"]
        path = f"/proc/{owner}/fd/{descriptor}"
        try:
            status = os.stat(path)
            if [status.st_dev, status.st_ino] != identity:
                raise FileNotFoundError(path)
            # Unlike Python's mmap, this keeps no descriptor.
            memory = torch.from_file(path, shared=True, size=self.num_bytes, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"The process {owner} does not have the memory that it shared: {error}.") from None
        self._lay_out(memory.numpy())

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedArrays:
        """Memory of its own with the same content."""
        other = SharedArrays(self._layout)
        for name, array in self.items():
            other[name][...] = array
        return other

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class EpisodeLog:
    """What the writer tells readers: which episodes are published, and which are retired.

    The entry of episode e is row `e % room` of the log: (start, length, id). Live episodes always fit, as the room
    doubles when they would not. A row says whose it is, so that a reader which comes too late, or with an old room,
    finds another id there.

    Args:
        memory: Holds `counters` and `entries`, laid out by `EpisodeLog.layout`, zeros at first.
    """

    def __init__(self, memory: SharedArrays) -> None:
        self._counters, self._entries = memory["log/counters"], memory["log/entries"]

    @staticmethod
    def layout(capacity: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """What the log of a dataset of `capacity` steps takes. Entries that are never used take no memory."""
        max_room = max(_INITIAL_ROOM, 1 << capacity.bit_length())
        int64 = np.dtype(np.int64)
        return {"log/counters": ((_NUM_COUNTERS,), int64), "log/entries": ((max_room, 3), int64)}

    # The writer's side.

    def begin(self, index: EpisodeIndex) -> None:
        """Publish all episodes of an index, before anyone reads."""
        room = max(_INITIAL_ROOM, 1 << len(index).bit_length())
        self._entries[:room, _ID] = -1
        self._entries[index.ids & (room - 1)] = np.stack([index.starts, index.lengths, index.ids], 1)
        self._counters[[_ROOM, _TAIL, _HEAD]] = room, index.next_start - index.num_steps, index.next_id

    def retire(self, tail: int) -> None:
        """Rows before step id `tail` are about to be written over."""
        self._counters[_TAIL] = tail
        # A reader that copied an overwritten row must see the new tail when it looks again.
        fence()

    def publish(self, episode_id: int, start: int, length: int, num_live: int) -> None:
        """The rows of an episode are written; `num_live` others are live."""
        room = int(self._counters[_ROOM])
        if num_live >= room:
            self._double_room(room, episode_id)
            room *= 2
        entry = self._entries[episode_id & (room - 1)]
        # A reader takes the id before and after the rest, and believes what lies between two that agree.
        entry[_ID] = -1
        fence()
        entry[_START], entry[_LENGTH] = start, length
        fence()
        entry[_ID] = episode_id
        fence()
        self._counters[_HEAD] = episode_id + 1

    def _double_room(self, room: int, next_id: int) -> None:
        ids = np.arange(next_id - room, next_id)
        entries = self._entries[ids & (room - 1)]
        self._entries[room : 2 * room, _ID] = -1
        self._entries[ids & (2 * room - 1)] = entries
        fence()
        self._counters[_ROOM] = 2 * room

    # A reader's side.

    @property
    def tail(self) -> int:
        """The least step id that is not retired, as of now and after everything loaded before."""
        fence()
        return int(self._counters[_TAIL])

    def follow(self, index: EpisodeIndex) -> None:
        """Bring a reader's own index up to date."""
        while True:
            head = int(self._counters[_HEAD])
            self._catch_up(index, head)
            index.retire(self.tail)
            # A reader that was held up may find that all it has just learned of is retired; there is more by now.
            if len(index) or int(self._counters[_HEAD]) == head:
                return

    def _catch_up(self, index: EpisodeIndex, head: int) -> None:
        """Learn of the episodes before `head`."""
        while index.next_id < head:
            fence()
            room = int(self._counters[_ROOM])
            ids = np.arange(max(index.next_id, head - room), head)
            places = ids & (room - 1)
            ids_before = self._entries[places, _ID]
            fence()
            entries = self._entries[places]
            fence()
            is_whole = (ids_before == ids) & (self._entries[places, _ID] == ids)
            fence()
            if int(self._counters[_ROOM]) == room:
                # What is not whole has been written over, so its episode is retired.
                index.extend(entries[is_whole])
                index.next_id = head
