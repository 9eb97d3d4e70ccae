"""Numbers about a buffer, for a logger."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.fields import Scalar, as_tensor
from buffers.loading.stream import SequenceStream

__all__ = ["Statistics"]

_NUM_RETURNS = 100
_BFLOAT16 = Scalar(dtype=torch.bfloat16)


class Statistics:
    """Remembers the returns of the last episodes, and counts what is there.

    Args:
        dataset: Where episodes live.
    """

    def __init__(self, dataset: EpisodeDataset) -> None:
        self._dataset = dataset
        self._returns: deque[float] = deque(maxlen=_NUM_RETURNS)

    def note_return(self, reward: Any) -> None:
        """Remember the sum of an episode's rewards; None and what is no real scalar field are passed over."""
        if reward is None:
            return
        rewards = reward if type(reward) is np.ndarray else as_array("reward", reward)
        if rewards.ndim != 1:
            return
        if rewards.dtype.kind in "fiub":
            self._returns.append(float(np.add.reduce(rewards)))
        elif rewards.dtype == _BFLOAT16.numpy_dtype:
            self._returns.append(float(as_tensor(rewards.copy(), _BFLOAT16).float().sum()))

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
            found["newest_age"] = dataset.table.next_start - 1 - stream.newest_step
        return found
