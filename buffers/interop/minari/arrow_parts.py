"""Files of Minari's Arrow and Parquet storage: their columns, and rows a record batch at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from buffers.interop.base import FormatError, library
from buffers.interop.minari.columns import Column, Path, column, field_of
from buffers.interop.minari.images import decoded
from buffers.interop.minari.spaces import Space, shape_of, subspaces_of

__all__ = ["IpcPart", "ParquetPart", "Part", "columns_of_space", "columns_without_space", "values_of"]

_ADVICE = "Get a whole copy of the dataset"
_BATCH_ROWS = 4096
_MAX_DEPTH = 32


class Part(ABC):
    """A file with rows of one episode. Errors are those of pyarrow.

    Attributes:
        path: Of the file.
        schema: Its pyarrow.Schema.
        num_rows: As the file says.
    """

    path: str
    schema: Any
    num_rows: int

    @abstractmethod
    def batches(self, roots: Collection[str]) -> Iterator[Any]:
        """The record batches, with at least these columns of the top level."""

    def _check_types(self) -> None:
        for field in self.schema:
            _check_type(self.path, field.type)


class IpcPart(Part):
    """An Arrow file. It is mapped, so that columns that nobody looks at are not read."""

    def __init__(self, path: str) -> None:
        pyarrow = library("pyarrow", "minari")
        self.path = path
        self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(path))
        self.schema = self._reader.schema
        self._check_types()
        self.num_rows = sum(batch.num_rows for batch in self.batches(()))

    def batches(self, roots: Collection[str]) -> Iterator[Any]:
        """As `Part.batches`."""
        for number in range(self._reader.num_record_batches):
            yield self._reader.get_batch(number)


class ParquetPart(Part):
    """A Parquet file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = library("pyarrow.parquet", "minari").ParquetFile(path)
        self.schema = self._file.schema_arrow
        self._check_types()
        self.num_rows = self._file.metadata.num_rows

    def batches(self, roots: Collection[str]) -> Iterator[Any]:
        """As `Part.batches`."""
        yield from self._file.iter_batches(_BATCH_ROWS, columns=sorted(roots))


def _check_type(source: str, kind: Any, depth: int = 0) -> None:
    """Refuse types that arrays of Arrow cannot be made of safely."""
    if depth > _MAX_DEPTH:
        raise FormatError(source, "nests too deeply", _ADVICE)
    # Arrow divides by the size of its lists.
    if library("pyarrow", "minari").types.is_fixed_size_list(kind) and kind.list_size < 1:
        raise FormatError(source, f"has lists of {kind.list_size} values", _ADVICE)
    for number in range(kind.num_fields):
        _check_type(source, kind.field(number).type, depth + 1)


def columns_of_space(source: str, path: Path, kind: Any, space: Space) -> Iterator[tuple[Path, Column]]:
    """(path, column) below observations or actions, for the type of the column and its space; `rows` are 0."""
    types = library("pyarrow", "minari").types
    if "subspaces" in space:
        names = [kind.field(number).name for number in range(kind.num_fields)] if types.is_struct(kind) else []
        subspaces = dict(subspaces_of(space))
        if missing := sorted(subspaces.keys() - names):
            raise FormatError(source, f"`{field_of(path)}` lacks {missing}, which its space has", _ADVICE)
        for name in names:
            if name in subspaces:
                yield from columns_of_space(source, (*path, name), kind.field(name).type, subspaces[name])
            else:
                yield (*path, name), Column(np.dtype(object), (), 0, "is not in the space")
        return
    if space["type"] == "Text":
        yield path, Column(np.dtype(object), (), 0, "is text")
        return
    shape = shape_of(space)
    if types.is_binary(kind) and space.get("dtype") == "uint8" and len(shape) in (2, 3):
        yield path, Column(np.dtype(np.uint8), shape, 0, is_jpeg=True)
        return
    is_list = types.is_fixed_size_list(kind)
    dtype = _dtype_of(kind.value_type if is_list else kind)
    if dtype is None or (kind.list_size if is_list else 1) != math.prod(shape):
        found = (
            f"`{field_of(path)}` has the Arrow type {kind!s:.60}, expected that of a {space['type']} of shape {shape}"
        )
        raise FormatError(source, found, _ADVICE)
    yield path, column(dtype, shape, 0)


def columns_without_space(path: Path, field: Any) -> Iterator[tuple[Path, Column]]:
    """(path, column) of rewards, flags and infos; `rows` are 0."""
    types, kind = library("pyarrow", "minari").types, field.type
    if types.is_struct(kind):
        for number in range(kind.num_fields):
            child = kind.field(number)
            yield from columns_without_space((*path, child.name), child)
        return
    is_list = types.is_fixed_size_list(kind)
    dtype = _dtype_of(kind.value_type if is_list else kind)
    if dtype is None:
        is_text = types.is_string(kind) or types.is_large_string(kind)
        problem = "is text" if is_text else f"has the Arrow type {kind!s:.60}"
        yield path, Column(np.dtype(object), (), 0, problem)
    else:
        yield path, column(dtype, _stated_shape(field) if is_list else (), 0)


def _stated_shape(field: Any) -> tuple[int, ...]:
    """Of the rows of infos that are lists: Minari keeps it beside the type."""
    text = (field.metadata or {}).get(b"shape", b"%d" % field.type.list_size).decode("ascii", "replace")
    sizes = [size for size in text.split(",") if size]
    is_right = all(size.isdecimal() and len(size) < 12 for size in sizes)
    shape = tuple(map(int, sizes)) if is_right else ()
    return shape if math.prod(shape) == field.type.list_size else (field.type.list_size,)


def _dtype_of(kind: Any) -> np.dtype | None:
    types = library("pyarrow", "minari").types
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return np.dtype(kind.to_pandas_dtype()) if is_number else None


def values_of(source: str, path: Path, batch: Any, one: Column) -> np.ndarray:
    """The rows of a column of a record batch, a view where Arrow has one."""
    array = batch.column(path[0])
    for key in path[1:]:
        _check_no_nulls(source, path, array)
        array = array.field(key)
    _check_no_nulls(source, path, array)
    if one.is_jpeg:
        return decoded(source, field_of(path), [item.as_buffer() for item in array], one.shape)
    if library("pyarrow", "minari").types.is_fixed_size_list(array.type):
        items = array.flatten()
        _check_no_nulls(source, path, items)
        return items.to_numpy(zero_copy_only=False).reshape(len(array), *one.shape)
    return array.to_numpy(zero_copy_only=False)


def _check_no_nulls(source: str, path: Path, array: Any) -> None:
    if array.null_count:
        found = f"`{field_of(path)}` has {array.null_count} rows without a value"
        raise FormatError(source, found, "Leave the field out by `fields`")
