"""RingRows: the rows of a ring, a column a field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from buffers.fields import TensorType
from buffers.sharing import SharedArrays
from buffers.sharing.column import Column, gather_windows

__all__ = ["ItemGathers", "Kind", "RingRows"]

_MAX_SIZES = 8

# For batches of one size, a function from offsets to the rows of each field; empty where `gather` is faster.
ItemGathers = dict[str, Callable[[np.ndarray], torch.Tensor]]


class Kind(NamedTuple):
    """What a field is stored as, and read as."""

    stored: TensorType
    dtype: torch.dtype


class RingRows:
    """Rows of fields by their offsets in the ring.

    Args:
        kinds: By field.
        capacity: Rows.
        device: Where they are.
        memory: Holds them if that is the CPU, by the names of `layout`.
    """

    def __init__(
        self, kinds: Mapping[str, Kind], capacity: int, device: torch.device, memory: SharedArrays | None
    ) -> None:
        self.columns = {
            name: Column(f"rows/{name}", kind.stored, kind.dtype, capacity, device, memory)
            for name, kind in kinds.items()
        }
        self._gathers: dict[tuple[int, int, int], ItemGathers] = {}

    @staticmethod
    def layout(kinds: Mapping[str, Kind], capacity: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Of the memory."""
        return {
            f"rows/{name}": ((capacity, *kind.stored.shape), kind.stored.numpy_dtype) for name, kind in kinds.items()
        }

    def write(self, offset: int, episode: Mapping[str, np.ndarray]) -> None:
        """Copy an episode `name -> (L, *shape)` to the offsets from `offset` on."""
        for name, column in self.columns.items():
            column.write(offset, episode[name])

    def memory(self, offset: int, num_rows: int) -> dict[str, np.ndarray]:
        """The memory of rows, `name -> (num_rows, *shape)`; empty on a GPU."""
        found = {name: column.memory(offset, num_rows) for name, column in self.columns.items()}
        return {name: rows for name, rows in found.items() if rows is not None}

    def gather(self, offsets: np.ndarray, length: int, out: Mapping[str, torch.Tensor]) -> None:
        """Copy the windows of T = `length` rows from `offsets` `(B,)` on into `name -> (B, T, *shape)`."""
        gather_windows([(self.columns[name], tensor) for name, tensor in out.items()], offsets, length)

    def item_gathers(self, num: int, length: int) -> ItemGathers:
        """Functions from `num` offsets to windows of so many rows, of all fields; empty where `gather` is faster."""
        size = (num, length, torch.get_num_threads())
        gathers = self._gathers.get(size)
        return self._find_gathers(size) if gathers is None else gathers

    def _find_gathers(self, size: tuple[int, int, int]) -> ItemGathers:
        found = {name: column.items(*size[:2]) for name, column in self.columns.items()}
        # All fields or none: a batch made partly by numpy and partly by torch's threads takes longer than either.
        gathers = {name: gather for name, gather in found.items() if gather is not None}
        if len(self._gathers) == _MAX_SIZES:
            self._gathers.clear()
        self._gathers[size] = gathers if len(gathers) == len(found) else {}
        return self._gathers[size]
