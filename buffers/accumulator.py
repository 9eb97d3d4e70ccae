"""Accumulator: rows with boundaries in, complete episodes out.

A row is one record in memory, with all fields side by side. Each environment has a run of 64 records, one of 128, one
of 256, and so on. Its open episode lies in one of them, and moves to the next when it outgrows it:

    runs of 64      env 0 # # # .    env 1 . . . .    env 2 # . . .         3 rows open, and 1 row
    runs of 128     env 0 . . . . . . . .    env 1 # # # # # . . .          65 rows open

So adding a row of N environments writes to N addresses, and a complete episode is one slice. Addresses take memory only
where they are written to, so every run can have its own.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from buffers.compression import Codec, EarlyBlocks
from buffers.fields import Fields
from buffers.saving import Pieces
from buffers.table import GOES_ON, continuing

__all__ = ["Accumulator"]

_SHORT = 64
# Address space is all that a reservation takes, but a process has no more than 2 ** 47 bytes of it.
_MOST_ADDRESSES = 2**43
_NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python names since 3.13.
# Up to this many environments are written one by one; for more, one pass over all of them is faster.
_FEW = 6
# From this many environments on, records of up to this many bytes are assembled before they are scattered: each address
# is then written once, not once a field.
_MANY, _SMALL_RECORD = 64, 1024


class Accumulator:
    """Keeps the open episode of each of N environments.

    Args:
        fields: What a row holds.
        num_envs: N.
        max_rows: A longer episode is refused.
        cut_after: Rows after which an open episode is cut, when it goes on; None to never cut.
        overlap: Rows with which a piece begins that the piece before it ends with.
        emit: Called with each complete episode: its environment, `name -> (L, *shape)` as views that are valid during
            the call only, and how it was cut (see `table/cut.py`). The episode is closed before the call.
        codecs: How the receiver compresses fields: whole blocks are compressed while their episode is open.
    """

    def __init__(
        self,
        fields: Fields,
        num_envs: int,
        max_rows: int,
        cut_after: int | None,
        overlap: int,
        emit: Callable[[int, dict[str, np.ndarray], int], object],
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:
        self.fields, self.num_envs, self.max_rows, self.cut_after = fields, num_envs, max_rows, cut_after
        self._early = EarlyBlocks(codecs, num_envs, self._open_rows) if codecs else None
        self.overlap, self._emit = overlap, emit
        #: What a save has still to write of the open episodes; None if none is under way.
        self.unsaved: Pieces | None = None
        self._record = _record_of(fields, {})
        self._is_packed = num_envs >= _MANY and self._record.itemsize <= _SMALL_RECORD
        self._packed = np.empty(num_envs, self._record)
        self._reserve(max_rows if cut_after is None else cut_after)
        # Where the run of each environment begins, its next row goes, and it is full.
        self._begin = np.arange(num_envs) * _SHORT
        self._next, self._end = self._begin.copy(), self._begin + min(_SHORT - 1, self._longest)
        # Single numbers are read and written through these in a fraction of the time that it takes through arrays.
        self._begins, self._nexts, self._ends = self._begin.data, self._next.data, self._end.data
        self._cuts = [0] * num_envs
        # By environment: runs of 64 << size, and rows of the last episode.
        self._sizes, self._last_lengths = [0] * num_envs, [0] * num_envs
        # Rows that every environment can add before one may be full.
        self._num_free = 0
        self._make_views()

    def __getstate__(self) -> dict[str, Any]:
        lengths, arguments = self.lengths, (self.fields, self.num_envs, self.max_rows, self.cut_after, self.overlap)
        return {
            "arguments": (*arguments, self._emit, None if self._early is None else self._early.codecs),
            "open": [self.read_open(env, length) for env, length in enumerate(lengths.tolist())],
            "lengths": lengths,
            "cuts": self.cuts,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["arguments"])  # type: ignore[misc]
        rows = {name: np.concatenate([episode[name] for episode in state["open"]]) for name in self.fields.names}
        self.restore(state["lengths"], state["cuts"], rows)

    @property
    def lengths(self) -> np.ndarray:
        """Rows of the open episode of each environment, int64 `(N,)`."""
        return self._next - self._begin

    @property
    def cuts(self) -> list[int]:
        """How the open episode of each environment begins, see `table/cut.py`."""
        return list(self._cuts)

    def read_open(self, env: int, num_rows: int) -> dict[str, np.ndarray]:
        """Copies of the first rows of an open episode, `name -> (num_rows, *shape)`."""
        begin = self._begins[env]
        return {name: rows.copy() for name, rows in self._episode(begin, begin + num_rows).items()}

    def restore(self, lengths: Sequence[int], cuts: Sequence[int], rows: Mapping[str, np.ndarray]) -> None:
        """Go on with open episodes of these lengths `(N,)`, whose rows come one environment after the other."""
        self._cuts, at = list(cuts), 0
        for env, length in enumerate(map(int, lengths)):
            self._start_run(env, _size_for(length))
            begin = self._begins[env]
            self._nexts[env] = begin + length
            for name in self.fields.names:
                self._rows[name][begin : begin + length] = rows[name][at : at + length]
            at += length

    def end_save(self) -> None:
        """Forget what is `unsaved`."""
        self.unsaved = None

    def _keep(self, env: int) -> None:
        if self.unsaved is not None:
            self.unsaved.keep(env, env + 1)

    @property
    def num_open_rows(self) -> int:
        """Rows of all open episodes."""
        return int(self.lengths.sum())

    @property
    def is_open(self) -> np.ndarray:
        """Which environments have an open episode, bool `(N,)`."""
        return self._next > self._begin

    def add_row(self, row: Sequence[np.ndarray | float], is_first: bool, is_last: bool) -> None:
        """`add_rows` for a single environment, with `(*shape)` a field."""
        if self._early is not None:
            # Before the row, as a call that fails, or that Ctrl-C ends, must not have taken it.
            self._early.advance()
        if is_first:
            self._close(0)
        place = self._nexts[0]
        if place == self._ends[0]:
            self._make_room(None, None)
            place = self._nexts[0]
        for column, value in zip(self._columns, row, strict=True):
            column[place] = value
        self._nexts[0] = place + 1
        if is_last:
            self._close(0)

    def add_rows(
        self,
        rows: Sequence[np.ndarray],
        is_first: np.ndarray | None = None,
        is_last: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> None:
        """Append one row of every environment under the mask.

        Args:
            rows: `(N, *shape)` a field, in the order of the fields.
            is_first: bool `(N,)`: the rows before this one are a complete episode.
            is_last: bool `(N,)`: the episode is complete with this row.
            mask: bool `(N,)`: False where there is no row, and the other two flags are ignored; None for all True.

        Raises:
            ValueError: An episode would be longer than `max_rows`; nothing has changed.
        """
        if self._early is not None:
            # As in `add_row`.
            self._early.advance()
        if not self._num_free:
            self._make_room(is_first, mask)
        if is_first is not None:
            self._close_all(is_first, mask)
        self._write(rows, mask)
        self._next += 1 if mask is None else mask
        self._num_free -= 1
        if is_last is not None:
            self._close_all(is_last, mask)

    def flush(self, mask: np.ndarray | None = None, truncate: bool = False) -> None:
        """Complete the open episodes under the mask, or all; with `truncate`, as truncated unless they terminated."""
        is_open = self.is_open
        if mask is not None:
            is_open &= mask
        if truncate and "truncated" in self.fields:
            for env in is_open.nonzero()[0].tolist():
                self._keep(env)
            last = self._next[is_open] - 1
            if "terminated" in self.fields:
                # Ctrl-C may have left an episode open that has ended.
                has_terminated = self._rows["terminated"][last]
                last = last[~has_terminated.any(axis=tuple(range(1, has_terminated.ndim)))]
            self._rows["truncated"][last] = True
        self._close_all(is_open, None)

    def read_last(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Copy the last row of each open episode into arrays `(N, *shape)` a field; bool `(N,)`, which are open."""
        is_open = self.is_open
        for name, array in arrays.items():
            array[is_open] = self._rows[name][self._next[is_open] - 1]
        return is_open

    def _write(self, rows: Sequence[np.ndarray], mask: np.ndarray | None) -> None:
        """Write a row behind each open episode, masked or not: it counts only once `_next` has moved past it."""
        envs = None if mask is None else mask.nonzero()[0]
        if envs is not None and len(envs) <= _FEW:
            for env in envs.tolist():
                position = self._nexts[env]
                for column, values in zip(self._columns, rows, strict=True):
                    column[position] = values[env]
            return
        positions = slice(None) if self._is_packed else self._next
        for (items, item), array in zip(self._items, rows, strict=True):
            items[positions] = array if item is None else np.frombuffer(np.ascontiguousarray(array), item)
        if self._is_packed:
            self._whole_rows[self._next] = self._whole_packed

    def _make_room(self, is_first: np.ndarray | None, mask: np.ndarray | None) -> None:
        """Let every environment that goes on take a row; behind the others' rows is a place to spare for `_write`."""
        goes_on = self._next >= self._end
        if mask is not None:
            goes_on &= mask
        if is_first is not None:
            goes_on &= ~is_first
        envs = goes_on.nonzero()[0].tolist()
        longest = int((self._next - self._begin)[envs].max(initial=0))
        if longest == self._longest and longest != self.cut_after:
            limit = "the `capacity` of the dataset" if longest == self.max_rows else "for which there are addresses"
            raise ValueError(
                f"An open episode has reached {longest} steps, {limit}, and cannot take another. End it, or cut "
                "endless streams into pieces with `max_episode_length`."
            )
        for env in envs:
            if self._nexts[env] - self._begins[env] == self.cut_after:
                self._cut(env)
            else:
                self._move_on(env)
        self._num_free = max(1, int((self._end - self._next).min()))

    def _reserve(self, max_rows: int) -> None:
        """Reserve runs for `max_rows` rows an environment, or for as many as there are addresses."""
        num_sizes = _size_for(max_rows) + 1
        while True:
            num_bytes = self.num_envs * (_SHORT << num_sizes) * self._record.itemsize
            if num_bytes <= _MOST_ADDRESSES or num_sizes == 1:
                with contextlib.suppress(OSError, MemoryError):
                    self._memory, buffer = _reserved(num_bytes)
                    break
            if num_sizes == 1:
                raise MemoryError(f"{_SHORT} open steps of {self.num_envs} environments need {num_bytes:,} bytes.")
            num_sizes -= 1
        self._rows = np.frombuffer(buffer, self._record)
        self._longest = min(max_rows, (_SHORT << num_sizes - 1) - 1)

    def _start_run(self, env: int, size: int) -> None:
        """Let the next row of an environment be the first of its run of `64 << size` records."""
        begin, end = self._run(env, size)
        self._num_free = min(self._num_free, end - begin)
        # At once, so that Ctrl-C finds all of it or nothing.
        self._sizes[env], self._begins[env], self._nexts[env], self._ends[env] = size, begin, begin, end

    def _run(self, env: int, size: int) -> tuple[int, int]:
        """Where a run begins, and where it is full."""
        begin = self.num_envs * _SHORT * ((1 << size) - 1) + (env * _SHORT << size)
        # One record is to spare, for `_write`.
        return begin, begin + min((_SHORT << size) - 1, self._longest)

    def _move_on(self, env: int) -> None:
        """Move an open episode to its environment's next larger run."""
        self._keep(env)
        size, begin, length = self._sizes[env], self._begins[env], self._nexts[env] - self._begins[env]
        place, end = self._run(env, size + 1)
        self._rows[place : place + length] = self._rows[begin : begin + length]
        self._sizes[env], self._begins[env], self._nexts[env], self._ends[env] = size + 1, place, place + length, end
        self._give_back(size, begin)

    def _give_back(self, size: int, begin: int) -> None:
        """Give the memory of a run back to the system, unless it is one of the shortest."""
        if size and isinstance(self._memory, mmap.mmap):
            page, record = mmap.PAGESIZE, self._record.itemsize
            first, last = -(-begin * record // page) * page, (begin + (_SHORT << size)) * record // page * page
            if last > first:
                self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _make_views(self) -> None:
        self._columns = [self._rows[name] for name in self.fields.names]
        whole = np.dtype((np.void, self._record.itemsize))
        self._whole_rows, self._whole_packed = self._rows.view(whole), self._packed.view(whole)
        # Values of several numbers are copied as opaque items of so many bytes, which numpy does faster.
        target = self._packed if self._is_packed else self._rows
        items = {
            name: np.dtype((np.void, field.nbytes))
            for name, field in self.fields.items()
            if field.nbytes and (field.shape or field.numpy_dtype.kind == "V")
        }
        opaque = target.view(_record_of(self.fields, items))
        self._items = [(opaque[name], items.get(name)) for name in self.fields.names]

    def _close_all(self, is_complete: np.ndarray, mask: np.ndarray | None) -> None:
        for env in (is_complete if mask is None else is_complete & mask).nonzero()[0].tolist():
            self._close(env)

    def _close(self, env: int) -> None:
        begin, end = self._begins[env], self._nexts[env]
        if end == begin:
            return
        self._keep(env)
        # First, so that Ctrl-C never leaves its blocks to the next episode.
        episode = self._ended(env, begin, end)
        size, cut, length = self._sizes[env], self._cuts[env], end - begin
        self._cuts[env], self._nexts[env] = 0, begin
        # The next episode begins in as long a run as the last two needed, so those that are all long do not move.
        next_size = min(size, _size_for(min(length, self._last_lengths[env])))
        self._last_lengths[env] = length
        if next_size != size:
            self._start_run(env, next_size)
        self._emit(env, episode, cut)
        if next_size != size:
            self._give_back(size, begin)

    def _cut(self, env: int) -> None:
        """Emit what is open of an episode that goes on."""
        self._keep(env)
        begin, end = self._begins[env], self._nexts[env]
        episode = self._ended(env, begin, end)
        overlap = self._rows[end - self.overlap : end].copy()
        cut, self._cuts[env] = self._cuts[env] | GOES_ON, 0
        self._nexts[env] = begin
        self._emit(env, episode, cut)
        self._rows[begin : begin + len(overlap)] = overlap
        self._nexts[env], self._cuts[env] = begin + len(overlap), continuing(len(overlap))

    def _open_rows(self, env: int) -> dict[str, np.ndarray]:
        return self._episode(self._begins[env], self._nexts[env])

    def _ended(self, env: int, begin: int, end: int) -> dict[str, np.ndarray]:
        episode = self._episode(begin, end)
        return episode if self._early is None else self._early.take(env, episode)

    def _episode(self, begin: int, end: int) -> dict[str, np.ndarray]:
        return {name: rows[begin:end] for name, rows in zip(self.fields.names, self._columns, strict=True)}


def _size_for(num_rows: int) -> int:
    """The least size of which a run of `64 << size` records has room for `num_rows` and one more."""
    return (num_rows // _SHORT).bit_length()


def _reserved(num_bytes: int) -> tuple[Any, Any]:
    """Addresses that take memory where they are written to, in huge pages if the kernel has them; and their buffer."""
    if sys.platform != "linux":
        rows = np.empty(num_bytes, np.uint8)
        return rows, rows
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, memory


def _record_of(fields: Fields, items: dict[str, np.dtype]) -> np.dtype:
    # Largest numbers first, so that all are aligned.
    names = sorted(fields.names, key=lambda name: -fields[name].dtype.itemsize)
    sizes = [fields[name].nbytes for name in names]
    alignment = max(fields[name].dtype.itemsize for name in names)
    return np.dtype(
        {
            "names": names,
            "formats": [items.get(name, (fields[name].numpy_dtype, fields[name].shape)) for name in names],
            "offsets": np.cumsum([0, *sizes[:-1]]).tolist(),
            "itemsize": -(-max(1, sum(sizes)) // alignment) * alignment,
        }
    )
