"""The right to write to a directory: one process at a time, given up by its death."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable

__all__ = ["CLOSE_ON_EXEC", "Descriptor", "DirectoryLock", "NO_SURPRISES"]

LOCK = ".lock"
# Flags of `os.open`, 0 on systems that lack them.
CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
NO_SURPRISES = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | CLOSE_ON_EXEC


class Descriptor:
    """A file descriptor that is closed with its last reference: a thread may still be using it."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close it, once."""
        number, self.number = self.number, -1
        if number >= 0:
            close(number)

    __del__ = close


class DirectoryLock:
    """The right to write: an flock on `.lock`, which ends with the process, however it ends.

    An flock belongs to the open file, which a forked child shares and would keep locked after its parent's death. So a
    forked child closes its copy at once.

    Raises:
        RuntimeError: Another process, or another dataset of this one, holds it.
        OSError: The directory must not be written to.
    """

    def __init__(self, path: str, directory: int) -> None:
        import fcntl  # Missing on some systems; reading does without.

        while True:
            descriptor = Descriptor(_open_lock(path, directory))
            try:
                fcntl.flock(descriptor.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(_refusal(path, descriptor.number)) from None
            # If the file was removed before it was locked, the next writer would lock its successor: try again.
            if _is_lock(descriptor.number, directory):
                break
        os.ftruncate(descriptor.number, 0)
        os.pwrite(descriptor.number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        _close_in_forked_children(descriptor)

    def release(self) -> None:
        """Let another writer in. The file stays: removing it would let two in."""
        self._descriptor.close()


def _open_lock(path: str, directory: int) -> int:
    try:
        return os.open(LOCK, os.O_RDWR | os.O_CREAT | NO_SURPRISES, 0o666, dir_fd=directory)
    except OSError as error:
        raise OSError(
            error.errno, f"The directory cannot be written to ({error.strerror}). mode='r' reads it", path
        ) from error


def _is_lock(descriptor: int, directory: int) -> bool:
    """Whether the open file is the one that others find under the name of the lock."""
    try:
        found = os.stat(LOCK, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def _refusal(path: str, descriptor: int) -> str:
    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    return (
        f"{path} is being written to by {holder or 'another process'}. One writer at a time: close that one, "
        "choose another `directory`, or read along with mode='r'."
    )


_locks: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _close_in_forked_children(descriptor: Descriptor) -> None:
    _locks.add(descriptor)


def _close_locks() -> None:
    for descriptor in list(_locks):
        descriptor.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)
