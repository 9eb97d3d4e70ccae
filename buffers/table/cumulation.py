"""Cumulation: from an integer to the window that it stands for, in constant time however many episodes live.

Episodes of 3, 1, 0 and 2 windows have running totals 0 3 4 4 6, and r = 4 lies in the last of them. A binary search
over the totals misses the cache at every level. A guide avoids it: for every so many windows, it has the episode in
which they lie. Most windows lie there or in the next episode:

    window      0 1 2 3 4 5             guide: every 2nd window       r = 5 -> guide[2] = 3: found
    row         0 0 0 1 3 3                    0 0 3                  r = 3 -> guide[1] = 0, one step on: 1

When the oldest episode leaves, only `first` changes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Cumulation", "Int64Array"]

Int64Array = npt.NDArray[np.int64]

_MIN_SPARE_BUCKETS = 64


class Cumulation:
    """Running totals over the live rows of a table, with a guide to search them.

    Args:
        counts: int64 `(n,)`, windows of each live row.
        first: Number of the first live row.
        size: Rows of the table.
    """

    def __init__(self, counts: Int64Array, first: int, size: int) -> None:
        self.first, self.counted = first, first + len(counts)
        # `_totals[row]` counts the windows before that row.
        self._totals: Int64Array = np.zeros(size + 1, np.int64)
        self._ends = self._totals[1:]
        live = self._totals[first : self.counted + 1]
        np.cumsum(counts, out=live[1:])
        # About as many buckets as there are rows, and a quarter more.
        self._shift = max(0, (self.num // max(1, len(counts))).bit_length() - 1)
        bounds = -(-live >> self._shift)  # The buckets bounds[i] to bounds[i + 1] begin in row i.
        num_buckets = bounds.item(-1)
        self._guide = np.empty(num_buckets + max(_MIN_SPARE_BUCKETS, num_buckets // 4), np.int64)
        rows = np.arange(first, self.counted)
        self._guide[:num_buckets] = rows.repeat(bounds[1:] - bounds[:-1])
        # Most rows from where the guide leads to the row of a window.
        spans = rows - self._guide[live[:-1] >> self._shift]
        self._max_steps = int(spans.max(initial=0, where=counts > 0))

    def append(self, count: int) -> bool:
        """Count the next row; False if the guide has no room for it."""
        row, total = self.counted, self._totals.item(self.counted)
        begin, end = -(-total >> self._shift), -(-(total + count) >> self._shift)
        if end > len(self._guide):
            return False
        self._ends[row] = total + count
        self._guide[begin:end] = row
        if begin and count:
            self._max_steps = max(self._max_steps, row - self._guide.item(begin - 1))
        self.counted += 1  # Last, so that a row whose counting is interrupted is counted again.
        return True

    @property
    def num(self) -> int:
        """Windows of all live rows."""
        return self._totals.item(self.counted) - self._totals.item(self.first)

    @property
    def bounds(self) -> tuple[int, int]:
        """The absolute numbers of the first window of the live rows, and of the one after their last."""
        return self._totals.item(self.first), self._totals.item(self.counted)

    def begins(self, rows: Int64Array) -> Int64Array:
        """The absolute numbers of the first windows of rows `(n,)` of the table."""
        return self._totals.take(rows)

    def locate(self, r: Int64Array) -> tuple[Int64Array, Int64Array]:
        """For integers `(B,)` in [0, num): the row of the table in which each lies, and its position there."""
        totals = r + self._totals.item(self.first)
        rows = self._guide.take(totals >> self._shift)
        if self._max_steps:
            rows += self._ends.take(rows) <= totals
            if self._max_steps > 1:
                late = (self._ends.take(rows) <= totals).nonzero()[0]
                if len(late):  # Searching nothing would still let other threads run meanwhile.
                    live = self._totals[self.first : self.counted + 1]
                    rows[late] = live.searchsorted(totals[late], "right") - 1 + self.first
        return rows, totals - self._totals.take(rows)
