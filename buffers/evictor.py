"""Evictors: which episode leaves when another needs its room."""

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
    """Chooses the episode that leaves when another needs its room."""

    @abstractmethod
    def evict(self, dataset: Evictable) -> int:
        """The index of an episode, 0 for the oldest, of a dataset with at least one; called until there is room."""


class FIFOEvictor(Evictor):
    """The oldest episode leaves first."""

    def evict(self, dataset: Evictable) -> int:
        """Choose the oldest episode, index 0."""
        return 0
