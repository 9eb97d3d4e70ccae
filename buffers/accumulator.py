"""Accumulator: rows with boundaries in, complete episodes out.

Open episodes lie in one array a field, `(num_envs, room, *shape)`: one contiguous run an environment, so that a
finished episode is one slice.

    env 0    # # # # . . . .        4 rows open: the next goes to place 0 * room + 4
    env 1    # . . . . . . .        1 row open:                        1 * room + 1
    env 2    # # # # # # . .        6 rows open:                       2 * room + 6
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from buffers.fields import Fields

__all__ = ["Accumulator", "EpisodeTaker"]

_INITIAL_ROOM = 64
# Rows that are written one by one: of 256, this takes 3 us for 1 and 9 us for 4, and 16 us otherwise for any number.
_FEW = 6


class EpisodeTaker(Protocol):
    """Takes a complete episode, `name -> (L, *shape)`, which it must copy.

    Attributes:
        has_taken: It sets this as soon as it has the episode: Ctrl-C may come then, and it must not get it twice. The
            accumulator sets it back.
    """

    has_taken: bool

    def __call__(self, episode: dict[str, np.ndarray]) -> object:
        """Take it, and say so."""


class Accumulator:
    """Keeps the open episode of each environment.

    Args:
        fields: What a row holds.
        num_envs: N, environments.
        max_rows: Rows that an episode may have at the most; a longer one is refused.
        cut_after: Rows after which an open episode counts as complete; None to never cut.
        emit: Takes complete episodes.
    """

    def __init__(
        self,
        fields: Fields,
        num_envs: int,
        max_rows: int,
        cut_after: int | None,
        emit: EpisodeTaker,
    ) -> None:
        self.fields, self.num_envs, self.max_rows, self.cut_after = fields, num_envs, max_rows, cut_after
        self._emit = emit
        self._limit = max_rows if cut_after is None else min(cut_after, max_rows)
        self._lengths = np.zeros(num_envs, np.int64)
        # No open episode is longer than this; found out exactly only when it matters.
        self._longest = 0
        # Environments whose episodes a call handed over before it failed, and the places of its rows.
        self._taken: dict[int, int] = {}
        self._arrays: list[np.ndarray] = []
        self._set_room(min(_INITIAL_ROOM, self._limit))

    def __getstate__(self) -> dict[str, Any]:
        # Views would be copied one by one, and rows written to one copy and read from another.
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_first_runs", "_by_name", "_items")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_views()

    @property
    def num_open_rows(self) -> int:
        """Rows of all open episodes."""
        return int(self._lengths.sum())

    def add_row(self, row: Sequence[np.ndarray | float], is_first: bool, is_last: bool) -> None:
        """Append one row of the only environment; if `emit` raises, the same call can be made again.

        Args:
            row: `(*shape)` a field, in the order of the fields.
            is_first: The rows before are complete.
            is_last: With this row, the episode is complete.

        Raises:
            ValueError: The episode would be longer than `max_rows`; nothing has changed.
        """
        if self._taken:
            is_repeated = self._without_taken([np.asarray(value)[None] for value in row], None) is not None
            self._taken = {}
            if is_repeated:
                return
        if is_first and self._lengths[0]:
            self._close(0, 0)
        place = int(self._lengths[0])
        if place >= self._room:
            self._make_room(place)
        for run, value in zip(self._first_runs, row, strict=True):
            run[place] = value
        if is_last or place + 1 == self.cut_after:
            self._close(0, 1)
            self._taken = {}
        else:
            self._lengths[0] = self._longest = place + 1

    def add_rows(
        self,
        rows: Sequence[np.ndarray],
        is_first: np.ndarray | None = None,
        is_last: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> None:
        """Append one row of every environment that brings one.

        The cost does not grow by a loop over environments; only those that complete an episode are visited.
        If `emit` raises, the same call can be made again: it goes on with the episodes that were not handed over.
        Whoever goes on with another call instead loses the rows of the one that failed, as with any call that fails.

        Args:
            rows: `(N, *shape)` a field, in the order of the fields.
            is_first: bool `(N,)`, the environment's rows before this one are complete.
            is_last: bool `(N,)`, with this row, the environment's episode is complete.
            mask: bool `(N,)`, the environment brings a row. Where it does not, the other two mean nothing.

        Raises:
            ValueError: An episode would be longer than `max_rows`; nothing has changed.
        """
        if self._taken:
            mask = self._without_taken(rows, mask)
        if self._longest >= self._room:
            staying = self._lengths if is_first is None else self._lengths * ~is_first
            self._make_room(int((staying if mask is None else staying * mask).max()))
        if is_first is not None:
            for env in (is_first if mask is None else is_first & mask).nonzero()[0].tolist():
                if self._lengths[env]:
                    self._close(env, 0)
        self._write(rows, mask)
        is_complete = is_last
        if self.cut_after is not None and self._longest + 1 >= self.cut_after:
            is_cut = self._lengths == self.cut_after - 1
            is_complete = is_cut if is_last is None else is_last | is_cut
        if is_complete is not None:
            mask = self._close_with_new_rows(is_complete, mask)
        self._taken = {}
        self._lengths += 1 if mask is None else mask
        self._longest += 1

    def amend(self, name: str, value: float, mask: np.ndarray | None = None) -> None:
        """Change a field of the last row of open episodes: what ended them may be known only after that row.

        Args:
            name: The field.
            value: Its new value.
            mask: bool `(N,)`, whose episodes; None for all.
        """
        is_open = self._lengths > 0
        envs = np.flatnonzero(is_open if mask is None else is_open & mask)
        self._arrays[self.fields.names.index(name)][envs, self._lengths[envs] - 1] = value

    def flush(self, mask: np.ndarray | None = None) -> None:
        """Hand over open episodes as they stand.

        Args:
            mask: bool `(N,)`, whose episodes; None for all.
        """
        self._taken = {}
        for env in np.flatnonzero(self._lengths if mask is None else self._lengths * mask).tolist():
            self._close(env, 0)

    def _write(self, rows: Sequence[np.ndarray], mask: np.ndarray | None) -> None:
        """Put a row behind each open episode; it does not belong to it before the lengths say so."""
        envs = None if mask is None else mask.nonzero()[0]
        if envs is not None and len(envs) <= _FEW:
            for env in envs.tolist():
                place = self._lengths[env]
                for array, values in zip(self._arrays, rows, strict=True):
                    array[env, place] = values[env]
            return
        places = self._first_places + self._lengths
        if mask is not None and self._longest >= self._room:
            rows, places = [array[mask] for array in rows], places[mask]
        # Else there is room behind every episode, and a row that nobody brought does no harm there.
        for (items, item), array in zip(self._items, rows, strict=True):
            if items is not None:
                items[places] = array if item is None else np.frombuffer(np.ascontiguousarray(array), item)

    def _close_with_new_rows(self, is_complete: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Hand over episodes with the row just written; return which environments' rows are still open."""
        still_open = np.ones(self.num_envs, np.bool_) if mask is None else mask.copy()
        for env in (is_complete & still_open).nonzero()[0].tolist():
            self._close(env, 1)
            still_open[env] = False
        return still_open

    def _without_taken(self, rows: Sequence[np.ndarray], mask: np.ndarray | None) -> np.ndarray | None:
        """The mask less what the failed call before took, if this call repeats it: that is, brings the same rows."""
        for env, place in self._taken.items():
            for array, values in zip(self._arrays, rows, strict=True):
                if array[env, place].tobytes() != np.ascontiguousarray(values[env], array.dtype).tobytes():
                    self._taken = {}
                    return mask
        still_to_come = np.ones(self.num_envs, np.bool_) if mask is None else mask.copy()
        still_to_come[list(self._taken)] = False
        return still_to_come

    def _make_room(self, longest: int) -> None:
        """See to it that a row can follow an open episode of `longest` rows."""
        if longest >= self.max_rows:
            raise ValueError(
                f"An open episode has reached {longest} steps, the `capacity` of the dataset, and cannot take another. "
                "End it, or cut endless streams into pieces with `max_episode_length`."
            )
        self._longest = int(self._lengths.max())
        if longest >= self._room:
            self._set_room(min(2 * self._room, self._limit))

    def _set_room(self, room: int) -> None:
        arrays = [np.empty((self.num_envs, room, *field.shape), field.numpy_dtype) for field in self.fields.values()]
        for array, before in zip(arrays, self._arrays, strict=False):
            # Rows that hold nothing are left alone: memory that is never touched is never used.
            for env, length in enumerate(self._lengths.tolist()):
                array[env, :length] = before[env, :length]
        self._arrays, self._room = arrays, room
        self._first_places = np.arange(self.num_envs) * room
        self._make_views()

    def _make_views(self) -> None:
        self._first_runs = [array[0] for array in self._arrays]
        self._by_name: list[tuple[str, np.ndarray]] = []
        # A row as one opaque item: scattering 256 of 96 bytes takes 2.1 us, and 4.4 us as 24 floats each. Single
        # numbers stay what they are (opaque where numpy has none such), and shapes with a zero have nothing to write.
        self._items: list[tuple[np.ndarray | None, np.dtype | None]] = []
        for (name, field), array in zip(self.fields.items(), self._arrays, strict=True):
            rows = array.reshape(self.num_envs * self._room, *field.shape)
            self._by_name.append((name, rows))
            item = np.dtype((np.void, field.nbytes)) if (field.shape or rows.dtype.kind == "V") and rows.size else None
            items = rows if item is None else rows.reshape(-1).view(item)
            self._items.append((items if rows.size else None, item))

    def _close(self, env: int, num_new_rows: int) -> None:
        """Hand over an open episode, with `num_new_rows` that its length does not count yet."""
        place, emit = int(self._lengths[env]), self._emit
        begin = env * self._room
        end = begin + place + num_new_rows
        try:
            emit({name: rows[begin:end] for name, rows in self._by_name})
        finally:
            if emit.has_taken:
                emit.has_taken = False
                self._lengths[env] = 0
                if num_new_rows:
                    # Should a later one fail, the caller may repeat the call, which must not bring this row again.
                    self._taken[env] = place
