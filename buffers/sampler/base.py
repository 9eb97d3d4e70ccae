"""The contract of samplers, and what they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from buffers.table import EpisodeTable, Int64Array, Windows

__all__ = ["Sampler", "integers_below"]


class Sampler(ABC):
    """Draws windows over a table of episodes. It holds no generator and no state that a draw changes.

    So two loaders can share one, and batch n of a loader depends on nothing but the seed, n and the table.
    """

    @abstractmethod
    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """Draw windows, with replacement.

        Args:
            table: The live episodes. Build the result with `table.windows(position, step, length)`.
            num_windows: B, at least 1.
            length: T, in steps; None for whole episodes (then T is that of the longest one drawn).
            rng: Source of randomness, a function of the loader's seed, the number of the batch and the attempt.

        Returns:
            B windows, each within its episode (or, for whole episodes, beginning with it).

        Raises:
            RuntimeError: No live episode has `length` rows.
        """


def integers_below(rng: np.random.Generator, high: int | Int64Array, num: int) -> Int64Array:
    """Draw integers, each of [0, high) equally likely, faster than by `rng.integers`.

    They are remainders of 64-bit words. That favours small integers by less than high / 2**64: of a million windows,
    by one part in 10**13.

        >>> integers_below(np.random.Generator(np.random.Philox(0)), 10, 5)
        array([7, 5, 6, 9, 2])

    `high` is at least 1, one number or `(num,)`, one for each. The result is int64 `(num,)`.
    """
    divisor = high if isinstance(high, int) else high.view(np.uint64)
    return (rng.bit_generator.random_raw(num) % divisor).view(np.int64)


def draw_whole_episodes(table: EpisodeTable, num_windows: int, rng: np.random.Generator) -> Windows:
    """Draw whole episodes, uniformly over episodes, with replacement; T is the length of the longest drawn."""
    if len(table) == 0:
        raise RuntimeError(table.no_window_message(None))
    position = integers_below(rng, len(table), num_windows)
    return table.windows(position, np.zeros(num_windows, np.int64), int(table.lengths[position].max()))
