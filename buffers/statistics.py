"""Numbers about a buffer, for a logger."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from buffers.conversion import as_array
from buffers.dataset.episode_source import EpisodeSource
from buffers.loading.stream import SequenceStream

__all__ = ["Statistics"]

_NUM_RETURNS = 100


class Statistics:
    """Remembers the returns of the last episodes, and counts what is there."""

    def __init__(self, dataset: EpisodeSource) -> None:
        self._dataset = dataset
        self._returns: deque[float] = deque(maxlen=_NUM_RETURNS)

    def note(self, episode: Mapping[str, Any]) -> None:
        """Remember an episode's return: the sum of `reward`, if that is one real number a step."""
        rewards = episode.get("reward")
        if rewards is None or isinstance(rewards, Mapping):
            return
        if type(rewards) is not np.ndarray:
            rewards = as_array("reward", rewards)
        if rewards.dtype.kind == "V":
            # bfloat16, the upper half of a float32.
            rewards = (rewards.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if rewards.ndim == 1 and rewards.dtype.kind in "fiub":
            self._returns.append(float(np.add.reduce(rewards)))

    def numbers(self, stream: SequenceStream) -> dict[str, float]:
        """What `ReplayBuffer.stats` gives."""
        dataset = self._dataset
        found: dict[str, float] = {
            "num_episodes": dataset.num_episodes,
            "num_timesteps": dataset.num_timesteps,
            "fill": dataset.num_timesteps / dataset.capacity,
            "mean_episode_length": dataset.average_episode_length,
            "num_evicted": dataset.num_evicted,
            "num_batches": stream.position,
            "num_rejected_windows": stream.num_rejected,
        }
        if self._returns:
            found["mean_episode_return"] = sum(self._returns) / len(self._returns)
        if stream.newest_step is not None and not dataset.has_members:
            found["newest_age"] = dataset.table.num_steps_after(stream.newest_step)
        return found
