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
import errno
import io
import os
import re
import stat
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from buffers.dataset.files.lock import NO_SURPRISES, Descriptor, last_capacity, sign, take_lock
from buffers.dataset.files.serialization import DamagedEpisodeError
from buffers.table import EpisodeTable

__all__ = ["Directory", "EpisodeDirectory", "FileName", "Listing", "with_advice"]

TEMPORARY = ".tmp-"
DAMAGED = "damaged"
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


class _File(io.FileIO):
    """A file that is closed with its last reference, without a warning."""

    def __del__(self) -> None:
        self.close()


class Directory:
    """A directory that is open: its files are reached by their names, wherever it is moved.

    Args:
        path: Where it was found.
        descriptor: Of the open directory.
        durable: Wait for the disk at each step of a commit.
    """

    def __init__(self, path: str, descriptor: Descriptor, durable: bool) -> None:
        self.path = path
        self._descriptor = descriptor
        self._is_durable = durable

    def folder(self, name: str, create: bool = False) -> Directory | None:
        """A folder in it; None if there is none. A link is not followed: it could lead out of the directory."""
        parent = self._descriptor.number
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=parent)
            if self._is_durable:
                os.fsync(parent)
        try:
            found = Descriptor(os.open(name, os.O_RDONLY | os.O_DIRECTORY | NO_SURPRISES, dir_fd=parent))
        except OSError as error:
            if create or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None
        return Directory(os.path.join(self.path, name), found, self._is_durable)

    def names(self) -> list[str]:
        """The names of all files, in order."""
        descriptor = Descriptor(os.open(".", os.O_RDONLY, dir_fd=self._descriptor.number))
        return sorted(os.listdir(descriptor.number))

    def commit(self, name: str, write: Callable[[io.BufferedWriter], None], replaces: bool = False) -> None:
        """Let a whole file appear under its name. After an error, nothing is left of it.

        If it `replaces` one of that name, an error leaves the old file or the new one, whole.
        """
        directory, present = self._descriptor.number, TEMPORARY + name
        with contextlib.suppress(OSError):
            os.unlink(present, dir_fd=directory)  # Left by an addition that was interrupted.
        try:
            with open(present, "xb", opener=partial(os.open, mode=0o666, dir_fd=directory)) as file:
                write(file)
                file.flush()
                if self._is_durable:
                    os.fsync(file.fileno())
            os.rename(present, name, src_dir_fd=directory, dst_dir_fd=directory)
            present = name
            if self._is_durable:
                os.fsync(directory)
        except Exception:
            # After a failed fsync, nobody knows what is on the disk, and a second fsync may succeed without having
            # written anything. So the file is removed.
            with contextlib.suppress(OSError):
                if not (replaces and present == name):
                    os.unlink(present, dir_fd=directory)
            raise

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=self._descriptor.number)

    def set_aside(self, name: str) -> bool:
        """Move a file into the folder of damaged files, without replacing another one; False if that fails."""
        with contextlib.suppress(OSError):
            folder = self.folder(DAMAGED, create=True)
            assert folder is not None  # It was created.
            taken = set(folder.names())
            target = next(other for n in range(len(taken) + 1) if (other := f"{name}.{n}" if n else name) not in taken)
            directories = {"src_dir_fd": self._descriptor.number, "dst_dir_fd": folder._descriptor.number}
            os.rename(name, target, **directories)
            return True
        return False

    def open(self, name: str) -> io.FileIO:
        """Open a file for reading; DamagedEpisodeError if it is not a regular file."""
        status = os.stat(name, dir_fd=self._descriptor.number, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedEpisodeError("is no regular file")
        return _File(
            name, opener=lambda name, flags: os.open(name, flags | NO_SURPRISES, dir_fd=self._descriptor.number)
        )

    def read(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """`method(file, *arguments)` of a file.

        One that looks damaged or gone is looked at again: a signal handler's exception can look like that.
        """
        try:
            with self.open(name) as file:
                return method(file, *arguments)
        except (DamagedEpisodeError, FileNotFoundError) as error:
            with self.open(name) as file:
                method(file, *arguments)
            raise error.__cause__ or error from None

    def close(self) -> None:
        """Close it. Files that are open stay so."""
        self._descriptor.close()


class EpisodeDirectory(Directory):
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
        super().__init__(path, Descriptor(_open_directory(path, writable)), durable)
        self.suffix = suffix
        self.newest: FileName | None = None  # Of the episode whose file was written last.
        self._markers: list[str] = []  # The names of `.next` files.
        self._change_seen, self._next_look = -1, 0.0
        self._lock = take_lock(self.path, self._descriptor.number, lock) if writable else None
        # Of the writer before, in steps; 0 if it is not known.
        self.last_capacity = last_capacity(self._descriptor.number)

    def keep_capacity(self, capacity: int) -> None:
        """Write down the capacity, for the next opening."""
        if self._lock is not None and capacity != self.last_capacity:
            sign(self._lock, capacity)
            if self._is_durable:
                os.fsync(self._lock.number)
                os.fsync(self._descriptor.number)

    def list(self, known: Collection[str] = ()) -> Listing:
        """List the directory. Names that are `known` appear in `all_names` only."""
        episodes: list[tuple[FileName, int]] = []
        all_names, other_names, other_suffixes = set(), [], set()
        # A descriptor of its own, because forked processes share the position of one up to which it has been read.
        descriptor = Descriptor(os.open(".", os.O_RDONLY, dir_fd=self._descriptor.number))
        with os.scandir(descriptor.number) as entries:
            for entry in entries:
                all_names.add(entry.name)
                if entry.name in known:
                    continue
                name = FileName.parse(entry.name)
                if name is None:
                    other_names.append(entry.name)
                elif name.suffix != self.suffix:
                    other_suffixes.add(name.suffix)
                else:
                    with contextlib.suppress(FileNotFoundError):  # Evicted meanwhile.
                        status = entry.stat(follow_symlinks=False)
                        episodes.append((name, status.st_size if stat.S_ISREG(status.st_mode) else -1))
        episodes.sort()
        names = [name for name, _ in episodes]
        rows = np.array([(name.start, name.length, name.id, name.cut) for name in names], np.int64).reshape(-1, 4)
        markers = [match for name in other_names if (match := _MARKER.fullmatch(name))]
        self._markers = [match[0] for match in markers]
        given = np.array([(int(match[1]), int(match[2])) for match in markers], np.int64).reshape(-1, 2)
        given = np.concatenate([given, np.stack([rows[:, 2] + 1, rows[:, 0] + rows[:, 1]], 1)])
        # This library never gives numbers as large as those that are left out here.
        next_id, next_start = given[(given < _LARGEST_NUMBER).all(1)].max(0, initial=0).tolist()
        return Listing(
            list(map(str, names)),
            rows,
            np.array([size for _, size in episodes], np.int64),
            [name for name in other_names if name.startswith(TEMPORARY) and FileName.parse(name[len(TEMPORARY) :])],
            [name for name in other_names if name[0] != "." and name.endswith((*_DATA_SUFFIXES, self.suffix))],
            other_suffixes,
            (next_id, next_start),
            all_names,
        )

    def look(self, scan: Callable[[], None], is_urgent: bool) -> None:
        """Call `scan` if it is urgent, or if a name was added or removed and it is not too early for another scan."""
        begin, changed_at = time.monotonic(), os.fstat(self._descriptor.number).st_mtime_ns
        if not is_urgent and (begin < self._next_look or changed_at == self._change_seen):
            return
        is_settled = time.time_ns() - changed_at > _CLOCK_GRAIN_NS
        scan()
        self._change_seen = changed_at if is_settled else -1
        end = time.monotonic()
        self._next_look = end + _REST * (end - begin)

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

    def keep_numbers_of(self, table: EpisodeTable) -> None:
        """`keep_numbers`, if the newest episode is gone."""
        if table.next_id and (not len(table) or int(table.ids[-1]) != table.next_id - 1):
            self.keep_numbers(table.next_id, table.next_start)

    def name_of(self, start: int, length: int, episode_id: int, cut: int) -> FileName:
        """The name for a row of the table."""
        return FileName(episode_id, start, length, cut, self.suffix)

    def close(self) -> None:
        """Release the lock, and close it."""
        if self._lock is not None:
            self._lock.close()
        super().close()


def with_advice(error: OSError, path: str, what: str) -> OSError:
    """The error of a write, of the same kind, with what it was for and what to do."""
    advice = "Make room or permission, or lower the `capacity`, and try again"
    return OSError(error.errno, f"{what}: {error.strerror or error}. {advice}", path)


def _open_directory(path: str, writable: bool) -> int:
    try:
        if writable:
            os.makedirs(path, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno is None:
            raise  # That of a signal handler.
        # A file, or a link to nothing, exists.
        number = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno
        advice = "Choose another `directory`" if writable else "mode='a' makes a `directory` that is not there"
        raise OSError(number, f"The directory cannot be opened ({error.strerror}). {advice}", path) from error
