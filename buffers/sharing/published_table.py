"""How one writer publishes its table of episodes to many readers, without a lock.

    the writer (the trainer)                             a reader (a worker, or a thread of the trainer)

    1. announce that an episode is about to come         1. read what is new in the table, draw
    2. retire: raise `oldest_step` past the rows that    2. copy rows
       will be overwritten
    3. write rows                                        3. load `oldest_step` again: keep windows from there on
    4. publish: write the episode, raise `head`

Retire before writing: a reader that copied overwritten rows sees the new `oldest_step` when it looks again, and draws
other windows. A writer that is killed in between leaves rows that are retired but not published, which nobody reads.
The writer never waits for a reader. A reader waits if nothing is left to draw but an episode is about to come.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Sequence

import numpy as np

from buffers.sharing.arrays import SharedArrays
from buffers.table import EpisodeTable, Int64Array
from buffers.utils import Process

__all__ = ["PublishedTable", "fence"]

_START, _LENGTH, _ID = range(3)
# Words that the writer stores, each on its own cache line.
_HEAD, _TAIL, _OLDEST_STEP, _IS_ADDING, _HAS_ENDED = range(5)
_NUM_LINES, _WORDS_PER_LINE = 5, 8
_MAX_ROWS = 2**28  # 6.4 GB, if all of it were ever used.
_ROWS_AT_ONCE = 64
_NOTHING_READ = -1
_STORES_STAY_IN_ORDER = platform.machine().lower() in ("x86_64", "amd64")


def fence() -> None:
    """Order this thread's loads and stores before it against those after it.

    Acquiring a lock does that. It is a new lock, because a fork could leave a shared one locked for ever.
    """
    threading.Lock().acquire()


def store_fence() -> None:
    """Order stores of single words; x86-64 does so by itself (only large copies may bypass its caches)."""
    if not _STORES_STAY_IN_ORDER:
        fence()


class PublishedTable:
    """A circular table of (start, length, id, cut) with a head and a tail.

    A row is an episode that was added or, with length 0, one that was removed. Row n of an endless sequence lies at
    index `n % size`. All live episodes lie between tail and head:

        row       40 41 42 | 43  44  45  46  47 | 48 ...
        id         8  9  3 | 10  11  -9  12   3 |             episode 9 was removed; 3 was moved to the head
                           tail                 head

    When the circle is full, the writer advances the tail. A live episode there is written again at the head; readers
    that know it skip it. With room for twice as many rows as live episodes, that is amortized O(1) a row.

    A reader copies the rows from its position to the head, then loads the tail again: rows from the tail on had not
    been overwritten. A reader that is a lap behind starts over at the tail.
    """

    def __init__(self, memory: SharedArrays) -> None:
        self.memory, self._rows = memory, memory["table/rows"]
        # Single words are read and written through memoryviews in a fraction of the time that it takes through arrays.
        self._words, self._size = self._rows.reshape(-1).data, len(self._rows)
        lines = [memoryview(line) for line in memory["table/lines"]]
        self._head, self._tail, self._oldest_step = lines[_HEAD], lines[_TAIL], lines[_OLDEST_STEP]
        self._is_adding, self._has_ended = lines[_IS_ADDING], lines[_HAS_ENDED]
        self._reader, self._num_read = Process.number, _NOTHING_READ

    def __reduce__(self) -> tuple[type[PublishedTable], tuple[SharedArrays]]:
        return PublishedTable, (self.memory,)

    @staticmethod
    def layout(num_rows: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The arrays for a table of so many rows: at least two more than live episodes, better twice as many."""
        int64, num_rows = np.dtype(np.int64), max(4, min(num_rows, _MAX_ROWS))
        return {"table/lines": ((_NUM_LINES, _WORDS_PER_LINE), int64), "table/rows": ((num_rows, 4), int64)}

    # The writer's side.

    def announce(self) -> None:
        """Say that an episode is about to come, for which others may leave."""
        self._is_adding[0] = 1
        store_fence()

    def retire(self, oldest_step: int) -> None:
        """Remove the episodes before this step id, whose rows are about to be overwritten."""
        self._oldest_step[0] = oldest_step
        # A reader that copied an overwritten row must see this when it looks again.
        fence()

    def add(self, row: Sequence[int], table: EpisodeTable) -> None:
        """Publish a row of `table`, which holds all live ones. RuntimeError if they are too many."""
        if self._head[0] - self._tail[0] >= self._size - 1:
            self._move_tail(table)
        self._append(*row)
        if self._is_adding[0]:
            store_fence()
            self._is_adding[0] = 0

    def add_all(self, table: EpisodeTable) -> None:
        """Publish all live episodes, before anyone reads."""
        self.add_rows(table.rows, table)

    def add_rows(self, rows: Int64Array, table: EpisodeTable) -> None:
        """`add` for several rows `(n, 4)`."""
        head = self._head[0]
        if head + len(rows) - self._tail[0] >= self._size:
            for row in rows.tolist():
                self.add(row, table)
            return
        self._rows[(head + np.arange(len(rows))) % self._size] = rows
        store_fence()
        self._head[0] = head + len(rows)

    def remove(self, episode_id: int, table: EpisodeTable) -> None:
        """Publish that an episode was removed, other than by `retire`."""
        self.add((0, 0, episode_id, 0), table)

    def end(self) -> None:
        """Say that this writer has ended, so that others may change what is stored without telling this table."""
        self._has_ended[0] = 1

    def _append(self, start: int, length: int, episode_id: int, cut: int) -> None:
        head, words = self._head[0], self._words
        word = 4 * (head % self._size)
        words[word], words[word + 1], words[word + 2], words[word + 3] = start, length, episode_id, cut
        store_fence()
        self._head[0] = head + 1

    def _move_tail(self, table: EpisodeTable) -> None:
        """Advance the tail past at least one row that is no live episode."""
        for _ in range(self._size):
            tail = self._tail[0]
            rows = self._rows[tail % self._size :][:_ROWS_AT_ONCE]
            may_live = (rows[:, _LENGTH] > 0) & (rows[:, _START] >= self._oldest_step[0])
            num_dead = int(may_live.argmax()) if may_live.any() else min(len(rows), self._head[0] - tail)
            row = rows[0].tolist()
            is_live = num_dead == 0 and table.position(row[_ID]) is not None
            if is_live:
                self._append(*row)
            self._tail[0] = tail + max(1, num_dead)
            # A reader that copied an overwritten row must see the new tail when it looks again.
            fence()
            if not is_live:
                return
        most = f"{self._size - 2:,}"
        raise RuntimeError(f"Workers can be shown {most} live episodes, and there are more. Lower the `capacity`.")

    # A reader's side.

    @property
    def oldest_step(self) -> int:
        """The smallest step id that is not retired, loaded after everything that was loaded before."""
        fence()
        return self._oldest_step[0]

    @property
    def has_news(self) -> bool:
        """Whether there are rows that this reader has not read, or an episode is about to come."""
        is_adding = self._is_adding[0]
        fence()
        return bool(is_adding) or self._head[0] != self._num_read

    @property
    def has_ended(self) -> bool:
        """Whether the writer has ended or been killed."""
        return bool(self._has_ended[0]) or self.memory.is_orphaned

    def follow(self, table: EpisodeTable) -> list[int]:
        """Update a reader's own table; returns the ids of episodes that were removed other than by `retire`."""
        if self._reader != Process.number:
            # The fork may have interrupted another thread here: start over.
            self._reader, self._num_read = Process.number, _NOTHING_READ
        gone: list[int] = []
        head = self._head[0]
        if head != self._num_read:
            fence()
            rows = None if self._num_read == _NOTHING_READ else self._copied(self._num_read, head)
            if rows is not None:
                gone = _apply(rows, table)
                self._num_read = head
            else:
                gone = self._read_all(table)
        table.retire(self.oldest_step)
        return gone

    def _copied(self, begin: int, end: int) -> Int64Array | None:
        """Rows `begin` to `end`; None if some were overwritten meanwhile."""
        rows = self._rows.take(np.arange(begin, end) % self._size, axis=0)
        fence()
        return rows if self._tail[0] <= begin else None

    def _read_all(self, table: EpisodeTable) -> list[int]:
        """Replace the reader's table by all rows from the tail on; returns the ids of episodes that are gone."""
        tail = end = self._tail[0]
        rows = np.empty((0, 4), np.int64)
        while True:
            fence()
            head = self._head[0]
            rows = np.concatenate([rows, self._rows.take(np.arange(end, head) % self._size, axis=0)])
            end = head
            fence()
            now = self._tail[0]
            if now == tail:
                break
            # Rows before the new tail may be overwritten. Those of live episodes were moved to the head: read on.
            if now > end:
                rows, end = rows[:0], now
            rows, tail = rows[now - tail :], now
        known = table.ids.copy()
        added = rows[rows[:, _LENGTH] > 0]
        added = added[np.unique(added[:, _ID], return_index=True)[1]]
        table.replace(added[~np.isin(added[:, _ID], rows[rows[:, _LENGTH] == 0, _ID])])
        self._num_read = end
        return np.setdiff1d(known, table.ids).tolist()


def _apply(rows: Int64Array, table: EpisodeTable) -> list[int]:
    is_added = rows[:, _LENGTH] > 0
    # Known episodes were moved to the head.
    is_new = is_added & (rows[:, _ID] >= table.next_id)
    table.extend(rows if is_new.all() else rows[is_new])
    gone = rows[~is_added, _ID]
    table.discard(gone)
    return gone.tolist()
