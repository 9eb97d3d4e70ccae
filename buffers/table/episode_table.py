"""The table of episodes: which of them live, how long they are, and where. No payload.

An episode is three numbers in flat arrays, 24 bytes, in the order in which episodes were added:

    position        0      1      2        position: 0 is the oldest that lives
    start           0      5      8        step id of its first row; never used again, may skip
    length          5      3      4        rows
    id              0      1      2        episode id; never used again

Windows are drawn over cumulated counts (see cumulation.py). The counts of an episode never change and only the oldest
leave, as a rule, so they stay valid: nothing is ever recounted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from buffers.table.cumulation import Cumulation, Int64Array
from buffers.table.windows import Windows

__all__ = ["EpisodeTable"]

_START, _LENGTH, _ID = range(3)
_INITIAL_SIZE = 64
_MAX_CUMULATIONS = 8


class _State(NamedTuple):
    """All that a change changes, so that Ctrl-C and other threads find it made or not made."""

    rows: Int64Array  # What live rows hold is never changed: a change is written behind them, or to a new array.
    first: int
    last: int  # Live episodes are the rows [first, last).
    num_steps: int
    next_start: int
    next_id: int


class EpisodeTable:
    """The live episodes, oldest first. Appending and removing the oldest are amortized O(1)."""

    def __init__(self) -> None:
        self._state = _State(np.empty((_INITIAL_SIZE, 3), np.int64), 0, 0, 0, 0, 0)
        self._cumulations: dict[tuple[str, int], tuple[Int64Array, Cumulation]] = {}

    def show(self, other: EpisodeTable) -> None:
        """Be as `other` is now: a snapshot, which later changes of `other` leave alone."""
        self._state = other._state

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": self._state, "_cumulations": {}}

    # What there is.

    def __len__(self) -> int:
        return self._state.last - self._state.first

    @property
    def rows(self) -> Int64Array:
        """int64 `(E, 3)`: start, length and id of each episode. A view: do not write to it."""
        rows, first, last, *_ = self._state
        return rows[first:last]

    @property
    def starts(self) -> Int64Array:
        """int64 `(E,)`, step ids of first rows. A view."""
        return self.rows[:, _START]

    @property
    def lengths(self) -> Int64Array:
        """int64 `(E,)`, rows of each episode. A view."""
        return self.rows[:, _LENGTH]

    @property
    def ids(self) -> Int64Array:
        """int64 `(E,)`, ascending episode ids. A view."""
        return self.rows[:, _ID]

    @property
    def num_steps(self) -> int:
        """Steps of all live episodes."""
        return self._state.num_steps

    @property
    def next_start(self) -> int:
        """The step id behind the newest episode."""
        return self._state.next_start

    @property
    def next_id(self) -> int:
        """The id of the next episode."""
        return self._state.next_id

    @property
    def oldest_start(self) -> int:
        """The step id of the first row of the oldest episode; `next_start` if there is none."""
        rows, first, last, _, next_start, _ = self._state
        return rows.item(first, _START) if first < last else next_start

    def episode(self, position: int) -> tuple[int, int, int]:
        """Start, length and id of the episode at a position."""
        start, length, episode_id = self.rows[position].tolist()
        return start, length, episode_id

    def position(self, episode_id: int) -> int | None:
        """The position of an episode; None if it does not live."""
        ids = self.ids
        position = int(ids.searchsorted(episode_id))
        return position if position < len(ids) and ids[position] == episode_id else None

    def num_steps_after(self, step_id: int) -> int:
        """Steps that were added after one; if its episode has left, with the step ids that were skipped."""
        position = int(self.starts.searchsorted(step_id, "right")) - 1
        if position < 0:
            return self.next_start - 1 - step_id
        return int(self.lengths[position:].sum() - (step_id - self.starts[position]) - 1)

    # Episodes that come.

    def append(self, length: int, start: int | None = None) -> int:
        """Write down an episode of `length` rows, the first with step id `start` or the next one; returns its id."""
        if self._state.last == len(self._state.rows):
            self.replace(self.rows)
        rows, first, last, num_steps, next_start, next_id = self._state
        start = next_start if start is None else start
        rows[last] = (start, length, next_id)
        self._state = _State(rows, first, last + 1, num_steps + length, start + length, next_id + 1)
        return next_id

    def extend(self, episodes: Int64Array) -> None:
        """Write down episodes `(n, 3)`, in ascending order; O(all that live) if some are older than some that live."""
        if not len(episodes):
            return
        if len(self) and episodes[0, _ID] < self.ids[-1]:
            episodes = np.concatenate([self.rows, episodes])
            self.replace(episodes[episodes[:, _ID].argsort()])
            return
        if self._state.last + len(episodes) > len(self._state.rows):
            self.replace(self.rows, len(episodes))
        rows, first, last, num_steps, next_start, next_id = self._state
        end = last + len(episodes)
        rows[last:end] = episodes
        start, length, episode_id = episodes[-1].tolist()
        num_steps += int(episodes[:, _LENGTH].sum())
        self._state = _State(rows, first, end, num_steps, max(next_start, start + length), max(next_id, episode_id + 1))

    def replace(self, episodes: Int64Array, num_new: int = 0) -> None:
        """Let these episodes `(n, 3)`, in ascending order, be all that live, with room for `num_new` and more."""
        rows = np.empty((len(episodes) + max(len(episodes) // 4, _INITIAL_SIZE, num_new), 3), np.int64)
        rows[: len(episodes)] = episodes
        start, length, newest_id = episodes[-1].tolist() if len(episodes) else (0, 0, -1)
        next_start, next_id = max(self.next_start, start + length), max(self.next_id, newest_id + 1)
        num_steps = int(episodes[:, _LENGTH].sum())
        self._state = _State(rows, 0, len(episodes), num_steps, next_start, next_id)

    def skip_to(self, next_id: int, next_start: int) -> None:
        """Give no number below these to an episode that comes."""
        rows, first, last, num_steps, start, number = self._state
        self._state = _State(rows, first, last, num_steps, max(next_start, start), max(next_id, number))

    # Episodes that leave.

    def retire(self, tail: int) -> None:
        """Forget the oldest episodes, those that start before step id `tail`."""
        rows, first, last, num_steps, next_start, next_id = self._state
        if first < last and rows.item(first, _START) < tail:
            num_retired = int(rows[first:last, _START].searchsorted(tail))
            num_steps -= int(rows[first : first + num_retired, _LENGTH].sum())
            self._state = _State(rows, first + num_retired, last, num_steps, next_start, next_id)

    def remove(self, position: int) -> None:
        """Forget the episode at `position`; O(1) for the oldest, O(all that live) for any other."""
        if position:
            self.replace(np.delete(self.rows, position, axis=0))
            return
        rows, first, last, num_steps, next_start, next_id = self._state
        self._state = _State(rows, first + 1, last, num_steps - rows.item(first, _LENGTH), next_start, next_id)

    def discard(self, ids: Int64Array) -> None:
        """Forget those of the episodes `ids` that live; O(1) if it is the oldest, else O(all that live)."""
        if len(ids) == 1 and len(self) and self.ids[0] == ids[0]:
            self.remove(0)
        elif len(ids):
            self.replace(self.rows[~np.isin(self.ids, ids)])

    # Windows.

    def count_windows(self, length: int) -> Cumulation:
        """The windows of T = `length` of each episode, cumulated: what `windows_of` takes."""
        return self._cumulated("windows", length)

    def count_episodes(self, length: int) -> Cumulation:
        """The episodes of at least `length` rows, cumulated."""
        return self._cumulated("episodes", length)

    def windows(self, position: Int64Array, step: Int64Array, length: int) -> Windows:
        """The windows of `length` that begin `step` rows into the episodes at `position`."""
        found = self.rows.take(position, axis=0)
        windows = Windows(length, found[:, _START] + step, step, found[:, _ID], found[:, _LENGTH])
        windows.is_checked, windows.oldest_step = windows.are_within, self.oldest_start
        return windows

    def windows_of(self, windows: Cumulation, r: Int64Array, length: int) -> Windows:
        """The windows that integers stand for, each in [0, num) of `count_windows(length)`."""
        places, step = windows.locate(r)
        # One look at 24 bytes an episode: with many episodes, each look is a cache miss.
        rows, first, *_ = self._state
        found = rows.take(places, axis=0)
        start, oldest_step = found[:, _START] + step, rows.item(first, _START)
        return Windows(length, start, step, found[:, _ID], found[:, _LENGTH], None, None, True, oldest_step)

    def no_window_message(self, length: int | None) -> str:
        """Why no window of `length` can be drawn, for an error."""
        if len(self) == 0:
            return "The dataset is empty. Add a complete episode before sampling."
        stored = f"every stored episode (longest of {len(self)}: {self.lengths.max()} steps)"
        return f"`sequence_length`={length} is longer than {stored}. Add longer episodes or lower it."

    def _cumulated(self, kind: str, length: int) -> Cumulation:
        rows, first, last, *_ = self._state
        key = (kind, length)
        counted_rows, cumulation = self._cumulations.get(key) or (None, None)
        if cumulation is None or counted_rows is not rows:
            self._cumulations.pop(key, None)
            # A sequence length that changes for ever (a curriculum) must not leave an array behind each time.
            if len(self._cumulations) == _MAX_CUMULATIONS:
                del self._cumulations[next(iter(self._cumulations))]
            cumulation = Cumulation(len(rows), first)
            self._cumulations[key] = rows, cumulation
        if cumulation.counted < first:
            cumulation.restart(first)
        cumulation.first = first
        if cumulation.counted + 1 == last:
            num_rows = rows.item(last - 1, _LENGTH)
            cumulation.append(max(num_rows - (length - 1), 0) if kind == "windows" else int(num_rows >= length))
        elif cumulation.counted < last:
            lengths = rows[cumulation.counted : last, _LENGTH]
            cumulation.extend(np.maximum(lengths - (length - 1), 0) if kind == "windows" else lengths >= length)
        return cumulation
