"""Batch n: which windows it has, what it is made of, and how it crosses from a worker."""

from buffers.loading.loader import SequenceLoader
from buffers.loading.options import Pad, RowOptions
from buffers.loading.padding import shift
from buffers.loading.stream import SequenceStream

__all__ = ["Pad", "RowOptions", "SequenceLoader", "SequenceStream", "shift"]
