"""Batch n: which windows it has, what it is made of, and how it crosses from a worker."""

from buffers.loading.loader import SequenceLoader
from buffers.loading.options import LoaderOptions, StreamOptions
from buffers.loading.stream import SequenceStream

__all__ = ["LoaderOptions", "SequenceLoader", "SequenceStream", "StreamOptions"]
