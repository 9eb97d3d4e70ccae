"""Huge pages for rows in shared memory, made just before the rows are written.

Each random row lies in another page, whose address the processor must look up; pages of 2 MB instead of 4 KB make that
rare. numpy's own memory has them. For shared memory, most kernels make them only on request, one at a time:

    pages of 2 MB    |####|####|####|    |    |        rows are about to be written in the third
    rows             |##########-----         |

Where the kernel makes none (before Linux 6.1), pages stay small and nothing else changes.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import torch

__all__ = ["HUGE_PAGE", "HugePages", "map_file", "map_file_again"]

HUGE_PAGE = 1 << 21
_ATTEMPTS = 3
_MADV_COLLAPSE = 25  # Python knows its name from 3.14 on.


def map_file(descriptor: int, num_bytes: int) -> tuple[mmap.mmap, int]:
    """Map `num_bytes` of a new file; returns the mapping and its offset in the file, below `HUGE_PAGE`."""
    # The file's huge pages can be huge here only if addresses and offsets in the file are equal modulo `HUGE_PAGE`.
    # A first mapping tells the address.
    # Another process may map more of it, see below.
    os.ftruncate(descriptor, num_bytes + 2 * HUGE_PAGE)
    offset = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8).ctypes.data % HUGE_PAGE
    return mmap.mmap(descriptor, num_bytes, offset=offset), offset


def map_file_again(path: str, num_bytes: int) -> torch.Tensor:
    """Map the first `num_bytes` of such a file in another process, uint8; keeps no descriptor, unlike Python's mmap."""
    memory, extra = _mapped(path, num_bytes), 0
    for _ in range(_ATTEMPTS):
        if memory.data_ptr() % HUGE_PAGE:
            # The kernel puts mappings below others: one that is so much longer begins at the address of a huge page.
            extra = (extra + memory.data_ptr()) % HUGE_PAGE
            memory = torch.empty(0, device="cpu")  # First make its place free.
            memory = _mapped(path, num_bytes + extra)
    return memory[:num_bytes]


def _mapped(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8, device="cpu")


class HugePages:
    """The pages of an array `(num_rows, *shape)` in memory from `map_file`, with the offset that this returned."""

    def __init__(self, memory: mmap.mmap, offset: int, array: np.ndarray) -> None:
        self._memory, self._bytes = memory, np.frombuffer(memory, np.uint8)
        self._num_rows, self._row_bytes = len(array), array[:1].nbytes
        self._begin = array.ctypes.data - self._bytes.ctypes.data
        # Only pages that lie within the array: its neighbours may never be used.
        self._next = self._begin + -(self._begin + offset) % HUGE_PAGE
        self._end = self._begin + array.nbytes

    def reach(self, row: int) -> int:
        """Make huge pages for the rows before `row`; returns the row up to which there is nothing left to do."""
        stop = self._begin + row * self._row_bytes
        while self._next < stop and self._next + HUGE_PAGE <= self._end:
            # The kernel needs a page there to begin with.
            self._bytes[self._next] = self._bytes[self._next]
            try:
                self._memory.madvise(_MADV_COLLAPSE, self._next, HUGE_PAGE)
            except OSError:
                self._end = 0  # It makes none, or has none left.
            self._next += HUGE_PAGE
        if self._next + HUGE_PAGE > self._end:
            return self._num_rows
        return (self._next - self._begin) // self._row_bytes
