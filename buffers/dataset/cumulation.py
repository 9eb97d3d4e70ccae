"""Cumulation: from one integer to the window that it stands for, in the same time however many episodes live.

Episodes of 3, 1, 0 and 2 windows have running totals 0 3 4 4 6, and r = 4 lies in the last of them. A binary search
over the totals mispredicts a branch and misses a cache at every level (for 256 integers: 31 us over 5,000 episodes,
107 us over a million). So a guide says for every so many windows which episode they lie in, and a step or two leads on:

    window      0 1 2 3 4 5             guide: every 2nd window       r = 5 -> guide[2] = 3: found
    row         0 0 0 1 3 3                    0 0 3                  r = 3 -> guide[1] = 0, one step on: 1

When the oldest episode leaves, nothing changes but where the live ones begin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Cumulation"]

Int64Array = npt.NDArray[np.int64]

_MAX_STEPS = 4


class Cumulation:
    """Running totals over the rows of a table of episodes: `values[row]` counts what lies before it, up to `counted`.

    Args:
        size: Rows of the table.
        first: The first that lives.
    """

    def __init__(self, size: int, first: int) -> None:
        self._set_values(np.empty(size + 1, np.int64))
        self.restart(first)

    def _set_values(self, values: Int64Array) -> None:
        # Single totals are read and written through the last in a fourth of the time that it takes through arrays.
        self.values, self._ends, self._totals = values, values[1:], values.data

    def __getstate__(self) -> dict[str, Any]:
        # A view would be copied as an array of its own, which what is counted later does not reach.
        return {name: value for name, value in self.__dict__.items() if name not in ("_ends", "_totals")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_values(self.values)

    def restart(self, row: int) -> None:
        """Begin to count at a row."""
        self.counted, self.first = row, row
        self._totals[row] = 0
        self._forget_guide()

    def append(self, count: int) -> None:
        """Count on, with what the next row holds: a tenth of the time of `extend`."""
        self.counted += 1
        self._totals[self.counted] = self._totals[self.counted - 1] + count

    def extend(self, counts: npt.NDArray[np.generic]) -> None:
        """Count on, with what the next rows hold."""
        begin, end = self.counted, self.counted + len(counts)
        np.cumsum(counts, out=self.values[begin + 1 : end + 1])
        self.values[begin + 1 : end + 1] += self.values[begin]
        self.counted = end

    def truncate(self, row: int) -> None:
        """Forget what was counted from a row on."""
        if row < self.counted:
            self.counted = row
            self._forget_guide()

    def relocate(self, size: int, first: int) -> None:
        """Follow the table, which has a new size, and whose row `first` is now row 0."""
        before, num_counted = self.values, self.counted - first
        self._set_values(np.empty(size + 1, np.int64))
        if num_counted < 0:
            self.restart(0)
            return
        self.values[: num_counted + 1] = before[first : self.counted + 1]
        self.counted, self.first = num_counted, 0
        self._forget_guide()

    @property
    def num(self) -> int:
        """What the live rows hold together."""
        return self._totals[self.counted] - self._totals[self.first]

    def locate(self, r: Int64Array) -> tuple[Int64Array, Int64Array]:
        """For integers in [0, num): the rows of the table that they lie in, and what remains of them there."""
        self._extend_guide()
        totals = r + self._totals[self.first]
        rows = self._guide.take(totals >> self._shift)
        for step in range(min(self._num_steps, _MAX_STEPS)):
            is_behind = self._ends.take(rows) <= totals
            if step and not is_behind.any():
                break
            rows += is_behind
        else:
            if self._num_steps > _MAX_STEPS:  # Many rows of little in a bucket: search the rest.
                late = (self._ends.take(rows) <= totals).nonzero()[0]
                live = self.values[self.first : self.counted + 1]
                rows[late] = live.searchsorted(totals[late], "right") - 1 + self.first
        return rows, totals - self.values.take(rows)

    # The guide: bucket b holds the row that the window with running total b << shift lies in.

    def _forget_guide(self) -> None:
        self._guide: Int64Array = np.empty(0, np.int64)
        self._shift = self._num_buckets = self._num_guided = self._guided_first = 0
        # Rows that lie in one bucket, less one: that far may be what is sought from where the guide leads to.
        self._max_span = self._num_steps = 0

    def _extend_guide(self) -> None:
        if self._num_guided == self.counted and self._guided_first == self.first and self._num_buckets:
            return
        try:
            self._bring_guide_up()
        except BaseException:  # Ctrl-C: half a guide leads astray.
            self._forget_guide()
            raise

    def _bring_guide_up(self) -> None:
        end = (self._totals[self.counted] - 1 >> self._shift) + 1
        if end > len(self._guide):
            self._begin_guide()
            end = (self._totals[self.counted] - 1 >> self._shift) + 1
        guide, begin = self._guide, self._num_buckets
        if begin < end:
            if self.counted - self._num_guided == 1:
                guide[begin:end] = self._num_guided
                before = int(guide[begin - 1]) if begin else self._num_guided
                self._max_span = max(self._max_span, self._num_guided - before)
            else:
                self._add_buckets(begin, end)
            self._num_buckets = end
        self._num_guided = self.counted
        if self._guided_first != self.first:
            # Rows that have left may share the first bucket with the first that lives.
            bucket = self._totals[self.first] >> self._shift
            if guide[bucket] < self.first:
                guide[bucket] = self.first
            self._guided_first = self.first
        self._num_steps = max(self._max_span, self.counted - 1 - int(guide[self._num_buckets - 1]))

    def _add_buckets(self, begin: int, end: int) -> None:
        """Lead the buckets from `begin` to `end` to rows that have been counted since the last ones."""
        starts = np.arange(begin, end) << self._shift
        totals = self.values[self._num_guided : self.counted + 1]
        rows = totals.searchsorted(np.maximum(starts, totals[0]), "right") - 1 + self._num_guided
        self._guide[begin:end] = rows
        spans = np.diff(self._guide[max(0, begin - 1) : end])
        self._max_span = max(self._max_span, int(spans.max(initial=0)))

    def _begin_guide(self) -> None:
        """An empty guide from the first live row on, of about as many buckets as there are rows, and a quarter more."""
        num_rows = max(1, self.counted - self.first)
        self._shift = max(0, (self.num // num_rows).bit_length() - 1)
        live = self.values[self.first : self.counted + 1]
        live -= live[0]
        num_buckets = (self.num >> self._shift) + 2
        self._guide = np.empty(num_buckets + max(64, num_buckets // 4), np.int64)
        self._num_buckets, self._num_guided, self._guided_first, self._max_span = 0, self.first, self.first, 0
