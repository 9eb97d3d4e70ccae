"""The values of one feature over the steps of an episode, from what an Example has."""

from __future__ import annotations

import math
import zlib

import numpy as np

from buffers.interop.rlds.example import Feature
from buffers.interop.rlds.images import decode_images
from buffers.interop.rlds.schema import Leaf

__all__ = ["values_of"]


def values_of(leaf: Leaf, feature: Feature, num_steps: int) -> np.ndarray:
    """`(num_steps, *shape)` in the dtype of features.json. ValueError if there is anything else."""
    if leaf.kind == "numbers":
        values, expected = _numbers(leaf, feature), num_steps * math.prod(leaf.shape)
        if len(values) != expected:
            raise ValueError(f"{len(values)} numbers, expected {expected}: {leaf.shape} for each of {num_steps} steps")
        return values.reshape(num_steps, *leaf.shape)
    encoded = feature.strings()
    if len(encoded) != num_steps:
        raise ValueError(f"{len(encoded)} values for {num_steps} steps")
    if leaf.kind == "image":
        return decode_images(encoded, leaf.shape, leaf.dtype)
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    parts = [_unpacked(part, nbytes) if leaf.kind == "zlib" else part for part in encoded]
    if any(len(part) != nbytes for part in parts):
        raise ValueError(f"arrays of {sorted({len(part) for part in parts})!r:.60} bytes, expected {nbytes}")
    values = np.frombuffer(b"".join(parts), leaf.dtype.newbyteorder("<"))
    if leaf.dtype.kind == "b" and values.view(np.uint8).max(initial=0) > 1:
        raise ValueError("bytes that are no bools")
    return values.astype(leaf.dtype).reshape(num_steps, *leaf.shape)


def _numbers(leaf: Leaf, feature: Feature) -> np.ndarray:
    if leaf.dtype.kind == "f":
        return feature.floats().astype(leaf.dtype)
    values = feature.integers()
    if leaf.dtype == np.uint64:
        return values.view(np.uint64)  # Examples hold the bits of one as an int64.
    limits = (0, 1) if leaf.dtype.kind == "b" else (np.iinfo(leaf.dtype).min, np.iinfo(leaf.dtype).max)
    if len(values) and not limits[0] <= values.min() <= values.max() <= limits[1]:
        raise ValueError(f"values from {values.min()} to {values.max()}, which {leaf.dtype} cannot hold")
    return values.astype(leaf.dtype)


def _unpacked(content: memoryview, nbytes: int) -> bytes:
    """What is packed, at most one byte more than expected."""
    return zlib.decompressobj().decompress(content, nbytes + 1)
