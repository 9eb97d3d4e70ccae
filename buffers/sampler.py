"""Samplers: windows, drawn over the table of episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from buffers.table import EpisodeTable, Int64Array, Windows

__all__ = ["Sampler", "UniformEpisodeSampler", "UniformSampler", "Windows", "integers_below"]


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


def _draw_whole_episodes(table: EpisodeTable, num_windows: int, rng: np.random.Generator) -> Windows:
    """Draw whole episodes, each equally likely; T is the length of the longest drawn."""
    if len(table) == 0:
        raise RuntimeError(table.no_window_message(None))
    position = integers_below(rng, len(table), num_windows)
    return table.windows(position, np.zeros(num_windows, np.int64), int(table.lengths[position].max()))


class UniformSampler(Sampler):
    """Every window is equally likely.

    An episode of L rows has L - T + 1 windows, so its last row can be drawn:

        L = 5, T = 3     0 1 2 3 4
                         # # #
                           # # #
                             # # #

    So long episodes are drawn in proportion to their windows. Whole episodes (T = None) are equally likely.

        >>> table = EpisodeTable()
        >>> episode_ids = table.append(5), table.append(14)  # 3 and 12 windows of 3 rows.
        >>> windows = UniformSampler().draw(table, 100_000, 3, np.random.default_rng(0))
        >>> (np.bincount(windows.episode) / 100_000).round(2)
        array([0.2, 0.8])
    """

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """`Sampler.draw`: one integer a window, its number in the order of episodes and steps."""
        if length is None:
            return _draw_whole_episodes(table, num_windows, rng)
        windows = table.count_windows(length)
        num = windows.num
        if num == 0:
            raise RuntimeError(table.no_window_message(length))
        return table.windows_of(windows, integers_below(rng, num, num_windows), length)


class UniformEpisodeSampler(Sampler):
    """Every episode of at least T rows is equally likely, then every window in it.

    The share of an episode does not depend on its length:

        >>> table = EpisodeTable()
        >>> episode_ids = table.append(5), table.append(14)
        >>> windows = UniformEpisodeSampler().draw(table, 100_000, 3, np.random.default_rng(0))
        >>> (np.bincount(windows.episode) / 100_000).round(2)
        array([0.5, 0.5])
    """

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """`Sampler.draw`: episodes, then a start in each."""
        if length is None:
            return _draw_whole_episodes(table, num_windows, rng)
        episodes = table.count_episodes(length)
        num = episodes.num
        if num == 0:
            raise RuntimeError(table.no_window_message(length))
        position = integers_below(rng, num, num_windows)
        if num < len(table):  # Otherwise all are long enough, and the integer is the position.
            offsets, _ = episodes.locate(position)
            position = offsets - episodes.first
        first, num_starts = table.steps_to_draw(position, length)
        return table.windows(position, first + integers_below(rng, num_starts, num_windows), length)
