"""The contract of evictors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["Evictor"]


class Evictor(ABC):
    """Chooses which episode leaves when another needs its room."""

    @abstractmethod
    def evict(self, dataset: EpisodeDataset) -> int:
        """Choose an episode; called as often as it takes to make room.

        Args:
            dataset: The dataset, not empty. It must not be changed.

        Returns:
            Episode index, 0 for the oldest to `dataset.num_episodes - 1` for the newest.
        """
