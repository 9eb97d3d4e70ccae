"""Memory that is used again once nothing refers to what was made in it."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

__all__ = ["NewArray", "ReusedMemory"]

#: An uninitialized array of a shape and dtype.
NewArray = Callable[[tuple[int, ...], np.dtype], np.ndarray]

_ALIGNMENT = 64


class ReusedMemory:
    """Memory of batches, or of episodes. New memory costs a page fault a page, which is more than the copy itself.

    What is kept is never overwritten: its memory is used again when nothing refers to it any more.

    Args:
        most_free: How many pieces of memory wait to be used again, at most.
        most_ratio: Memory is used for what needs at least 1 / `most_ratio` of it.
    """

    def __init__(self, most_free: int, most_ratio: float) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=most_free)
        self._most_ratio = most_ratio

    def begin(self, sizes: list[int]) -> NewArray:
        """Choose memory for arrays of so many bytes, and return what makes them there, in this order."""
        memory, used = self._take(sum(map(_aligned, sizes))), 0

        def new_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            nonlocal used
            num_bytes = math.prod(shape) * dtype.itemsize
            part = memory[used : used + num_bytes]
            used += _aligned(num_bytes)
            return part.view(dtype).reshape(shape)

        return new_array

    def _take(self, num_bytes: int) -> np.ndarray:
        for _ in range(len(self._free)):
            base = self._free.popleft()
            if num_bytes <= len(base) <= self._most_ratio * num_bytes + _ALIGNMENT:
                break
        else:
            base = np.empty(num_bytes + num_bytes // 8, np.uint8)
        # A new array over it: it lives exactly as long as an array that was made in it.
        memory = np.frombuffer(base.data, np.uint8)
        weakref.finalize(memory, self._free.append, base).atexit = False
        return memory


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
