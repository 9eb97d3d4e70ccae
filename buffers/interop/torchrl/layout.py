"""Which rows of a storage hold data, in which order they were written, and which of them make an episode."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from buffers.interop.base import FormatError
from buffers.interop.torchrl.memmaps import META, Column, Key, MemoryMapped, read_json
from buffers.utils import integer, one_of

__all__ = ["Located", "MASK_KEY", "Options", "StoredRows", "TRAJ_KEY", "by_row", "flags_of", "key_of", "locate"]

TRAJ_KEY, MASK_KEY = "collector/traj_ids", "collector/mask"
_STORAGE_META, _WRITER_META = "storage_metadata.json", "metadata.json"
_WHOLE = "Save the buffer again with `dumps`, while nothing is added"


@dataclass(frozen=True)
class Options:
    """What a user says of a source that it does not say itself; see `read`."""

    num_envs: int | None = None
    ndim: int | None = None
    time_axis: int | None = None
    num_rows: int | None = None
    observations: Sequence[str] | None = None
    traj_key: str | None = TRAJ_KEY
    mask_key: str | None = MASK_KEY
    gaps: Literal["refuse", "split"] = "refuse"
    repeats: Literal["drop", "keep"] | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_envs", 1), ("ndim", 1), ("time_axis", 0), ("num_rows", 1)):
            value = getattr(self, name)
            if value is not None:
                integer(name, value, least)
        if isinstance(self.observations, str) or not all(isinstance(name, str) for name in self.observations or ()):
            raise TypeError(f"`observations` must be a sequence of names, found {self.observations!r:.60}.")
        one_of("gaps", self.gaps, ["refuse", "split"])
        if self.repeats is not None:
            one_of("repeats", self.repeats, ["drop", "keep"])


def key_of(name: str) -> Key:
    """The key that a name with "/" stands for."""
    return tuple(name.split("/"))


def flags_of(columns: MemoryMapped, column: Column) -> np.ndarray:
    """Flags by flat row, from bools or numbers of the shape of the batch, or with one more axis of size 1."""
    return by_row(columns, column) != 0


def by_row(columns: MemoryMapped, column: Column) -> np.ndarray:
    """One value for each flat row."""
    if column.shape not in (columns.batch, (*columns.batch, 1)):
        found = f"`{column.name}` has the shape {column.shape}, expected {(*columns.batch, 1)}"
        raise FormatError(columns.source, found, "Name another column, or save one value for each row")
    return columns.flat_rows(column).reshape(-1)


@dataclass(frozen=True)
class Located:
    """Where the rows are, and what the storage and its writer say."""

    path: str
    storage: dict[str, Any] | None = None
    writer: dict[str, Any] | None = None


def locate(source: str) -> Located:
    """The rows of what `dumps` has written, of its `storage` alone, or of a plain TensorDict."""
    if not os.path.lexists(source):
        raise FormatError(source, "It is not there", "Check the path")
    if not os.path.isdir(source):
        raise FormatError(source, "It is no directory", "Give the directory that `dumps` or `memmap` has written")
    inner = os.path.join(source, "storage")
    if os.path.isdir(inner) and not os.path.exists(os.path.join(source, META)):
        writer = os.path.join(source, "writer", _WRITER_META)
        if os.path.isdir(os.path.join(inner, "0")) and os.path.isdir(os.path.join(source, "writer", "0")):
            advice = "Import each by itself, saved by its own `dumps`"
            raise FormatError(source, "It is an ensemble of buffers", advice)
        if not os.path.exists(os.path.join(inner, _STORAGE_META)):
            raise FormatError(source, f"storage/{_STORAGE_META} is not there: a save that was not finished", _WHOLE)
        storage = read_json(source, os.path.join(inner, _STORAGE_META))
        _check_storage(source, inner, storage)
        return Located(inner, storage, read_json(source, writer) if os.path.exists(writer) else None)
    if os.path.exists(os.path.join(source, _STORAGE_META)):
        storage = read_json(source, os.path.join(source, _STORAGE_META))
        _check_storage(source, source, storage)
        return Located(source, storage)
    return Located(source)


def _check_storage(source: str, path: str, storage: dict[str, Any]) -> None:
    if storage.get("is_pytree"):
        raise FormatError(source, "It is a storage of plain dicts or tensors", "Save a buffer of TensorDicts")
    if "_storage_shape" in read_json(source, os.path.join(path, META)):
        found = "It was saved by a checkpointer that leaves out next observations"
        raise FormatError(source, found, "Save it with the storage's default checkpointer")


@dataclass
class StoredRows:
    """The rows of the first axis that hold data, oldest first.

    A full storage is written again from its beginning. With room for 6 rows, after 8 of them:

        row of the file    0  1  2  3  4  5
        step               6  7  2  3  4  5      the cursor is 2

    Attributes:
        first_axis: Indices of the first axis, oldest first.
        ndim: Axes of the storage that are rows; None for a plain TensorDict.
        is_plain: Whether it is a plain TensorDict.
        num_before: How many rows were written before the oldest that is left; None if that is not known.
        has_lost_rows: Whether there were any.
    """

    first_axis: np.ndarray
    ndim: int | None = None
    is_plain: bool = False
    num_before: int | None = 0
    has_lost_rows: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, columns: MemoryMapped, located: Located, options: Options) -> StoredRows:
        """Those of a source; FormatError if it does not say, or contradicts itself."""
        if not columns.batch:
            raise FormatError(columns.source, "It has no axis of rows", "Save a TensorDict with a batch size")
        if not columns.columns or 0 in columns.batch:
            raise FormatError(columns.source, "It has no rows", "Import a source with rows")
        if located.storage is None:
            return cls(np.arange(_plain_rows(columns, options)), None, True)
        return _of_storage(columns, located, options)


def _plain_rows(columns: MemoryMapped, options: Options) -> int:
    """Rows of a TensorDict, whose last one must not be all zeros: no file says how many were written."""
    size = columns.batch[0]
    if options.num_rows is not None:
        if options.num_rows > size:
            raise ValueError(f"`num_rows` is {options.num_rows}, and {columns.source} has {size} rows.")
        return options.num_rows
    last = columns.num_rows - columns.num_rows // size  # Of all axes but the first.
    if not any(np.any(columns.flat_rows(column)[last:]) for column in columns.columns.values()):
        found = "The last row is zero in every column, as in the `scratch_dir` of a storage that is not full"
        raise FormatError(columns.source, found, "Save the buffer with `dumps`, or give `num_rows`, those with data")
    return size


def _of_storage(columns: MemoryMapped, located: Located, options: Options) -> StoredRows:
    source, size = columns.source, columns.batch[0]
    assert located.storage is not None
    total: Any = located.storage.get("len")
    writer = located.writer or {}
    cursor, written = writer.get("cursor"), writer.get("write_count")
    if "rank_key" in writer:
        found = "The buffer keeps the rows of highest rank, in no order of time"
        raise FormatError(source, found, "Import a buffer that is written in order")
    numbers = [("len", total), *((n, writer.get(n)) for n in ("cursor", "write_count") if n in writer)]
    for name, value in numbers:
        if type(value) is not int or value < 0:
            raise FormatError(source, f"`{name}` is {value!r:.40}", _WHOLE)
    ndim, num_rows = _axes(columns, total, cursor, written, options.ndim)
    metadata = {"capacity": list(columns.batch), **writer}
    if num_rows < size:
        return StoredRows(np.arange(num_rows), ndim, metadata=metadata)
    if cursor is None:
        advice = "Give the directory above `storage`, which has the writer's cursor"
        raise FormatError(source, "The storage is full, and nothing says which row is the oldest", advice)
    if cursor >= size:
        raise FormatError(source, f"The cursor is {cursor}, and there are {size} rows", _WHOLE)
    # Writing at chosen rows counts, and does not move the cursor.
    before = None if written is None or written < size or written % size != cursor else written - size
    first_axis = np.roll(np.arange(size), -cursor)
    return StoredRows(first_axis, ndim, False, before, cursor > 0 or bool(before), metadata)


def _axes(
    columns: MemoryMapped, total: int, cursor: int | None, written: int | None, ndim: int | None
) -> tuple[int, int]:
    """(ndim, rows of the first axis). `len` counts the rows of one axis, or of several: the file does not say which."""
    batch = columns.batch
    if ndim is not None and ndim > len(batch):
        raise ValueError(f"`ndim` is {ndim}, and {columns.source} has {len(batch)} axes of rows.")
    found = []
    for axes in range(1, len(batch) + 1) if ndim is None else [ndim]:
        num_rows, rest = divmod(total, int(np.prod(batch[1:axes])))
        # The cursor is behind the last row until the storage is full.
        if not rest and num_rows <= batch[0] and (num_rows == batch[0] or cursor in (None, num_rows)):
            found.append((axes, num_rows))
    if len(found) > 1 and written is not None:
        found = [(axes, num_rows) for axes, num_rows in found if (written >= batch[0]) == (num_rows == batch[0])]
    if len(found) > 1:
        what = f"It has {total} rows, which may be of {' or '.join(str(axes) for axes, _ in found)} axes of {batch}"
        raise FormatError(columns.source, what, "Give the `ndim` of the storage")
    if not found:
        what = f"It says that it has {total} rows of {batch} and that {cursor} is written next"
        raise FormatError(columns.source, what, _WHOLE)
    return found[0]
