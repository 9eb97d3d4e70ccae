"""LateField: the values of one late field, which one process writes and others read.

A row of several words cannot be written at once. It has a version, which is odd while it is being written:

    the writer              a reader
    1. version 4 -> 5       1. load the versions
    2. write the row        2. copy the rows
    3. version 5 -> 6       3. load the versions again: rows whose version was odd, or has changed, are copied again

A row of one number needs none: a processor stores and loads it at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from buffers.conversion import as_array, cast_if_kept
from buffers.fields import TensorType, as_tensor
from buffers.late.changes import ChangedBlocks
from buffers.sharing import SharedArrays, fence, store_fence
from buffers.sharing.column import Column, gather_windows
from buffers.table import Int64Array, Windows

__all__ = ["LateField", "PADDING", "checked_default"]

#: The step id of padding.
PADDING = -1

# Of one field, where step ids may lie far apart: address space, of which only rows that are written take memory.
_SPARSE_BYTES, _SPARSE_ROWS = 2**37, 2**32
_SECONDS_TO_WAIT, _PAUSE = 10.0, 0.0001
_MAX_VIEWS = 8
_UNSHARED = ("memory", "column", "_views", "changed")


class LateField:
    """Values `(num_rows, *shape)`; those of the step with id s are in row `s % num_rows`.

    Args:
        name: Of the field, for errors.
        kind: Type of a row.
        default: A number, or a row `(*shape)`: what rows hold until they are given values.
        capacity: Of the dataset, in steps.
        is_circular: Whether step ids lie within `capacity` of each other. If not, only the address space bounds them.
        device: Where values are kept.
    """

    #: Arrays in shared memory besides the values.
    extra: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    #: What was written since it was last kept on disk; None if it is not kept.
    changed: ChangedBlocks | None = None

    def __init__(
        self, name: str, kind: TensorType, default: Any, capacity: int, is_circular: bool, device: torch.device
    ) -> None:
        self.name, self.kind, self.device, self.is_circular = name, kind, device, is_circular
        self.default = checked_default(name, kind, default)
        is_sparse = not is_circular and sys.platform == "linux"
        self.num_rows = capacity if is_circular else 2 * capacity
        if is_sparse:
            self.num_rows = max(self.num_rows, min(_SPARSE_ROWS, _SPARSE_BYTES // max(1, kind.nbytes)))
        memory = None
        if device.type == "cpu":
            layout = {"values": ((self.num_rows, *kind.shape), kind.numpy_dtype), **self.extra}
            if kind.shape or kind.dtype.is_complex:
                layout["versions"] = ((self.num_rows,), np.dtype(np.int32))
            memory = SharedArrays(layout, sparse=True)
        self._open(memory)
        # Nothing was written, so pages that were never used hold 0.
        self._is_zero = not self.default.tobytes().strip(b"\0")

    def _open(self, memory: SharedArrays | None) -> None:
        self.memory = memory
        self.column = Column("values", self.kind, self.kind.dtype, self.num_rows, self.device, memory)
        self._versions: np.ndarray | None = None if memory is None else memory.get("versions")
        self._views: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A handle; on a GPU, the values."""
        state = {name: value for name, value in self.__dict__.items() if name not in _UNSHARED}
        state["_versions"] = None
        state["memory"] = None if self.memory is None else self.memory.__getstate__()
        state["tensor"] = self.column.tensor if self.memory is None else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        memory, tensor = state.pop("memory"), state.pop("tensor")
        self.__dict__.update(state)
        self._open(None if memory is None else SharedArrays.opened(memory))
        if tensor is not None:
            self.column.tensor.copy_(tensor)

    # Writing.

    def checked(self, value: Any, ids: Int64Array) -> Any:
        """Values for step ids as an array, or a tensor on a GPU, `(*ids.shape, *kind.shape)` of the field's dtype."""
        kind, expected = self.kind, (*ids.shape, *self.kind.shape)
        if isinstance(value, torch.Tensor) and value.dtype != kind.dtype and torch.can_cast(value.dtype, kind.dtype):
            value = value.detach().to(kind.dtype)
        if self.device.type != "cpu" and isinstance(value, torch.Tensor):
            found: Any = value.detach().to(self.device)
            dtype = value.dtype
        else:
            found = cast_if_kept(as_array(self.name, value), kind.numpy_dtype)
            dtype = found.dtype
        if tuple(found.shape) != expected or dtype not in (kind.dtype, kind.numpy_dtype):
            raise ValueError(
                f"Late field `{self.name}` takes values {kind.dtype} {expected}, found {dtype} {tuple(found.shape)}."
            )
        return found if isinstance(found, torch.Tensor) else np.ascontiguousarray(found)

    def write(self, starts: Int64Array, values: Any) -> None:
        """Write rows `(n, T, *shape)` of the runs of step ids that begin at `starts` `(n,)`."""
        num, length = values.shape[:2]
        if not num or not self.kind.nbytes:
            return
        if self.changed is not None:
            self.changed.mark(starts)
        offsets = starts % self.num_rows
        if self.memory is None:
            rows = torch.from_numpy(offsets[:, None] + np.arange(length)).view(-1).to(self.device)
            values = values if isinstance(values, torch.Tensor) else as_tensor(values, self.kind).to(self.device)
            self.column.tensor.index_copy_(0, rows % self.num_rows, values.view(num * length, *self.kind.shape))
            return
        if length > 1 and offsets.max() > self.num_rows - length:
            offsets = ((offsets[:, None] + np.arange(length)) % self.num_rows).ravel()
            num, length = num * length, 1
        item = np.dtype((np.void, length * self.kind.nbytes))
        rows = np.ndarray((num,), item, values)
        if self._versions is None:
            self._items(length)[offsets] = rows
            return
        versions = (offsets[:, None] + np.arange(length)).ravel()
        odd = self._versions[versions] | 1
        try:
            self._versions[versions] = odd
            store_fence()
            self._items(length)[offsets] = rows
            store_fence()
        finally:
            self._versions[versions] = odd + 1

    def note(self, episode_ids: Int64Array, steps: Int64Array, num: int | Int64Array) -> None:
        """Tell readers that `num` rows from `steps` `(n,)` on of episodes `(n,)` have been written."""

    def note_all(self) -> None:
        """Tell readers that any row may have been written."""

    def fill(self, start: int, length: int) -> None:
        """Give new rows the default, before anyone reads them."""
        if self._is_zero and not self.is_circular:
            return
        begin = start % self.num_rows
        end = begin + length
        for piece in (slice(begin, end), slice(0, max(0, end - self.num_rows))):
            if self.memory is None:
                self.column.tensor[piece] = as_tensor(np.array(self.new_value), self.kind).to(self.device)
            else:
                assert self.column.array is not None  # It is in shared memory.
                self.column.array[piece] = self.new_value

    @property
    def new_value(self) -> Any:
        """What new rows hold."""
        return self.default

    def release(self, begin: int, end: int) -> None:
        """Give back the memory of step ids that have left."""
        if self.memory is not None and not self.is_circular and begin < end:
            first = begin % self.num_rows
            for name in ("values", "versions"):
                if name in self.memory and self.memory[name].size:
                    self.memory.release(name, first, min(first + end - begin, self.num_rows))

    # Reading.

    def read(self, windows: Windows, out: torch.Tensor) -> None:
        """Copy the rows of windows into `out` `(B, T, *shape)`; those of padding are anything."""
        if not self.kind.nbytes:
            return
        if self._versions is None:
            self._gather(windows.start, windows.length, out)
            return
        rows = ((windows.start[:, None] + np.arange(windows.length)) % self.num_rows).ravel()
        torn = self._torn(rows, lambda: self._gather(windows.start, windows.length, out))
        if len(torn):
            self._read_again(rows, torn, out.view(-1, *self.kind.shape))

    def _read_again(self, rows: Int64Array, torn: Int64Array, out: torch.Tensor) -> None:
        """Copy `out[i] = values[rows[i]]` for i in `torn`, until each is whole."""
        array, deadline = self.column.array, time.monotonic() + _SECONDS_TO_WAIT
        assert array is not None  # On a GPU, rows have no versions.

        def copy() -> None:
            out[torch.from_numpy(torn)] = as_tensor(array[rows[torn]], self.kind)

        while True:
            torn = torn[self._torn(rows[torn], copy)]
            if not len(torn):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"A row of late field `{self.name}` stays half written: its writer was killed.")
            time.sleep(_PAUSE)

    def _torn(self, rows: Int64Array, copy: Callable[[], None]) -> Int64Array:
        """Copy rows `(n,)`; returns which of them were being written meanwhile."""
        assert self._versions is not None  # Others are read at once.
        before = self._versions.take(rows)
        fence()
        copy()
        fence()
        return ((before & 1 == 1) | (self._versions.take(rows) != before)).nonzero()[0]

    def _gather(self, starts: Int64Array, length: int, out: torch.Tensor) -> None:
        gather_windows([(self.column, out)], starts % self.num_rows, length)

    def rows(self, steps: Int64Array) -> torch.Tensor:
        """A copy of the rows `(n, *shape)` of step ids `(n,)`, on the device of the field."""
        out = torch.empty((len(steps), 1, *self.kind.shape), dtype=self.kind.dtype, device=self.device)
        self.read(Windows(1, steps, steps, steps, steps), out)
        return out[:, 0]

    def windows(self, starts: Int64Array, length: int) -> np.ndarray:
        """A copy of the rows `(n, T)` from each of `starts` `(n,)` on, of a field of one number a row."""
        offsets, last = starts % self.num_rows, self.num_rows - length
        assert self.column.array is not None  # It is in shared memory.
        if last < 0:
            return self.column.array.take(offsets[:, None] + np.arange(length), mode="wrap")
        if np.maximum.reduce(offsets, initial=0) <= last:
            return np.ndarray((len(starts), length), self.kind.numpy_dtype, self._items(length)[offsets])
        found = self._items(length)[np.minimum(offsets, last)]
        rows, late = np.ndarray((len(starts), length), self.kind.numpy_dtype, found), (offsets > last).nonzero()[0]
        rows[late] = self.column.array.take(offsets[late, None] + np.arange(length), mode="wrap")
        return rows

    def _items(self, length: int) -> np.ndarray:
        """`Column.runs`, kept for the next time."""
        view = self._views.get(length)
        if view is None:
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            view = self._views[length] = self.column.runs(length)
        return view


def checked_default(name: str, kind: TensorType, default: Any) -> np.ndarray:
    """The default as an array `(*shape)`."""
    value = torch.from_numpy(as_array(name, default)) if not isinstance(default, torch.Tensor) else default
    is_number = isinstance(default, int | float) or torch.can_cast(value.dtype, kind.dtype)
    if tuple(value.shape) not in ((), kind.shape) or not is_number:
        found = f"{value.dtype} {tuple(value.shape)}"
        raise ValueError(f"The default of late field `{name}` must be a number or {kind}, found {found}.")
    return np.array(np.broadcast_to(as_array(name, value.to(kind.dtype)), kind.shape))
