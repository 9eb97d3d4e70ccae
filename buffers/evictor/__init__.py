"""Evictors: which episode leaves when another needs its room."""

from buffers.evictor.base import Evictable, Evictor
from buffers.evictor.fifo import FIFOEvictor

__all__ = ["Evictable", "Evictor", "FIFOEvictor"]
