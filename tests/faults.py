"""Faults that tests inject: system calls that fail or are watched, killed processes, limits, and full disks."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from buffers.dataset import IndividualFileDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.files import directory
from buffers.disk import directory as disk_directory
from buffers.disk import lock
from buffers.saving import packed_file

CAPACITY = 20
# The calls of `os` that change a directory, or a file in it.
CHANGES = (
    *("open", "fsync", "rename", "unlink", "mkdir", "ftruncate", "pwrite", "close", "makedirs"),
    *("link", "rmdir"),
)


def lengths() -> Iterator[int]:
    return itertools.cycle([5, 3, 9, 4, 1])


def opened(path: Path, capacity: int = CAPACITY, **options: Any) -> IndividualFileDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return IndividualFileDataset(capacity, directory=path, **options)


# System calls.


class WatchedOS:
    """The os module, with functions that are called before and after each call that changes something.

    With `with_options`, they are given its keyword arguments, too.
    """

    def __init__(self, before: Callable[..., object], after: Callable[..., object], with_options: bool = False) -> None:
        self.before, self.after, self.with_options = before, after, with_options

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        if name not in CHANGES:
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            told = options if self.with_options else {}
            self.before(name, *arguments, **told)
            result = found(*arguments, **options)
            self.after(name, *arguments, **told)
            return result

        return call


def nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def watched_calls(
    before: Callable[..., object] = nothing, after: Callable[..., object] = nothing, with_options: bool = False
) -> Iterator[None]:
    """Call functions with (name, *arguments) around the system calls of directories; `before` may raise, or kill."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (directory, disk_directory, lock, packed_file):
            patch.setattr(module, "os", WatchedOS(before, after, with_options))
        yield


@contextlib.contextmanager
def failing_calls(
    name: str, error: BaseException, is_meant: Callable[..., bool] = lambda *_: True
) -> Iterator[list[bool]]:
    """Let the calls of a name fail, those that are meant; what becomes of each is listed."""
    failed: list[bool] = []

    def fail(called: str, *arguments: Any) -> None:
        if called == name:
            failed.append(is_meant(*arguments))
            if failed[-1]:
                raise error

    with watched_calls(fail):
        yield failed


@contextlib.contextmanager
def failing_call(number: int, error: BaseException, kind: str | None = None) -> Iterator[list[str]]:
    """Let the n-th call fail, of a kind or of all; its name is listed."""
    left, failed = itertools.count(number, -1), []

    def before(name: str, *_: Any) -> None:
        if kind in (None, name) and next(left) == 0:
            failed.append(name)
            raise type(error)(*error.args)  # Another one: nothing here may keep its traceback.

    with watched_calls(before):
        yield failed


@contextlib.contextmanager
def recorded_calls(root: Path) -> Iterator[list[tuple[Any, ...]]]:
    """List what becomes of files and folders, by their paths below a folder, as `Disk` of `test_crash.py` takes it.

    Contents are those at an fsync, rename or link. The files `.lock` are left out.
    """
    calls: list[tuple[Any, ...]] = []

    def place(name: str, folder: int | None) -> str:
        parent = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")
        return os.path.relpath(os.path.join(parent, name), root.resolve())

    def before(name: str, *arguments: Any, **_: Any) -> None:
        if name == "fsync" and not (synced := place("", arguments[0])).endswith("/.lock"):
            if (root / synced).is_dir():
                calls.append(("sync directory", synced))
            else:
                calls.extend((call, synced, (root / synced).read_bytes()) for call in ("write", "sync"))

    def after(name: str, *arguments: Any, dir_fd: int | None = None, **options: Any) -> None:
        if name == "open" and arguments[1] & os.O_CREAT and arguments[0] != ".lock":
            calls.append(("create", place(arguments[0], dir_fd)))
        elif name in ("unlink", "mkdir", "rmdir"):
            calls.append((name, place(arguments[0], dir_fd)))
        elif name in ("rename", "link"):
            old, new = place(arguments[0], options["src_dir_fd"]), place(arguments[1], options["dst_dir_fd"])
            calls.append((name, old, new, (root / new).read_bytes()))

    with watched_calls(before, after, with_options=True):
        yield calls


# Saves.


def save_error(source: EpisodeSource, saves: Path, block: bool = True) -> tuple[type[BaseException], str] | None:
    """What a save fails with, without its traceback, which keeps what it refers to; None if it does not.

    With `block=False`, a warning says the same.
    """
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            future = source.save(saves, block=block)
        except BaseException as error:
            return type(error), str(error)
        failed = future.exception()
        join_saves()
    assert [str(warning.message) for warning in found] == ([] if failed is None else [f"A save failed: {failed}"])
    return None if failed is None else (type(failed), str(failed))


def join_saves() -> None:
    """Wait for the threads that save, which warn at their ends."""
    for thread in threading.enumerate():
        if thread.name == "buffers-save":
            thread.join()


# Processes.


def fork() -> int:
    with warnings.catch_warnings():
        # Children here use neither torch's threads nor any other.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(action: Callable[[], object]) -> int:
    """Run it in a forked process; its process id."""
    pid = fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    """How a child ended: its exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def kill_worker(worker: Any) -> None:
    """Kill a worker of a DataLoader; torch, which raises the news wherever the trainer is, finds out later."""
    torchs_own = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        worker.kill()
        worker.join()
    finally:
        signal.signal(signal.SIGCHLD, torchs_own)


def killed_before_call(
    num_calls: int, action: Callable[..., object], prepare: Callable[[], object] | None = None
) -> bool:
    """Run it in a process that kills itself before its n-th change; whether it got so far.

    `action` is given what `prepare` returns, during which nothing is counted.
    """

    def run() -> None:
        prepared = () if prepare is None else (prepare(),)
        left = itertools.count(num_calls, -1)
        with watched_calls(lambda *_: next(left) or os.kill(os.getpid(), signal.SIGKILL)):
            action(*prepared)

    status = status_of(in_child(run))
    assert status in (0, -signal.SIGKILL)
    return status != 0


def as_nobody(action: Callable[[], object]) -> int:
    """Run it in a process without any rights; its exit status."""

    def run() -> None:
        os.setgid(65534)
        os.setuid(65534)
        action()

    return status_of(in_child(run))


# Limits.


@contextlib.contextmanager
def limited(what: int, value: int) -> Iterator[None]:
    """A limit of `resource`, meanwhile."""
    limits = resource.getrlimit(what)
    resource.setrlimit(what, (value, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, limits)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed")
    try:
        yield path
    finally:
        # Lazily: what a failure refers to may have files open.
        subprocess.run(["umount", "--lazy", str(path)], check=True)
