"""Memory-mapped TensorDicts: JSON that names the columns, and one file of plain values for each.

    PATH/meta.json             {"observation": {"dtype": "torch.float32", "shape": [1000, 3], ...},
                                "next": {"type": "TensorDict"}, "shape": [1000], ...}
    PATH/observation.memmap    1000 x 3 float32, row after row
    PATH/next/meta.json        the same, one level below

What is no tensor (text, pickled objects) lies beside them and is never opened.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from buffers.conversion import TO_NUMPY
from buffers.disk import DTYPES, as_damage, parse_json
from buffers.interop.base import FormatError

__all__ = ["Column", "Key", "MemoryMapped", "read_json"]

Key = tuple[str, ...]

META = "meta.json"
_MOST_BYTES = 1 << 24
_MOST_LEVELS = 50
_MOST_ELEMENTS = 2**60
# As tensordict writes the characters that a file's name should not have.
_ENCODED = {ord(char): f"%{ord(char):02X}" for char in '/<>:"|?*\\ %\x7f' + "".join(map(chr, range(32)))}
_ADVICE = "Get a whole copy of the directory, with all files below it"


@dataclass(frozen=True)
class Column:
    """The values of one key: a file without a header."""

    name: str
    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # With the batch axes.

    @property
    def num_bytes(self) -> int:
        """Of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check_size(self, source: str) -> None:
        """FormatError if the file has fewer bytes than its values take. A reused file may have more."""
        if not self.num_bytes:
            return  # The library writes no file.
        size = _regular_size(self.path)
        if size is None:
            raise FormatError(source, f"The file of `{self.name}` is not there ({self.path})", _ADVICE)
        if size < self.num_bytes:
            kind = str(self.dtype).removeprefix("torch.")
            found = f"`{self.name}` has {size} bytes, and {kind} {self.shape} takes {self.num_bytes}"
            raise FormatError(source, found, _ADVICE)

    def mapped(self) -> np.ndarray:
        """The values over the pages of the file, which are read when they are used."""
        dtype = TO_NUMPY[self.dtype]
        if not self.num_bytes:
            return np.empty(self.shape, dtype)
        return np.asarray(np.memmap(self.path, dtype, "r", shape=self.shape))


@dataclass
class MemoryMapped:
    """The columns of a directory.

    Attributes:
        source: What the user gave, for errors.
        path: Of the directory with `meta.json`.
        batch: The shape that all columns begin with.
        columns: By key, in the order of the file.
        unread: `name -> what it is`, of what is not read.
    """

    source: str
    path: str
    batch: tuple[int, ...] = ()
    columns: dict[Key, Column] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    _mapped: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        meta = read_json(self.source, os.path.join(self.path, META))
        if (kind := _type_of(meta)) != "TensorDict":
            advice = "Save it as a TensorDict, a lazy stack after `.contiguous()`"
            raise FormatError(self.source, f"It is a {kind}, and no TensorDict with a file for each key", advice)
        self.batch = self._shape("the batch", meta.get("shape"))
        self._add(self.path, meta, ())
        for column in self.columns.values():
            column.check_size(self.source)
        # With that, the rows are no more than the bytes that are there.
        if self.num_rows and not any(column.num_bytes for column in self.columns.values()):
            raise FormatError(self.source, f"It says that it has {self.num_rows} rows, and has no values", _ADVICE)

    @property
    def num_rows(self) -> int:
        """Of all batch axes together."""
        return math.prod(self.batch)

    def flat_rows(self, column: Column) -> np.ndarray:
        """The values of a column with one axis of rows, over the pages of its file."""
        column.check_size(self.source)  # Reading pages that a file has no more kills the process.
        if column.path not in self._mapped:
            shape = self.num_rows, *column.shape[len(self.batch) :]
            self._mapped[column.path] = column.mapped().reshape(shape)
        return self._mapped[column.path]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._mapped.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def _add(self, path: str, meta: Mapping[str, Any], parents: Key) -> None:
        for key, described in meta.items():
            if not isinstance(described, dict):
                continue  # Of the directory itself: its shape, device and type.
            keys = (*parents, key)
            name = "/".join(keys)
            _check_key(self.source, name, key)
            if "type" in described:
                self._add_below(_child(path, key, ""), keys, name)
            elif described.get("is_nested"):
                self.unread[name] = "a nested tensor"
            elif str(described.get("dtype")).removeprefix("torch.") not in DTYPES:
                self.unread[name] = f"of the type {described.get('dtype')!s:.40}"
            else:
                dtype = DTYPES[str(described["dtype"]).removeprefix("torch.")]
                shape = self._shape(f"`{name}`", described.get("shape"))
                if shape[: len(self.batch)] != self.batch:
                    found = f"`{name}` has the shape {shape}, which does not begin with that of the batch, {self.batch}"
                    raise FormatError(self.source, found, _ADVICE)
                self.columns[keys] = Column(name, _child(path, key, ".memmap"), dtype, shape)

    def _add_below(self, path: str, keys: Key, name: str) -> None:
        if len(keys) > _MOST_LEVELS:
            raise FormatError(self.source, f"`{name:.60}` is nested too deeply", _ADVICE)
        meta = read_json(self.source, os.path.join(path, META))
        if (kind := _type_of(meta)) == "TensorDict":
            self._add(path, meta, keys)
        else:
            self.unread[name] = f"no tensor ({kind})"

    def _shape(self, what: str, found: Any) -> tuple[int, ...]:
        is_list = isinstance(found, list) and all(type(size) is int and size >= 0 for size in found)
        if not is_list or math.prod(size or 1 for size in found) > _MOST_ELEMENTS:
            raise FormatError(self.source, f"{what} has the shape {found!r:.60}", _ADVICE)
        return tuple(found)


def read_json(source: str, path: str) -> dict[str, Any]:
    """A JSON object in a file of at most 16 MB; FormatError if it is not there, or anything else."""
    size = _regular_size(path)
    if size is None:
        raise FormatError(source, f"{path} is not there", "Give the directory that `dumps` or `memmap` has written")
    try:
        with as_damage(), open(path, "rb") as file:
            found = parse_json(file.read(_MOST_BYTES))
    except ValueError as error:
        raise FormatError(source, f"{path} {error}", _ADVICE) from None
    if not isinstance(found, dict):
        raise FormatError(source, f"{path} is no JSON object", _ADVICE)
    return found


def _check_key(source: str, name: str, key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:
        raise FormatError(source, f"The key {name!r:.60} is no text", _ADVICE) from None


def _child(path: str, key: str, suffix: str) -> str:
    """The file or directory of a key. No key leads out of the directory: a slash is encoded, and so are dots."""
    encoded = "%2E" * len(key) if key in (".", "..") else key.translate(_ENCODED)
    found = os.path.join(path, encoded + suffix)
    # Older versions wrote keys as they are.
    if encoded != key and not os.path.lexists(found) and key not in (".", "..") and not {*key} & {*"/\\\0"}:
        return os.path.join(path, key + suffix)
    return found


def _regular_size(path: str) -> int | None:
    """Bytes of a file; None if it is not there. A pipe would block for ever."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _type_of(meta: Mapping[str, Any]) -> str:
    """The class in the metadata, without its module."""
    return str(meta.get("_type", "unknown type")).removesuffix("'>").rpartition(".")[2][:60]
