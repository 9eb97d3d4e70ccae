"""Helpers that several packages share."""

from __future__ import annotations

import math
import operator
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from buffers.conversion import as_array

__all__ = ["to_torch"]


def how_to_install(extra: str) -> str:
    """The command that installs an extra, for an error."""
    # "buffers" on PyPI is a stranger's package.
    return f"`pip install '.[{extra}]'` in a checkout, or `pip install 'episode-buffers[{extra}]'` once it is on PyPI"


def progress_bar(is_shown: bool, total: int | None, what: str, unit: str = "B", initial: int = 0) -> Any:
    """A bar of tqdm over bytes, or others, for a `with` block; without `is_shown`, one that shows nothing.

    ImportError if tqdm is missing.
    """
    if not is_shown:
        return nullcontext(_NoBar())
    return tqdm_class()(total=total, desc=what, unit=unit, unit_scale=unit == "B", initial=initial)


class _NoBar:
    def update(self, num: int) -> None:
        pass


def tqdm_class() -> Any:
    """That of the extra; an ImportError names it."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f"`progress=True` needs tqdm ({error}): {how_to_install('demo')}.") from None
    return tqdm


class Process:
    """Its process id, kept here because asking the kernel is slow."""

    number = os.getpid()


class ThreadLock(type(threading.RLock())):  # type: ignore[misc]
    """A lock between the threads of one process; a forked child and a copy start with a free one.

    A subclass of the C type, because Ctrl-C within Python methods for `with` could leave it locked for ever.
    """

    all: weakref.WeakSet[ThreadLock] = weakref.WeakSet()

    def __init__(self) -> None:
        ThreadLock.all.add(self)

    def __reduce__(self) -> tuple[type[ThreadLock], tuple[()]]:
        return ThreadLock, ()


def _renew() -> None:
    """In a forked child: threads that it does not have may have held the locks."""
    Process.number = os.getpid()
    for lock in ThreadLock.all:
        lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def to_torch(value: Any, device: torch.device | str | None = None) -> Any:
    """Turn numbers and arrays into tensors, also inside lists, tuples (named ones too) and dicts, which are rebuilt.

    dtypes are kept; Python floats become float32, ints int64, bools bool. A tensor shares the memory of its array where
    torch allows it, so copy the result if the array is reused. Other values (a string, None, an object array) are
    returned as they are. `device` is where to move tensors; None leaves them where they are.

        >>> to_torch({"obs": np.zeros(2, np.float32), "reward": 0.5, "name": "left"})
        {'obs': tensor([0., 0.]), 'reward': tensor(0.5000), 'name': 'left'}
    """
    if isinstance(value, dict):
        return {key: to_torch(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_torch(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_torch(item, device) for item in value)
    if not isinstance(value, torch.Tensor):
        try:
            array = as_array("value", value)
        except TypeError:
            return value
        # torch supports neither negative strides nor read-only memory.
        is_plain = array.flags.writeable and all(stride >= 0 for stride in array.strides)
        value = torch.from_numpy(array if is_plain else array.copy())
    return value if device is None else value.to(device)


def integer(name: str, value: Any, minimum: int) -> int:
    """Check an argument that must be an integer of at least `minimum`, and no bool."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, found {type(value).__name__}: {value!r:.60}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, found {value}.")
    return operator.index(value)


def number(name: str, value: Any, minimum: float, maximum: float = math.inf) -> float:
    """Check an argument that must be a finite real number from `minimum` to `maximum`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a number, found {type(value).__name__}: {value!r:.60}.")
    if not (minimum <= value <= maximum and math.isfinite(value)):
        most = "" if maximum == math.inf else f" and at most {maximum:g}"
        raise ValueError(f"`{name}` must be finite, at least {minimum:g}{most}, found {value}.")
    return float(value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> Any:
    """Check an argument that must be one of a few words."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, found {value!r:.60}.")
    return value


def usable_device(name: str, device: torch.device | str) -> torch.device:
    """Check an argument that must be a device of this machine."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`{name}`={device!r} cannot be used: {str(error).splitlines()[0]}") from None


def format_bytes(num_bytes: float) -> str:
    """A number of bytes as `1.5 MB`, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with aligned columns; the first row is the head and is underlined."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
