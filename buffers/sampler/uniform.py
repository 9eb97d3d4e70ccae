"""Uniform samplers: over windows (the default), and over episodes first."""

from __future__ import annotations

import numpy as np

from buffers.sampler.base import Sampler, draw_whole_episodes, integers_below
from buffers.table import EpisodeTable, Windows

__all__ = ["UniformEpisodeSampler", "UniformSampler"]


class UniformSampler(Sampler):
    """Every window is equally likely.

    An episode of L rows has L - T + 1 windows, so its last row can be drawn:

        L = 5, T = 3     0 1 2 3 4
                         # # #
                           # # #
                             # # #

    So long episodes are drawn in proportion to their windows; whole episodes (T = None) all alike.

        >>> table = EpisodeTable()
        >>> episode_ids = table.append(5), table.append(14)  # 3 and 12 windows of 3 rows.
        >>> windows = UniformSampler().draw(table, 100_000, 3, np.random.default_rng(0))
        >>> (np.bincount(windows.episode) / 100_000).round(2)
        array([0.2, 0.8])
    """

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """Draw one integer a window, which stands for it in the order of episodes and steps; see `Sampler.draw`."""
        if length is None:
            return draw_whole_episodes(table, num_windows, rng)
        windows = table.count_windows(length)
        num = windows.num
        if num == 0:
            raise RuntimeError(table.no_window_message(length))
        return table.windows_of(windows, integers_below(rng, num, num_windows), length)


class UniformEpisodeSampler(Sampler):
    """Every episode of at least T rows is equally likely, whatever its length, then every window in it.

    >>> table = EpisodeTable()
    >>> episode_ids = table.append(5), table.append(14)
    >>> windows = UniformEpisodeSampler().draw(table, 100_000, 3, np.random.default_rng(0))
    >>> (np.bincount(windows.episode) / 100_000).round(2)
    array([0.5, 0.5])
    """

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """Draw episodes, then a start in each; see `Sampler.draw`."""
        if length is None:
            return draw_whole_episodes(table, num_windows, rng)
        episodes = table.count_episodes(length)
        num = episodes.num
        if num == 0:
            raise RuntimeError(table.no_window_message(length))
        position = integers_below(rng, num, num_windows)
        if num < len(table):  # Else all are long enough, and the integer is the position.
            places, _ = episodes.locate(position)
            position = places - episodes.first
        step = integers_below(rng, table.lengths[position] - (length - 1), num_windows)
        return table.windows(position, step, length)
