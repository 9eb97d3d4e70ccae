"""What a sampler draws, checked where the sampler is the user's own."""

from __future__ import annotations

import numpy as np

from buffers.dataset.index import EpisodeIndex, Windows
from buffers.sampler.base import Sampler
from buffers.sampler.uniform import UniformEpisodeSampler, UniformSampler

__all__ = ["checked_draw"]


def checked_draw(
    sampler: Sampler, index: EpisodeIndex, num_windows: int, length: int | None, rng: np.random.Generator
) -> Windows:
    """`sampler.draw`, refused by a ValueError where it is not what was asked for."""
    windows = sampler.draw(index, num_windows, length, rng)
    if type(sampler) in (UniformSampler, UniformEpisodeSampler):
        return windows
    name = type(sampler).__name__
    if not isinstance(windows, Windows) or len(windows) != num_windows:
        raise ValueError(f"{name} was asked for {num_windows} windows, found {windows!r:.80}.")
    if length not in (None, windows.length):
        raise ValueError(f"{name} was asked for windows of {length} steps, found {windows.length}.")
    ends = windows.step + (1 if length is None else windows.length)
    if (windows.step < 0).any() or (ends > windows.episode_length).any():
        raise ValueError(f"{name} drew a window that is not within its episode.")
    return windows
