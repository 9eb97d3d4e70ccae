"""A directory of episode files that is its own index: names, the commit, and setting aside.

    0000000012-000000002400-200.safetensors     episode 12: step ids 2400 to 2599
    0000000013-000000002600.next                the next episode's id and start, where no file says so (empty)
    .tmp-0000000013-000000002600-87.safetensors an episode on its way
    .lock                                       names the process that writes
    damaged/                                    files that were no whole episodes

`docs/format.md` has a table of what a crash leaves after each step of a commit.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from buffers.dataset.files.lock import CLOSE_ON_EXEC, NO_SURPRISES, Descriptor, take_lock
from buffers.dataset.files.serialization import DamagedEpisodeError

__all__ = ["DirectoryWatch", "EpisodeDirectory", "FileName", "Listing", "with_advice"]

TEMPORARY = ".tmp-"
DAMAGED = "damaged"
_LARGEST_NUMBER = 10**15
# Numbers below 10**15, each in the one way in which it is written.
_NUMBERS = r"([0-9]{10}|[1-9][0-9]{10,14})-([0-9]{12}|[1-9][0-9]{12,14})"
_NAME = re.compile(_NUMBERS + r"-([1-9][0-9]{0,8})(\.[^/]+)")
_MARKER = re.compile(_NUMBERS + r"\.next")
# A reader looks for new episodes for at most a twentieth of its time.
_REST = 20.0
# Two changes of a directory within the clock's grain (2 s on some file systems) look like one.
_CLOCK_GRAIN_NS = 2 * 10**9
# What opening a link, a directory or a socket says.
_NOT_REGULAR = (errno.ELOOP, errno.EISDIR, errno.ENXIO)


class FileName(NamedTuple):
    """What a file's name says of its episode."""

    id: int
    start: int
    length: int

    def text(self, suffix: str) -> str:
        """The name itself: names in their order are episodes in theirs."""
        return f"{self.id:010d}-{self.start:012d}-{self.length}{suffix}"

    @classmethod
    def parse(cls, text: str) -> FileName | None:
        """What a name says, whatever its suffix; None for other names."""
        match = _NAME.fullmatch(text)
        return None if match is None else cls(int(match[1]), int(match[2]), int(match[3]))


class Listing(NamedTuple):
    """What a directory holds; `names`, `rows` and `sizes` are of episodes with the right suffix, in their order."""

    names: list[str]
    rows: npt.NDArray[np.int64]  # (n, 3): the start, length and id that each name states.
    sizes: npt.NDArray[np.int64]  # (n,): bytes; -1 for what is no regular file.
    temporaries: list[str]
    other_suffixes: set[str]  # Of files with an episode's name and another suffix.
    next_numbers: tuple[int, int]  # The least id and start that no file, and no `.next` file, has given.
    all_names: set[str]


class EpisodeDirectory:
    """The files of a dataset, whatever their format.

    Args:
        path: Created, with its parents, if `writable`.
        suffix: Of episode files.
        writable: Take the lock; a RuntimeError if another process has it.
        durable: Let changes reach the disk before going on.
    """

    def __init__(self, path: str, suffix: str, writable: bool, durable: bool = True) -> None:
        self.path = os.path.abspath(path)
        self.suffix = suffix
        self._is_durable = durable
        self._markers: list[str] = []
        self._descriptor = Descriptor(_open_directory(self.path, writable))
        self._lock = take_lock(self.path, self._descriptor.number) if writable else None

    def list(self, known: Collection[str] = ()) -> Listing:
        """What there is; of the names that are `known`, nothing but that they are there."""
        episodes: list[tuple[int, int, int, int, str]] = []
        all_names, other_names, other_suffixes = set(), [], set()
        # A descriptor of its own: forked processes share the position up to which a directory has been read.
        descriptor = Descriptor(os.open(".", os.O_RDONLY | CLOSE_ON_EXEC, dir_fd=self._descriptor.number))
        with os.scandir(descriptor.number) as entries:
            for entry in entries:
                all_names.add(entry.name)
                if entry.name in known:
                    continue
                match = _NAME.fullmatch(entry.name)
                if match is None:
                    other_names.append(entry.name)
                elif match[4] != self.suffix:
                    other_suffixes.add(match[4])
                else:
                    with contextlib.suppress(FileNotFoundError):  # Evicted meanwhile.
                        status = entry.stat(follow_symlinks=False)
                        size = status.st_size if stat.S_ISREG(status.st_mode) else -1
                        episodes.append((int(match[1]), int(match[2]), int(match[3]), size, entry.name))
        episodes.sort()
        table = np.array([episode[:4] for episode in episodes], np.int64).reshape(-1, 4)
        temporaries = [
            name for name in other_names if name.startswith(TEMPORARY) and FileName.parse(name[len(TEMPORARY) :])
        ]
        markers = [match for name in other_names if (match := _MARKER.fullmatch(name))]
        self._markers = [match[0] for match in markers]
        # This library never gives larger numbers: what has them is a stranger's.
        given = np.array([(int(match[1]), int(match[2])) for match in markers], np.int64).reshape(-1, 2)
        given = np.concatenate([given, np.stack([table[:, 0] + 1, table[:, 1] + table[:, 2]], 1)])
        next_id, next_start = given[(given < _LARGEST_NUMBER).all(1)].max(0, initial=0).tolist()
        names = [episode[4] for episode in episodes]
        rows, sizes = table[:, [1, 2, 0]], table[:, 3]
        return Listing(names, rows, sizes, temporaries, other_suffixes, (next_id, next_start), all_names)

    @property
    def modified_at(self) -> int:
        """When a name last came or went, in nanoseconds."""
        return os.fstat(self._descriptor.number).st_mtime_ns

    def commit(self, name: str, write: Callable[[io.BufferedWriter], None]) -> None:
        """Let a file appear under its name, whole, or not at all: after an error nothing is left behind."""
        directory, appeared = self._descriptor.number, TEMPORARY + name
        with contextlib.suppress(OSError):
            os.unlink(appeared, dir_fd=directory)  # Left by an addition that was cut off.
        try:
            with open(appeared, "xb", opener=partial(os.open, mode=0o666, dir_fd=directory)) as file:
                write(file)
                file.flush()
                if self._is_durable:
                    os.fsync(file.fileno())
            os.rename(appeared, name, src_dir_fd=directory, dst_dir_fd=directory)
            appeared = name
            if self._is_durable:
                os.fsync(directory)
        except Exception:
            # After a failed fsync it is unknown what is on the disk, and a second one may succeed without having
            # written anything: the file is given up.
            with contextlib.suppress(OSError):
                os.unlink(appeared, dir_fd=directory)
            raise

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=self._descriptor.number)

    def keep_numbers(self, next_id: int, next_start: int) -> None:
        """Leave a `.next` file, and no other, so that numbers of episodes that are gone are not given again."""
        name = f"{next_id:010d}-{next_start:012d}.next"
        if name in self._markers:
            return
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | NO_SURPRISES, 0o666, dir_fd=self._descriptor.number))
        if self._is_durable:
            os.fsync(self._descriptor.number)
        for other in self._markers:
            self.remove(other)
        self._markers = [name]

    def set_aside(self, name: str) -> bool:
        """Move a file into the folder of damaged ones, over no other; False if that fails."""
        directory = self._descriptor.number
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                os.mkdir(DAMAGED, dir_fd=directory)
            # Not through a link, which could lead out of the directory.
            folder = Descriptor(os.open(DAMAGED, os.O_RDONLY | os.O_DIRECTORY | NO_SURPRISES, dir_fd=directory))
            taken = set(os.listdir(folder.number))
            target = next(other for n in range(len(taken) + 1) if (other := f"{name}.{n}" if n else name) not in taken)
            os.rename(name, target, src_dir_fd=directory, dst_dir_fd=folder.number)
            return True
        return False

    def open(self, name: str) -> io.FileIO:
        """A file for reading; a DamagedEpisodeError if it is no regular one. Opening a pipe does not wait."""
        try:
            file = io.FileIO(
                name,
                opener=lambda name, flags: os.open(name, flags | NO_SURPRISES, dir_fd=self._descriptor.number),
            )
        except OSError as error:
            if error.errno not in _NOT_REGULAR:
                raise
        else:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
        raise DamagedEpisodeError("is no regular file")

    def close(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._lock.close()
        self._descriptor.close()


class DirectoryWatch:
    """When a reader looks at its directory again: if it has changed, and for at most a twentieth of its time."""

    def __init__(self, directory: EpisodeDirectory) -> None:
        self._directory = directory
        self._change_seen, self._next_look = -1, 0.0

    def look(self, scan: Callable[[], None], is_urgent: bool) -> None:
        """Call `scan` if it is time, or urgent."""
        begin, now = time.monotonic(), time.time_ns()
        if not is_urgent and (begin < self._next_look or self._directory.modified_at == self._change_seen):
            return
        changed_at = self._directory.modified_at
        scan()
        self._change_seen = changed_at if now - changed_at > _CLOCK_GRAIN_NS else -1
        end = time.monotonic()
        self._next_look = end + _REST * (end - begin)


def with_advice(error: OSError, path: str, what: str) -> OSError:
    """The error of a write, of the same kind, that says what it was for and what to do."""
    advice = "Make room or permission, or lower the `capacity`, and try again"
    return OSError(error.errno, f"{what}: {error.strerror or error}. {advice}", path)


def _open_directory(path: str, writable: bool) -> int:
    try:
        if writable:
            os.makedirs(path, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | CLOSE_ON_EXEC)
    except FileExistsError as error:  # A file, or a link that leads nowhere.
        number, reason = errno.ENOTDIR, error.strerror
    except OSError as error:
        number, reason = error.errno or 0, error.strerror
    advice = "Choose another `directory`" if writable else "mode='a' makes a `directory` that is not there"
    raise OSError(number, f"The directory cannot be opened ({reason}). {advice}", path)
