"""Uniform samplers: over all windows, or over all episodes first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buffers.sampler.base import Sampler, integers_below
from buffers.table import EpisodeTable, Windows

__all__ = ["UniformEpisodeSampler", "UniformSampler"]


def _draw_whole_episodes(table: EpisodeTable, num_windows: int, rng: np.random.Generator) -> Windows:
    """Draw whole episodes, each equally likely; T is the length of the longest drawn."""
    if len(table) == 0:
        raise RuntimeError(table.no_window_message(None))
    return table.windows_at(integers_below(rng, len(table), num_windows), None)


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

    def density(self, table: EpisodeTable, windows: Windows) -> npt.NDArray[np.float64] | None:
        """As `Sampler.density`."""
        if table.context.is_whole:
            return None
        episodes, length = table.count_episodes(windows.length).num, windows.length
        _, num_starts = table.steps_to_draw(table.ids.searchsorted(windows.episode), length)
        return table.num_to_draw(length) / (episodes * num_starts)
