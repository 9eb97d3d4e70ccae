"""Pieces: the rows that a save has still to write, each as it was when the save began.

A save goes on while the trainer adds, evicts and updates. Whoever is about to change rows that a save may still need
calls `keep` before, which writes their pieces at once, unless they are written:

    the save               0 1 2 . . . . . . .        in order
    evicts rows of 7       0 1 2 . . . . 7 . .        writes that piece first, then goes on
    the save               0 1 2 3 4 5 6 7 8 9        skips it

So nothing is copied beforehand, and a save takes no memory to speak of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from buffers.utils import Process, ThreadLock

__all__ = ["Pieces", "cut_into_pieces"]

Int64Array = npt.NDArray[np.int64]
PIECE_BYTES = 4 * 2**20


class Pieces:
    """What is still to be written.

    Args:
        bounds: int64 `(n, 2)`, ascending: the numbers [first, end) that each piece covers, of steps for example.
        write: Called once with the number of each piece.
        lock: Held meanwhile.

    Attributes:
        error: What a call of `keep` failed with; the save fails then, and the caller goes on.
    """

    def __init__(self, bounds: Int64Array, write: Callable[[int], None], lock: ThreadLock) -> None:
        self._firsts, self._ends = np.ascontiguousarray(bounds[:, 0]), np.ascontiguousarray(bounds[:, 1])
        self._write, self._lock = write, lock
        self._is_written = np.zeros(len(bounds), np.bool_)
        self._process, self._is_held = Process.number, True
        self.error: Exception | None = None
        # Until everything is ready, `keep` waits.
        lock.acquire()

    @property
    def is_ours(self) -> bool:
        """Whether this process writes them, and is not a fork of the one that does."""
        return Process.number == self._process

    def begin(self) -> None:
        """Let `keep` write: the file is there."""
        if self._is_held:
            self._is_held = False
            self._lock.release()

    def stop(self, error: Exception) -> None:
        """Write no more, if not everything is written: the file is about to be closed."""
        with self._lock:
            if not self._is_written.all():
                self.error = self.error or error
        self.begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # Only the process that saves writes.

    def write_all(self) -> None:
        """Write what is left; raises the error of `keep`, if it had one."""
        for number in range(len(self._is_written)):
            with self._lock:
                if self.error is not None:
                    raise self.error
                self._write_one(number)

    def keep(self, firsts: int | Int64Array, ends: int | Int64Array) -> None:
        """Write the pieces that cover any number in [first, end), of one such span or several."""
        if not self.is_ours or self.error is not None or self._is_written.all():
            return
        begin, end = self._ends.searchsorted(firsts, "right"), self._firsts.searchsorted(ends, "left")
        spans = np.unique(np.stack([np.atleast_1d(begin), np.atleast_1d(end)], 1), axis=0)
        with self._lock:
            if self.error is not None:
                return
            try:
                for number in (n for first, last in spans.tolist() for n in range(first, last)):
                    self._write_one(number)
            except Exception as error:
                self.error = error

    def _write_one(self, number: int) -> None:
        if not self._is_written[number]:
            self._write(number)
            self._is_written[number] = True


def cut_into_pieces(
    starts: Int64Array,
    lengths: Int64Array,
    ids: Int64Array,
    row_bytes: int,
    lap: int | None = None,
    most: int | None = None,
) -> Int64Array:
    """The first of the episodes `(n,)` of each piece, and n behind them.

    A piece is a run of whole episodes, up to `most`, without gaps in their step ids or ids, of some megabytes. It
    crosses no multiple of `lap`, at which the memory of a ring begins anew.
    """
    if not len(starts):
        return np.zeros(1, np.int64)
    has_gap = (starts[1:] != starts[:-1] + lengths[:-1]) | (ids[1:] != ids[:-1] + 1)
    if lap is not None:
        has_gap |= starts[1:] // lap != starts[:-1] // lap
    if most is not None:
        has_gap |= np.arange(1, len(starts)) % most == 0
    bytes_before = np.concatenate([np.zeros(1, np.int64), (lengths * max(1, row_bytes)).cumsum()[:-1]])
    is_first = has_gap | (np.diff(bytes_before // PIECE_BYTES) > 0)
    return np.concatenate([np.zeros(1, np.int64), is_first.nonzero()[0] + 1, np.full(1, len(starts))])
