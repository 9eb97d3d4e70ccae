"""The contract of samplers, and what they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from buffers.dataset.cumulation import Int64Array
from buffers.dataset.index import EpisodeIndex, Windows

__all__ = ["Sampler", "integers_below"]

_NUM_WORDS = 2**64


class Sampler(ABC):
    """Draws windows over an index. It holds no generator and no state that a draw changes.

    So two loaders can share one, and batch n of a loader depends on nothing but the seed, n and the index.
    """

    @abstractmethod
    def draw(self, index: EpisodeIndex, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """Draw windows, with replacement.

        Args:
            index: The live episodes. Build the result with `index.windows(position, step, length)`.
            num_windows: B, at least 1.
            length: T, in steps; None for whole episodes (then T is that of the longest one drawn).
            rng: Source of randomness, a function of the loader's seed, the number of the batch and the attempt.

        Returns:
            B windows, each within its episode (or, for whole episodes, beginning with it).

        Raises:
            RuntimeError: No live episode has `length` rows.
        """


def integers_below(rng: np.random.Generator, high: int | Int64Array, num: int) -> Int64Array:
    """Draw integers, each of [0, high) equally likely: in a third of the time of `rng.integers`.

        >>> integers_below(np.random.Generator(np.random.Philox(0)), 10, 5)
        array([7, 5, 6, 9, 2])

    Args:
        rng: Source of randomness.
        high: At least 1; one number, or `(num,)`, one for each.
        num: How many.

    Returns:
        int64 `(num,)`.
    """
    words = rng.bit_generator.random_raw(num)
    largest = int(high if isinstance(high, int) else high.max())
    divisor = np.asarray(high).astype(np.uint64)
    # Words from the last multiple of `high` on would favour small integers. There hardly ever is one.
    while int(words.max()) >= _NUM_WORDS - largest:
        remainder = np.uint64(_NUM_WORDS - 1) % divisor + np.uint64(1)
        is_unfair = words > np.uint64(_NUM_WORDS - 1) - remainder % divisor
        if not is_unfair.any():
            break
        words[is_unfair] = rng.bit_generator.random_raw(int(is_unfair.sum()))
    return (words % divisor).view(np.int64)


def draw_whole_episodes(index: EpisodeIndex, num_windows: int, rng: np.random.Generator) -> Windows:
    """Draw whole episodes, uniformly over episodes, with replacement; T is the length of the longest drawn."""
    if len(index) == 0:
        raise RuntimeError(index.no_window_message(None))
    position = integers_below(rng, len(index), num_windows)
    return index.windows(position, np.zeros(num_windows, np.int64), int(index.lengths[position].max()))
