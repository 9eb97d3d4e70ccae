"""Column: the storage of one field of a ring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch

from buffers.fields import TensorType, as_tensor
from buffers.sharing.arrays import SharedArrays

__all__ = ["Column", "gather_windows"]

_MAX_VIEWS = 8
# From so many bytes of a batch on, torch gathers: it releases the GIL.
_LARGE = 1 << 22
# From so many elements on, torch shares the work among its threads.
_GRAIN = 1 << 15


class Column:
    """The storage of one field: `(capacity, *shape)` of type `stored`, read as `dtype`.

    On a CPU it is the array `name` of `memory`.
    """

    def __init__(
        self,
        name: str,
        stored: TensorType,
        dtype: torch.dtype,
        capacity: int,
        device: torch.device,
        memory: SharedArrays | None,
    ) -> None:
        self.capacity, self.stored = capacity, stored
        self._read_as, self._needs_cast = TensorType(stored.shape, dtype), dtype != stored.dtype
        self.array, self._pages, self._word = None, None, _word(stored)
        # What is made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            if memory is None:
                self.tensor = torch.empty((capacity, *stored.shape), dtype=stored.dtype, device=device)
            else:
                self.array, self._pages = memory[name], memory.huge_pages(name)
                self.tensor = as_tensor(self.array, stored)
            self._rows = self._in_words(self.tensor)
        self._num_paged = 0  # Rows before this one need no more huge pages.
        self._views: dict[int, torch.Tensor] = {}

    def write(self, offset: int, rows: np.ndarray) -> None:
        """Copy rows `(L, *shape)` to the offsets from `offset` on."""
        memory = self.memory(offset, len(rows))
        if memory is not None:
            memory[...] = rows
            return
        self.tensor[offset : offset + len(rows)].copy_(as_tensor(rows.astype(self.stored.numpy_dtype), self.stored))

    def memory(self, offset: int, num_rows: int) -> np.ndarray | None:
        """The memory of rows, `(num_rows, *shape)`, to be read or filled; None on a GPU."""
        end, array = offset + num_rows, self.array
        if array is None:
            return None
        if self._pages is not None and end > self._num_paged:
            self._num_paged = self._pages.reach(end)
        return array[offset:end]

    def gather(self, offsets: torch.Tensor, length: int, out: torch.Tensor) -> None:
        """Copy `out[b] = rows[offsets[b] : offsets[b] + length]`, for offsets `(B,)` up to capacity - length."""
        windows = self._windows(length)
        if self._needs_cast:
            out.copy_(torch.index_select(windows, 0, offsets))
        else:
            torch.index_select(windows, 0, offsets, out=self._in_words(out))

    def gather_rows(self, offsets: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Copy `out[positions[i], t] = rows[offsets[i, t]]`, for offsets `(n, T)`."""
        rows = self._rows.index_select(0, offsets.view(-1)).view(*offsets.shape, *self._rows.shape[1:])
        if self._needs_cast:
            out.index_copy_(0, positions, rows.to(out.dtype))
        else:
            self._in_words(out).index_copy_(0, positions, rows)

    def items(self, num: int, length: int) -> Callable[[np.ndarray], torch.Tensor] | None:
        """A function from offsets `(num,)` to rows `(num, T, *shape)`; None where torch's threads share the work.

        numpy sees a window as one opaque item, copied by one `memcpy`, where torch copies its elements. IndexError if
        fewer than T rows follow an offset.
        """
        row_bytes, num_rows = self.stored.nbytes, num * length
        can_share = torch.get_num_threads() > 1 and num_rows * math.prod(self._rows.shape[1:]) > _GRAIN
        if self.array is None or can_share or length > self.capacity:
            return None
        if not row_bytes:
            empty = np.empty((num, length, *self.stored.shape), self._read_as.numpy_dtype)
            return lambda offsets: as_tensor(empty.copy(), self._read_as)
        if self._needs_cast or num_rows * row_bytes >= _LARGE:
            return partial(self._gathered, length)
        items = self.runs(length)
        # `take` is faster, but needs items that do not overlap.
        pick = items.take if length == 1 else items.__getitem__
        shape, dtype = (num, length, *self.stored.shape), self.stored.numpy_dtype
        if self.stored.dtype == torch.bfloat16:
            return lambda offsets: torch.from_numpy(np.ndarray(shape, np.int16, pick(offsets))).view(torch.bfloat16)
        return lambda offsets: torch.from_numpy(np.ndarray(shape, dtype, pick(offsets)))

    def runs(self, length: int) -> np.ndarray:
        """A view of all runs of T rows on the CPU as opaque items, which overlap: `(capacity - T + 1,)`."""
        row_bytes = self.stored.nbytes
        item = np.dtype((np.void, length * row_bytes))
        return np.ndarray((self.capacity - length + 1,), item, self.array, 0, (row_bytes,))

    def _gathered(self, length: int, offsets: np.ndarray) -> torch.Tensor:
        shape = (len(offsets), length, *self.stored.shape)
        # numpy asks for huge pages, unlike torch.
        out = as_tensor(np.empty(shape, self._read_as.numpy_dtype), self._read_as)
        self.gather(torch.from_numpy(offsets), length, out)
        return out

    def _windows(self, length: int) -> torch.Tensor:
        """A view of all windows, which overlap: `(capacity - T + 1, T, *row)`."""
        view = self._views.get(length)
        if view is None:
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            stride, num_windows = self._rows.stride(), self.capacity - length + 1
            view = self._rows.as_strided((num_windows, length, *self._rows.shape[1:]), (stride[0], *stride))
            self._views[length] = view
        return view

    def _in_words(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor `(..., *shape)` as words `(..., n)`, or unchanged if there is no word."""
        if self._word is None:
            return tensor
        num_leading_axes = tensor.dim() - len(self.stored.shape)
        return tensor.view(*tensor.shape[:num_leading_axes], -1).view(self._word)


def gather_windows(columns: Iterable[tuple[Column, torch.Tensor]], offsets: np.ndarray, length: int) -> None:
    """Copy the windows of T = `length` rows from `offsets` `(B,)` on into `out` `(B, T, *shape)`, for pairs with it.

    After the last row of a column comes its first.
    """
    for column, out in columns:
        last = column.capacity - length
        # Padding may reach beyond the end: read those windows row by row.
        late = (offsets > last).nonzero()[0]
        if last >= 0:
            column.gather(_on_device(np.minimum(offsets, last) if len(late) else offsets, column), length, out)
        if len(late):
            rows = (offsets[late, None] + np.arange(length)) % column.capacity
            column.gather_rows(_on_device(rows, column), _on_device(late, column), out)


def _on_device(array: np.ndarray, column: Column) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor if column.tensor.device.type == "cpu" else tensor.to(column.tensor.device)


def _word(stored: TensorType) -> torch.dtype | None:
    """The integer dtype that rows are copied as; None for their own."""
    # Fewer, larger elements are copied faster.
    if stored.dtype.itemsize == 1 and stored.nbytes % 8 == 0 and stored.nbytes > 0:
        return torch.int64
    # torch cannot gather these dtypes.
    return {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(stored.dtype)
