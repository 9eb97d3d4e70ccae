"""Reading what files say: their JSON, their fields, and telling damage from other errors."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch

from buffers import fields as field_types
from buffers.conversion import TO_NUMPY
from buffers.fields import Fields, TensorType

__all__ = [
    "DTYPES",
    "DamagedEpisodeError",
    "UnknownVersionError",
    "as_damage",
    "described_fields",
    "parse_fields",
    "parse_json",
    "safetensors_type",
]

# What parsers raise for damaged bytes.
_PARSER_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, EOFError, NotImplementedError, OSError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)
_OUT_OF_MEMORY = "Error -4"  # The beginning of zlib's message.
# Levels of fields; the JSON of a file never nests as deeply.
_MAX_DEPTH = 100
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TO_NUMPY}


class DamagedEpisodeError(ValueError):
    """A file is not the whole episode that its name promises."""


class UnknownVersionError(DamagedEpisodeError):
    """The version of a file's format is not one that this version of the library reads."""


@contextlib.contextmanager
def as_damage() -> Iterator[None]:
    """Turn what parsers raise for damaged bytes into a DamagedEpisodeError. Only for code that parses."""
    try:
        yield
    except DamagedEpisodeError:
        raise
    except _PARSER_ERRORS as error:
        if isinstance(error, zlib.error) and str(error).startswith(_OUT_OF_MEMORY):
            raise MemoryError(str(error)) from error
        # zipfile reports a failed read as a bad archive. Seeking to a negative offset (EINVAL) is damage.
        cause = error.__context__ if isinstance(error, zipfile.BadZipFile) else error
        if isinstance(cause, OSError) and cause.errno != errno.EINVAL:
            raise cause from None
        raise DamagedEpisodeError(f"cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def parse_json(data: str | bytes) -> Any:
    """Parse JSON. Text that nests too deeply is damage, unless it is the caller's stack that is too deep."""
    text = data if isinstance(data, str) else data.decode()
    try:
        return json.loads(text)
    except RecursionError:
        if max(accumulate((char in "[{") - (char in "]}") for char in text)) <= _MAX_DEPTH:
            raise
        raise DamagedEpisodeError("nests too deeply") from None


def described_fields(fields: Fields) -> list[dict[str, Any]]:
    """The fields as JSON; equal ones give equal texts."""
    if max(map(len, fields.paths)) > _MAX_DEPTH:
        raise ValueError(f"Files hold fields of at most {_MAX_DEPTH} levels.")
    return [
        {"path": path, "type": _type_name(kind), "dtype": str(kind.dtype).removeprefix("torch."), "shape": kind.shape}
        for path, kind in zip(fields.paths, fields.values(), strict=True)
    ]


def parse_fields(described: Any) -> Fields:
    """What `described_fields` has described; a DamagedEpisodeError, or what `as_damage` makes one of, otherwise."""
    tree: dict[str, Any] = {}
    for field in described:
        *parents, last = field["path"]
        if len(parents) >= _MAX_DEPTH:
            raise DamagedEpisodeError("nests fields too deeply")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        if last in node:
            raise DamagedEpisodeError(f"names the field {last!r:.60} twice")
        node[last] = _parse_type(field)
    return Fields(tree)


def _parse_type(described: Mapping[str, Any]) -> TensorType:
    name, shape = described["type"], described["shape"]
    kind = getattr(field_types, name) if name in field_types.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, TensorType)):
        raise DamagedEpisodeError(f"has a field of the unknown type {name!r:.60}")
    if not all(type(size) is int and 0 <= size < 2**48 for size in shape) or math.prod(shape) >= 2**48:
        raise DamagedEpisodeError(f"has a field of shape {shape!r:.60}")
    return kind(tuple(shape), DTYPES[described["dtype"]])


def _type_name(tensor_type: TensorType) -> str:
    """The nearest class that the library defines: a user's own type is stored as its base."""
    return next(kind.__name__ for kind in type(tensor_type).__mro__ if kind.__name__ in field_types.__all__)


def safetensors_type(tensor_type: TensorType) -> tuple[str, tuple[int, ...]]:
    """The dtype, by safetensors' name for it, and the shape in the file."""
    if tensor_type.dtype.is_complex:
        return ("F32" if tensor_type.dtype == torch.complex64 else "F64"), (*tensor_type.shape, 2)
    if tensor_type.dtype == torch.bfloat16:
        return "BF16", tensor_type.shape
    dtype = tensor_type.numpy_dtype
    return "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}", tensor_type.shape
