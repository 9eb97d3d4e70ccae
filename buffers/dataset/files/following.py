"""How a reader of a directory of episodes keeps up with its writer.

reader                                              keeps up by
a child of the writer's process, or its pickle      the writer's log, in shared memory: exact, whenever it draws
any other (`mode="r"`), or if the writer is gone    looking at the directory, now and then
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import Any

from buffers.dataset.files.directory import EpisodeDirectory
from buffers.sharing import PublishedTable, SharedArrays

__all__ = ["DirectoryWatch", "attach_log", "new_log", "share_log"]

# A reader looks for new episodes for at most a twentieth of its time.
_REST = 20.0
# Two changes of a directory within the clock's grain (2 s on some file systems) look like one.
_CLOCK_GRAIN_NS = 2 * 10**9


class DirectoryWatch:
    """When a reader looks at its directory again: if it has changed, and for at most a twentieth of its time."""

    def __init__(self, directory: EpisodeDirectory) -> None:
        self._directory = directory
        self._change_seen, self._next_look = -1, 0.0

    def look(self, scan: Callable[[], None], is_urgent: bool) -> None:
        """Call `scan` if it is time, or urgent."""
        begin, now = time.monotonic(), time.time_ns()
        if not is_urgent and (begin < self._next_look or self._directory.modified_at() == self._change_seen):
            return
        changed_at = self._directory.modified_at()
        scan()
        self._change_seen = changed_at if now - changed_at > _CLOCK_GRAIN_NS else -1
        end = time.monotonic()
        self._next_look = end + _REST * (end - begin)


def new_log(capacity: int) -> PublishedTable:
    """A log for the readers of a new writer.

    Raises:
        MemoryError: There is no memory for it.
    """
    return PublishedTable(SharedArrays(PublishedTable.layout(2 * capacity + 2)))


def share_log(log: PublishedTable | None) -> dict[str, Any] | None:
    """What `attach_log` needs in another process; None if there is no log, or it would be copied.

    Outside Linux, shared memory goes only to processes that are being started.
    """
    if log is None or (sys.platform != "linux" and get_spawning_popen() is None):
        return None
    return log.memory.__getstate__()


def attach_log(state: dict[str, Any] | None) -> PublishedTable | None:
    """The log that another process shares; None if its memory is not there any more."""
    if state is None:
        return None
    memory = SharedArrays.__new__(SharedArrays)
    try:
        memory.__setstate__(state)
    except RuntimeError:
        return None  # What its writer has left is in the directory.
    return PublishedTable(memory)
