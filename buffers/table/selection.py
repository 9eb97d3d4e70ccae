"""Which windows there are: how far they reach beyond their episodes, and of which episodes.

An episode of 4 rows has 2 windows of T = 3, and 5 with padding (`.`) of up to 2 rows before it and 1 behind it:

    row              0 1 2 3
    start -2     . . #
          -1       . # #
           0         # # #
           1           # # #
           2             # # .

The ends that `max_episode_length` cut out of a stream are not padded: there, the stream goes on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from buffers.table.cumulation import Int64Array
from buffers.table.cut import CONTINUES, GOES_ON, context_of

__all__ = ["NO", "Selection", "Split", "UNKNOWN", "YES"]

#: Whether an episode is in a part.
UNKNOWN, NO, YES = range(3)


class Split(NamedTuple):
    """One of two parts of the episodes. An episode belongs to one by its id, whatever else is stored."""

    is_train: bool
    share: float  # Of the part for training.
    seed: int

    def judge(self, episode_id: Int64Array) -> npt.NDArray[np.int8]:
        """Whether episodes `(n,)` belong to this part: int8 `(n,)`, YES or NO."""
        words = _mixed(episode_id.astype(np.uint64) ^ _mixed(np.array([self.seed % 2**64], np.uint64)))
        return np.where((words < self.share * 2.0**64) == self.is_train, np.int8(YES), np.int8(NO))


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One step of the generator splitmix64 (Steele, Lea and Flood, 2014), from each of the states `(n,)`."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Selection(NamedTuple):
    """By default, all windows that lie within their episodes."""

    pad_before: int = 0
    pad_after: int = 0
    stride: int = 1  # Of the starts of windows in an episode.
    split: Split | None = None

    # Below, `cut` are the cuts `(n,)` of episodes, None where none is a piece.

    def room(self, cut: Int64Array | None) -> tuple[Any, Any]:
        """How many rows a window may begin before episodes and end behind them."""
        if cut is None:
            return self.pad_before, self.pad_after
        return self.pad_before * ((cut & CONTINUES) == 0), self.pad_after * ((cut & GOES_ON) == 0)

    def first_steps(self, cut: Int64Array | None, length: int) -> Any:
        """Where in each episode its first window of T = `length` begins."""
        first = 0 if cut is None else np.maximum(context_of(cut) - (length - 1), 0)
        return first - self.room(cut)[0]

    def num_windows(self, lengths: Int64Array, cut: Int64Array | None, length: int) -> Int64Array:
        """The windows of T = `length` in episodes of `lengths` `(n,)` rows.

        Windows that lie within the context of an episode are windows of the piece before it.
        """
        num: Int64Array = np.maximum(lengths + (1 - length + self.room(cut)[1] - self.first_steps(cut, length)), 0)
        return num if self.stride == 1 else -(-num // self.stride)
