"""The formats by name. Each is a module here, imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from buffers.utils import one_of

__all__ = ["FORMATS", "module_of"]

FORMATS = ("d3rlpy", "flat", "hdf5", "lerobot", "minari", "npz", "ogbench", "rlds", "torchrl")
"""The names of the formats."""


def module_of(format: str) -> ModuleType:
    """The module of a format; ValueError for another name."""
    return importlib.import_module(f"buffers.interop.{one_of('format', format, FORMATS)}")
