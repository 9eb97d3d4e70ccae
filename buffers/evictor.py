"""Evictors: which episode is evicted when another needs its room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from buffers.table import EpisodeTable

__all__ = ["Evictable", "Evictor", "FIFOEvictor"]


class Evictable(Protocol):
    """What an evictor sees of a dataset."""

    capacity: int
    table: EpisodeTable

    @property
    def num_episodes(self) -> int:
        """Live episodes."""

    @property
    def episode_lengths(self) -> list[int]:
        """Steps of each live episode, oldest first."""


class Evictor(ABC):
    """Chooses the episode that is evicted when another needs its room."""

    @abstractmethod
    def evict(self, dataset: Evictable) -> int:
        """Return the index of an episode, 0 for the oldest; called until there is room, never without an episode."""


class FIFOEvictor(Evictor):
    """Evicts the oldest episode first."""

    def evict(self, dataset: Evictable) -> int:
        """Return 0, the index of the oldest."""
        return 0
