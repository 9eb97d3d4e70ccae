"""What samplers draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from buffers.table.cumulation import Int64Array

__all__ = ["Windows"]

_COLUMNS = ("start", "step", "episode", "episode_length", "weight", "source", "cut")


@dataclass(slots=True)  # Not frozen: that takes longer to make.
class Windows:
    """B windows to be read. All arrays are `(B,)`."""

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

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_rows(self) -> Int64Array:
        """int64 `(B,)`, real rows: T, or fewer where the episode ends before the window."""
        return np.minimum(self.length, self.episode_length - self.step)

    @property
    def last_steps(self) -> Int64Array:
        """int64 `(B,)`, step ids of the last real rows."""
        return self.start + self.num_rows - 1

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
            if getattr(others, name) is not None:
                getattr(copied, name)[positions] = getattr(others, name)
        copied.oldest_step = min(self.oldest_step, others.oldest_step)
        return copied

    @property
    def are_within(self) -> bool:
        """Whether each window lies within its episode."""
        # The sign bit of the union is set where either is negative.
        outside = self.step | (self.episode_length - self.step - self.length)
        return bool(outside[outside.argmin()] >= 0)
