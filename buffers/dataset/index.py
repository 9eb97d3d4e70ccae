"""Which episodes live, how long they are, and where: no payload.

An episode is three numbers in flat arrays, 24 bytes, in the order in which episodes were added:

    position        0      1      2        position: 0 is the oldest that lives
    start           0      5      8        step id of its first row; never used again
    length          5      3      4        rows
    id              0      1      2        episode id; never used again

Windows are drawn over cumulated counts (see cumulation.py). The counts of an episode never change and only the oldest
leave, as a rule, so they stay valid: nothing is ever recounted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from buffers.dataset.cumulation import Cumulation, Int64Array

__all__ = ["EpisodeIndex", "Windows"]

_START, _LENGTH, _ID = range(3)
_INITIAL_SIZE = 64
_MAX_CUMULATIONS = 8


@dataclass(slots=True)  # Not frozen: that takes 2 us to make.
class Windows:
    """Windows as drawn: what is to be read, and where it lies in its episodes. Nothing changes them.

    Attributes:
        length: T, steps of each window. Whole episodes have the length of the longest; the shorter are padded.
        start: int64 `(B,)`, step id of the first row.
        step: int64 `(B,)`, position of the first row in its episode.
        episode: int64 `(B,)`, episode ids.
        episode_length: int64 `(B,)`, rows of the episodes.
        weight: float32 `(B,)`, importance weights; None stands for ones.
        source: int64 `(B,)`, which of several stores each window is in; None where there is one.
    """

    length: int
    start: Int64Array
    step: Int64Array
    episode: Int64Array
    episode_length: Int64Array
    weight: npt.NDArray[np.float32] | None = None
    source: Int64Array | None = None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_rows(self) -> Int64Array:
        """int64 `(B,)`, rows that are real: T, or fewer where the episode ends before the window does."""
        return np.minimum(self.length, self.episode_length - self.step)

    @property
    def last_steps(self) -> Int64Array:
        """int64 `(B,)`, step ids of the last rows that are real."""
        return self.start + self.num_rows - 1

    def __getitem__(self, selection: slice | npt.NDArray[np.generic]) -> Windows:
        return Windows(
            self.length,
            self.start[selection],
            self.step[selection],
            self.episode[selection],
            self.episode_length[selection],
            None if self.weight is None else self.weight[selection],
            None if self.source is None else self.source[selection],
        )

    def replaced(self, positions: npt.NDArray[np.generic], others: Windows) -> Windows:
        """A copy with the windows at `positions` replaced by others of the same length."""
        columns = []
        for name in ("start", "step", "episode", "episode_length", "weight", "source"):
            mine, theirs = getattr(self, name), getattr(others, name)
            if mine is not None:
                mine = mine.copy()
                mine[positions] = theirs
            columns.append(mine)
        return Windows(self.length, *columns)


class EpisodeIndex:
    """The live episodes, oldest first. Appending and removing the oldest are amortized O(1)."""

    def __init__(self) -> None:
        self._table = np.empty((_INITIAL_SIZE, 3), np.int64)
        # Live episodes are the rows [first, last) of the table; rows before `first` are spent.
        self._first = 0
        self._last = 0
        self._cumulations: dict[tuple[str, int], Cumulation] = {}
        self.num_steps = 0
        self.next_start = 0
        self.next_id = 0
        #: Counts changes: windows that were drawn are as if drawn now while it stays.
        self.version = 0

    def __len__(self) -> int:
        return self._last - self._first

    @property
    def starts(self) -> Int64Array:
        """int64 `(E,)`, step ids of first rows. A view: valid until the index changes."""
        return self._table[self._first : self._last, _START]

    @property
    def lengths(self) -> Int64Array:
        """int64 `(E,)`, rows of each episode. A view: valid until the index changes."""
        return self._table[self._first : self._last, _LENGTH]

    @property
    def ids(self) -> Int64Array:
        """int64 `(E,)`, ascending episode ids. A view: valid until the index changes."""
        return self._table[self._first : self._last, _ID]

    @property
    def rows(self) -> Int64Array:
        """int64 `(E, 3)`, start, length and id of each. A view: valid until the index changes."""
        return self._table[self._first : self._last]

    def episode(self, position: int) -> tuple[int, int, int]:
        """Start, length and id of the episode at a position."""
        start, length, episode_id = self._table[self._first + position].tolist()
        return start, length, episode_id

    def append(self, length: int) -> int:
        """Write down an episode of `length` rows and return its id."""
        if self._last == len(self._table):
            self._relocate(1)
        episode_id = self.next_id
        self._table[self._last] = (self.next_start, length, episode_id)
        self._last += 1
        self.version += 1
        self.next_id += 1
        self.next_start += length
        self.num_steps += length
        return episode_id

    def extend(self, rows: Int64Array) -> None:
        """Write down episodes `(n, 3)` of (start, length, id), in ascending order, all newer than those that live."""
        if self._last + len(rows) > len(self._table):
            self._relocate(len(rows))
        self.version += 1
        if len(rows):
            self._table[self._last : self._last + len(rows)] = rows
            self._last += len(rows)
            self.num_steps += int(rows[:, _LENGTH].sum())
            self.next_start = int(rows[-1, _START] + rows[-1, _LENGTH])
            self.next_id = int(rows[-1, _ID]) + 1

    def insert(self, rows: Int64Array) -> None:
        """`extend`, also by episodes older than some that live; those cost O(all that live)."""
        if len(self) and len(rows) and rows[0, _ID] < self.ids[-1]:
            rows = np.concatenate([self.rows, rows])
            rows = rows[rows[:, _ID].argsort()]
            self.clear()
        self.extend(rows)

    def clear(self) -> None:
        """Forget all episodes."""
        self.version += 1
        self._first = self._last = self.num_steps = 0
        self._cumulations.clear()

    def retire(self, tail: int) -> None:
        """Forget the oldest episodes, those that start before step id `tail`."""
        if len(self) and self._table[self._first, _START] < tail:
            num_retired = int(self.starts.searchsorted(tail))
            self.version += 1
            self.num_steps -= int(self.lengths[:num_retired].sum())
            self._first += num_retired

    def remove(self, position: int) -> None:
        """Forget the episode at `position`; O(1) for the oldest, a shift of the younger ones for any other."""
        row = self._first + position
        self.num_steps -= int(self._table[row, _LENGTH])
        self.version += 1
        if position == 0:
            self._first += 1
            return
        self._table[row : self._last - 1] = self._table[row + 1 : self._last]
        self._last -= 1
        for cumulation in self._cumulations.values():
            cumulation.truncate(row)

    def discard(self, ids: Int64Array) -> None:
        """Forget those of the episodes `ids` that live; a few of the oldest are O(1), any others O(all that live)."""
        positions = self.ids.searchsorted(ids)
        lives = positions < len(self)
        lives[lives] = self.ids[positions[lives]] == ids[lives]
        positions = np.unique(positions[lives])
        self.version += 1
        self.num_steps -= int(self.lengths[positions].sum())
        num_oldest = int((positions == np.arange(len(positions))).sum())
        self._first += num_oldest
        positions = positions[num_oldest:] - num_oldest
        if len(positions):
            row = self._first + int(positions[0])
            kept = np.delete(self._table[row : self._last], positions - positions[0], axis=0)
            self._table[row : row + len(kept)] = kept
            self._last = row + len(kept)
            for cumulation in self._cumulations.values():
                cumulation.truncate(row)

    def count_windows(self, length: int) -> Cumulation:
        """The windows of T = `length` of each episode, cumulated: what `Cumulation.locate` leads to."""
        return self._cumulated("windows", length)

    def count_episodes(self, length: int) -> Cumulation:
        """The episodes of at least `length` rows, cumulated."""
        return self._cumulated("episodes", length)

    def position(self, episode_id: int) -> int | None:
        """The position of an episode; None if it does not live."""
        position = int(self.ids.searchsorted(episode_id))
        return position if position < len(self) and self.ids[position] == episode_id else None

    def windows(self, position: Int64Array, step: Int64Array, length: int) -> Windows:
        """The windows of `length` that begin `step` rows into the episodes at `position`."""
        return _windows(self.rows, position, step, length)

    def windows_of(self, windows: Cumulation, r: Int64Array, length: int) -> Windows:
        """The windows that integers stand for, each in [0, num) of `count_windows(length)`."""
        rows, step = windows.locate(r)
        return _windows(self._table, rows, step, length)

    def no_window_message(self, length: int | None) -> str:
        """Why no window of `length` can be drawn, for an error."""
        if len(self) == 0:
            return "The dataset is empty. Add a complete episode before sampling."
        return (
            f"`sequence_length`={length} is longer than every stored episode (longest of {len(self)}: "
            f"{self.lengths.max()} steps). Add longer episodes or lower it."
        )

    def _cumulated(self, kind: str, length: int) -> Cumulation:
        key = (kind, length)
        cumulation = self._cumulations.get(key)
        if cumulation is None:
            # A sequence length that changes for ever (a curriculum) must not leave an array behind each time.
            if len(self._cumulations) == _MAX_CUMULATIONS:
                del self._cumulations[next(iter(self._cumulations))]
            cumulation = self._cumulations[key] = Cumulation(len(self._table), self._first)
        if cumulation.counted < self._first:
            cumulation.restart(self._first)
        cumulation.first = self._first
        if cumulation.counted + 1 == self._last:
            num_rows = int(self._table[cumulation.counted, _LENGTH])
            cumulation.append(max(num_rows - (length - 1), 0) if kind == "windows" else int(num_rows >= length))
        elif cumulation.counted < self._last:
            lengths = self._table[cumulation.counted : self._last, _LENGTH]
            cumulation.extend(np.maximum(lengths - (length - 1), 0) if kind == "windows" else lengths >= length)
        return cumulation

    def _relocate(self, num_new: int) -> None:
        """Move the live rows to the front of a table that has room for new ones, and for a quarter more."""
        live = len(self)
        table = np.empty((live + max(live // 4, _INITIAL_SIZE, num_new), 3), np.int64)
        table[:live] = self.rows
        # Should this be cut off by Ctrl-C, they are counted anew.
        cumulations, self._cumulations = self._cumulations, {}
        for cumulation in cumulations.values():
            cumulation.relocate(len(table), self._first)
        self._table, self._first, self._last = table, 0, live
        self._cumulations = cumulations


def _windows(table: Int64Array, rows: Int64Array, step: Int64Array, length: int) -> Windows:
    # One look at 24 bytes an episode: with many episodes, each look is a cache miss.
    found = table.take(rows, axis=0)
    return Windows(length, found[:, _START] + step, step, found[:, _ID], found[:, _LENGTH])
