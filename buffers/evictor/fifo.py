"""First in, first out."""

from __future__ import annotations

from buffers.evictor.base import Evictable, Evictor

__all__ = ["FIFOEvictor"]


class FIFOEvictor(Evictor):
    """The oldest episode leaves first."""

    def evict(self, dataset: Evictable) -> int:
        """Choose the oldest episode, index 0."""
        return 0
