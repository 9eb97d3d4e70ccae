"""What the tests of processes that die share."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from buffers.dataset import IndividualFileDataset

CAPACITY = 20


def lengths() -> Iterator[int]:
    return itertools.cycle([5, 3, 9, 4, 1])


def opened(path: Path, capacity: int = CAPACITY, **options: Any) -> IndividualFileDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return IndividualFileDataset(capacity, directory=path, **options)


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
        finally:
            os._exit(status)
    return pid
