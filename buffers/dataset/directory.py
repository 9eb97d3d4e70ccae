"""A directory of episode files that is its own index: names, the commit, the lock, and setting aside.

    0000000012-000000002400-200.safetensors     episode 12: step ids 2400 to 2599
    0000000013-000000002600.next                the next episode's id and start, where no file says so (empty)
    .tmp-0000000013-000000002600-87.safetensors an episode on its way
    .lock                                       who writes
    damaged/                                    files that were no whole episodes

How an episode comes, and what a crash after each step leaves (power: the machine's; a killed process loses nothing
that it has written):

| step | after a kill | after a power loss | on opening |
|---|---|---|---|
| 1 create the temporary | temporary | temporary, or nothing | swept |
| 2 write all | temporary | temporary, of any length and content | swept |
| 3 fsync it | temporary | temporary, whole, or nothing | swept |
| 4 rename | episode | temporary or episode, whole, or nothing | swept, or there |
| 5 fsync the directory | episode | episode | there |
| 6 count it: acknowledged | episode | episode | there |

With `durability="rename"`, steps 3 and 5 are left out: a kill still loses nothing, a power loss may take the newest
episodes, or leave files with wrong content, which the size, the header, or (`verify="full"`) the checksum gives away.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import socket
import stat
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["DirectoryLock", "EpisodeDirectory", "FileName", "Listing"]

TEMPORARY = ".tmp-"
LOCK = ".lock"
DAMAGED = "damaged"
NEXT = ".next"
_LARGEST = 10**15
_NAME = re.compile(r"([0-9]{10,16})-([0-9]{12,16})-([0-9]{1,9})(\.[^/]+)")
_NEXT_NAME = re.compile(r"([0-9]{10,16})-([0-9]{12,16})\.next")
# Absent where they mean nothing.
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NO_SURPRISES = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | _CLOEXEC


class FileName(NamedTuple):
    """What a file's name says of its episode."""

    id: int
    start: int
    length: int

    def text(self, suffix: str) -> str:
        """The name itself: names in their order are episodes in theirs."""
        return f"{self.id:010d}-{self.start:012d}-{self.length}{suffix}"

    @staticmethod
    def parse(text: str) -> tuple[FileName, str] | None:
        """What a name says, and its suffix; None if it is no episode's."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        name, suffix = FileName(int(match[1]), int(match[2]), int(match[3])), match[4]
        is_possible = name.length > 0 and max(name.id, name.start) < _LARGEST and name.text(suffix) == text
        return (name, suffix) if is_possible else None


@dataclass
class Listing:
    """What a directory holds.

    Attributes:
        episodes: (name, file name, size) of regular files with an episode's name and the right suffix, unsorted.
        misfits: (file name, what is wrong) of others that are in the way.
        temporaries: Names of episodes on their way.
        other_suffixes: Suffixes of files with an episode's name and another suffix.
        next_numbers: The largest (id, start) that a `.next` file or a name of any kind leaves for the next episode.
        markers: Names of `.next` files.
        names: Every name that there is.
    """

    episodes: list[tuple[FileName, str, int]] = field(default_factory=list)
    misfits: list[tuple[str, str]] = field(default_factory=list)
    temporaries: list[str] = field(default_factory=list)
    other_suffixes: set[str] = field(default_factory=set)
    next_numbers: tuple[int, int] = (0, 0)
    markers: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


class EpisodeDirectory:
    """The files of a dataset; it knows nothing of what is in them.

    Args:
        path: Created, with its parents, if `writable`.
        suffix: Of episode files.
        writable: Take the lock, sweep temporaries.

    Raises:
        OSError: The directory is not there, or must not be read or written; the message says what to do.
        RuntimeError: Another process writes to it.
    """

    def __init__(self, path: str, suffix: str, writable: bool) -> None:
        self.path = os.path.abspath(path)
        self.suffix = suffix
        self.lock: DirectoryLock | None = None
        self._markers: list[str] = []
        self._descriptor = _Descriptor(_open_directory(self.path, writable))
        if writable:
            self.lock = DirectoryLock(self.path, self._descriptor.number)

    def list(self, known: Collection[str] = ()) -> Listing:
        """What there is; of the names that are `known`, nothing but that they are there."""
        listing = Listing()
        next_id, next_start = 0, 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                listing.names.add(entry.name)
                if entry.name in known:
                    continue
                numbers = self._classify(entry, listing)
                if numbers is not None:
                    next_id, next_start = max(next_id, numbers[0]), max(next_start, numbers[1])
        listing.next_numbers = (next_id, next_start)
        self._markers = listing.markers
        return listing

    def _classify(self, entry: os.DirEntry[str], listing: Listing) -> tuple[int, int] | None:
        parsed = FileName.parse(entry.name)
        if parsed is None:
            marker = _NEXT_NAME.fullmatch(entry.name)
            if marker is not None and int(marker[1]) < _LARGEST and int(marker[2]) < _LARGEST:
                listing.markers.append(entry.name)
                return int(marker[1]), int(marker[2])
            if entry.name.startswith(TEMPORARY):
                listing.temporaries.append(entry.name)
            elif entry.name.endswith(self.suffix):
                listing.misfits.append((entry.name, "its name is no episode's"))
            return None
        name, suffix = parsed
        if suffix != self.suffix:
            listing.other_suffixes.add(suffix)
            return None
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None  # Evicted while we looked.
        if stat.S_ISREG(status.st_mode):
            listing.episodes.append((name, entry.name, status.st_size))
        else:
            listing.misfits.append((entry.name, "it is no regular file"))
        return name.id + 1, name.start + name.length

    def modified_at(self) -> int:
        """When a name last came or went, in nanoseconds."""
        return os.stat(self.path).st_mtime_ns

    # Changing it.

    def commit(self, name: str, write: Callable[[io.BufferedWriter], None], durable: bool) -> None:
        """Let a file appear under its name, whole, or not at all: the steps of the table above.

        Raises:
            OSError: As the operating system says; nothing is left behind.
        """
        temporary = TEMPORARY + name
        descriptor = self._descriptor.number
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_SURPRISES
        is_renamed = False
        try:
            with _written(os.open(temporary, flags, 0o666, dir_fd=descriptor)) as file:
                write(file)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.rename(temporary, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
            is_renamed = True
            if durable:
                os.fsync(descriptor)
        except BaseException:
            # After a failed fsync nobody knows what is on the disk, and a second one may succeed without having
            # written anything: the file is given up.
            with contextlib.suppress(OSError):
                os.unlink(name if is_renamed else temporary, dir_fd=descriptor)
            raise

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor.number)

    def keep_numbers(self, next_id: int, next_start: int, durable: bool) -> None:
        """Leave a `.next` file, and no other, so that numbers of episodes that are gone are not given again."""
        name = f"{next_id:010d}-{next_start:012d}{NEXT}"
        if name in self._markers:
            return
        flags = os.O_WRONLY | os.O_CREAT | _NO_SURPRISES
        os.close(os.open(name, flags, 0o666, dir_fd=self._descriptor.number))
        if durable:
            os.fsync(self._descriptor.number)
        for other in self._markers:
            self.remove(other)
        self._markers = [name]

    def set_aside(self, name: str) -> bool:
        """Move a file into the folder of damaged ones, over no other; False if that cannot be."""
        descriptor = self._descriptor.number
        try:
            for folder in (DAMAGED, *(f"{DAMAGED}-{n}" for n in range(1, 100))):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=descriptor)
                # A link could lead out of the directory.
                is_folder = stat.S_ISDIR(os.stat(folder, dir_fd=descriptor, follow_symlinks=False).st_mode)
                if is_folder and not _exists(f"{folder}/{name}", descriptor):
                    os.rename(name, f"{folder}/{name}", src_dir_fd=descriptor, dst_dir_fd=descriptor)
                    return True
        except OSError:
            pass
        return False

    # Reading it.

    def open(self, name: str) -> int:
        """A descriptor of a file for reading. Links are not followed, and nothing is waited for.

        Raises:
            FileNotFoundError: It is gone.
            OSError: As the operating system says.
        """
        return os.open(name, os.O_RDONLY | _NO_SURPRISES, dir_fd=self._descriptor.number)

    def close(self) -> None:
        """Give up the lock."""
        if self.lock is not None:
            self.lock.release()
        self._descriptor.close()


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open_directory(path: str, writable: bool) -> int:
    try:
        if writable:
            os.makedirs(path, exist_ok=True)
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOEXEC)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.errno, f"There is no directory to read; mode='a' makes one ({error.strerror})", path
        ) from error
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "Episodes need a directory, and this is a file", path) from error
    except OSError as error:
        raise OSError(
            error.errno, f"The directory cannot be opened ({error.strerror}). Choose another `directory`", path
        ) from error


@contextlib.contextmanager
def _written(descriptor: int) -> Iterator[io.BufferedWriter]:
    """A file over a new descriptor, closed in any case, also where closing writes, and fails, once more."""
    file = os.fdopen(descriptor, "wb")
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            file.close()
        raise
    file.close()


class _Descriptor:
    """A descriptor that is closed when nobody has it any more: a reader in another thread may be at it."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self, close: Callable[[int], None] = os.close) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            close(number)

    __del__ = close


class DirectoryLock:
    """The right to write: an flock on `.lock`, which ends with the process, however it ends.

    An flock belongs to the open file, of which a forked child has a part: it would hold on to it after the parent's
    death. So a forked child closes its part first thing.

    Attributes:
        is_first: Whether nobody has held it before.

    Raises:
        RuntimeError: Another process, or another dataset of this one, has it.
        OSError: The directory must not be written to.
    """

    def __init__(self, path: str, directory: int) -> None:
        self.path = path
        descriptor = _Descriptor(self._open(directory))
        import fcntl  # Not everywhere; reading needs none.

        while True:
            try:
                fcntl.flock(descriptor.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(self._refusal(descriptor.number)) from None
            try:
                found = os.stat(LOCK, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                found = None
            if found is not None and os.path.samestat(found, os.fstat(descriptor.number)):
                break
            # Someone has removed the file in between: whoever comes next would lock another one.
            descriptor = _Descriptor(self._open(directory))
        self.is_first = os.fstat(descriptor.number).st_size == 0
        os.ftruncate(descriptor.number, 0)
        os.pwrite(descriptor.number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        _close_in_forked_children(descriptor)

    def _open(self, directory: int) -> int:
        try:
            return os.open(LOCK, os.O_RDWR | os.O_CREAT | _NO_SURPRISES, 0o666, dir_fd=directory)
        except OSError as error:
            raise OSError(
                error.errno, f"The directory cannot be written to ({error.strerror}). mode='r' reads it", self.path
            ) from error

    def _refusal(self, descriptor: int) -> str:
        # The holder writes its name a moment after it has the lock.
        for _ in range(10):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if holder:
                break
            time.sleep(0.01)
        return (
            f"{self.path} is being written to by {holder or 'another process'}. One writer at a time: close that one, "
            "choose another `directory`, or read along with mode='r'."
        )

    def release(self) -> None:
        """Let another have it. The file stays: removing it would let two have it."""
        if self._descriptor.number >= 0:
            import fcntl

            # Whoever has a part of the open file (a child that was not forked by Python) would keep it locked.
            fcntl.flock(self._descriptor.number, fcntl.LOCK_UN)
        self._descriptor.close()


_locks: weakref.WeakSet[_Descriptor] = weakref.WeakSet()
_hooks: list[Callable[[], None]] = []


def _close_in_forked_children(descriptor: _Descriptor) -> None:
    _locks.add(descriptor)
    if not _hooks:
        # Not on import, which changes nothing in the process.
        _hooks.append(_close_locks)
        os.register_at_fork(after_in_child=_close_locks)


def _close_locks() -> None:
    for descriptor in list(_locks):
        descriptor.close()
