"""Column: the storage of one field of a ring."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from buffers.fields import TensorType, as_tensor
from buffers.sharing.huge_pages import HugePages

__all__ = ["Column"]

_MAX_VIEWS = 8
# Bytes of a batch from which on the gather is torch's: it lets Python's other threads go on meanwhile.
_LARGE = 1 << 22
# Elements from which on torch shares the work among its threads.
_GRAIN = 1 << 15


class Column:
    """The storage of one field: `(capacity, *shape)` of type `stored`, read as `dtype`.

    Off the GPU, `array` is its memory, with `pages` if they shall be huge.
    """

    def __init__(
        self,
        capacity: int,
        stored: TensorType,
        dtype: torch.dtype,
        device: torch.device,
        array: np.ndarray | None = None,
        pages: HugePages | None = None,
    ) -> None:
        self.capacity, self.stored, self.array = capacity, stored, array
        self._read_as, self._needs_cast = TensorType(stored.shape, dtype), dtype != stored.dtype
        # Rows from `_num_paged` on lie in pages that are still to be made.
        self._pages, self._num_paged = pages, capacity if pages is None else 0
        if array is not None:
            self.tensor = as_tensor(array, stored)
        else:
            self.tensor = torch.empty((capacity, *stored.shape), dtype=stored.dtype, device=device)
        self._word = _word(stored)
        self._rows = self._in_words(self.tensor)
        self._views: dict[int, torch.Tensor] = {}

    def write(self, place: int, rows: np.ndarray) -> None:
        """Copy rows `(L, *shape)` to the places from `place` on."""
        end, array = place + len(rows), self.array
        if array is not None:
            if end > self._num_paged and self._pages is not None:
                self._num_paged = self._pages.reach(end)
            array[place:end] = rows
            return
        # torch reads no opaque items, which is what bfloat16 is to numpy.
        is_opaque = self.tensor.dtype == torch.bfloat16
        self.tensor[place:end].copy_(as_tensor(rows.copy(), self.stored) if is_opaque else torch.tensor(rows))

    def copy_from(self, other: Column, begin: int, end: int) -> None:
        """Copy the rows at the places [begin, end) of another column of the same kind."""
        self._rows[begin:end] = other._rows[begin:end]
        # There are pages for them now, if small ones.
        self._num_paged = other._num_paged

    def gather(self, places: torch.Tensor, length: int, out: torch.Tensor) -> None:
        """Copy `out[b] = rows[places[b] : places[b] + length]`, for places `(B,)` with so many rows behind them."""
        windows = self._windows(length)
        if self._needs_cast:
            out.copy_(torch.index_select(windows, 0, places))
        else:
            torch.index_select(windows, 0, places, out=self._in_words(out))

    def gather_rows(self, places: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Copy `out[positions[i], t] = rows[places[i, t]]`, for places `(n, T)`."""
        rows = self._rows.index_select(0, places.view(-1)).view(*places.shape, *self._rows.shape[1:])
        if self._needs_cast:
            out.index_copy_(0, positions, rows.to(out.dtype))
        else:
            self._in_words(out).index_copy_(0, positions, rows)

    def items(self, num: int, length: int) -> Callable[[np.ndarray], torch.Tensor] | None:
        """A gather for one thread, from places `(num,)` to `(num, T, *shape)`; None where torch's threads share it.

        To numpy, windows are opaque items, each copied by one `memcpy`; torch goes through their elements. An
        IndexError says that there are fewer than T rows behind a place.
        """
        row_bytes, num_rows = self.stored.nbytes, num * length
        can_share = torch.get_num_threads() > 1 and num_rows * math.prod(self._rows.shape[1:]) > _GRAIN
        if self.array is None or can_share:
            return None
        if self._needs_cast or not row_bytes or num_rows * row_bytes >= _LARGE:
            return partial(self._gathered, length)
        item = np.dtype((np.void, length * row_bytes))
        items = np.ndarray((self.capacity - length + 1,), item, self.array, 0, (row_bytes,))
        # Items that do not overlap can be taken, which is faster still.
        pick = items.take if length == 1 else items.__getitem__
        shape, dtype = (num, length, *self.stored.shape), self.stored.numpy_dtype
        if self.stored.dtype == torch.bfloat16:
            return lambda places: torch.from_numpy(np.ndarray(shape, np.int16, pick(places))).view(torch.bfloat16)
        return lambda places: torch.from_numpy(np.ndarray(shape, dtype, pick(places)))

    def _gathered(self, length: int, places: np.ndarray) -> torch.Tensor:
        shape = (len(places), length, *self.stored.shape)
        # numpy asks for huge pages, unlike torch.
        out = as_tensor(np.empty(shape, self._read_as.numpy_dtype), self._read_as)
        self.gather(torch.from_numpy(places), length, out)
        return out

    def _windows(self, length: int) -> torch.Tensor:
        """All windows, one a row, overlapping: `(capacity - T + 1, T, *row)`."""
        view = self._views.get(length)
        if view is None:
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            stride, num_windows = self._rows.stride(), self.capacity - length + 1
            view = self._rows.as_strided((num_windows, length, *self._rows.shape[1:]), (stride[0], *stride))
            self._views[length] = view
        return view

    def _in_words(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor `(..., *shape)` as words `(..., n)`, or as it is where its own elements serve."""
        if self._word is None:
            return tensor
        num_leading_axes = tensor.dim() - len(self.stored.shape)
        return tensor.view(*tensor.shape[:num_leading_axes], -1).view(self._word)


def _word(stored: TensorType) -> torch.dtype | None:
    """The integers that rows are moved as; None for the elements themselves."""
    # torch shares work by the number of elements: there are fewer, larger ones where the bytes of a row allow.
    if stored.dtype.itemsize == 1 and stored.nbytes % 8 == 0 and stored.nbytes > 0:
        return torch.int64
    # torch has these dtypes without the gather.
    return {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(stored.dtype)
