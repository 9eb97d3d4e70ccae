"""Small things that several rooms share."""

from __future__ import annotations

import operator
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["to_torch"]


def how_to_install(extra: str) -> str:
    """The command that installs an extra, for an error."""
    # "buffers" on PyPI is a stranger's package.
    return f"`pip install '.[{extra}]'` in a checkout, or `pip install 'episode-buffers[{extra}]'` once it is on PyPI"


class Process:
    """This process: its number is kept, as asking the kernel takes long where a batch has just used the caches."""

    number = os.getpid()


class ThreadLock(type(threading.RLock())):  # type: ignore[misc]
    """A lock between the threads of one process; a forked child and a copy begin with one of their own.

    It is taken and given back by C: Ctrl-C between the two lines of a method would leave it taken for ever.
    """

    all: weakref.WeakSet[ThreadLock] = weakref.WeakSet()

    def __init__(self) -> None:
        ThreadLock.all.add(self)

    def __reduce__(self) -> tuple[type[ThreadLock], tuple[()]]:
        return ThreadLock, ()


def _renew() -> None:
    """In a forked child, where a thread that is not here may have held the locks."""
    Process.number = os.getpid()
    for lock in ThreadLock.all:
        lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def to_torch(value: Any, device: torch.device | str | None = None) -> Any:
    """Turn numbers and arrays into tensors, also inside lists, tuples (named ones too) and dicts, which are rebuilt.

    dtypes are kept; Python floats become float32, ints int64, bools bool. Arrays share their memory with the tensor
    where torch allows it, so copy the result if the array is used again. What is neither (a string, None, an object
    array) comes back as it is. `device` is where the tensors shall live; None leaves them where they are.

        >>> to_torch({"obs": np.zeros(2, np.float32), "reward": 0.5, "name": "left"})
        {'obs': tensor([0., 0.]), 'reward': tensor(0.5000), 'name': 'left'}
    """
    if isinstance(value, dict):
        return {key: to_torch(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_torch(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_torch(item, device) for item in value)
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            tensor = _from_numpy(np.asarray(value))
        except TypeError:  # Of a dtype that torch has not.
            return value
    elif isinstance(value, torch.Tensor):
        tensor = value
    elif isinstance(value, bool) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        tensor = torch.tensor(value)
    elif isinstance(value, (float, complex)):
        tensor = torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.complex64)
    else:
        return value
    return tensor if device is None else tensor.to(device)


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    # torch knows neither foreign byte orders, nor negative strides, nor memory that must not be written.
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    is_plain = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if is_plain else array.copy())


def integer(name: str, value: Any, minimum: int) -> int:
    """An argument that must be an integer of at least `minimum`, and no bool."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, found {type(value).__name__}: {value!r:.60}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, found {value}.")
    return operator.index(value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> Any:
    """An argument that must be one of a few words."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, found {value!r:.60}.")
    return value


def format_bytes(num_bytes: float) -> str:
    """A number of bytes for people: `1.5 MB`, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text whose columns are aligned; the first row is the head and is underlined."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
