"""The formats by name. Each is a module here, imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from buffers.utils import one_of

__all__ = ["FORMATS", "check_options", "module_of"]

FORMATS = ("d3rlpy", "flat", "hdf5", "lerobot", "minari", "npz", "ogbench", "rlds", "torchrl")
"""The names of the formats."""


def module_of(format: str) -> ModuleType:
    """The module of a format; ValueError for another name."""
    return importlib.import_module(f"buffers.interop.{one_of('format', format, FORMATS)}")


def check_options(format: str, function: Callable[..., Any], options: Iterable[str]) -> None:
    """TypeError for a name that is no option of a format's `read` or `write`."""
    known = [*inspect.signature(function).parameters][1:]
    known = [name for name in known if name not in ("fields", "limit", "progress")]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise TypeError(f"The format {format!r} has no option `{name}` here. It has {known}.{hint}")
