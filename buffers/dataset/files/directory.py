"""A directory of episode files that is its own index: file names, the commit, and setting files aside.

    0000000012-000000002400-200.safetensors     episode 12: step ids 2400 to 2599
    0000000012-000000002400-200-7.safetensors   the same as a piece of a longer stream: its cut, see `table/cut.py`
    0000000013-000000002600.next                the next id and start, if no episode's name tells them (empty)
    .tmp-0000000013-000000002600-87.safetensors an episode that is being written
    .lock                                       names the process that writes
    damaged/                                    files that were not whole episodes
    late/                                       late fields, see `late_files.py`

`docs/format.md` has a table of what a crash leaves after each step of a commit.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from abc import abstractmethod
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from buffers.disk import TEMPORARY, Descriptor, Directory, Files, open_directory
from buffers.disk.lock import NO_SURPRISES, last_capacity, sign, take_lock
from buffers.fields import Fields
from buffers.table import EpisodeTable

__all__ = ["EpisodeDirectory", "EpisodeFiles", "FileName", "Listing"]

_DATA_SUFFIXES = ".npz", ".pt", ".safetensors", ".hdf5", ".h5"
_LARGEST_NUMBER = 10**15
# Numbers below 10**15. Each can be written in one way only.
_NUMBERS = r"([0-9]{10}|[1-9][0-9]{10,14})-([0-9]{12}|[1-9][0-9]{12,14})"
_NAME = re.compile(_NUMBERS + r"-([1-9][0-9]{0,8})(?:-([1-9][0-9]{0,9}))?(\.[^/]+)")
_MARKER = re.compile(_NUMBERS + r"\.next")
# A reader lists its directory for at most a twentieth of its time.
_REST = 20.0
# Some file systems round times to 2 s, so two changes within that time look like one.
_CLOCK_GRAIN_NS = 2 * 10**9


class FileName(NamedTuple):
    """What the name of an episode's file says. Names sort in the order of their episodes."""

    id: int
    start: int
    length: int
    cut: int
    suffix: str

    def __str__(self) -> str:
        cut = f"-{self.cut}" if self.cut else ""
        return f"{self.id:010d}-{self.start:012d}-{self.length}{cut}{self.suffix}"

    @classmethod
    def parse(cls, text: str) -> FileName | None:
        """None if it is not the name of an episode, in any format."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        return cls(int(match[1]), int(match[2]), int(match[3]), int(match[4] or 0), match[5])


class Listing(NamedTuple):
    """What a directory holds. The first three are of episodes in the directory's format, in order."""

    names: list[str]
    rows: npt.NDArray[np.int64]  # (n, 4): start, length, id and cut, from the names.
    sizes: npt.NDArray[np.int64]  # (n,): bytes; -1 if it is not a regular file.
    temporaries: list[str]
    strangers: list[str]  # What looks like data, but is not named like an episode.
    other_suffixes: set[str]  # Of episodes in other formats.
    next_numbers: tuple[int, int]  # The least id and start that are free, by all episodes and `.next` files.
    all_names: set[str]
    markers: list[str]  # Of the names, those of `.next` files.
    fields: Fields | None = None  # Of all episodes, where their headers have been checked before.


class EpisodeFiles(Files):
    """The files of a dataset, in any format: in a directory, or elsewhere.

    Attributes:
        suffix: Of episode files.
        last_capacity: Of the writer before, in steps; 0 if it is not known.
    """

    suffix: str
    last_capacity = 0
    _next_look = 0.0

    @abstractmethod
    def _entries(self) -> Iterator[tuple[str, Callable[[], int]]]:
        """The names of all files, and what tells their sizes, -1 for what is no file."""

    def expect(self, names: Sequence[str], lengths: Sequence[int], fields: Fields, whole: bool) -> None:
        """Prepare for reading the headers of episodes, or `whole` files: they will be opened next."""

    def list(self, known: Collection[str] = ()) -> Listing:
        """List the files. Names that are `known` appear in `all_names` only."""
        all_names, other_names, other_suffixes = set(), [], set()
        names: list[str] = []
        numbers = array("q")
        for entry, size_of in self._entries():
            all_names.add(entry)
            if entry in known:
                continue
            name = FileName.parse(entry)
            if name is None:
                other_names.append(entry)
            elif name.suffix != self.suffix:
                other_suffixes.add(name.suffix)
            else:
                with contextlib.suppress(FileNotFoundError):  # Evicted meanwhile.
                    numbers.extend((name.start, name.length, name.id, name.cut, size_of()))
                    names.append(entry)
        found = np.frombuffer(numbers, np.int64).reshape(-1, 5) if numbers else np.empty((0, 5), np.int64)
        order = np.lexsort(found[:, [3, 1, 0, 2]].T)
        rows = found[order, :4]
        markers = [match for name in other_names if (match := _MARKER.fullmatch(name))]
        given = np.array([(int(match[1]), int(match[2])) for match in markers], np.int64).reshape(-1, 2)
        given = np.concatenate([given, np.stack([rows[:, 2] + 1, rows[:, 0] + rows[:, 1]], 1)])
        # This library never gives numbers as large as those that are left out here.
        next_id, next_start = given[(given < _LARGEST_NUMBER).all(1)].max(0, initial=0).tolist()
        return Listing(
            [names[at] for at in order.tolist()],
            rows,
            found[order, 4],
            [name for name in other_names if name.startswith(TEMPORARY) and FileName.parse(name[len(TEMPORARY) :])],
            [name for name in other_names if name[0] != "." and name.endswith((*_DATA_SUFFIXES, self.suffix))],
            other_suffixes,
            (next_id, next_start),
            all_names,
            [match[0] for match in markers],
        )

    def look(self, scan: Callable[[], None], is_urgent: bool) -> None:
        """Call `scan` if it is urgent, or if a name was added or removed and it is not too early for another scan."""
        begin = time.monotonic()
        if (is_urgent or begin >= self._next_look) and self._look(scan, is_urgent):
            end = time.monotonic()
            self._next_look = end + _REST * (end - begin)

    @abstractmethod
    def _look(self, scan: Callable[[], None], is_urgent: bool) -> bool:
        """Call `scan` if it is urgent, or if a name may have been added or removed; whether that took time."""

    def name_of(self, start: int, length: int, episode_id: int, cut: int) -> FileName:
        """The name for a row of the table."""
        return FileName(episode_id, start, length, cut, self.suffix)


class EpisodeDirectory(Directory, EpisodeFiles):
    """The files of a dataset, in any format.

    Args:
        path: Created, with its parents, if `writable`.
        suffix: Of episode files.
        writable: Take the lock; a RuntimeError if another process has it.
        durable: Wait for the disk at each step of a commit.
        lock: False takes no lock: the caller knows that there is no other writer.
    """

    def __init__(self, path: str, suffix: str, writable: bool, durable: bool = True, lock: bool = True) -> None:
        path = os.path.abspath(path)
        super().__init__(path, Descriptor(open_directory(path, writable)), durable)
        self.suffix = suffix
        self.newest: FileName | None = None  # Of the episode whose file was written last.
        self._markers: list[str] = []  # The names of `.next` files.
        self._change_seen = -1
        self._lock = take_lock(self.path, self._descriptor.number, lock) if writable else None
        self.last_capacity = last_capacity(self._descriptor.number)

    def keep_capacity(self, capacity: int) -> None:
        """Write down the capacity, for the next opening."""
        if self._lock is not None and capacity != self.last_capacity:
            sign(self._lock, capacity)
            if self._is_durable:
                os.fsync(self._lock.number)
                os.fsync(self._descriptor.number)

    def _entries(self) -> Iterator[tuple[str, Callable[[], int]]]:
        # A descriptor of its own, because forked processes share the position of one up to which it has been read.
        descriptor = Descriptor(os.open(".", os.O_RDONLY, dir_fd=self._descriptor.number))
        with os.scandir(descriptor.number) as entries:
            for entry in entries:
                yield entry.name, partial(_size_of, entry)

    def list(self, known: Collection[str] = ()) -> Listing:
        """As `EpisodeFiles.list`."""
        listing = super().list(known)
        self._markers = listing.markers
        return listing

    def _look(self, scan: Callable[[], None], is_urgent: bool) -> bool:
        changed_at = os.fstat(self._descriptor.number).st_mtime_ns
        if not is_urgent and changed_at == self._change_seen:
            return False
        is_settled = time.time_ns() - changed_at > _CLOCK_GRAIN_NS
        scan()
        self._change_seen = changed_at if is_settled else -1
        return True

    def remove_uncounted(self, next_id: int) -> None:
        """Remove the newest file if its addition failed after writing it: its numbers will be given again."""
        if self.newest is not None and self.newest.id >= next_id:
            self.remove(str(self.newest))
        self.newest = None

    def keep_numbers(self, next_id: int, next_start: int) -> None:
        """Leave one `.next` file, so that numbers are not reused once the newest episodes are gone."""
        name = f"{next_id:010d}-{next_start:012d}.next"
        if name in self._markers:
            return
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | NO_SURPRISES, 0o666, dir_fd=self._descriptor.number))
        if self._is_durable:
            os.fsync(self._descriptor.number)
        for other in self._markers:
            self.remove(other)
        self._markers = [name]

    def forget_numbers(self) -> None:
        """Remove what `keep_numbers` has left: the numbers after those of the episodes are given again."""
        for name in self._markers:
            self.remove(name)
        self._markers = []

    def keep_numbers_of(self, table: EpisodeTable) -> None:
        """`keep_numbers`, if the newest episode is gone."""
        if table.next_id and (not len(table) or int(table.ids[-1]) != table.next_id - 1):
            self.keep_numbers(table.next_id, table.next_start)

    def close(self) -> None:
        """Release the lock, and close it."""
        if self._lock is not None:
            self._lock.close()
        super().close()


def _size_of(entry: os.DirEntry[str]) -> int:
    status = entry.stat(follow_symlinks=False)
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
