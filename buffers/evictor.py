"""Evictors: which episode is evicted when another needs its room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

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

    def state_dict(self) -> dict[str, Any]:
        """What a save keeps, for an evictor with a state: numbers, strings, lists, dicts, arrays and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another evictor stood."""
        raise ValueError(f"A {type(self).__name__} has no state, found {sorted(state)}.")


class FIFOEvictor(Evictor):
    """Evicts the oldest episode first."""

    def evict(self, dataset: Evictable) -> int:
        """Return 0, the index of the oldest."""
        return 0
