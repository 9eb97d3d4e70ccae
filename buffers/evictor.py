"""Evictors: which episode leaves when another needs its room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buffers.dataset import EpisodeDataset

__all__ = ["Evictor", "FIFOEvictor"]


class Evictor(ABC):
    """Chooses the episode that leaves when another needs its room."""

    @abstractmethod
    def evict(self, dataset: EpisodeDataset) -> int:
        """The index of an episode, 0 for the oldest, of a dataset with at least one; called until there is room."""


class FIFOEvictor(Evictor):
    """The oldest episode leaves first."""

    def evict(self, dataset: EpisodeDataset) -> int:
        """Choose the oldest episode, index 0."""
        return 0
