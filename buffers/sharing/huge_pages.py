"""Huge pages for rows in shared memory, made just before the rows are written.

Rows at random places lie in a page each, and where pages have 4 KB the processor looks up an address for each. Private
memory of numpy has pages of 2 MB; for shared memory, most kernels give them only on request, piece by piece:

    pages of 2 MB    |####|####|####|    |    |        rows are about to be written beyond the third
    rows             |##########-----         |

Where the kernel has none (before Linux 6.1, say), pages stay small, and all else is the same.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

__all__ = ["HUGE_PAGE", "HugePages", "map_file"]

HUGE_PAGE = 1 << 21
_MADV_COLLAPSE = 25  # Python knows its name from 3.14 on.


def map_file(descriptor: int, num_bytes: int) -> tuple[mmap.mmap, int]:
    """Map so much of a new file, from an offset below `HUGE_PAGE`, which is returned, too."""
    # A huge page of the file can be one here only if its address and its offset in the file are equal modulo its size.
    # Where the kernel maps is known once it has done so.
    os.ftruncate(descriptor, num_bytes + HUGE_PAGE)
    offset = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8).ctypes.data % HUGE_PAGE
    return mmap.mmap(descriptor, num_bytes, offset=offset), offset


class HugePages:
    """The pages of an array `(num_rows, *shape)` in memory that `map_file` has mapped from an offset."""

    def __init__(self, memory: mmap.mmap, offset: int, array: np.ndarray) -> None:
        self._memory, self._bytes = memory, np.frombuffer(memory, np.uint8)
        self._num_rows, self._row_bytes = len(array), array[:1].nbytes
        self._begin = array.ctypes.data - self._bytes.ctypes.data
        # Pages that the array has for itself: what lies beside it may never be used.
        self._next = self._begin + -(self._begin + offset) % HUGE_PAGE
        self._end = self._begin + array.nbytes

    def reach(self, row: int) -> int:
        """Make pages up to a row that is about to be written; the row up to which nothing is left to do."""
        stop = self._begin + row * self._row_bytes
        while self._next < stop and self._next + HUGE_PAGE <= self._end:
            # The kernel makes none where there is no page at all.
            self._bytes[self._next] = self._bytes[self._next]
            try:
                self._memory.madvise(_MADV_COLLAPSE, self._next, HUGE_PAGE)
            except OSError:
                self._end = 0  # It has none, or none left.
            self._next += HUGE_PAGE
        if self._next + HUGE_PAGE > self._end:
            return self._num_rows
        return (self._next - self._begin) // self._row_bytes
