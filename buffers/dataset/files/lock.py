"""The right to write to a directory: held by one process at a time, and released when that process ends."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable

__all__ = ["Descriptor", "NO_SURPRISES", "take_lock"]

LOCK = ".lock"
# Flags of `os.open`: neither follow a link nor wait for a pipe. 0 on systems that lack them.
NO_SURPRISES = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class Descriptor:
    """A file descriptor that is closed with its last reference."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close it, once."""
        number, self.number = self.number, -1
        if number >= 0:
            close(number)

    __del__ = close


def take_lock(path: str, directory: int) -> Descriptor:
    """Take an exclusive flock on `.lock`, held until the result is closed or the process ends, however it ends.

    The file is never removed: two processes could then lock two different files.

    Raises:
        RuntimeError: Another process, or another dataset of this one, holds the lock.
        OSError: The directory cannot be written to.
    """
    import fcntl  # Windows does not have it, and can read without it.

    try:
        lock = Descriptor(os.open(LOCK, os.O_RDWR | os.O_CREAT | NO_SURPRISES, 0o666, dir_fd=directory))
    except OSError as error:
        message = f"The directory cannot be written to ({error.strerror}). mode='r' reads it"
        raise OSError(error.errno, message, path) from error
    try:
        fcntl.flock(lock.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock.number, 200, 0).decode(errors="replace").strip()
        raise RuntimeError(
            f"{path} is being written to by {holder or 'another process'}. One writer at a time: close that one, "
            "choose another `directory`, or read along with mode='r'."
        ) from None
    os.ftruncate(lock.number, 0)
    os.pwrite(lock.number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _locks.add(lock)
    return lock


_locks: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _close_locks() -> None:
    """In a forked child, which shares the flock and would keep it after the death of its parent."""
    for lock in list(_locks):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)
