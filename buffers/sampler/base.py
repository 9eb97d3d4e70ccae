"""Sampler: what chooses the windows of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from buffers.table import EpisodeTable, Int64Array, Windows

__all__ = ["Sampler", "integers_below"]


class Sampler(ABC):
    """Draws windows over a table of episodes. It has no state, so loaders can share it."""

    @abstractmethod
    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """Draw B = `num_windows` windows, with replacement, each within its episode.

        Args:
            table: The live episodes. Build the result with `table.windows(position, step, length)`.
            num_windows: B, at least 1.
            length: T, in steps; None for whole episodes (then T is that of the longest one drawn).
            rng: Source of randomness: a function of the loader's seed, the batch's number and the attempt.

        Raises:
            RuntimeError: No live episode has `length` rows.
        """


def integers_below(rng: np.random.Generator, high: int | Int64Array, num: int) -> Int64Array:
    """Draw int64 `(num,)` uniformly from [0, high), faster than `rng.integers`; `high` is one number or `(num,)`.

        >>> integers_below(np.random.Generator(np.random.Philox(0)), 10, 5)
        array([7, 5, 6, 9, 2])

    They are remainders of 64-bit words, which favours small integers by less than high / 2**64.
    """
    divisor = high if isinstance(high, int) else high.view(np.uint64)
    return (rng.bit_generator.random_raw(num) % divisor).view(np.int64)
