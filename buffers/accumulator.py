"""Accumulator: rows with boundaries in, complete episodes out.

A row is one record in memory, with all fields side by side, and the open rows of an environment are contiguous. So
adding a row of N environments writes to N addresses, and a complete episode is one slice.

    env 0    # # # # . . . .        4 rows open: the next is written at 0 * room + 4
    env 1    # . . . . . . .        1 row open:                         1 * room + 1
    env 2    # # # # # # . .        6 rows open:                        2 * room + 6
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from buffers.fields import Fields

__all__ = ["Accumulator"]

_INITIAL_ROOM = 64
# Up to this many environments are written one by one; for more, one pass over all of them is faster.
_FEW = 6
# From this many environments on, records of up to this many bytes are assembled before they are scattered: each address
# is then written once, not once a field.
_MANY, _SMALL_RECORD = 64, 1024
_VIEWS = ("_columns", "_items", "_whole_rows", "_whole_packed")


class Accumulator:
    """Keeps the open episode of each of N environments.

    Args:
        fields: What a row holds.
        num_envs: N.
        max_rows: A longer episode is refused.
        cut_after: Rows after which an open episode counts as complete; None to never cut.
        emit: Called with each complete episode, `name -> (L, *shape)`, once it is closed. The arrays are views, valid
            during the call only.
    """

    def __init__(
        self,
        fields: Fields,
        num_envs: int,
        max_rows: int,
        cut_after: int | None,
        emit: Callable[[dict[str, np.ndarray]], object],
    ) -> None:
        self.fields, self.num_envs, self.max_rows, self.cut_after = fields, num_envs, max_rows, cut_after
        self._emit = emit
        self._record = _record_of(fields, {})
        self._is_packed = num_envs >= _MANY and self._record.itemsize <= _SMALL_RECORD
        self._packed, self._rows = np.empty(num_envs, self._record), np.empty(0, self._record)
        # Where the rows of each environment begin, and where its next row goes.
        self._begin = self._next = np.zeros(num_envs, np.int64)
        # An upper bound on the length of all open episodes, made exact only when it reaches `_full`.
        self._longest = 0
        self._set_room(_INITIAL_ROOM)

    def __getstate__(self) -> dict[str, Any]:
        # Copies of views would no longer share memory.
        return {name: value for name, value in self.__dict__.items() if name not in _VIEWS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_views()

    @property
    def num_open_rows(self) -> int:
        """Rows of all open episodes."""
        return int((self._next - self._begin).sum())

    def add_row(self, row: Sequence[np.ndarray | float], is_first: bool, is_last: bool) -> None:
        """`add_rows` for a single environment, with `(*shape)` a field."""
        if is_first:
            self._close(0)
        length = int(self._next[0])
        if length >= self._full:
            self._make_room(None, None)
        for column, value in zip(self._columns, row, strict=True):
            column[length] = value
        self._next[0] = self._longest = length + 1
        if is_last or length + 1 == self.cut_after:
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
        if self._longest >= self._full:
            self._make_room(is_first, mask)
        if is_first is not None:
            self._close_all(is_first, mask)
        self._write(rows, mask)
        self._next += 1 if mask is None else mask
        self._longest += 1
        if is_last is not None:
            self._close_all(is_last, mask)
        if self.cut_after is not None and self._longest >= self.cut_after:
            self._close_all(self._next - self._begin == self.cut_after, None)

    def flush(self, mask: np.ndarray | None = None, **changes: Any) -> None:
        """Complete the open episodes under the mask, or all, after setting the fields `changes` of their last rows."""
        is_open = self._next > self._begin
        if mask is not None:
            is_open &= mask
        for name, value in changes.items():
            self._rows[name][self._next[is_open] - 1] = value
        self._close_all(is_open, None)

    def read_last(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Copy the last row of each open episode into arrays `(N, *shape)` a field; bool `(N,)`, which are open."""
        is_open = self._next > self._begin
        for name, array in arrays.items():
            array[is_open] = self._rows[name][self._next[is_open] - 1]
        return is_open

    def _write(self, rows: Sequence[np.ndarray], mask: np.ndarray | None) -> None:
        """Write a row behind each open episode, masked or not: it counts only once `_next` has moved past it."""
        envs = None if mask is None else mask.nonzero()[0]
        if envs is not None and len(envs) <= _FEW:
            for env in envs.tolist():
                position = self._next[env]
                for column, values in zip(self._columns, rows, strict=True):
                    column[position] = values[env]
            return
        positions = slice(None) if self._is_packed else self._next
        for (items, item), array in zip(self._items, rows, strict=True):
            items[positions] = array if item is None else np.frombuffer(np.ascontiguousarray(array), item)
        if self._is_packed:
            self._whole_rows[self._next] = self._whole_packed

    def _make_room(self, is_first: np.ndarray | None, mask: np.ndarray | None) -> None:
        """Ensure that a row can be written behind every open episode, masked or not."""
        lengths = self._next - self._begin
        self._longest = int(lengths.max())
        if is_first is not None:
            lengths[is_first if mask is None else is_first & mask] = 0
        longest = int((lengths if mask is None else lengths * mask).max())
        if longest >= self.max_rows:
            raise ValueError(
                f"An open episode has reached {longest} steps, the `capacity` of the dataset, and cannot take another. "
                "End it, or cut endless streams into pieces with `max_episode_length`."
            )
        if lengths.max() >= self._room:
            self._set_room(2 * self._room)

    def _set_room(self, room: int) -> None:
        room = min(room, 1 + (self.max_rows if self.cut_after is None else min(self.cut_after, self.max_rows)))
        lengths, begin = self._next - self._begin, np.arange(self.num_envs) * room
        rows = np.empty(self.num_envs * room, self._record)
        for env in lengths.nonzero()[0].tolist():
            # One by one, because memory that is never touched takes no room.
            rows[begin[env] : begin[env] + lengths[env]] = self._rows[self._begin[env] : self._next[env]]
        self._rows, self._begin, self._next = rows, begin, begin + lengths
        self._room, self._full = room, min(room, self.max_rows)
        self._make_views()

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
        begin, end = int(self._begin[env]), int(self._next[env])
        if end > begin:
            self._next[env] = begin
            self._emit({name: rows[begin:end] for name, rows in zip(self.fields.names, self._columns, strict=True)})


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
