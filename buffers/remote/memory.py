"""Memory for the batches that a learner is given: used again once the last tensor of a batch is dropped."""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch

__all__ = ["BatchMemory"]

_ALIGNMENT = 64
_MOST_FREE = 4


class BatchMemory:
    """New memory costs a page fault for each of its pages, which is more than the copy itself.

    A batch that is kept is never overwritten: its memory is used again when nothing refers to it any more.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_MOST_FREE)
        self._memory, self._used = np.empty(0, np.uint8), 0

    def begin(self, sizes: list[int]) -> None:
        """Choose the memory of the next batch, whose tensors have so many bytes."""
        num_bytes = sum(map(_aligned, sizes))
        for _ in range(len(self._free)):
            base = self._free.popleft()
            if num_bytes <= len(base) <= 2 * num_bytes + _ALIGNMENT:
                break
        else:
            base = np.empty(num_bytes + num_bytes // 8, np.uint8)
        # A new array over it: it lives exactly as long as a tensor of the batch.
        self._memory, self._used = np.frombuffer(base.data, np.uint8), 0
        weakref.finalize(self._memory, self._free.append, base).atexit = False

    def new_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """A tensor in the memory of the current batch."""
        num_bytes = math.prod(shape) * dtype.itemsize
        part = self._memory[self._used : self._used + num_bytes]
        self._used += _aligned(num_bytes)
        return torch.from_numpy(part).view(dtype).view(shape)

    def end(self) -> None:
        """Leave the memory to the batch."""
        self._memory = np.empty(0, np.uint8)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
