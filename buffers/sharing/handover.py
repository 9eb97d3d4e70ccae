"""Handing shared memory to processes that are no children of its owner: torchrun's ranks, or an evaluation.

    the owner                                      another process of the same user

    1. listens under a name                        2. connects; each asks the kernel who the other is
    3. sends what its object is made of, with      4. maps the memory
       the descriptors of its memory               5. while it draws, asks the kernel whether the owner lives

The name is a Unix socket in a folder that only the user can enter. After a SIGKILL the socket is left, and the next
process that shares a ring, or finds none, removes it. The memory goes with the last process that maps it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pickle
import re
import select
import socket
import stat
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from buffers.sharing.arrays import SharedArrays

__all__ = ["Door", "Owner", "enter"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEADER = struct.Struct("=Q")
_CREDENTIALS = struct.Struct("=3i")
_MOST_DESCRIPTORS = 253  # That one message can carry.
_SECONDS_TO_ANSWER, _PAUSE = 5.0, 0.02
# Asking the kernel takes as long as a small part of a batch.
_SECONDS_BETWEEN_LOOKS = 0.05
# The owner's end. A forked child must not keep it open when the owner has ended.
_own_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    for own in list(_own_sockets):
        own.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class Door:
    """Where other processes of this user get what `describe` returns, until it is closed.

    That may hold `SharedArrays`. While it is None, they wait. `describe` is called by a thread.

    Raises:
        ValueError: The name is not one for a file, or its path is too long for a socket.
        RuntimeError: Another process uses it; or this is not Linux.
    """

    def __init__(self, name: str, describe: Callable[[], Any]) -> None:
        self.name = name
        path = _path_of(name)
        with _alone(os.path.dirname(path)):
            _sweep(os.path.dirname(path))
            if os.path.lexists(path):
                what = "Another process of yours shares a ring as" if _is_socket(path) else f"{path} is in the way of"
                raise RuntimeError(f"{what} `{name}`. Choose another name.")
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            _own_sockets.add(listener)
            listener.bind(path)
            listener.listen(64)
        self.close = weakref.finalize(self, _close, listener, path, os.getpid())
        name = f"buffers-share-{name}"
        threading.Thread(target=_serve, args=(listener, describe), daemon=True, name=name).start()


def _close(listener: socket.socket, path: str, owner: int) -> None:
    if os.getpid() == owner:  # Not in a forked child.
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # Wakes the thread.
    listener.close()


def _serve(listener: socket.socket, describe: Callable[[], Any]) -> None:
    poll, own = select.poll(), listener.fileno()
    poll.register(own, select.POLLIN)
    # Connections stay open, so that their end tells the others.
    connections: dict[int, socket.socket] = {}
    while True:
        for number, event in poll.poll():
            if number != own:
                poll.unregister(number)
                connections.pop(number).close()
            elif event & ~select.POLLIN:
                for connection in connections.values():
                    connection.close()
                return
            else:
                with contextlib.suppress(OSError):  # The other has gone.
                    connection = listener.accept()[0]
                    _own_sockets.add(connection)
                    connections[connection.fileno()] = connection
                    poll.register(connection, select.POLLIN)
                    if not _hand_over(connection, describe):
                        connection.shutdown(socket.SHUT_RDWR)


def _hand_over(connection: socket.socket, describe: Callable[[], Any]) -> bool:
    """Send what `describe` returns; False if that is nothing, or the other is a stranger."""
    connection.settimeout(_SECONDS_TO_ANSWER)
    if _peer(connection)[1] != os.geteuid():
        return False
    try:
        if (found := describe()) is None:
            return False
        content, arrays = _pickled(found)
    except Exception as error:  # It belongs to who asks; others can still be answered.
        content, arrays = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}")), []
    descriptors = [item.descriptor for item in arrays]
    if len(descriptors) > _MOST_DESCRIPTORS:
        raise OSError(f"{len(descriptors)} pieces of memory are more than can be handed over.")
    socket.send_fds(connection, [_HEADER.pack(len(content))], descriptors)
    connection.sendall(content)
    return True


def _pickled(found: Any) -> tuple[bytes, list[SharedArrays]]:
    buffer, arrays = io.BytesIO(), []

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if not isinstance(item, SharedArrays):
                return None
            arrays.append(item)
            return len(arrays) - 1, item.__getstate__()

    Pickler(buffer).dump(found)
    return buffer.getvalue(), arrays


def enter(name: str, timeout: float) -> tuple[Any, Owner]:
    """What the process that listens under a name describes, and that process.

    Raises:
        ValueError: The name is not one for a file, or its path is too long for a socket.
        RuntimeError: Within `timeout` seconds, no process of this user has shared anything under this name; or this is
            not Linux.
    """
    path, deadline = _path_of(name), time.monotonic() + timeout
    while True:
        try:
            with contextlib.ExitStack() as stack:
                connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                connection.settimeout(max(_PAUSE, deadline - time.monotonic()))
                connection.connect(path)
                pid, uid = _peer(connection)
                if uid != os.geteuid():
                    raise RuntimeError(f"What is shared as `{name}` belongs to another user.")
                found = _received(connection)
                if isinstance(found, Exception):
                    raise found
                stack.pop_all()
                return found, Owner(name, pid, connection)
        except FileNotFoundError:
            reason = f"No process of yours shares a ring as `{name}`"
        except ConnectionRefusedError:
            reason = f"The process that shared a ring as `{name}` has ended"
            if os.path.lexists(path) and not _is_socket(path):
                reason = f"{path} is no shared ring"
        except (EOFError, ConnectionError, BlockingIOError):
            reason = f"The ring that is shared as `{name}` has no fields yet"
        except TimeoutError:
            reason = f"The process that shares a ring as `{name}` does not answer"
        if time.monotonic() >= deadline:
            with _alone(os.path.dirname(path)):
                _sweep(os.path.dirname(path))
            raise RuntimeError(f"{reason}: after {timeout:g} s, there is nothing to attach to.")
        time.sleep(_PAUSE)


def _received(connection: socket.socket) -> Any:
    header, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, _MOST_DESCRIPTORS)
    taken: set[int] = set()

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, item: Any) -> SharedArrays:
            number, state = item
            taken.add(descriptors[number])
            return SharedArrays.received(state, descriptors[number])

    try:
        if len(header) < _HEADER.size:
            raise EOFError
        with connection.makefile("rb") as file:
            content = file.read(_HEADER.unpack(header)[0])
        if len(content) < _HEADER.unpack(header)[0]:
            raise EOFError
        return Unpickler(io.BytesIO(content)).load()
    finally:
        for descriptor in {*descriptors} - taken:
            os.close(descriptor)


class Owner:
    """The process that memory was handed over by."""

    def __init__(self, name: str, pid: int, connection: socket.socket | None = None) -> None:
        self._name, self._pid, self._connection = name, pid, connection
        self._process: int | None = None
        self._next_look = 0.0
        with contextlib.suppress(OSError):  # It has ended.
            self._process = os.pidfd_open(pid)
            weakref.finalize(self, os.close, self._process)
        if connection is not None:
            weakref.finalize(self, connection.close)

    def __reduce__(self) -> tuple[type[Owner], tuple[str, int]]:
        return Owner, (self._name, self._pid)

    def check(self) -> None:
        """RuntimeError if it has ended, or shares no more; known after a twentieth of a second at the latest."""
        now = time.monotonic()
        if now < self._next_look:
            return
        # A new one each time: threads cannot poll the same one at a time.
        poll = select.poll()
        if self._process is not None:
            poll.register(self._process, select.POLLIN)
        if self._connection is not None:
            poll.register(self._connection, select.POLLIN)
        if self._process is None or poll.poll(0):
            raise RuntimeError(
                f"The process {self._pid}, which shared a ring as `{self._name}`, has ended or has given the ring up. "
                "Attach again once there is another."
            )
        self._next_look = now + _SECONDS_BETWEEN_LOOKS


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user id of the other end."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def _path_of(name: str) -> str:
    if not hasattr(socket, "SO_PEERCRED") or not hasattr(os, "pidfd_open"):
        raise RuntimeError("Rings are shared by name on Linux only.")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(f"`name` must be 1 to 64 letters, digits, '.', '_' or '-', found {name!r:.80}.")
    parent = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isdir(parent):
        folder = os.path.join(parent, "buffers")
    else:
        folder = os.path.join(tempfile.gettempdir(), f"buffers-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise RuntimeError(f"{folder} must be a directory that only you can enter (mode 0700).")
    path = os.path.join(folder, name)
    if len(os.fsencode(path)) > 107:  # The most that a Unix socket takes.
        raise ValueError(f"{path} is longer than the 107 bytes of a socket's path. Choose a shorter name or folder.")
    return path


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    """While no other process makes or removes names."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_socket(path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    return False


def _sweep(folder: str) -> None:
    """Remove the names that killed processes have left."""
    for entry in os.scandir(folder):
        if _is_socket(entry.path):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                try:
                    probe.connect(entry.path)
                except ConnectionRefusedError:
                    os.unlink(entry.path)
                except OSError:
                    pass  # It lives, and is busy.
