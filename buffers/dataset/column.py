"""Column: the storage of one field of a ring."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from buffers.dataset.fields import TensorType, as_tensor
from buffers.dataset.huge_pages import HugePages

__all__ = ["Column"]

_MAX_VIEWS = 8
# In bytes. numpy asks for huge pages from this size on; torch does not, and takes 1.2 times as long.
_HUGE = 1 << 22
# Elements from which on torch shares the work among its threads.
_GRAIN = 1 << 15


class Column:
    """The storage of one field: `(capacity, *shape)`.

    Args:
        capacity: In steps.
        tensor_type: What is stored.
        device: Where.
        array: The memory, if it is not on a GPU: `(capacity, *shape)`.
        batch_dtype: dtype of what is read.
        pages: What the memory lies in, if they shall be huge.
    """

    def __init__(
        self,
        capacity: int,
        tensor_type: TensorType,
        device: torch.device,
        array: np.ndarray | None,
        batch_dtype: torch.dtype,
        pages: HugePages | None = None,
    ) -> None:
        self.capacity, self.tensor_type, self.array = capacity, tensor_type, array
        self.batch_dtype, self.needs_cast = batch_dtype, batch_dtype != tensor_type.dtype
        # Rows from `_paged` on lie in pages that are still to be made.
        self._pages, self._paged = pages, capacity if pages is None else 0
        if array is not None:
            self.tensor = as_tensor(array, tensor_type)
        else:
            self.tensor = torch.empty((capacity, *tensor_type.shape), dtype=tensor_type.dtype, device=device)
        # What is gathered are words, of 8 bytes where rows of bytes allow: with two threads 423 us against 890 us for
        # 256 x 3 pixels, as torch decides by the number of elements whether to split the work.
        self.word = _word(tensor_type)
        self.rows = self._in_words(self.tensor)
        self.windows: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Views would be copied one by one, and show nothing of what is written later. Words can all be pickled.
        return {name: value for name, value in self.__dict__.items() if name not in ("tensor", "windows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.windows, self.tensor = {}, self.rows
        if self.word is not None:
            self.tensor = self.rows.view(self.tensor_type.dtype).view(self.capacity, *self.tensor_type.shape)

    @property
    def num_ready(self) -> int:
        """Rows that can be written to `array` as to any array: none on a GPU, and else all that there are pages for."""
        return 0 if self.array is None else self._paged

    def write(self, slot: int, length: int, rows: np.ndarray) -> None:
        """Copy rows, as many as `length`, to the slots from `slot` on, around the end if need be."""
        array, end = self.array, slot + length
        if array is not None and end <= self.capacity:
            if end > self._paged and self._pages is not None:
                self._paged = self._pages.reach(end)
            array[slot:end] = rows
            return
        before_end = min(length, self.capacity - slot)
        if array is not None:
            array[slot : slot + before_end] = rows[:before_end]
            array[: length - before_end] = rows[before_end:]
            return
        source = torch.tensor(rows) if self.tensor.dtype != torch.bfloat16 else as_tensor(rows.copy(), self.tensor_type)
        self.tensor[slot : slot + before_end].copy_(source[:before_end])
        if before_end < len(rows):
            self.tensor[: len(rows) - before_end].copy_(source[before_end:])

    def take(self, other: Column, slots: torch.Tensor) -> None:
        """Copy the rows in some slots of another column of the same kind."""
        self.rows[slots] = other.rows[slots]
        # There are pages for them now, if small ones.
        self._paged = other._paged

    def read_windows(self, slots: torch.Tensor, length: int, out: torch.Tensor) -> None:
        """Gather `out[b] = rows[slots[b] : slots[b] + length]`, none of which wraps."""
        windows = self._windows(length)
        if self.needs_cast:
            out.copy_(torch.index_select(windows, 0, slots))
        elif self.word is None:
            torch.index_select(windows, 0, slots, out=out)
        else:
            torch.index_select(windows, 0, slots, out=self._in_words(out))

    def shares_work(self, num: int, length: int) -> bool:
        """Whether torch's threads, where there are several, would share the work of reading `num` windows."""
        return num * length * math.prod(self.rows.shape[1:]) > _GRAIN

    def item_reader(self, num: int, length: int) -> Callable[[np.ndarray], torch.Tensor]:
        """The quickest way to `num` windows in new memory, on a CPU and for one thread.

        To numpy, windows are opaque items here, each copied by one `memcpy`; torch goes through them by its own loops.
        For large batches there is no difference but that torch lets Python's other threads go on meanwhile.

        Returns:
            A function from slots `(num,)` to a tensor `(num, length, *shape)`.
        """
        assert self.array is not None  # It is on a CPU.
        row_bytes = self.tensor_type.nbytes
        if self.needs_cast or row_bytes == 0 or num * length * row_bytes >= _HUGE:
            read = self.reader(num, length)
            return lambda slots: read(torch.from_numpy(slots))
        item = np.dtype((np.void, length * row_bytes))
        items = np.ndarray((self.capacity - length + 1,), item, self.array, 0, (row_bytes,))
        # Items that do not overlap can be taken, which is quicker still.
        pick = items.take if length == 1 else items.__getitem__
        shape, dtype = (num, length, *self.tensor_type.shape), self.tensor_type.numpy_dtype
        if self.tensor_type.dtype == torch.bfloat16:
            return lambda slots: torch.from_numpy(np.ndarray(shape, np.int16, pick(slots))).view(torch.bfloat16)
        return lambda slots: torch.from_numpy(np.ndarray(shape, dtype, pick(slots)))

    def reader(self, num: int, length: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The quickest way to `num` windows in new memory, on a GPU or for several threads.

        Returns:
            A function from slots `(num,)` to a tensor `(num, length, *shape)`.
        """
        if self.array is not None and not self.needs_cast and num * length * self.tensor_type.nbytes >= _HUGE:
            return partial(self._fill_huge_pages, length)
        windows = self._windows(length)
        is_plain = self.word is None and not self.needs_cast
        return partial(torch.index_select, windows, 0) if is_plain else partial(self._convert, windows)

    def _fill_huge_pages(self, length: int, slots: torch.Tensor) -> torch.Tensor:
        shape = (len(slots), length, *self.tensor_type.shape)
        out = as_tensor(np.empty(shape, self.tensor_type.numpy_dtype), self.tensor_type)
        self.read_windows(slots, length, out)
        return out

    def _convert(self, windows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        out = torch.index_select(windows, 0, slots)
        if self.word is not None:
            out = out.view(self.tensor_type.dtype).view(*out.shape[:2], *self.tensor_type.shape)
        return out.to(self.batch_dtype)

    def read_rows(self, slots: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Gather `out[positions[i]] = rows[slots[i]]` for slots `(num, T)`."""
        rows = self.rows.index_select(0, slots.view(-1)).view(*slots.shape, *self.rows.shape[1:])
        if self.needs_cast:
            out.index_copy_(0, positions, rows.to(out.dtype))
        else:
            self._in_words(out).index_copy_(0, positions, rows)

    def _windows(self, length: int) -> torch.Tensor:
        """All windows that do not wrap, one a row, overlapping: `(capacity - length + 1, length, *row)`."""
        view = self.windows.get(length)
        if view is not None:
            return view
        if len(self.windows) == _MAX_VIEWS:
            self.windows.clear()
        num_windows = self.capacity - length + 1
        stride = self.rows.stride()
        view = self.rows.as_strided((num_windows, length, *self.rows.shape[1:]), (stride[0], *stride))
        self.windows[length] = view
        return view

    def _in_words(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor `(..., *shape)` as words `(..., n)`, or as it is where its own elements serve."""
        if self.word is None:
            return tensor
        num_leading_axes = tensor.dim() - len(self.tensor_type.shape)
        return tensor.view(*tensor.shape[:num_leading_axes], -1).view(self.word)


def _word(tensor_type: TensorType) -> torch.dtype | None:
    """The integers that rows are moved as; None for the elements themselves."""
    if tensor_type.dtype.itemsize == 1 and tensor_type.nbytes % 8 == 0 and tensor_type.nbytes > 0:
        return torch.int64
    # torch has these dtypes without the gather.
    return {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(tensor_type.dtype)
