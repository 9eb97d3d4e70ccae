"""The right to write to a directory: one process at a time, given up by its death."""

from __future__ import annotations

import os
import socket
import time
import weakref
from collections.abc import Callable

__all__ = ["CLOSE_ON_EXEC", "Descriptor", "DirectoryLock", "NO_SURPRISES"]

LOCK = ".lock"
# Absent where they mean nothing.
CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
NO_SURPRISES = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | CLOSE_ON_EXEC


class Descriptor:
    """A descriptor that is closed when nobody has it any more: a reader in another thread may be at it."""

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
        descriptor = Descriptor(self._open(directory))
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
            descriptor = Descriptor(self._open(directory))
        self.is_first = os.fstat(descriptor.number).st_size == 0
        os.ftruncate(descriptor.number, 0)
        os.pwrite(descriptor.number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        _close_in_forked_children(descriptor)

    def _open(self, directory: int) -> int:
        try:
            return os.open(LOCK, os.O_RDWR | os.O_CREAT | NO_SURPRISES, 0o666, dir_fd=directory)
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


_locks: weakref.WeakSet[Descriptor] = weakref.WeakSet()
_hooks: list[Callable[[], None]] = []


def _close_in_forked_children(descriptor: Descriptor) -> None:
    _locks.add(descriptor)
    if not _hooks:
        # Not on import, which changes nothing in the process.
        _hooks.append(_close_locks)
        os.register_at_fork(after_in_child=_close_locks)


def _close_locks() -> None:
    for descriptor in list(_locks):
        descriptor.close()
