"""Indexes from a random number to a window, or an episode, with probability proportional to its priority ** alpha.

The priority of a window is computed from its rows' when it is proposed; nothing is kept for each window. Proposals come
from pieces of an episode: G windows in a row, with the G rows that they begin at. A sum tree holds for each a bound:

    row          0 1 2 3 4 5 6            T = 3, G = 4: pieces of 4 windows and of 1
    priority     1 1 1 8 1 1 1
    piece        0 0 0 0 1 1 1            the largest of its rows: 8, 1
    windows      # # # # #                they end within the next piece: bounds 4 * max(8, 1) ** alpha, 1 * 1 ** alpha

A piece is drawn by its bound, then one of its windows uniformly, and that one is accepted with probability
(its priority / 8) ** alpha. So the distribution is exact, and a change of a row costs what a few pieces cost. G is
about T, so most proposals are accepted; the fewest where one row at an end of its episode has nearly all priority, as
only one window of its piece has it: then, one in G. With a small eta, the sums of pieces bound the mean as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch

from buffers.late import PriorityField
from buffers.sampler.sum_tree import Float64Array, SumTree
from buffers.table import Cumulation, EpisodeTable, Int64Array

__all__ = ["EpisodeIndex", "Pieces", "PriorityIndex", "WindowIndex"]

_ROWS_AT_ONCE = 1 << 18
_LARGE_ETA, _MARGIN = 0.8, 1 + 1e-5  # Of rounding.


class Pieces(NamedTuple):
    """Some pieces; all arrays are `(n,)` or `(n, 4)`."""

    number: Int64Array  # In the tree.
    episode: Int64Array  # Rows of the table: start, length, id, cut.
    step: Int64Array  # Where its first window begins, relative to the episode.
    num: Int64Array  # Windows from there on in the episode: 0 or less if only windows of earlier pieces have its rows.


class PriorityIndex(ABC):
    """Follows one table of episodes and the log of changed priorities; belongs to one process.

    Attributes:
        field: The priorities.
        size: G, the most windows of a piece.
        tree: The bounds of pieces.
        is_exact: Whether bounds are exact, so that every proposal is accepted.
    """

    size, is_exact = 1, True

    def __init__(self, field: PriorityField, alpha: float, eta: float) -> None:
        self.field, self._alpha, self._eta = field, alpha, eta
        self.tree = SumTree(np.zeros(0))
        # Of each piece, the priority ** alpha of all its windows; made when someone asks for the total.
        self._exact: SumTree | None = None
        self._cumulation = Cumulation(np.zeros(0, np.int64), 0, 0)
        # The live rows of the table that are in the tree, the numbers of their pieces, and the row of each piece.
        self._rows, self._first, self._last = np.zeros((0, 4), np.int64), 0, 0
        self._begin = self._end = 0
        self._row_of_piece = np.zeros(0, np.int64)
        self._num_read = 0
        # Whether the last call of `follow` was not cut off, by Ctrl-C.
        self._is_whole = False

    @abstractmethod
    def _count(self, table: EpisodeTable) -> Cumulation:
        """The pieces of each episode."""

    @abstractmethod
    def _pieces(self, table: EpisodeTable, row: Int64Array, number: Int64Array) -> Pieces:
        """The pieces of these numbers `(n,)`, which are of the episodes in rows `(n,)` of the table."""

    @abstractmethod
    def _changed(self, table: EpisodeTable, row: Int64Array, step: Int64Array, num: Int64Array) -> tuple[Any, Any]:
        """First and last position of the pieces whose windows have one of `num` `(n,)` rows from `step` on."""

    @abstractmethod
    def _bounds(self, pieces: Pieces) -> Float64Array:
        """Of each piece, its windows times a bound of their priority ** alpha."""

    @abstractmethod
    def weights(self, episode: Int64Array, step: Int64Array) -> Float64Array:
        """The priority ** alpha of the windows that begin at `step` `(n,)` of episodes `(n, 4)`."""

    def pieces(self, table: EpisodeTable, numbers: Int64Array) -> Pieces:
        """The pieces of these numbers `(n,)`; others than there are become the first or the last."""
        numbers = np.minimum(np.maximum(numbers, self._begin), self._end - 1)
        return self._pieces(table, self._row_of_piece.take(numbers), numbers)

    def follow(self, table: EpisodeTable) -> None:
        """Take in what has changed since the last call: episodes that came or left, and priorities."""
        changes, num_read = self.field.log.since(self._num_read)
        if not self._is_whole:
            changes = None  # Start over.
        self._is_whole = False
        cumulation = self._count(table)
        begin, end = cumulation.bounds
        rows, first, last, *_ = table.state
        if cumulation is not self._cumulation or changes is None or end > self.tree.num_leaves:
            self._rebuild(table, cumulation, keep=changes is not None)
        elif (begin, end) != (self._begin, self._end):
            for tree in (self.tree, self._exact):
                if tree is not None and begin > self._begin:
                    tree.clear(self._begin, begin)
            new = np.arange(max(self._last, first), last)
            self._begin, self._end = begin, end
            self._rows, self._first, self._last = rows, first, last
            self._add(table, new)
        self._num_read = num_read
        if changes is not None and len(changes):
            row, lives = table.numbers_of_ids(changes[:, 0])
            if lives is not True:
                row, changes = row[lives], changes[lives]
            self._refresh(table, row, *self._changed(table, row, changes[:, 1], changes[:, 2]))
        self._is_whole = True

    def _rebuild(self, table: EpisodeTable, cumulation: Cumulation, keep: bool) -> None:
        """Lay out the pieces anew, with the weights that are known, if they are to be kept."""
        begin, end = cumulation.bounds
        sources = targets = np.zeros(0, np.int64)
        known = np.zeros(len(table), np.bool_)
        if keep and self._last > self._first and len(table):
            old_ids = self._rows[self._first : self._last, 2]
            position = np.minimum(old_ids.searchsorted(table.ids), len(old_ids) - 1)
            known = old_ids[position] == table.ids
            row = table.state.first + np.flatnonzero(known)
            begins = cumulation.begins(row)
            num = cumulation.begins(row + 1) - begins
            targets = _ranges(begins, num)
            sources = targets + (self._cumulation.begins(self._first + position[known]) - begins).repeat(num)
        self._move(sources, targets, end + end // 4)
        self._cumulation, self._begin, self._end = cumulation, begin, end
        self._rows, self._first, self._last = table.state.rows, table.state.first, table.state.last
        live = np.arange(self._first, self._last)
        self._row_of_piece = np.zeros(self.tree.num_leaves, np.int64)
        self._row_of_piece[begin:end] = live.repeat(cumulation.begins(live + 1) - cumulation.begins(live))
        self._add(table, live[~known])

    def _move(self, sources: Int64Array, targets: Int64Array, size: int) -> None:
        """Make room for `size` pieces, of which those at `targets` are those that were at `sources`."""
        weights = np.zeros(size)
        weights[targets] = self.tree.weights[sources]
        self.tree, self._exact = SumTree(weights), None

    def _add(self, table: EpisodeTable, row: Int64Array) -> None:
        """Look at all pieces of episodes."""
        begins = self._cumulation.begins(row)
        last = self._cumulation.begins(row + 1) - begins - 1
        done = 0
        while done < len(row):
            end = max(done + 1, int(begins.searchsorted(begins[done] + _ROWS_AT_ONCE)))
            self._refresh(table, row[done:end], np.zeros(end - done, np.int64), last[done:end])
            done = end

    def _refresh(self, table: EpisodeTable, row: Int64Array, first: Int64Array, last: Int64Array) -> None:
        """Look at the pieces at positions from `first` to `last` `(n,)` of the episodes in these rows of the table."""
        num = last - first + 1
        numbers = _ranges(self._cumulation.begins(row) + first, num)
        if len(numbers):
            row = row.repeat(num)
            self._row_of_piece[numbers] = row
            pieces = self._pieces(table, row, numbers)
            self.tree.set(numbers, self._bounds(pieces))
            if self._exact is not None:
                self._exact.set(numbers, self._sums(pieces))

    def total(self, table: EpisodeTable) -> float:
        """The priority ** alpha of all windows, summed up."""
        if self._exact is None:
            self._exact = SumTree(np.zeros(self.tree.num_leaves))
            for begin in range(self._begin, self._end, _ROWS_AT_ONCE):
                numbers = np.arange(begin, min(begin + _ROWS_AT_ONCE, self._end))
                self._exact.set(numbers, self._sums(self.pieces(table, numbers)))
        return self._exact.total()

    def _sums(self, pieces: Pieces) -> Float64Array:
        found, num = np.zeros(len(pieces.num)), np.minimum(np.maximum(pieces.num, 0), self.size)
        at_once = max(1, _ROWS_AT_ONCE // self.size)
        for begin in range(0, len(found), at_once):
            part = begin + num[begin : begin + at_once].nonzero()[0]
            some, first = num[part], num[part].cumsum() - num[part]
            steps = np.arange(int(some.sum())) + (pieces.step[part] - first).repeat(some)
            weights = self.weights(pieces.episode[part].repeat(some, axis=0), steps)
            if len(part):
                found[part] = np.add.reduceat(weights, first)
        return found


class WindowIndex(PriorityIndex):
    """Windows of T = `length` steps; with an `anchor`, their priority is that of this row alone."""

    def __init__(self, field: PriorityField, alpha: float, eta: float, length: int, anchor: int | None) -> None:
        super().__init__(field, alpha, eta)
        self._length = length
        # The rows of a window that count: `width` from `offset` on.
        self._offset, self._width = (0, length) if anchor is None else (anchor, 1)
        self.size, self.is_exact = 1 << (self._width - 1).bit_length(), self._width == 1
        # Of each piece, the largest priority of the rows that its windows begin at, and their sum.
        self._maxima = np.zeros(0, np.float32)
        self._sums_of_rows = np.zeros(0)
        # Where the mean hardly counts, its bound is not worth its time.
        self._bounds_mean = self._width > 1 and eta < _LARGE_ETA
        self._share_of_each = np.full(self._width, (1 - eta) / self._width, np.float32)

    def _count(self, table: EpisodeTable) -> Cumulation:
        return table.count_pieces(self._length, self.size, self._width - 1)

    def _pieces(self, table: EpisodeTable, row: Int64Array, number: Int64Array) -> Pieces:
        episode, selection = table.state.rows.take(row, axis=0), table.selection
        cut = episode[:, 3] if table.has_cuts else None
        before = (number - self._cumulation.begins(row)) * self.size
        num = selection.num_windows(episode[:, 1], cut, self._length) - before
        return Pieces(number, episode, before + selection.first_steps(cut, self._length), num)

    def _changed(self, table: EpisodeTable, row: Int64Array, step: Int64Array, num: Int64Array) -> tuple[Any, Any]:
        cut = table.state.rows[row, 3] if table.has_cuts else None
        step = step - (self._offset + table.selection.first_steps(cut, self._length))
        first, last = step // self.size, (step + num - 1) // self.size
        if self._width > 1:
            first -= 1  # The piece before has windows that end here.
        most = self._cumulation.begins(row + 1) - self._cumulation.begins(row)
        first = np.minimum(np.maximum(first, 0), most)
        return first, np.maximum(np.minimum(last, most - 1), first - 1)

    def _move(self, sources: Int64Array, targets: Int64Array, size: int) -> None:
        super()._move(sources, targets, size)
        self._maxima = _moved(self._maxima, sources, targets, self.tree.num_leaves + 1)  # `_bounds` looks at the next.
        if self._bounds_mean:
            self._sums_of_rows = _moved(self._sums_of_rows, sources, targets, self.tree.num_leaves + 1)

    def _bounds(self, pieces: Pieces) -> Float64Array:
        at_once = max(1, _ROWS_AT_ONCE // self.size)
        for begin in range(0, len(pieces.number), at_once):
            number, episode, step, _ = (column[begin : begin + at_once] for column in pieces)
            rows = self._rows_of(episode, step, self.size)[0]
            self._maxima[number] = _largest(rows)
            if self._bounds_mean:
                self._sums_of_rows[number] = np.add.reduce(rows, 1, dtype=np.float64)
        found = self._maxima.take(pieces.number)
        if self._width > 1:
            # Unless this piece is the last of its episode.
            goes_on = pieces.num > self.size - self._width + 1
            found = np.maximum(found, self._maxima.take(pieces.number + 1) * goes_on)
            if self._bounds_mean:
                rest = self._sums_of_rows.take(pieces.number + 1) * goes_on
                found = self._bound_of(pieces, found, self._sums_of_rows.take(pieces.number) + rest)
        return np.minimum(np.maximum(pieces.num, 0), self.size) * _power(found, self._alpha)

    def _bound_of(self, pieces: Pieces, largest: np.ndarray, total: np.ndarray) -> np.ndarray:
        """A bound of the priority of windows whose rows have this largest priority and sum at most."""
        # Windows that are padded have a mean of fewer rows.
        last = pieces.step + np.minimum(pieces.num, self.size) - 1 + self._width
        is_full = (pieces.step >= 0) & (last <= pieces.episode[:, 1])
        mean = np.where(is_full, np.minimum(largest, total * (_MARGIN / self._width)), largest)
        return largest * np.float32(self._eta) + mean * np.float32(1 - self._eta)

    def weights(self, episode: Int64Array, step: Int64Array) -> Float64Array:
        """As `PriorityIndex.weights`."""
        rows, num = self._rows_of(episode, step, self._width)
        if self._width == 1:
            return _power(rows[:, 0], self._alpha)
        mean = rows @ self._share_of_each
        if num is not None:
            mean *= self._width / num
        return _power(_largest(rows) * np.float32(self._eta) + mean, self._alpha)

    def _rows_of(self, episode: Int64Array, step: Int64Array, num: int) -> tuple[np.ndarray, Int64Array | None]:
        """Priorities `(n, num)` of rows from `step` on, 0 where there is none; and how many are real, None for all."""
        first = step + self._offset if self._offset else step
        after = episode[:, 1] - first
        if np.minimum.reduce(first, initial=0) >= 0 and np.minimum.reduce(after, initial=num) >= num:
            return self.field.windows(episode[:, 0] + first, num), None
        begin = np.maximum(-first, 0)
        rows = self.field.windows(episode[:, 0] + first + begin, num)
        real = np.maximum(np.minimum(after, num) - begin, 0)
        short = (real < num).nonzero()[0]
        rows[short] *= np.arange(num) < real[short, None]
        return rows, real


class EpisodeIndex(PriorityIndex):
    """Whole episodes: each is one piece, of one window that is accepted."""

    def _count(self, table: EpisodeTable) -> Cumulation:
        return table.count_episodes(1)

    def _pieces(self, table: EpisodeTable, row: Int64Array, number: Int64Array) -> Pieces:
        zero = np.zeros(len(row), np.int64)
        return Pieces(number, table.state.rows.take(row, axis=0), zero, zero + 1)

    def _changed(self, table: EpisodeTable, row: Int64Array, step: Int64Array, num: Int64Array) -> tuple[Any, Any]:
        # Each episode once.
        first = np.ones(len(row), np.int64)
        first[np.unique(row, return_index=True)[1]] = 0
        return first, 0 * first

    def _bounds(self, pieces: Pieces) -> Float64Array:
        return self.weights(pieces.episode, pieces.step)

    def weights(self, episode: Int64Array, step: Int64Array) -> Float64Array:
        """As `PriorityIndex.weights`, of whole episodes `(n, 4)`."""
        found, length = np.empty(len(episode)), episode[:, 1]
        ends = length.cumsum()
        begin = 0
        while begin < len(found):
            end = max(begin + 1, int(ends.searchsorted(ends[begin] - length[begin] + _ROWS_AT_ONCE, "right")))
            part = slice(begin, end)
            first = ends[part] - length[part] - (ends[begin] - length[begin])
            ids = np.arange(int(length[part].sum())) + (episode[part, 0] - first).repeat(length[part])
            rows = self.field.windows(ids, 1).ravel()
            mean = np.add.reduceat(rows, first, dtype=np.float64) / length[part]
            found[part] = self._eta * np.maximum.reduceat(rows, first) + (1 - self._eta) * mean
            begin = end
        return _power(found, self._alpha)


def _largest(rows: np.ndarray) -> np.ndarray:
    return torch.from_numpy(rows).amax(1).numpy() if rows.shape[1] > 1 else rows[:, 0]


def _moved(values: np.ndarray, sources: Int64Array, targets: Int64Array, size: int) -> np.ndarray:
    found = np.zeros(size, values.dtype)
    found[targets] = values[sources]
    return found


def _power(values: np.ndarray, exponent: float) -> Float64Array:
    return np.power(values, exponent, dtype=np.float64)


def _ranges(first: Int64Array, num: Int64Array) -> Int64Array:
    """`num` `(n,)` numbers from each of `first` `(n,)` on."""
    ends = num.cumsum()
    return (first - ends + num).repeat(num) + np.arange(ends[-1] if len(ends) else 0)
