"""Which rows a writer has changed: for readers that keep something made of them, and for what keeps rows on disk."""

from __future__ import annotations

import numpy as np

from buffers.sharing import fence, store_fence
from buffers.table import Int64Array

__all__ = ["ChangeLog", "ChangedBlocks"]

_NUM_ENTRIES = 1 << 16
# Entries that are written before they are published: a reader must not be so close to being lapped.
_MOST_AT_ONCE = _NUM_ENTRIES // 4
# Step ids of a block, and flags; both powers of two.
_BLOCK_BITS, _NUM_FLAGS = 12, 1 << 16


class ChangeLog:
    """The last changes, (episode id, first row, number of rows) each, in a circle in memory that processes share.

    A reader copies the entries since its last look, then loads the number of entries again: those that the writer
    cannot have reached meanwhile are whole. A reader that is a lap behind starts over.
    """

    #: Names, shapes and dtypes of the arrays in shared memory.
    layout = {"log/entries": ((_NUM_ENTRIES, 3), np.dtype(np.int64)), "log/num": ((1,), np.dtype(np.int64))}

    def __init__(self, entries: Int64Array, num: Int64Array) -> None:
        self._entries, self._num = entries, num

    @property
    def num(self) -> int:
        """Entries ever written."""
        return int(self._num[0])

    def append(self, changes: Int64Array) -> None:
        """Note changes `(n, 3)`, which must have been written before."""
        for begin in range(0, len(changes), _MOST_AT_ONCE):
            part, num = changes[begin : begin + _MOST_AT_ONCE], self.num
            place = num % _NUM_ENTRIES
            at_end = _NUM_ENTRIES - place
            self._entries[place : place + len(part)] = part[:at_end]
            self._entries[: max(0, len(part) - at_end)] = part[at_end:]
            store_fence()
            self._num[0] = num + len(part)

    def skip(self) -> None:
        """Let all readers start over."""
        store_fence()
        self._num[0] += _NUM_ENTRIES

    def since(self, num: int) -> tuple[Int64Array | None, int]:
        """The entries `(n, 3)` from number `num` on, None if some are gone; and the number to ask from next."""
        end = self.num
        fence()
        found = self._entries.take(np.arange(num, end) % _NUM_ENTRIES, axis=0) if end - num <= _NUM_ENTRIES else None
        fence()
        is_whole = found is not None and self.num + _MOST_AT_ONCE <= num + _NUM_ENTRIES
        return (found if is_whole else None), end


class ChangedBlocks:
    """Which blocks of step ids have changed. Blocks that are far apart share a flag, so it may say so of more."""

    def __init__(self) -> None:
        self._flags = np.zeros(_NUM_FLAGS, np.bool_)

    def mark(self, starts: Int64Array) -> None:
        """Note changes in the runs that begin at `starts` `(n,)`. Each lies in one episode."""
        self._flags[(starts >> _BLOCK_BITS) & (_NUM_FLAGS - 1)] = True

    def mark_all(self, begin: int, end: int) -> None:
        """Note that all step ids in [begin, end) have changed."""
        self._flags[_flags_of(begin, end)] = True

    def has(self, begin: int, end: int) -> bool:
        """Whether anything may have changed in the episodes that begin and end within [begin, end)."""
        return bool(self._flags[_flags_of(begin, end)].any())

    def take(self) -> ChangedBlocks:
        """All changes so far, which are forgotten here."""
        taken = ChangedBlocks()
        taken._flags, self._flags = self._flags, taken._flags
        return taken

    def put_back(self, taken: ChangedBlocks) -> None:
        """Note again what was taken."""
        self._flags |= taken._flags


def _flags_of(begin: int, end: int) -> Int64Array:
    last = min((end - 1) >> _BLOCK_BITS, (begin >> _BLOCK_BITS) + _NUM_FLAGS - 1)
    return np.arange(begin >> _BLOCK_BITS, last + 1) & (_NUM_FLAGS - 1)
