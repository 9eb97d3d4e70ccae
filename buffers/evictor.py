"""Evictors: which episode is evicted when another needs its room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["Evictor", "FIFOEvictor"]


class Evictor(ABC):
    """Chooses the episode that is evicted when another needs its room."""

    @abstractmethod
    def evict(self, dataset: EpisodeDataset) -> int:
        """Return the index of an episode, 0 for the oldest; called until there is room, never without an episode."""


class FIFOEvictor(Evictor):
    """Evicts the oldest episode first."""

    def evict(self, dataset: EpisodeDataset) -> int:
        """Return 0, the index of the oldest."""
        return 0
