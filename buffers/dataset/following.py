"""How a reader of a directory of episodes keeps up with its writer.

    reader                                              keeps up by
    a child of the writer's process, or its pickle      the writer's log, in shared memory: exact, whenever it draws
    any other (`mode="r"`), or if the writer is gone    looking at the directory, now and then

Either way an episode's file has the name that its numbers give it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import Any

from buffers.dataset.directory import EpisodeDirectory, FileName
from buffers.sharing import PublishedTable, SharedArrays
from buffers.table import EpisodeTable

__all__ = ["DirectoryWatch", "EpisodeNames", "handed_on", "new_log", "opened_log"]

# A reader looks for new episodes for at most a twentieth of its time.
_REST = 20.0
# Two changes of a directory within the clock's grain (2 s on some file systems) look like one.
_CLOCK_GRAIN_NS = 2 * 10**9


class EpisodeNames:
    """The names of files, worked out when they are first asked for.

    Args:
        index: The episodes that live.
        directory: Knows the suffix.
    """

    def __init__(self, index: EpisodeTable, directory: EpisodeDirectory) -> None:
        self._index, self._directory = index, directory
        self._known: dict[int, str] = {}

    def get(self, episode_id: int) -> str | None:
        """The name of an episode's file; None if it neither lives nor was noted."""
        name = self._known.get(episode_id)
        if name is None:
            position = self._index.position(episode_id)
            if position is not None:
                start, length, _ = self._index.episode(position)
                name = self.note(episode_id, start, length)
        return name

    def note(self, episode_id: int, start: int, length: int) -> str:
        """The name of an episode that is not in the index yet."""
        name = self._known[episode_id] = FileName(episode_id, start, length).text(self._directory.suffix)
        return name

    def forget(self, episode_id: int) -> None:
        """The episode is gone."""
        self._known.pop(episode_id, None)

    def all(self) -> set[str]:
        """The names of all that live."""
        suffix = self._directory.suffix
        return {FileName(number, start, rows).text(suffix) for start, rows, number in self._index.rows.tolist()}

    def live_among(self, names: set[str]) -> list[int]:
        """The ids of the episodes that live and have one of these names, whatever else is among them."""
        numbers = {int(digits) for digits in (name.partition("-")[0] for name in names) if digits.isdecimal()}
        return [number for number in numbers if self.get(number) in names]


class DirectoryWatch:
    """When a reader looks at its directory again: if it has changed, and for at most a twentieth of its time.

    Attributes:
        seen: Names that need not be looked at again.
    """

    def __init__(self, directory: EpisodeDirectory) -> None:
        self._directory = directory
        self.seen: set[str] = set()
        self._change_seen, self._next_look = -1, 0.0

    def look(self, scan: Callable[[], None], is_urgent: bool) -> None:
        """Call `scan` if it is time, or urgent."""
        begin = time.monotonic()
        if begin < self._next_look and not is_urgent:
            return
        changed_at, now = self._directory.modified_at(), time.time_ns()
        if changed_at == self._change_seen and not is_urgent:
            return
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


def handed_on(log: PublishedTable | None) -> dict[str, Any] | None:
    """What `opened_log` makes the same log of in another process; None if there is none, or it would be a copy.

    Outside Linux, shared memory goes only to processes that are being started.
    """
    if log is None or (sys.platform != "linux" and get_spawning_popen() is None):
        return None
    return log.memory.__getstate__()


def opened_log(state: dict[str, Any] | None) -> PublishedTable | None:
    """The log whose memory another process has handed on; None if it is not there any more."""
    if state is None:
        return None
    memory = SharedArrays.__new__(SharedArrays)
    try:
        memory.__setstate__(state)
    except RuntimeError:
        return None  # What its writer has left is in the directory.
    return PublishedTable(memory)
