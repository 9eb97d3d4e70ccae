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
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from buffers.dataset.lock import CLOSE_ON_EXEC, NO_SURPRISES, Descriptor, DirectoryLock

__all__ = ["EpisodeDirectory", "FileName", "Listing", "explained"]

TEMPORARY = ".tmp-"
_LARGEST_NUMBER = 10**15
DAMAGED = "damaged"
NEXT = ".next"
# Numbers below 10**15, each in the one way in which it is written.
_NUMBERS = r"([0-9]{10}|[1-9][0-9]{10,14})-([0-9]{12}|[1-9][0-9]{12,14})"
_NAME = re.compile(_NUMBERS + r"-([1-9][0-9]{0,8})(\.[^/]+)")
_NEXT_NAME = re.compile(_NUMBERS + r"\.next")


class FileName(NamedTuple):
    """What a file's name says of its episode."""

    id: int
    start: int
    length: int

    def text(self, suffix: str) -> str:
        """The name itself: names in their order are episodes in theirs.

        Raises:
            RuntimeError: Numbers have run out: the name would not be taken for an episode's when it is read.
        """
        if max(self.id, self.start + self.length) >= _LARGEST_NUMBER:
            raise RuntimeError(
                f"Episode {self.id}, from step {self.start} on, is beyond the last number, {_LARGEST_NUMBER}."
            )
        return f"{self.id:010d}-{self.start:012d}-{self.length}{suffix}"


@dataclass
class Listing:
    """What a directory holds.

    Attributes:
        texts: Names of regular files with an episode's name and the right suffix, unsorted.
        ids: What they say. As lists of numbers: for 100,000 files, a tuple each takes twice the time.
        starts: The same.
        lengths: The same.
        sizes: In bytes.
        misfits: (file name, what is wrong) of others that are in the way.
        temporaries: Names of episodes on their way.
        other_suffixes: Suffixes of files with an episode's name and another suffix.
        next_numbers: The largest (id, start) that a `.next` file or a name of any kind leaves for the next episode.
        markers: Names of `.next` files.
        names: Every name that there is.
    """

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    misfits: list[tuple[str, str]] = field(default_factory=list)
    temporaries: list[str] = field(default_factory=list)
    other_suffixes: set[str] = field(default_factory=set)
    next_numbers: tuple[int, int] = (0, 0)
    markers: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def count(self, next_id: int, next_start: int) -> None:
        """These numbers, and all before them, have been given; not those that this library never gives."""
        if max(next_id, next_start) >= _LARGEST_NUMBER:
            return
        if next_id > self.next_numbers[0] or next_start > self.next_numbers[1]:
            self.next_numbers = max(next_id, self.next_numbers[0]), max(next_start, self.next_numbers[1])


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
        self._descriptor = Descriptor(_open_directory(self.path, writable))
        if writable:
            self.lock = DirectoryLock(self.path, self._descriptor.number)

    @property
    def is_new(self) -> bool:
        """Whether nobody has written to it before."""
        return self.lock is not None and self.lock.is_first

    def list(self, known: Collection[str] = ()) -> Listing:
        """What there is; of the names that are `known`, nothing but that they are there."""
        listing = Listing()
        # A descriptor of its own: forked processes share the place where a directory is being read.
        descriptor = Descriptor(os.open(".", os.O_RDONLY | CLOSE_ON_EXEC, dir_fd=self._descriptor.number))
        with os.scandir(descriptor.number) as entries:
            for entry in entries:
                listing.names.add(entry.name)
                if entry.name not in known:
                    self._classify(entry, listing)
        self._markers = listing.markers
        return listing

    def _classify(self, entry: os.DirEntry[str], listing: Listing) -> None:
        match = _NAME.fullmatch(entry.name)
        if match is None:
            marker = _NEXT_NAME.fullmatch(entry.name)
            if marker is not None:
                listing.markers.append(entry.name)
                listing.count(int(marker[1]), int(marker[2]))
            elif entry.name.startswith(TEMPORARY) and _NAME.fullmatch(entry.name, len(TEMPORARY)):
                listing.temporaries.append(entry.name)
            elif entry.name.endswith(self.suffix):
                listing.misfits.append((entry.name, "its name is no episode's"))
            return
        if match[4] != self.suffix:
            listing.other_suffixes.add(match[4])
            return
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return  # Evicted while we looked.
        number, start, length = int(match[1]), int(match[2]), int(match[3])
        listing.count(number + 1, start + length)
        if stat.S_ISREG(status.st_mode):
            listing.texts.append(entry.name)
            listing.ids.append(number)
            listing.starts.append(start)
            listing.lengths.append(length)
            listing.sizes.append(status.st_size)
        else:
            listing.misfits.append((entry.name, "it is no regular file"))

    def modified_at(self) -> int:
        """When a name last came or went, in nanoseconds."""
        return os.fstat(self._descriptor.number).st_mtime_ns

    # Changing it.

    def commit(self, name: str, write: Callable[[io.BufferedWriter], None], durable: bool) -> None:
        """Let a file appear under its name, whole, or not at all: the steps of the table above.

        Raises:
            OSError: As the operating system says; nothing is left behind.
        """
        temporary = TEMPORARY + name
        descriptor = self._descriptor.number
        # Whatever Ctrl-C finds open belongs to a file, which closes it.
        opener = partial(os.open, mode=0o666, dir_fd=descriptor)
        is_renamed = False
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=descriptor)  # What lies there, a link even, is nobody's.
        try:
            with _written(open(temporary, "xb", opener=opener)) as file:
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
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=self._descriptor.number)

    def keep_numbers(self, next_id: int, next_start: int, durable: bool) -> None:
        """Leave a `.next` file, and no other, so that numbers of episodes that are gone are not given again."""
        name = f"{next_id:010d}-{next_start:012d}{NEXT}"
        if name in self._markers:
            return
        flags = os.O_WRONLY | os.O_CREAT | NO_SURPRISES
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

    def open(self, name: str) -> io.FileIO:
        """A file for reading. Links are not followed, and nothing is waited for.

        Raises:
            FileNotFoundError: It is gone.
            OSError: As the operating system says.
        """
        return io.FileIO(name, opener=self._opened)

    def _opened(self, name: str, flags: int) -> int:
        return os.open(name, flags | NO_SURPRISES, dir_fd=self._descriptor.number)

    def close(self) -> None:
        """Give up the lock."""
        if self.lock is not None:
            self.lock.release()
        self._descriptor.close()


def explained(error: OSError, path: str, what: str) -> OSError:
    """The error of a write, of the same kind, that says what it was for and what to do."""
    if error.errno is None:
        return error
    return OSError(
        error.errno,
        f"{what}: {error.strerror or error}. Make room or permission, or lower the `capacity`, and try again",
        path,
    )


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
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | CLOSE_ON_EXEC)
    except FileNotFoundError as error:
        what = "It cannot be made: choose another" if writable else "There is no directory to read; mode='a' makes one"
        raise FileNotFoundError(error.errno, f"{what} ({error.strerror})", path) from error
    except FileExistsError as error:
        what = "Episodes need a directory, and this is a file, or a link that leads nowhere"
        raise NotADirectoryError(errno.ENOTDIR, what, path) from error
    except OSError as error:
        raise OSError(
            error.errno, f"The directory cannot be opened ({error.strerror}). Choose another `directory`", path
        ) from error


@contextlib.contextmanager
def _written(file: io.BufferedWriter) -> Iterator[io.BufferedWriter]:
    """A new file, closed in any case, also where closing writes, and fails, once more."""
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            file.close()
        raise
    file.close()
