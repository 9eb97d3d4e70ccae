"""PartTable: some episodes of a table, such as one part of a split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from buffers.table.cumulation import Int64Array
from buffers.table.episode_table import ID, EpisodeTable
from buffers.table.selection import UNKNOWN, YES

__all__ = ["EMPTY_PART", "Judge", "PartTable"]

EMPTY_PART = "No stored episode belongs to this part of the split."

#: From episode ids `(n,)` to int8 `(n,)`: YES, NO, or UNKNOWN. It is asked again about those it does not know.
Judge = Callable[[Int64Array], npt.NDArray[np.int8]]


class PartTable(EpisodeTable):
    """The episodes that `judge` takes. Following another table costs what has changed since, amortized.

    `empty` is the error where no episode is left.
    """

    def __init__(self, judge: Judge, empty: str) -> None:
        super().__init__()
        self._judge, self._empty = judge, empty
        # What was looked at: up to which row of which array.
        self._rows: Int64Array | None = None
        self._last = 0

    def show(self, other: EpisodeTable) -> None:
        """Become a snapshot of this part of `other`, up to the first episode that is not known yet."""
        rows, first, last, *_ = other.state
        begin = max(first, self._last) if rows is self._rows else first
        found = self._judge(rows[begin:last, ID])
        unknown = (found == UNKNOWN).nonzero()[0]
        if len(unknown):
            last = begin + int(unknown[0])
        part = rows[begin:last][found[: last - begin] == YES]
        if rows is self._rows:
            # After Ctrl-C in between, those that were added are not added again.
            self.extend(part[part[:, ID] >= self.next_id])
            self.retire(other.oldest_start)
        else:
            self.replace(part)
        self._rows, self._last = rows, last

    def no_window_message(self, length: int | None) -> str:
        """The error message where no window of `length` can be drawn."""
        return super().no_window_message(length) if len(self) else self._empty
