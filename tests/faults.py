"""Faults that tests inject: system calls that fail or are watched, killed processes, limits, and full disks."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from buffers.dataset import IndividualFileDataset
from buffers.dataset.files import directory, lock

CAPACITY = 20
# The calls of `os` that change a directory, or a file in it.
CHANGES = ("open", "fsync", "rename", "unlink", "mkdir", "ftruncate", "pwrite", "close", "makedirs")


def lengths() -> Iterator[int]:
    return itertools.cycle([5, 3, 9, 4, 1])


def opened(path: Path, capacity: int = CAPACITY, **options: Any) -> IndividualFileDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return IndividualFileDataset(capacity, directory=path, **options)


# System calls.


class WatchedOS:
    """The os module, with functions that are called before and after each call that changes something."""

    def __init__(self, before: Callable[..., object], after: Callable[..., object]) -> None:
        self.before, self.after = before, after

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        if name not in CHANGES:
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self.before(name, *arguments)
            result = found(*arguments, **options)
            self.after(name, *arguments)
            return result

        return call


def nothing(*_: Any) -> None:
    pass


@contextlib.contextmanager
def watched_calls(before: Callable[..., object] = nothing, after: Callable[..., object] = nothing) -> Iterator[None]:
    """Call functions with (name, *arguments) around the system calls of directories; `before` may raise, or kill."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (directory, lock):
            patch.setattr(module, "os", WatchedOS(before, after))
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


def killed_before_call(num_calls: int, action: Callable[[], object]) -> bool:
    """Run it in a process that kills itself before its n-th change; whether it got so far."""

    def run() -> None:
        left = itertools.count(num_calls, -1)
        with watched_calls(lambda *_: next(left) or os.kill(os.getpid(), signal.SIGKILL)):
            action()

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
    yield path
    subprocess.run(["umount", str(path)], check=True)
