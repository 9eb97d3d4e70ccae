"""Arrow's values as arrays of the declared dtype and shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from buffers.interop.base import FormatError, library
from buffers.interop.lerobot.parquet import EXTRA, reading

__all__ = ["array_of", "encoded_images", "is_image_type", "is_number_type"]


def is_number_type(kind: Any, num_axes: int) -> bool:
    """Whether an arrow type is of numbers, in lists of as many levels, or one less where LeRobot stores `(1,)`."""
    types = library("pyarrow.types", EXTRA)
    depth = 0
    while _is_list(types, kind := _storage(kind)):
        kind, depth = kind.value_type, depth + 1
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return is_number and (depth == num_axes or (depth == 0 and num_axes == 1))


def is_image_type(kind: Any) -> bool:
    """Whether an arrow type is of encoded images: bytes, or a struct that has `bytes`."""
    types = library("pyarrow.types", EXTRA)
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind)


def array_of(path: str, name: str, chunks: list[Any], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The rows `(n, *shape)` of a column, from arrow arrays.

    FormatError for rows without a value, of another shape, or with numbers that the declared dtype cannot hold.
    """
    arrow = library("pyarrow", EXTRA)
    target = arrow.from_numpy_dtype(dtype)
    found = []
    for chunk in chunks:
        with reading(path):
            values = _flat(path, name, chunk, shape)
            # Within floats, where precision may be lost, arrow casts as numpy does.
            numbers = values if values.type == target else values.cast(target)
            found.append(numbers.to_numpy(zero_copy_only=False).reshape(len(chunk), *shape))
        if numbers is not values and dtype.kind == "f" and arrow.types.is_floating(values.type):
            _check_finite(path, name, found[-1], values.to_numpy(zero_copy_only=False))
    return np.concatenate(found) if found else np.empty((0, *shape), dtype)


def encoded_images(path: str, name: str, chunks: list[Any]) -> list[Any]:
    """The bytes of each image of a column, as buffers of arrow, which are not copied."""
    found = []
    for chunk in chunks:
        values = chunk.field("bytes") if hasattr(chunk, "field") else chunk
        if values.null_count:
            found_text = f"`{name}` has images outside of the file, or none in some rows"
            raise FormatError(path, found_text, "Let LeRobot embed them")
        found += [value.as_buffer() for value in values]
    return found


def _storage(kind: Any) -> Any:
    """Of a type that another library has registered with arrow, as `datasets` does for arrays."""
    return getattr(kind, "storage_type", kind)


def _is_list(types: Any, kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _flat(path: str, name: str, chunk: Any, shape: tuple[int, ...]) -> Any:
    """All numbers of an arrow array, after checking that each row has as many as its shape says."""
    arrow = library("pyarrow", EXTRA)
    compute = library("pyarrow.compute", EXTRA)
    values, sizes = getattr(chunk, "storage", chunk), list(shape)
    while _is_list(arrow.types, values.type):
        _check_nulls(path, name, values)
        lengths = compute.list_value_length(values)
        size = sizes.pop(0)
        if len(values) and (compute.min(lengths).as_py(), compute.max(lengths).as_py()) != (size, size):
            raise FormatError(path, f"`{name}` has rows of another shape than {shape}", "Get a whole copy of it")
        values = values.flatten()
    _check_nulls(path, name, values)
    if len(values) != len(chunk) * math.prod(shape):
        raise FormatError(path, f"`{name}` has rows of another shape than {shape}", "Get a whole copy of it")
    return values


def _check_nulls(path: str, name: str, values: Any) -> None:
    if values.null_count:
        raise FormatError(path, f"`{name}` has no value in {values.null_count} rows", "Get a whole copy of it")


def _check_finite(path: str, name: str, found: np.ndarray, stored: np.ndarray) -> None:
    if np.isinf(found).sum() != np.isinf(stored).sum():
        text = f"`{name}` has numbers beyond the declared {found.dtype}"
        raise FormatError(path, text, "Declare a wider one in meta/info.json")
