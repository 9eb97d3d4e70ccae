"""The table of live episodes: where each begins and how long it is. No payload.

An episode is four numbers, 32 bytes, in the order in which episodes were added:

    position        0      1      2        0 is the oldest live episode
    start           0      5      8        step id of its first row; never reused, may skip
    length          5      3      4        rows
    id              0      1      2        episode id; never reused
    cut             0      0      0        how it was cut out of a longer stream, see cut.py

Windows are drawn over cumulated counts (see cumulation.py), which stay valid when episodes are appended and when the
oldest leave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from buffers.table.cumulation import Cumulation, Int64Array
from buffers.table.cut import CONTINUES, context_of
from buffers.table.selection import YES, Selection
from buffers.table.windows import Windows

__all__ = ["DrawContext", "EpisodeTable", "ID", "TableRow"]

_START, _LENGTH, ID, _CUT = range(4)
_INITIAL_SIZE = 64
_MAX_CUMULATIONS = 8
# Sizes of the pieces that are counted, see `_counts`.
_SINGLE, _ALL, _STEPS = 1, 2**62, 0

TableRow = tuple[int, int, int, int]


class DrawContext(NamedTuple):
    """What a sampler may know besides the episodes."""

    batch: int = 0  # The position of the batch in its stream.
    #: The late fields of the dataset, `buffers.late.LateFields`; None where there are none.
    late: Any = None
    #: The row of a window that stands for it: the one that `offsets` count from. None: all its rows do.
    anchor: int | None = None
    #: The windows that are to be replaced, which were gone before they were read; None for the batch itself.
    again: Windows | None = None
    #: The position of the first batch of this iteration, and a function that waits a little, for other workers.
    first: int = 0
    pause: Any = None
    #: Whether windows are whole episodes.
    is_whole: bool = False
    #: Whether weights are asked for.
    has_weights: bool = False
    #: Whether `Windows.density` must be relative to a uniform draw, not only to that of other windows.
    needs_density: bool = False


class _State(NamedTuple):
    """Replaced as a whole, so that no other thread sees half a change and Ctrl-C leaves none."""

    rows: Int64Array  # Live rows are never overwritten: changes go behind them or into a new array.
    first: int  # Live episodes are the rows [first, last).
    last: int
    num_steps: int
    next_start: int
    next_id: int


class EpisodeTable:
    """The live episodes, oldest first. Appending and removing the oldest are amortized O(1).

    All arrays are int64 views of `(E,)` or `(E, 4)` for E live episodes: do not write to them.
    """

    def __init__(self) -> None:
        self._state = _State(np.empty((_INITIAL_SIZE, 4), np.int64), 0, 0, 0, 0, 0)
        #: Whether an episode has ever been a piece of a longer stream.
        self.has_cuts = False
        #: Which windows are drawn.
        self.selection = Selection()
        self.context = DrawContext()
        self._cumulations: dict[tuple[int, int, int, Selection], tuple[Int64Array, Cumulation]] = {}

    @property
    def state(self) -> _State:
        """What a snapshot is made of."""
        return self._state

    def show(self, other: EpisodeTable) -> None:
        """Become a snapshot of `other`, which its later changes do not affect."""
        self._state, self.has_cuts = other._state, other.has_cuts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cumulations": {}}

    def __len__(self) -> int:
        return self._state.last - self._state.first

    @property
    def rows(self) -> Int64Array:
        """`(E, 4)`: start, length, id and cut of each episode."""
        rows, first, last, *_ = self._state
        return rows[first:last]

    @property
    def starts(self) -> Int64Array:
        """`(E,)`: step ids of first rows."""
        return self.rows[:, _START]

    @property
    def lengths(self) -> Int64Array:
        """`(E,)`: rows of each episode."""
        return self.rows[:, _LENGTH]

    @property
    def ids(self) -> Int64Array:
        """`(E,)`: episode ids, ascending."""
        return self.rows[:, ID]

    @property
    def num_steps(self) -> int:
        """Steps of all live episodes."""
        return self._state.num_steps

    @property
    def mean_length(self) -> float:
        """Steps of an episode on average, where pieces of a stream are one episode; 0.0 if there is none."""
        cuts = self.rows[:, _CUT]
        num_episodes = len(cuts) - int(((cuts & CONTINUES) != 0).sum())
        return (self.num_steps - int(context_of(cuts).sum())) / max(num_episodes, 1)

    @property
    def next_start(self) -> int:
        """The step id after the last row of the newest episode."""
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

    def episode(self, position: int) -> TableRow:
        """The start, length, id and cut of the episode at a position."""
        start, length, episode_id, cut = self.rows[position].tolist()
        return start, length, episode_id, cut

    def position(self, episode_id: int) -> int | None:
        """The position of an episode; None if it is not in the table."""
        ids = self.ids
        position = int(ids.searchsorted(episode_id))
        return position if position < len(ids) and ids[position] == episode_id else None

    def row_of(self, episode_id: int) -> TableRow:
        """`episode` of an id; all 0 if it is not in the table."""
        position = self.position(episode_id)
        return (0, 0, 0, 0) if position is None else self.episode(position)

    def num_steps_after(self, step_id: int) -> int:
        """The number of steps added after a step; if its episode has left, skipped step ids count as steps."""
        position = int(self.starts.searchsorted(step_id, "right")) - 1
        if position < 0:
            return self.next_start - 1 - step_id
        return int(self.lengths[position:].sum() - (step_id - self.starts[position]) - 1)

    def append(self, length: int, start: int | None = None, cut: int = 0) -> int:
        """Add an episode of `length` rows that begins at step id `start`, or at `next_start`; returns its id."""
        if self._state.last == len(self._state.rows):
            self.replace(self.rows)
        rows, first, last, num_steps, next_start, next_id = self._state
        start = next_start if start is None else start
        rows[last] = (start, length, next_id, cut)
        self.has_cuts = self.has_cuts or cut != 0
        self._state = _State(rows, first, last + 1, num_steps + length, start + length, next_id + 1)
        return next_id

    def extend(self, episodes: Int64Array) -> None:
        """Add episodes `(n, 4)` in ascending order; O(E) if one is older than a live one."""
        if not len(episodes):
            return
        if len(self) and episodes[0, ID] < self.ids[-1]:
            episodes = np.concatenate([self.rows, episodes])
            self.replace(episodes[episodes[:, ID].argsort()])
            return
        if self._state.last + len(episodes) > len(self._state.rows):
            self.replace(self.rows, len(episodes))
        rows, first, last, num_steps, next_start, next_id = self._state
        end = last + len(episodes)
        rows[last:end] = episodes
        self.has_cuts |= bool(episodes[:, _CUT].any())
        start, length, episode_id, _ = episodes[-1].tolist()
        num_steps += int(episodes[:, _LENGTH].sum())
        self._state = _State(rows, first, end, num_steps, max(next_start, start + length), max(next_id, episode_id + 1))

    def replace(self, episodes: Int64Array, num_new: int = 0) -> None:
        """Replace all episodes by these `(n, 4)`, in ascending order, with room for at least `num_new` more."""
        rows = np.empty((len(episodes) + max(len(episodes) // 4, _INITIAL_SIZE, num_new), 4), np.int64)
        rows[: len(episodes)] = episodes
        self.has_cuts |= bool(episodes[:, _CUT].any())
        start, length, newest_id, _ = episodes[-1].tolist() if len(episodes) else (0, 0, -1, 0)
        next_start, next_id = max(self.next_start, start + length), max(self.next_id, newest_id + 1)
        num_steps = int(episodes[:, _LENGTH].sum())
        self._state = _State(rows, 0, len(episodes), num_steps, next_start, next_id)

    def skip_to(self, next_id: int, next_start: int) -> None:
        """Give later episodes ids and step ids of at least these."""
        rows, first, last, num_steps, start, number = self._state
        self._state = _State(rows, first, last, num_steps, max(next_start, start), max(next_id, number))

    def retire(self, tail: int) -> None:
        """Remove the episodes that start before step id `tail`."""
        rows, first, last, num_steps, next_start, next_id = self._state
        if first < last and rows.item(first, _START) < tail:
            num_retired = int(rows[first:last, _START].searchsorted(tail))
            num_steps -= int(rows[first : first + num_retired, _LENGTH].sum())
            self._state = _State(rows, first + num_retired, last, num_steps, next_start, next_id)

    def remove(self, position: int) -> None:
        """Remove the episode at `position`; O(1) for the oldest, O(E) for any other."""
        if position:
            self.replace(np.delete(self.rows, position, axis=0))
            return
        rows, first, last, num_steps, next_start, next_id = self._state
        self._state = _State(rows, first + 1, last, num_steps - rows.item(first, _LENGTH), next_start, next_id)

    def discard(self, ids: Int64Array) -> None:
        """Remove the live episodes among `ids`; O(1) if that is the oldest alone, else O(E)."""
        if len(ids) == 1 and len(self) and self.ids[0] == ids[0]:
            self.remove(0)
        elif len(ids):
            self.replace(self.rows[~np.isin(self.ids, ids)])

    # Windows.

    def count_windows(self, length: int) -> Cumulation:
        """The windows of T = `length` steps, for `windows_of`."""
        return self._cumulated(_SINGLE, length)

    def num_to_draw(self, length: int | None) -> int:
        """How many windows of T = `length` there are; with None, episodes."""
        return len(self) if length is None else self.count_windows(length).num

    def count_episodes(self, length: int) -> Cumulation:
        """The episodes of at least `length` rows."""
        return self._cumulated(_ALL, length)

    def count_pieces(self, length: int, size: int, extra: int) -> Cumulation:
        """Of each episode with windows of T = `length` steps: pieces of `size` that hold these and `extra` more."""
        return self._cumulated(size, length, extra)

    def numbers_of(self, step_ids: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The rows of `state.rows` that hold steps `(n,)`, and where in its episode each is; negative if in none."""
        rows, first, last, *_ = self._state
        if first == last:
            return np.zeros(len(step_ids), np.int64), np.full(len(step_ids), -1)
        counted = self._cumulated(_STEPS, 1)
        # Steps between episodes, whose ids were skipped, count as steps of the next.
        begin = rows.item(last - 1, _START) + rows.item(last - 1, _LENGTH) - counted.num
        r = step_ids - begin
        if np.minimum.reduce(r, initial=0) >= 0 and np.maximum.reduce(r, initial=0) < counted.num:
            number, _ = counted.locate(r)
            return number, step_ids - rows[:, _START].take(number)
        number, _ = counted.locate(np.minimum(np.maximum(r, 0), counted.num - 1))
        step = step_ids - rows[:, _START].take(number)
        return number, np.where((r >= 0) & (r < counted.num), step, -1)

    def numbers_of_ids(self, ids: Int64Array) -> tuple[Int64Array, Any]:
        """The rows of `state.rows` that hold episodes `(n,)`, and whether each lives, `(n,)` or True."""
        rows, first, last, *_ = self._state
        if first == last:
            return np.zeros(len(ids), np.int64), np.zeros(len(ids), np.bool_)
        # Most tables have all ids from the oldest to the newest.
        number = np.minimum(np.maximum(ids + (first - rows.item(first, ID)), first), last - 1)
        lives = rows[:, ID].take(number) == ids
        if lives.all():
            return number, True
        number = np.minimum(self.ids.searchsorted(ids), last - first - 1) + first
        return number, rows[:, ID].take(number) == ids

    def cuts_of(self, episode: Int64Array) -> Int64Array:
        """The cuts of live episodes, by their ids `(B,)`."""
        return self.rows[self.ids.searchsorted(episode), _CUT]

    def steps_to_draw(self, position: Int64Array, length: int) -> tuple[Any, Int64Array]:
        """Of episodes at `position` `(B,)`: the first step of windows of T = `length`, one or `(B,)`, and how many."""
        cut = self.rows[position, _CUT] if self.has_cuts else None
        num_windows = self.selection.num_windows(self.lengths[position], cut, length)
        return self.selection.first_steps(cut, length), num_windows

    def windows(self, position: Int64Array, step: Int64Array, length: int) -> Windows:
        """The windows of T = `length` that begin at row `step` `(B,)` of the episodes at `position` `(B,)`."""
        found = self.rows.take(position, axis=0)
        windows = Windows(length, found[:, _START] + step, step, found[:, ID], found[:, _LENGTH])
        windows.cut = found[:, _CUT] if self.has_cuts else None
        windows.is_checked, windows.oldest_step = self.has_room_for(windows), self.oldest_start
        return windows

    def windows_of(self, windows: Cumulation, r: Int64Array, length: int) -> Windows:
        """The windows of integers `r` `(B,)`, each in [0, num) of `windows`, which is `count_windows(length)`."""
        numbers, step = windows.locate(r)
        rows, first, *_ = self._state
        # All of an episode's row at once: with many episodes, each look is a cache miss.
        found, cut = rows.take(numbers, axis=0), None
        if self.selection.stride > 1:
            step *= self.selection.stride
        if self.has_cuts:
            cut = found[:, _CUT]
        if self.has_cuts or self.selection.pad_before:
            step += self.selection.first_steps(cut, length)
        start, oldest_step = found[:, _START] + step, rows.item(first, _START)
        return Windows(length, start, step, found[:, ID], found[:, _LENGTH], None, None, True, oldest_step, cut)

    def windows_at(self, places: Int64Array, length: int | None) -> Windows:
        """The windows of integers `(B,)` below `num_to_draw(length)`; with None, the episodes at these positions."""
        if length is None:
            return self.windows(places, np.zeros(len(places), np.int64), int(self.lengths[places].max()))
        return self.windows_of(self.count_windows(length), places, length)

    def places_of(self, windows: Windows, length: int | None) -> Int64Array:
        """The integers `(B,)` that `windows_at` takes for windows of live episodes."""
        position = self.ids.searchsorted(windows.episode)
        if length is None:
            return position
        counted = self.count_windows(length)
        cut = self.rows[position, _CUT] if self.has_cuts else None
        before = counted.begins(self._state.first + position) - counted.bounds[0]
        return before + windows.step - self.selection.first_steps(cut, length)

    def has_room_for(self, windows: Windows) -> bool:
        """Whether windows lie within their episodes, and the padding that is selected."""
        return windows.are_within(*self.selection.room(windows.cut))

    def reachable(self, length: int | None, selection: Selection, most: int | None = None) -> float:
        """The share of the steps that lie in some window of T = `length`; 0.0 if there are none.

        With None for T, windows are whole episodes, or the last `most` rows of longer ones.
        """
        rows = self.rows
        if selection.split is not None:
            rows = rows[selection.split.judge(rows[:, ID]) == YES]
        lengths = rows[:, _LENGTH]
        if not len(rows):
            return 0.0
        if length is None:
            reached = lengths if most is None else np.minimum(lengths, most)
        elif self.has_cuts:
            reached = lengths[selection.num_windows(lengths, rows[:, _CUT], length) > 0]
        else:
            reached = lengths[lengths >= length - selection.pad_before - selection.pad_after]
        return float(reached.sum() / lengths.sum())

    def no_window_message(self, length: int | None) -> str:
        """The error message where no window of `length` can be drawn."""
        if len(self) == 0:
            return "The dataset is empty. Add a complete episode before sampling."
        stored = f"every stored episode (longest of {len(self)}: {self.lengths.max()} steps)"
        advice = "Add longer episodes, lower it, or pad (`pad_before`, `pad_after`)"
        return f"`sequence_length`={length} is longer than {stored}. {advice}; for `offsets`, it is how far they reach."

    def _cumulated(self, size: int, length: int, extra: int = 0) -> Cumulation:
        rows, first, last, *_ = self._state
        key = (size, length, extra, self.selection)
        counted_rows, cumulation = self._cumulations.get(key) or (None, None)
        if cumulation is not None and counted_rows is rows and cumulation.counted >= first:
            cumulation.first = first
            if cumulation.counted == last:
                return cumulation
            counts = self._counts(size, rows, cumulation.counted, last, length, extra, True)
            if all(map(cumulation.append, counts.tolist())):
                return cumulation
        self._cumulations.pop(key, None)
        # A sequence length that keeps changing (a curriculum) must not leave an array behind each time.
        if len(self._cumulations) == _MAX_CUMULATIONS:
            del self._cumulations[next(iter(self._cumulations))]
        cumulation = Cumulation(self._counts(size, rows, first, last, length, extra, False), first, len(rows))
        self._cumulations[key] = rows, cumulation
        return cumulation

    def _counts(
        self, size: int, rows: Int64Array, first: int, last: int, length: int, extra: int, goes_on: bool
    ) -> Int64Array:
        """For the rows [first, last): pieces of `size` windows; or steps since the row before, if `goes_on`."""
        found = rows[first:last]
        if size == _STEPS:
            ends = found[:, _START] + found[:, _LENGTH]
            begin = rows[first - 1, _START] + rows[first - 1, _LENGTH] if goes_on else found[:1, _START]
            return np.diff(ends, prepend=begin)
        num: Int64Array = self.selection.num_windows(
            found[:, _LENGTH], found[:, _CUT] if self.has_cuts else None, length
        )
        if extra:
            num += extra * (num > 0)
        return num if size == _SINGLE else -(-num // size)
