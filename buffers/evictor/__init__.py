"""Evictors: which episode leaves when another needs its room."""

from buffers.evictor.base import Evictor
from buffers.evictor.fifo import FIFOEvictor

__all__ = ["Evictor", "FIFOEvictor"]
