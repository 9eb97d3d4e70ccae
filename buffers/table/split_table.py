"""SplitTable: the episodes of a table that belong to one part of a split."""

from __future__ import annotations

from buffers.table.cumulation import Int64Array
from buffers.table.episode_table import ID, EpisodeTable
from buffers.table.selection import Split

__all__ = ["EMPTY_PART", "SplitTable"]

EMPTY_PART = "No stored episode belongs to this part of the split."


class SplitTable(EpisodeTable):
    """A part of the episodes of another table. Following that costs what has changed since, amortized."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split
        # What was looked at: up to which row of which array.
        self._rows: Int64Array | None = None
        self._last = 0

    def show(self, other: EpisodeTable) -> None:
        """Become a snapshot of this part of `other`."""
        rows, first, last, *_ = other.state
        if rows is self._rows:
            self.extend(self._part(rows[max(first, self._last) : last]))
            self.retire(other.oldest_start)
        else:
            self.replace(self._part(rows[first:last]))
        self._rows, self._last = rows, last

    def no_window_message(self, length: int | None) -> str:
        """The error message where no window of `length` can be drawn."""
        return super().no_window_message(length) if len(self) else EMPTY_PART

    def _part(self, episodes: Int64Array) -> Int64Array:
        return episodes[self._split.accepts(episodes[:, ID])]
