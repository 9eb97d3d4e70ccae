"""RingBufferDataset: episodes in memory, in one preallocated tensor a field."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch

from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.fields import Fields, TensorType, as_tensor
from buffers.dataset.index import Windows
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.evictor.base import Evictor
from buffers.evictor.fifo import FIFOEvictor
from buffers.utils import format_bytes

__all__ = ["RingBufferDataset"]

_MAX_VIEWS = 8
_LARGEST_HALF = float(np.finfo(np.float16).max)


@final
class RingBufferDataset(EpisodeDataset):
    """Episodes in RAM or on a GPU; the oldest are overwritten by the newest.

    The row with step id s lies in slot `s % capacity`. An episode is contiguous but for the one that wraps:

        slot      0  1  2  3  4  5  6  7          capacity 8, episodes of 3, 4 and 3 rows: the first had
        step id   8  9  2  3  4  5  6  7          to leave, and the third wraps, in slots 7, 0 and 1

    Args:
        capacity: In steps. Memory is reserved when the fields are known, and used as it is written.
        info: What is known beforehand; with its `fields`, memory is reserved now.
        evictor: Only first in, first out is possible; the argument is there for the common signature.
        device: Where the episodes live and batches are made.
        half_precision: Store float32 as float16 (numbers up to 65,504) and give float32 back.

    Raises:
        ValueError: Another evictor than `FIFOEvictor`.
        MemoryError: The memory for `capacity` steps is not to be had.
    """

    def __init__(
        self,
        capacity: int,
        info: EpisodeDatasetInfo | None = None,
        evictor: Evictor | None = None,
        device: torch.device | str = "cpu",
        half_precision: bool = False,
    ) -> None:
        if evictor is not None and type(evictor) is not FIFOEvictor:
            raise ValueError(
                f"A RingBufferDataset overwrites its oldest rows, so it can only use FIFOEvictor, found "
                f"{type(evictor).__name__}. IndividualFileDataset takes any evictor."
            )
        self.device = torch.device(device)
        self.half_precision = bool(half_precision)
        super().__init__(capacity, info, evictor)

    def _allocate(self, fields: Fields) -> None:
        stored = {name: self._stored_type(tensor_type) for name, tensor_type in fields.items()}
        try:
            columns = {
                name: _Column(self.capacity, stored[name], self.device, stored[name].dtype != fields[name].dtype)
                for name in fields
            }
        except (MemoryError, torch.cuda.OutOfMemoryError):
            size = format_bytes(sum(tensor_type.nbytes for tensor_type in stored.values()) * self.capacity)
            raise MemoryError(
                f"A `capacity` of {self.capacity} steps needs {size} on {self.device}, which cannot be had. Lower it."
            ) from None
        self._columns = columns

    def _stored_type(self, tensor_type: TensorType) -> TensorType:
        if self.half_precision and tensor_type.dtype == torch.float32:
            return TensorType(tensor_type.shape, torch.float16)
        return tensor_type

    def _check(self, episode: dict[str, np.ndarray]) -> None:
        if not self.half_precision:
            return
        for name, rows in episode.items():
            if rows.dtype == np.float32 and (np.isfinite(rows) & (np.abs(rows) > _LARGEST_HALF)).any():
                raise ValueError(
                    f"Field `{name}` holds numbers beyond {_LARGEST_HALF:.0f}, which half_precision=True cannot store."
                )

    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        slot = start % self.capacity
        for name, rows in episode.items():
            self._columns[name].write(slot, rows)

    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> None:
        length, last_slot = windows.length, self.capacity - windows.length
        slots = windows.start % self.capacity
        wraps = slots > last_slot
        if wraps.any():
            self._read_with_wraps(slots, wraps.nonzero()[0], length, out)
            return
        places = self._on_device(slots)
        for name, tensor in out.items():
            self._columns[name].read_windows(places, length, tensor)

    def _read_with_wraps(
        self, slots: np.ndarray, wrapped: np.ndarray, length: int, out: dict[str, torch.Tensor]
    ) -> None:
        """Read all as if none wrapped, those that do from slot 0, which is then replaced by what they should be."""
        rows = self._on_device((slots[wrapped, None] + np.arange(length)) % self.capacity)
        slots[wrapped] = 0
        places, positions = self._on_device(slots), self._on_device(wrapped)
        for name, tensor in out.items():
            self._columns[name].read_windows(places, length, tensor)
            self._columns[name].read_rows(rows, positions, tensor)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    def _erase(self, episode_id: int, start: int, length: int) -> None:
        if start != self.index.starts[0]:
            raise ValueError("A RingBufferDataset can only evict its oldest episode, `episode_index`=0.")


class _Column:
    """The storage of one field: `(capacity, *shape)`.

    Args:
        capacity: In steps.
        tensor_type: What is stored.
        device: Where.
        needs_cast: Whether batches have another dtype.
    """

    def __init__(self, capacity: int, tensor_type: TensorType, device: torch.device, needs_cast: bool) -> None:
        self.capacity, self.tensor_type, self.device, self.needs_cast = capacity, tensor_type, device, needs_cast
        shape = (capacity, *tensor_type.shape)
        self.array: np.ndarray | None = None
        if device.type == "cpu":
            # numpy asks the kernel for huge pages, torch does not: 117 us against 143 us for 256 x 64 of state.
            self.array = np.empty(shape, tensor_type.numpy_dtype)
            self.tensor = as_tensor(self.array, tensor_type)
        else:
            self.tensor = torch.empty(shape, dtype=tensor_type.dtype, device=device)
        # What is gathered are words, of 8 bytes where rows of bytes allow: with two threads 423 us against 890 us for
        # 256 x 3 pixels, as torch decides by the number of elements whether to split the work.
        self.word = _word(tensor_type)
        self.rows = self._in_words(self.tensor)
        self.windows: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> tuple[Any, ...]:
        return self.capacity, self.tensor_type, self.device, self.needs_cast, self.tensor

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *arguments, tensor = state
        # The views are made anew: pickled one by one, they would be copies.
        self.__init__(*arguments)  # type: ignore[misc]
        self.tensor.copy_(tensor)

    def write(self, slot: int, rows: np.ndarray) -> None:
        """Copy rows to the slots from `slot` on, around the end if need be."""
        before_end = min(len(rows), self.capacity - slot)
        if self.array is not None:
            self.array[slot : slot + before_end] = rows[:before_end]
            if before_end < len(rows):
                self.array[: len(rows) - before_end] = rows[before_end:]
            return
        source = torch.tensor(rows) if self.tensor.dtype != torch.bfloat16 else as_tensor(rows.copy(), self.tensor_type)
        self.tensor[slot : slot + before_end].copy_(source[:before_end])
        if before_end < len(rows):
            self.tensor[: len(rows) - before_end].copy_(source[before_end:])

    def read_windows(self, slots: torch.Tensor, length: int, out: torch.Tensor) -> None:
        """Gather `out[b] = rows[slots[b] : slots[b] + length]`, none of which wraps."""
        windows = self.windows.get(length)
        if windows is None:
            windows = self._window_view(length)
        if self.needs_cast:
            out.copy_(torch.index_select(windows, 0, slots))
        elif self.word is None:
            torch.index_select(windows, 0, slots, out=out)
        else:
            torch.index_select(windows, 0, slots, out=self._in_words(out))

    def read_rows(self, slots: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Gather `out[positions[i]] = rows[slots[i]]` for slots `(num, T)`."""
        rows = self.rows.index_select(0, slots.view(-1)).view(*slots.shape, *self.rows.shape[1:])
        if self.needs_cast:
            out.index_copy_(0, positions, rows.to(out.dtype))
        else:
            self._in_words(out).index_copy_(0, positions, rows)

    def _window_view(self, length: int) -> torch.Tensor:
        """All windows that do not wrap, one a row, overlapping: `(capacity - length + 1, length, *row)`."""
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
