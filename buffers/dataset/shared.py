"""Memory that worker processes see, and how one writer publishes episodes to many readers without a lock.

    the writer (the trainer)                             a reader (a worker)

    1. say that an episode is about to come              1. read the log on, draw
    2. tail = start of the oldest episode that stays     2. copy rows
    3. write rows                                        3. look at tail: keep what starts at or behind it
    4. say in the log that it has come

Retire before writing: rows are written over only after `tail` has passed their episode, so a reader that copied such
rows sees the new tail when it looks again, and draws others. A writer that is killed in the middle leaves rows that
are retired and not published, which nobody reads. The writer never waits for a reader; a reader waits where nothing is
left to draw but an episode is about to come. Where nothing is written over (episodes in files), there is no tail, and
the log alone says what has gone.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from buffers.dataset.cumulation import Int64Array
from buffers.dataset.huge_pages import HugePages, map_file
from buffers.dataset.index import EpisodeIndex
from buffers.utils import Process, format_bytes

__all__ = ["EpisodeLog", "SharedArrays"]

_PAGE = 4096
_TOKEN_BYTES = 16
_LENGTH, _ID = 1, 2
# Each a cache line of 8 words; _HALVES and the line after it are those of half 0, the next two those of half 1.
_VERSION, _TAIL, _HALVES = 0, 1, 2
_NUM_LINES, _WORDS = 6, 8
_HAS_ENDED, _NUM_CHANGES = 1, 2  # Words of the line of _VERSION.
_OWNER, _ROOM, _NUM_LIVE, _NEXT_START, _NEXT_ID = range(5)
_MIN_ROOM = 256
# The most that a half may hold, 6.4 GB if it ever did.
_MAX_ROOM = 2**28
_NOTHING_READ = -2
_WORDS_STAY_IN_ORDER = platform.machine().lower() in ("x86_64", "amd64")


def fence() -> None:
    """Order what this thread has stored and loaded before it against what comes after.

    The atomic operations of taking a lock do it: a new one, as a fork could leave a common one taken for ever. x86-64
    keeps stores in order and loads in order, which is all that is needed here, but for large copies, in which memcpy
    may stream past the caches: on such a machine the writer leaves the fence out between single words.
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
        self._descriptor, self._handle, self._mapping, self._offset = -1, None, None, 0
        self._token = os.urandom(_TOKEN_BYTES)
        try:
            if sys.platform == "linux":
                self._descriptor = os.memfd_create("buffers", os.MFD_CLOEXEC)
                self._mapping, self._offset = map_file(self._descriptor, self.num_bytes)
                self._handle = self._handle_here()
                memory = np.frombuffer(self._mapping, np.uint8)
            else:
                self._tensor = torch.empty(self.num_bytes, dtype=torch.uint8).share_memory_()
                memory = self._tensor.numpy()
        except (OSError, ValueError, OverflowError, RuntimeError) as error:
            raise MemoryError(f"{format_bytes(self.num_bytes)} of shared memory cannot be had: {error}") from None
        memory[-_TOKEN_BYTES:] = np.frombuffer(self._token, np.uint8)
        self._lay_out(memory)

    def _handle_here(self) -> tuple[int, int, int, int]:
        """Where the memory is found, (process, descriptor), and what it is (device, inode)."""
        status = os.fstat(self._descriptor)
        return os.getpid(), self._descriptor, status.st_dev, status.st_ino

    def _lay_out(self, memory: np.ndarray) -> None:
        self._arrays, offset = {}, 0
        for name, (shape, dtype) in self._layout.items():
            size = math.prod(shape) * dtype.itemsize
            self._arrays[name] = (
                memory[offset : offset + size].view(dtype).reshape(shape) if size else np.empty(shape, dtype)
            )
            offset += -(-size // _PAGE) * _PAGE

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"layout": self._layout, "num_bytes": self.num_bytes, "token": self._token}
        if sys.platform != "linux":
            return {**state, "tensor": self._tensor}
        if self._descriptor < 0:
            raise RuntimeError("Shared memory can only be handed on by the process that made it.")
        return {**state, "handle": self._handle_here(), "offset": self._offset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layout, self.num_bytes, self._token = state["layout"], state["num_bytes"], state["token"]
        self._descriptor, self._handle, self._mapping = -1, state.get("handle"), None
        if self._handle is None:
            self._tensor = state["tensor"]
            self._lay_out(self._tensor.numpy())
            return
        try:
            if self.is_orphaned:
                raise FileNotFoundError(_path(self._handle))
            # Unlike Python's mmap, this keeps no descriptor.
            size = state["offset"] + self.num_bytes
            memory = torch.from_file(_path(self._handle), shared=True, size=size, dtype=torch.uint8).numpy()
            memory = memory[state["offset"] :]
            # On another machine, the same numbers may mean something else.
            if memory[-_TOKEN_BYTES:].tobytes() != self._token:
                raise FileNotFoundError(_path(self._handle))
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"The process {self._handle[0]} does not have the memory that it shared: {error}. A pickled ring is a "
                "handle for other processes, while the one that made it lives; what shall last belongs in files."
            ) from None
        self._lay_out(memory)

    def huge_pages(self, name: str) -> HugePages | None:
        """The pages of an array, to be made by who made the memory; None for others, or where there are none."""
        if self._mapping is None or not self[name].size:
            return None
        return HugePages(self._mapping, self._offset, self[name])

    @property
    def is_orphaned(self) -> bool:
        """Whether the process that made it has ended or given it up. What it holds stays. Known on Linux only."""
        if self._handle is None:
            return False
        try:
            status = os.stat(_path(self._handle))
        except FileNotFoundError:
            return True
        except OSError:
            return False  # It must not be looked at, so something is there.
        return (status.st_dev, status.st_ino) != self._handle[2:]

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


def _path(handle: tuple[int, int, int, int]) -> str:
    return f"/proc/{handle[0]}/fd/{handle[1]}"


class EpisodeLog:
    """What the writer tells readers: which episodes have come, and which have gone.

    A log of rows (start, length, id), each an episode that has come or, with length 0, one that has gone. There are
    two halves of it. When one is full, the writer states the episodes that live at the front of the other, and goes on
    there; one store, of the version, makes it the one that counts, so there is a whole log at any moment, should the
    writer be killed:

        half 1   owner 7   stated: 3 8 9 12 | came and went since: 13 14 -8 ... -15
        half 0   owner 8   stated: 9 12 14 | came and went since: 16 -9           <- version 8

    A reader that knows half 1 to its end goes on behind what is stated in half 0, which it knows. Before a half is
    written over it gets its new owner: a reader that has copied rows looks at the owner again, and if it is another,
    or the reader is two versions behind, it takes all that is stated. A half has room for as many rows again as are
    stated, so both sides do O(1) a row.

    Args:
        memory: Laid out by `EpisodeLog.layout`, zeros at first, which are a log without episodes.
    """

    def __init__(self, memory: SharedArrays) -> None:
        self.memory = memory
        # Single words are read and written through these in a fourth of the time that it takes through arrays.
        lines = [memoryview(line) for line in memory["log/lines"]]
        self._version, self._tail = lines[_VERSION], lines[_TAIL]
        # Of each half: the words of its rows, how many rows there are, and what the writer says of it.
        self._halves = [
            (memoryview(memory["log/rows"][h].reshape(-1)), lines[_HALVES + 2 * h], lines[_HALVES + 2 * h + 1])
            for h in (0, 1)
        ]
        self._reader, self._version_read, self._num_read = Process.number, _NOTHING_READ, 0

    @staticmethod
    def layout(capacity: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """What the log of a dataset of `capacity` steps takes. Rows that are never used take no memory."""
        room = max(_MIN_ROOM, min(2 * capacity, _MAX_ROOM))
        int64 = np.dtype(np.int64)
        return {"log/lines": ((_NUM_LINES, _WORDS), int64), "log/rows": ((2, room, 3), int64)}

    # The writer's side.

    @property
    def newest_id(self) -> int:
        """The newest episode that readers have been told of; -1 before the first."""
        words, last, header = self._halves[self._version[0] & 1]
        num = last[0]
        return words[3 * (num - 1) + _ID] if num else header[_NEXT_ID] - 1

    def announce(self) -> None:
        """Episodes may leave now for one that is about to come."""
        self._version[_NUM_CHANGES] |= 1
        # A reader that finds them gone must see it.
        if not _WORDS_STAY_IN_ORDER:
            fence()

    def retire(self, tail: int) -> None:
        """Rows before step id `tail` are about to be written over; their episodes are gone."""
        self._tail[0] = tail
        # A reader that copied an overwritten row must see the new tail when it looks again.
        fence()

    def add(self, start: int, length: int, episode_id: int, index: EpisodeIndex) -> None:
        """An episode can be read; it may be in the index already, where all others that live are."""
        words, last, header = self._halves[self._version[0] & 1]
        num = last[0]
        if num == header[_ROOM]:
            # Only what readers of this half have been told.
            self._restate(index, int(index.ids.searchsorted(episode_id)) if length else len(index))
            words, last, header = self._halves[self._version[0] & 1]
            num = last[0]
        word = 3 * num
        words[word], words[word + 1], words[word + 2] = start, length, episode_id
        if not _WORDS_STAY_IN_ORDER:
            fence()
        last[0] = num + 1
        if length and self._version[_NUM_CHANGES] & 1:
            if not _WORDS_STAY_IN_ORDER:
                fence()
            self._version[_NUM_CHANGES] += 1

    def remove(self, episode_id: int, index: EpisodeIndex) -> None:
        """An episode is gone, or about to go; it may still be in the index."""
        self.add(0, 0, episode_id, index)

    def restate(self, index: EpisodeIndex) -> None:
        """Begin with the episodes of an index, before anyone reads.

        Raises:
            RuntimeError: There are too many of them.
        """
        self._restate(index, len(index))

    def _restate(self, index: EpisodeIndex, num_live: int) -> None:
        """Go on in the other half, behind the oldest `num_live` episodes of the index."""
        version = self._version[0] + 1
        _, last, header = self._halves[version & 1]
        rows = self._rows_of(version)
        room = min(max(_MIN_ROOM, 2 * num_live), len(rows))
        if num_live >= room:
            raise RuntimeError(
                f"Workers can be shown {room - 1:,} live episodes, and there are more. Lower the `capacity`."
            )
        # A reader that copied a row that is written over must see the new owner when it looks again.
        header[_OWNER] = version
        fence()
        rows[:num_live] = index.rows[:num_live]
        header[_ROOM], header[_NUM_LIVE] = room, num_live
        header[_NEXT_START], header[_NEXT_ID] = index.next_start, index.next_id
        last[0] = num_live
        fence()
        self._version[0] = version

    def end(self) -> None:
        """The writer gives up: what it has said holds no longer than until others have changed it."""
        self._version[_HAS_ENDED] = 1

    # A reader's side.

    @property
    def tail(self) -> int:
        """The least step id that is not retired, as of now and after everything loaded before."""
        fence()
        return self._tail[0]

    @property
    def num_changes(self) -> int:
        """Changes from one episode to another: odd while some have left, or may have, and the new one has not come."""
        fence()
        return self._version[_NUM_CHANGES]

    @property
    def has_ended(self) -> bool:
        """Whether nothing will come any more: the writer has said so, or is no more."""
        return bool(self._version[_HAS_ENDED]) or self.memory.is_orphaned

    def follow(self, index: EpisodeIndex) -> list[int]:
        """Bring a reader's own index up to date; the ids of those episodes that the log says have gone.

        Begun again only if a writer fills a whole half while a reader copies one, which is much faster.
        """
        if self._reader != Process.number:
            # A fork may have caught another thread in the middle of a change: what it left in this index is not used.
            self._reader, self._version_read = Process.number, _NOTHING_READ
        gone: list[int] = []
        while True:
            if not self._is_all_read():
                gone += self._read(index)
            index.retire(self.tail)
            # A reader that was held up may find that all it has just learned of is retired; there is more by now.
            if len(index) or self._is_all_read():
                return gone

    def _is_all_read(self) -> bool:
        _, last, _ = self._halves[self._version_read & 1]
        return last[0] == self._num_read and self._version[0] == self._version_read

    def _read(self, index: EpisodeIndex) -> list[int]:
        gone: list[int] = []
        while True:
            version = self._version[0]
            fence()
            if version == self._version_read + 1:
                # The rest of the half that is known; what the other one states is known then.
                gone += self._read_on(index)
                if version == self._version_read + 1:
                    _, _, header = self._halves[version & 1]
                    self._version_read, self._num_read = version, header[_NUM_LIVE]
            gone += self._read_on(index) if version == self._version_read else self._read_all(version, index)
            if version == self._version_read:
                return gone

    def _read_on(self, index: EpisodeIndex) -> list[int]:
        """Read what has come in the half that is known; if it is not there any more, nothing is known."""
        news = self._rows(self._version_read, self._num_read)
        if news is None:
            self._version_read = _NOTHING_READ
            return []
        self._num_read += len(news)
        return _apply(news, index)

    def _read_all(self, version: int, index: EpisodeIndex) -> list[int]:
        """Read the half of a version from its front on; if it is not there any more, nothing is known."""
        _, _, header = self._halves[version & 1]
        next_start, next_id = header[_NEXT_START], header[_NEXT_ID]
        news = self._rows(version, 0)
        if news is None:
            self._version_read = _NOTHING_READ
            return []
        known = index.ids.copy()
        index.clear()
        _apply(news, index)
        # The newest of all may have gone before the rest was stated.
        index.next_start, index.next_id = max(index.next_start, next_start), max(index.next_id, next_id)
        self._version_read, self._num_read = version, len(news)
        return np.setdiff1d(known, index.ids).tolist()

    def _rows(self, version: int, begin: int) -> Int64Array | None:
        """The rows of a version from a number on; None if they have been written over meanwhile."""
        _, last, header = self._halves[version & 1]
        num = last[0]
        fence()
        news = self._rows_of(version)[begin:num].copy()
        fence()
        return news if header[_OWNER] == version else None

    def _rows_of(self, version: int) -> Int64Array:
        """All rows of the half of a version, int64 `(n, 3)`, also those that nothing is in yet."""
        return self.memory["log/rows"][version & 1]


def _apply(news: Int64Array, index: EpisodeIndex) -> list[int]:
    """Let episodes come and go; the ids of those that have gone."""
    has_come = news[:, _LENGTH] > 0
    if has_come.all():
        index.extend(news)
        return []
    index.extend(news[has_come])
    gone = news[~has_come, _ID]
    index.discard(gone)
    return gone.tolist()
