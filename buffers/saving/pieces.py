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

from buffers.table import Int64Array
from buffers.utils import Process, ThreadLock

__all__ = ["Pieces", "cut_into_pieces"]

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

    def stop(self) -> None:
        """Write no more, if not everything is written: the file is about to be closed."""
        with self._lock:
            if not self._is_written.all():
                self.error = self.error or RuntimeError("The save has failed.")
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
    episodes: Int64Array, row_bytes: int, lap: int | None = None, most: int | None = None
) -> tuple[Int64Array, Int64Array]:
    """Cut the episodes `(n, 4)` of a table into pieces.

    A piece is a run of whole episodes, up to `most`, without gaps in their step ids or ids, of some megabytes. It
    crosses no multiple of `lap`, at which the memory of a ring begins anew.

    Returns:
        The first episode of each piece, with n behind them; and its step ids, [first, end), int64 `(pieces, 2)`.
    """
    starts, lengths, ids, _ = episodes.T
    ends, num_bytes = starts + lengths, lengths * max(1, row_bytes)
    bytes_before = num_bytes.cumsum() - num_bytes
    is_first = np.ones(len(episodes), np.bool_)
    is_first[1:] = (starts[1:] != ends[:-1]) | (np.diff(ids) != 1) | (np.diff(bytes_before // PIECE_BYTES) > 0)
    if lap is not None:
        is_first[1:] |= np.diff(starts // lap) != 0
    if most is not None:
        is_first |= np.arange(len(episodes)) % most == 0
    at = np.append(is_first.nonzero()[0], len(episodes))
    return at, np.stack([starts[at[:-1]], ends[at[1:] - 1]], 1)
