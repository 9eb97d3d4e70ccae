"""A directory of files that appear whole, or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from buffers.disk.lock import NO_SURPRISES, Descriptor
from buffers.disk.parsing import DamagedEpisodeError

__all__ = ["DAMAGED", "Directory", "Files", "TEMPORARY", "open_directory", "with_advice"]

TEMPORARY = ".tmp-"
DAMAGED = "damaged"
_COMPARED = 1 << 16
# Of a link: another file system, one without links, or as many as a file can have.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class _File(io.FileIO):
    """A file that is closed with its last reference, without a warning."""

    def __del__(self) -> None:
        self.close()


class Files(ABC):
    """What readers need of a directory, or of objects that stand for one.

    Attributes:
        path: Where it was found.
    """

    path: str

    @abstractmethod
    def folder(self, name: str) -> Files | None:
        """A folder in it; None if there is none."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all files, in order."""

    @abstractmethod
    def open(self, name: str) -> io.FileIO:
        """Open a file for reading; FileNotFoundError if it is gone, DamagedEpisodeError if it cannot be an episode.

        What stands for a file elsewhere is a `RangeFile`, which has no descriptor.
        """

    @abstractmethod
    def close(self) -> None:
        """Close it. Files that are open stay so."""

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


class Directory(Files):
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
        """Let a whole file appear under its name, once `write` has written it; see `new_file`."""
        with self.new_file(name, replaces) as file:
            write(file)

    @contextlib.contextmanager
    def new_file(self, name: str, replaces: bool = False) -> Iterator[io.BufferedWriter]:
        """A file that appears under its name when the block is left, whole. After an error, nothing is left of it.

        If it `replaces` one of that name, an error leaves the old file or the new one, whole.
        """
        directory, present = self._descriptor.number, TEMPORARY + name
        with contextlib.suppress(OSError):
            os.unlink(present, dir_fd=directory)  # Left by an addition that was interrupted.
        try:
            with open(present, "xb", opener=partial(os.open, mode=0o666, dir_fd=directory)) as file:
                yield file
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

    def sync(self) -> None:
        """Wait until what was created, renamed or linked is on the disk."""
        if self._is_durable:
            os.fsync(self._descriptor.number)

    def sync_file(self, name: str) -> None:
        """Wait until a file is on the disk."""
        with self.open(name) as file:
            os.fsync(file.fileno())

    def link(self, name: str, other: Directory) -> None:
        """Let a file, which never changes, appear in `other` as well; as a copy where links are not possible."""
        try:
            directories = {"src_dir_fd": self._descriptor.number, "dst_dir_fd": other._descriptor.number}
            os.link(name, name, follow_symlinks=False, **directories)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with self.open(name) as file:
                other.commit(name, lambda copy: shutil.copyfileobj(file, copy))

    def is_same(self, name: str, other: Directory) -> bool:
        """Whether the file of this name is the same one in both, or a copy as far as its beginning and end tell."""
        try:
            own, others = self.status(name), other.status(name)
        except FileNotFoundError:
            return False
        if os.path.samestat(own, others):
            return True
        with self.open(name) as file, other.open(name) as copy:
            parts = [(0, _COMPARED), (max(0, own.st_size - _COMPARED), _COMPARED)]
            same = [os.pread(file.fileno(), n, at) == os.pread(copy.fileno(), n, at) for at, n in parts]
        return own.st_size == others.st_size and all(same)

    def status(self, name: str) -> os.stat_result:
        """Of a file; a link is not followed."""
        return os.stat(name, dir_fd=self._descriptor.number, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=self._descriptor.number)

    def remove_folder(self, name: str) -> None:
        """Remove a folder with the files in it, if it is there."""
        folder = self.folder(name)
        if folder is not None:
            for file in folder.names():
                folder.remove(file)
            folder.close()
            os.rmdir(name, dir_fd=self._descriptor.number)

    def set_aside(self, name: str, into: str = DAMAGED) -> bool:
        """Move a file into the folder of damaged files, or another, replacing none; False if that fails."""
        with contextlib.suppress(OSError):
            folder = self.folder(into, create=True)
            assert folder is not None  # It was created.
            taken = set(folder.names())
            target = next(other for n in range(len(taken) + 1) if (other := f"{name}.{n}" if n else name) not in taken)
            directories = {"src_dir_fd": self._descriptor.number, "dst_dir_fd": folder._descriptor.number}
            os.rename(name, target, **directories)
            return True
        return False

    def open(self, name: str) -> io.FileIO:
        """Open a file for reading; DamagedEpisodeError if it is not a regular file."""
        if not stat.S_ISREG(self.status(name).st_mode):
            raise DamagedEpisodeError("is no regular file")
        return _File(
            name, opener=lambda name, flags: os.open(name, flags | NO_SURPRISES, dir_fd=self._descriptor.number)
        )

    def close(self) -> None:
        """Close it. Files that are open stay so."""
        self._descriptor.close()


def with_advice(error: OSError, path: str, what: str) -> OSError:
    """The error of a write, of the same kind, with what it was for and what to do."""
    advice = "Make room or permission, or lower the `capacity`, and try again"
    return OSError(error.errno, f"{what}: {error.strerror or error}. {advice}", path)


def open_directory(path: str, writable: bool) -> int:
    """A descriptor of a directory, which is created if `writable`; an OSError says what to do."""
    try:
        if writable and not os.path.isdir(path):
            _make(path)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno is None:
            raise  # That of a signal handler.
        # A file, or a link to nothing, exists.
        number = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno
        advice = "Choose another `directory`" if writable else "mode='a' makes a `directory` that is not there"
        raise OSError(number, f"The directory cannot be opened ({error.strerror}). {advice}", path) from error


def _make(path: str) -> None:
    """Make a directory, with its parents, that a power loss does not take away again."""
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        _make(parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise  # Otherwise, somebody else has made it.
    descriptor = Descriptor(os.open(parent, os.O_RDONLY | os.O_DIRECTORY))
    os.fsync(descriptor.number)
    descriptor.close()
