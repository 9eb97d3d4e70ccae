"""The right to write to a directory: held by one process at a time, and released when that process ends."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import weakref
from collections.abc import Callable

__all__ = ["Descriptor", "LOCK", "NO_SURPRISES", "capacity_in", "last_capacity", "sign", "take_lock"]

LOCK = ".lock"
_TEXT_SIZE = 200
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


def take_lock(path: str, directory: int, lock: bool = True) -> Descriptor:
    """Take an exclusive flock on `.lock`, held until the result is closed or the process ends, however it ends.

    The file is never removed: two processes could then lock two different files. With `lock=False`, it is only opened.

    Raises:
        RuntimeError: Another process, or another dataset of this one, holds the lock.
        OSError: The directory cannot be written to, or its file system has no locks.
    """
    import fcntl  # Windows does not have it, and can read without it.

    try:
        found = Descriptor(os.open(LOCK, os.O_RDWR | os.O_CREAT | NO_SURPRISES, 0o666, dir_fd=directory))
    except OSError as error:
        message = f"The directory cannot be written to ({error.strerror}). mode='r' reads it"
        raise OSError(error.errno, message, path) from error
    try:
        if lock:
            fcntl.flock(found.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _text(found)
        raise RuntimeError(
            f"{path} is being written to by {holder or 'another process'}. One writer at a time: close that one, "
            "choose another `directory`, or read along with mode='r'."
        ) from None
    except OSError as error:
        message = f"The file system cannot lock files ({error.strerror}), so nothing would keep a second writer out"
        advice = "If this process is the only one that writes there, pass lock=False"
        raise OSError(error.errno, f"{message}. {advice}", path) from error
    try:
        sign(found, _capacity(found))
    except BaseException:
        found.close()
        raise
    _locks.add(found)
    return found


def sign(lock: Descriptor, capacity: int) -> None:
    """Say in `.lock` who writes, and up to which capacity; by one call, so that a kill leaves the old or the new."""
    text = f"process {os.getpid()} on {socket.gethostname()}, capacity {capacity}"
    os.pwrite(lock.number, text.ljust(_TEXT_SIZE - 1).encode() + b"\n", 0)


def last_capacity(directory: int) -> int:
    """The capacity of the last writer, in steps; 0 if it is not known."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        return _capacity(Descriptor(os.open(LOCK, os.O_RDONLY | NO_SURPRISES, dir_fd=directory)))
    return 0


def _capacity(lock: Descriptor) -> int:
    return capacity_in(_text(lock))


def capacity_in(text: str) -> int:
    """The capacity that the text of `.lock` says; 0 if it says none."""
    match = re.search(r"capacity ([0-9]{1,19})$", text.strip())
    return 0 if match is None else int(match[1])


def _text(lock: Descriptor) -> str:
    return os.pread(lock.number, _TEXT_SIZE, 0).decode(errors="replace").strip()


_locks: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _close_locks() -> None:
    """In a forked child, which shares the flock and would keep it after the death of its parent."""
    for lock in list(_locks):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)
