"""Accumulator: rows with boundaries in, complete episodes out.

A row lies in memory as one record, all fields side by side, and each environment has a contiguous run of them, so that
adding a row of N environments touches N places, and a finished episode is one slice.

    env 0    # # # # . . . .        4 rows open: the next goes to place 0 * room + 4
    env 1    # . . . . . . .        1 row open:                        1 * room + 1
    env 2    # # # # # # . .        6 rows open:                       2 * room + 6
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from buffers.fields import Fields

__all__ = ["Accumulator"]

_INITIAL_ROOM = 64
# Up to so many environments are written one by one; for more, one pass over all of them is faster.
_FEW = 6
# Small records of many environments are put together before they are scattered, which saves cache misses.
_MANY = 64
_SMALL_RECORD = 1024
_VIEWS = ("_columns", "_items", "_whole_rows", "_whole_packed")


class Accumulator:
    """Keeps the open episode of each environment.

    Args:
        fields: What a row holds.
        num_envs: N, environments.
        max_rows: Rows that an episode may have at most; a longer one is refused.
        cut_after: Rows after which an open episode counts as complete; None to never cut.
        emit: Takes each complete episode, `name -> (L, *shape)`. The arrays are views that are valid during the call
            only. The episode is closed before the call, also if that fails, which it should not.
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
        self._limit = max_rows if cut_after is None else min(cut_after, max_rows)
        self._record = _record_of(fields, {})
        self._is_packed = num_envs >= _MANY and self._record.itemsize <= _SMALL_RECORD
        self._packed, self._rows = np.empty(num_envs, self._record), np.empty(0, self._record)
        # Where the run of each environment begins, and where its next row goes.
        self._begin = self._next = np.zeros(num_envs, np.int64)
        # No open episode is longer than this; the exact length is found only when it matters.
        self._longest = 0
        self._set_room(min(_INITIAL_ROOM, self._limit))

    def __getstate__(self) -> dict[str, Any]:
        # Views would be copied one by one, and rows written to one copy and read from another.
        return {name: value for name, value in self.__dict__.items() if name not in _VIEWS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_views()

    @property
    def num_open_rows(self) -> int:
        """Rows of all open episodes."""
        return int((self._next - self._begin).sum())

    def add_row(self, row: Sequence[np.ndarray | float], is_first: bool, is_last: bool) -> None:
        """`add_rows` for the only environment, whose row is `(*shape)` a field."""
        if is_first:
            self._close(0)
        length = int(self._next[0])
        if length >= self._room:
            self._make_room(length)
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
        """Append one row of every environment that brings one.

        The cost does not grow by a loop over environments; only those that complete an episode are visited.

        Args:
            rows: `(N, *shape)` a field, in the order of the fields.
            is_first: bool `(N,)`, the environment's rows before this one are complete.
            is_last: bool `(N,)`, with this row, the environment's episode is complete.
            mask: bool `(N,)`, the environment brings a row. Where it does not, the other two mean nothing.

        Raises:
            ValueError: An episode would be longer than `max_rows`; nothing has changed.
        """
        if self._longest >= self._room:
            lengths = self._next - self._begin
            staying = lengths if is_first is None else lengths * ~is_first
            self._make_room(int((staying if mask is None else staying * mask).max()))
        if is_first is not None:
            self._close_all(is_first, mask)
        self._write(rows, mask)
        self._next += 1 if mask is None else mask
        self._longest += 1
        if is_last is not None:
            self._close_all(is_last, mask)
        if self.cut_after is not None and self._longest >= self.cut_after:
            self._close_all(self._next - self._begin == self.cut_after, None)

    def amend(self, name: str, value: float, mask: np.ndarray | None = None) -> None:
        """Change a field of the last row of open episodes, of those under the mask: what ended them came after it."""
        is_open = self._next > self._begin
        self._rows[name][self._next[is_open if mask is None else is_open & mask] - 1] = value

    def flush(self, mask: np.ndarray | None = None) -> None:
        """Complete open episodes as they stand; those under the mask, bool `(N,)`, or all."""
        self._close_all(self._next > self._begin, mask)

    def _write(self, rows: Sequence[np.ndarray], mask: np.ndarray | None) -> None:
        """Put a row behind each open episode; it does not belong to it before the lengths say so."""
        if mask is not None:
            envs = mask.nonzero()[0]
            if len(envs) <= _FEW:
                for env in envs.tolist():
                    place = self._next[env]
                    for column, values in zip(self._columns, rows, strict=True):
                        column[place] = values[env]
                return
        if mask is None or self._longest < self._room:
            # There is room behind every episode: a row that no environment brought does no harm there.
            places, packed = self._next, slice(None)
        else:
            rows, places, packed = [array[envs] for array in rows], self._next[envs], slice(len(envs))
        for (items, item), array in zip(self._items, rows, strict=True):
            values = array if item is None else np.frombuffer(np.ascontiguousarray(array), item)
            items[packed if self._is_packed else places] = values
        if self._is_packed:
            self._whole_rows[places] = self._whole_packed[packed]

    def _make_room(self, longest: int) -> None:
        """See to it that a row can follow an open episode of `longest` rows."""
        if longest >= self.max_rows:
            raise ValueError(
                f"An open episode has reached {longest} steps, the `capacity` of the dataset, and cannot take another. "
                "End it, or cut endless streams into pieces with `max_episode_length`."
            )
        self._longest = int((self._next - self._begin).max())
        if longest >= self._room:
            self._set_room(min(2 * self._room, self._limit))

    def _set_room(self, room: int) -> None:
        lengths, begin = self._next - self._begin, np.arange(self.num_envs) * room
        rows = np.empty(self.num_envs * room, self._record)
        for env in lengths.nonzero()[0].tolist():
            # Rows that hold nothing are left alone: memory that is never touched is never used.
            rows[begin[env] : begin[env] + lengths[env]] = self._rows[self._begin[env] : self._next[env]]
        self._rows, self._room, self._begin, self._next = rows, room, begin, begin + lengths
        self._make_views()

    def _make_views(self) -> None:
        self._columns = [self._rows[name] for name in self.fields.names]
        whole = np.dtype((np.void, self._record.itemsize))
        self._whole_rows, self._whole_packed = self._rows.view(whole), self._packed.view(whole)
        # Where the values of N environments are written first, each as one opaque item, which is moved as a whole.
        # Single numbers stay what they are (opaque where numpy has none such).
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
        """Complete the open episode of an environment, if it has one."""
        begin, end = int(self._begin[env]), int(self._next[env])
        if end > begin:
            self._next[env] = begin
            self._emit({name: rows[begin:end] for name, rows in zip(self.fields.names, self._columns, strict=True)})


def _record_of(fields: Fields, items: dict[str, np.dtype]) -> np.dtype:
    """A dtype of one row, `items` in place of some of its fields.

    The largest numbers come first, so that each lies at a multiple of its size.
    """
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
