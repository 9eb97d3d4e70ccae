"""Packing: whole episodes laid end to end, for models that take episodes of unlike length as one long row.

Episodes of 5, 3, 6 and 5 rows, drawn in this order, in two long rows of 10:

    a a a a a b b b c c        c gives its last two rows: it is the first that does not fit any more
    d d d d d ...

So there is no padding, and every episode that is drawn is there. `step` tells where one that was cut begins. Of an
episode longer than a long row, only the last rows can come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from buffers.fields import Fields
from buffers.loading.layout import Rows, SequenceLayout
from buffers.table import Int64Array, Windows, joined

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["PackedLayout"]


class PackedLayout(SequenceLayout):
    """Long rows of episodes, `(B, num_rows, *shape)`, which are drawn and read as windows of one row."""

    extra = ("episode", "step", "cu_seqlens")

    def __init__(self, num_rows: int) -> None:
        super().__init__(is_padded=False, with_edge=False)
        self.num_packed: int = num_rows

    def draw(self, num_windows: int, rng: np.random.Generator, draw: Callable[[int], Windows]) -> Windows:
        """B * `num_rows` windows of one row, for B = `num_windows`."""
        drawn, bounds, at_a_time = [], None, 2 * num_windows
        while bounds is None:
            windows = draw(at_a_time)
            # Those of a mixture come by member.
            drawn.append(windows[rng.permutation(at_a_time)])
            bounds = self._bounds(np.concatenate([part.episode_length for part in drawn]), num_windows)
            at_a_time *= 2
        episode, step, num = bounds
        begin = (num.cumsum() - num).repeat(num)
        return joined(drawn)[episode.repeat(num)].shifted(step.repeat(num) + np.arange(len(begin)) - begin, 1)

    def _bounds(self, lengths: Int64Array, num_windows: int) -> tuple[Int64Array, Int64Array, Int64Array] | None:
        """Position, first row and rows of each episode in the batch; None if there are too few to fill it."""
        ends, first, num = lengths.cumsum(), 0, lengths.copy()
        for _ in range(num_windows):
            end = ends[first] - lengths[first] + self.num_packed
            last = int(ends.searchsorted(end))
            if last >= len(ends) - 1:
                return None
            num[last] -= ends[last] - end
            first = last + 1
        return np.arange(first), (lengths - num)[:first], num[:first]

    def leading(self, fields: Fields, windows: Windows) -> dict[str, tuple[int, int]]:
        """(B, `num_rows`)."""
        return dict.fromkeys(fields, (len(windows) // self.num_packed, self.num_packed))

    def read(self, source: EpisodeSource, windows: Windows, out: Rows | None) -> tuple[Rows, np.ndarray | None]:
        """As `EpisodeSource.read`."""
        num = len(windows)
        single = None if out is None else {name: rows.view(num, 1, *rows.shape[2:]) for name, rows in out.items()}
        rows, was_read = source.read(windows, single)
        size = num // self.num_packed, self.num_packed
        return {name: tensor.view(*size, *tensor.shape[2:]) for name, tensor in rows.items()}, was_read

    def included(self, name: str, source: EpisodeSource, windows: Windows) -> Any:
        """`(B, num_rows)` each; "cu_seqlens" int32 `(n + 1,)`: where in all rows of the batch its n episodes begin."""
        if name != "cu_seqlens":
            return super().included(name, source, windows).view(-1, self.num_packed)
        follows = np.diff(windows.step, prepend=-1) == 1
        for column in (windows.episode, windows.source):
            follows &= True if column is None else np.diff(column, prepend=-1) == 0
        begins = np.append(np.flatnonzero(~follows), len(windows))
        return torch.from_numpy(begins.astype(np.int32))
