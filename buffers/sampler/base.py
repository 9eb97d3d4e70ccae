"""The contract of samplers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from buffers.dataset.index import EpisodeIndex, Windows

__all__ = ["Sampler"]


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
            rng: Source of randomness.

        Returns:
            B windows, each within its episode (or, for whole episodes, beginning with it).

        Raises:
            RuntimeError: No live episode has `length` rows.
        """


def draw_whole_episodes(index: EpisodeIndex, num_windows: int, rng: np.random.Generator) -> Windows:
    """Draw whole episodes, uniformly over episodes, with replacement; T is the length of the longest drawn."""
    if len(index) == 0:
        raise RuntimeError(index.no_window_message(None))
    position = rng.integers(len(index), size=num_windows)
    return index.windows(position, np.zeros(num_windows, np.int64), int(index.lengths[position].max()))
