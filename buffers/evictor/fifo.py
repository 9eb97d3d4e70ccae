"""First in, first out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buffers.evictor.base import Evictor

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["FIFOEvictor"]


class FIFOEvictor(Evictor):
    """The oldest episode leaves first."""

    def evict(self, dataset: EpisodeDataset) -> int:
        """Choose the oldest episode, index 0."""
        return 0
