"""The contract of evictors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from buffers.table import EpisodeTable

__all__ = ["Evictable", "Evictor"]


class Evictable(Protocol):
    """What an evictor sees of a dataset."""

    capacity: int
    table: EpisodeTable

    @property
    def num_episodes(self) -> int:
        """Live episodes."""

    @property
    def num_timesteps(self) -> int:
        """Steps of all live episodes."""

    @property
    def episode_lengths(self) -> list[int]:
        """Steps of each live episode, oldest first."""


class Evictor(ABC):
    """Chooses the episode that leaves when another needs its room."""

    @abstractmethod
    def evict(self, dataset: Evictable) -> int:
        """Choose an episode; called as often as it takes to make room.

        Args:
            dataset: The dataset, not empty. It must not be changed.

        Returns:
            Episode index, 0 for the oldest to `dataset.num_episodes - 1` for the newest.
        """
