"""Cumulation: from one integer to the window that it stands for, in the same time however many episodes live.

Episodes of 3, 1, 0 and 2 windows have running totals 0 3 4 4 6, and r = 4 lies in the last of them. A binary search
over the totals mispredicts a branch and misses a cache at every level. So a guide says for every so many windows in
which episode they lie, and a step or two leads on:

    window      0 1 2 3 4 5             guide: every 2nd window       r = 5 -> guide[2] = 3: found
    row         0 0 0 1 3 3                    0 0 3                  r = 3 -> guide[1] = 0, one step on: 1

When the oldest episode leaves, nothing changes but where the live ones begin.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Cumulation", "Int64Array"]

Int64Array = npt.NDArray[np.int64]

_MAX_STEPS = 3


class _Guide(NamedTuple):
    """Bucket b leads to the row in which the window with running total `b << shift` lies."""

    rows: Int64Array = np.empty(0, np.int64)
    shift: int = 0
    num_buckets: int = 0  # That are set.
    first: int = 0  # The first live row that it knows of.
    counted: int = 0  # Rows that it covers.
    max_span: int = 0  # Most rows from one bucket to the next.
    num_steps: int = 0  # Most rows from a bucket to a window in it.


class Cumulation:
    """Running totals over the rows of a table: `totals[row]` counts what lies before that row, up to `counted`."""

    def __init__(self, size: int, first: int) -> None:
        self._totals: Int64Array = np.empty(size + 1, np.int64)
        # Single totals are read and written through the second in a fraction of the time that it takes through arrays.
        self._ends, self._words = self._totals[1:], self._totals.data
        self.restart(first)

    def restart(self, first: int) -> None:
        """Begin to count at a row."""
        self.counted = self.first = first
        self._words[first] = 0
        self._guide = _Guide()

    def append(self, count: int) -> None:
        """Count on, with what the next row holds: faster than `extend`."""
        self._words[self.counted + 1] = self._words[self.counted] + count
        self.counted += 1

    def extend(self, counts: npt.NDArray[np.generic]) -> None:
        """Count on, with what the next rows hold."""
        begin, end = self.counted, self.counted + len(counts)
        np.cumsum(counts, out=self._totals[begin + 1 : end + 1])
        self._totals[begin + 1 : end + 1] += self._words[begin]
        self.counted = end

    @property
    def num(self) -> int:
        """What the live rows hold together."""
        return self._words[self.counted] - self._words[self.first]

    def locate(self, r: Int64Array) -> tuple[Int64Array, Int64Array]:
        """For integers in [0, num): the rows of the table in which they lie, and what remains of them there."""
        guide = self._guide
        if guide.counted != self.counted or guide.first != self.first or not guide.num_buckets:
            guide = self._guide = self._extended_guide()
        totals = r + self._words[self.first]
        rows = guide.rows.take(totals >> guide.shift)
        if guide.num_steps:
            rows += self._ends.take(rows) <= totals
            if guide.num_steps > 1:
                self._walk_on(rows, totals, guide.num_steps - 1)
        return rows, totals - self._totals.take(rows)

    def _walk_on(self, rows: Int64Array, totals: Int64Array, num_steps: int) -> None:
        """Lead rows on to those in which the totals lie."""
        for _ in range(min(num_steps, _MAX_STEPS)):
            is_behind = self._ends.take(rows) <= totals
            if not is_behind.any():
                return
            rows += is_behind
        # Many rows of little in a bucket: search the rest.
        late = (self._ends.take(rows) <= totals).nonzero()[0]
        live = self._totals[self.first : self.counted + 1]
        rows[late] = live.searchsorted(totals[late], "right") - 1 + self.first

    def _extended_guide(self) -> _Guide:
        """The guide over all that is counted. What is set in its array is right, should Ctrl-C come in between."""
        guide, last_total = self._guide, self._words[self.counted] - 1
        if (last_total >> guide.shift) + 1 > len(guide.rows):
            guide = self._new_guide()
            last_total = self._words[self.counted] - 1
        rows, begin, end, max_span = guide.rows, guide.num_buckets, (last_total >> guide.shift) + 1, guide.max_span
        if begin < end:
            if self.counted - guide.counted == 1:
                rows[begin:end] = guide.counted
                max_span = max(max_span, guide.counted - rows.item(begin - 1) if begin else 0)
            else:
                starts = np.arange(begin, end) << guide.shift
                totals = self._totals[guide.counted : self.counted + 1]
                rows[begin:end] = totals.searchsorted(np.maximum(starts, totals[0]), "right") - 1 + guide.counted
                max_span = max(max_span, int(np.diff(rows[max(0, begin - 1) : end]).max(initial=0)))
        # Rows that have left may share the first bucket with the first that lives.
        bucket = self._words[self.first] >> guide.shift
        if rows.item(bucket) < self.first:
            rows[bucket] = self.first
        num_steps = max(max_span, self.counted - 1 - rows.item(end - 1))
        return _Guide(rows, guide.shift, end, self.first, self.counted, max_span, num_steps)

    def _new_guide(self) -> _Guide:
        """An empty guide from the first live row on, of about as many buckets as there are rows, and a quarter more."""
        self._guide = _Guide()  # Should Ctrl-C come behind the subtraction, the one before would lead astray.
        num_rows = max(1, self.counted - self.first)
        shift = max(0, (self.num // num_rows).bit_length() - 1)
        live = self._totals[self.first : self.counted + 1]
        live -= live[0]
        num_buckets = (self.num >> shift) + 2
        rows = np.empty(num_buckets + max(64, num_buckets // 4), np.int64)
        return _Guide(rows, shift, 0, self.first, self.first, 0, 0)
