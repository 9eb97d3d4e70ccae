"""What samplers draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from buffers.table.cumulation import Int64Array

__all__ = ["Windows", "joined"]

_COLUMNS = ("start", "step", "episode", "episode_length", "weight", "source", "cut", "density")
_ONES = ("weight", "density")  # Where they are None, they stand for ones.


@dataclass(slots=True)  # Not frozen: that takes longer to make.
class Windows:
    """B windows to be read. All arrays are `(B,)`.

    With padding, a window may begin before row 0 of its episode (then `step` is negative, and `start` no step id) and
    end behind the last row.
    """

    length: int  # T, steps of each window. Whole episodes are padded to the longest.
    start: Int64Array  # Step id of the first row.
    step: Int64Array  # Position of the first row in its episode.
    episode: Int64Array  # Episode ids.
    episode_length: Int64Array  # Rows of the episodes.
    weight: npt.NDArray[np.float32] | None = None  # Importance weights; None stands for ones.
    source: Int64Array | None = None  # Of a mixture: the number of the dataset that each window is in.
    is_checked: bool = False  # Whether a table has made them and found each within its episode.
    oldest_step: int = -1  # The step id of the oldest live row when a table made them.
    cut: Int64Array | None = None  # How their episodes were cut out of longer streams, see cut.py; None: not at all.
    # float64, how often each is drawn, relative to the others; None stands for ones.
    density: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_rows(self) -> Int64Array:
        """int64 `(B,)`, real rows: T, or fewer where a window reaches beyond its episode."""
        return np.minimum(self.length, self.episode_length - self.step) + np.minimum(self.step, 0)

    @property
    def last_steps(self) -> Int64Array:
        """int64 `(B,)`, step ids of the last real rows."""
        return self.first_steps + self.num_rows - 1

    @property
    def first_steps(self) -> Int64Array:
        """int64 `(B,)`, step ids of the first real rows."""
        return self.start - np.minimum(self.step, 0)

    @property
    def steps(self) -> Int64Array:
        """int64 `(B, T)`, positions in the episode; negative, or at least its length, in padding."""
        return self.step[:, None] + np.arange(self.length)

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Where rows are real: bool `(B, T)`."""
        mask = np.ones((len(self.step), self.length), np.bool_)
        outside = (self.step | (self.episode_length - self.length - self.step)) < 0
        b = outside.nonzero()[0]
        if len(b):
            # In one comparison: as unsigned numbers, negative steps are the largest.
            steps = self.step[b, None] + np.arange(self.length)
            mask[b] = steps.view(np.uint64) < self.episode_length[b, None].view(np.uint64)
        return mask

    def shifted(self, offset: int | Int64Array, length: int) -> Windows:
        """Windows of `length` rows that begin `offset` rows, one number or `(B,)`, after these."""
        start, step = self.start + offset, self.step + offset
        # As `replace` would, in a fraction of its time.
        kept = self.episode, self.episode_length, self.weight, self.source, self.is_checked, self.oldest_step, self.cut
        return Windows(length, start, step, *kept, self.density)

    def moved_between(self, first: int, last: Int64Array) -> Windows:
        """The windows, moved so that each begins at row `first` of its episode, or behind it, and not after `last`."""
        step: Int64Array = np.minimum(np.maximum(self.step, first), last)
        return self.shifted(step - self.step, self.length)

    def __getitem__(self, selection: slice | npt.NDArray[np.generic]) -> Windows:
        columns = ((name, getattr(self, name)) for name in _COLUMNS)
        chosen: dict[str, Any] = {name: column[selection] for name, column in columns if column is not None}
        return replace(self, **chosen)

    def replaced(self, positions: npt.NDArray[np.generic], others: Windows) -> Windows:
        """A copy with the windows at `positions` replaced by others."""
        copied = self[np.arange(len(self))]
        if copied.cut is None and others.cut is not None:
            copied.cut = np.zeros(len(self), np.int64)
        for name in _COLUMNS:
            values = getattr(others, name)
            if values is None and name in _ONES and getattr(copied, name) is not None:
                values = 1
            elif values is not None and getattr(copied, name) is None:
                setattr(copied, name, np.ones(len(self), values.dtype))
            if values is not None:
                getattr(copied, name)[positions] = values
        copied.oldest_step = min(self.oldest_step, others.oldest_step)
        return copied

    def are_within(self, before: int | Int64Array, after: int | Int64Array) -> bool:
        """Whether each begins at most `before` rows before its episode and ends at most `after` rows behind it."""
        # The sign bit of the union is set where either is negative.
        outside = (self.step + before) | (self.episode_length - self.step - self.length + after)
        return not len(outside) or bool(outside[outside.argmin()] >= 0)


def joined(parts: list[Windows], sources: list[int] | None = None) -> Windows:
    """The windows of several draws one after the other, of the datasets with these numbers if those are given.

    T is that of the longest.
    """
    columns: dict[str, Any] = {}
    for name in _COLUMNS:
        found = [getattr(part, name) for part in parts]
        if any(column is not None for column in found):
            missing = np.ones if name in _ONES else np.zeros
            pairs = zip(found, parts, strict=True)
            columns[name] = np.concatenate([missing(len(part), np.int64) if c is None else c for c, part in pairs])
    if sources is not None:
        columns["source"] = np.repeat(np.array(sources, np.int64), [len(part) for part in parts])
    windows = Windows(max(part.length for part in parts), **columns)
    if sources is None:
        windows.is_checked = all(part.is_checked for part in parts)
        windows.oldest_step = min(part.oldest_step for part in parts)
    return windows
