"""How a batch crosses from a worker to the trainer: in shared slots that are reused.

    worker                                              trainer

    finds a slot whose flag is 0, sets it to 1
    gathers into the slot
    sends slot number, offsets, shapes, strides   ->    makes tensors over the slot
                                                        drops the last of them: a finalizer sets the flag to 0

Views of the slot, such as stacks of frames that a transform has made, cross as views: no byte is copied.
A batch that the user keeps is never overwritten. If no slot is free, the batch crosses in new shared memory of its own.
So nothing waits, and nothing is taken from `/dev/shm`, which is small in containers.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from buffers.fields import Fields
from buffers.sharing import SharedArrays

__all__ = ["Slots", "forget"]

_ALIGNMENT = 64
_SLACK = 65_536  # Room for what `include` and a transform add to the fields.
_FREE, _FULL = range(2)


@dataclass(frozen=True)
class _Leaf:
    """Where a tensor lies in the memory of its batch."""

    offset: int
    num_bytes: int  # From its first item to its last.
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # In items. Views may overlap.
    dtype: torch.dtype


class Slots:
    """The worker's side: `num_slots` batches can be under way or in use at a time."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._shared: SharedArrays | None = None
        # All memory that is open here: `_shared`, and what has to stay until the trainer has mapped it.
        self._open: list[SharedArrays] = []
        # Where the current batch is assembled.
        self._current: SharedArrays | None = None
        self._slot = self._used = self._minimal_size = 0
        self._memory = np.empty(0, np.uint8)

    def begin(self, num_bytes: int) -> None:
        """Choose the memory of the next batch, whose tensors take about `num_bytes`."""
        num_bytes = max(num_bytes, self._minimal_size)
        num_bytes += num_bytes // 8 + _SLACK
        if self._current is not None:
            self._release()  # The last batch was not sent: its transform failed.
        if self._shared is None or self._shared["slots"].shape[1] < num_bytes:
            self._shared = self._make(self._num_slots, num_bytes)
        self._open = [memory for memory in self._open if memory is self._shared or (memory["flags"] == _FULL).any()]
        free = np.flatnonzero(self._shared["flags"] == _FREE)
        if len(free):
            self._use(self._shared, int(free[0]))
        else:
            self._use(self._make(1, num_bytes), 0)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in the memory of the current batch."""
        num_bytes = math.prod(shape) * dtype.itemsize
        tensor = torch.from_numpy(self._memory[self._used : self._used + num_bytes]).view(dtype).view(shape)
        self._used += _aligned(num_bytes)
        return tensor

    def empty_batch(self, fields: Fields, leading: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Memory for a batch, `name -> (B, T, *shape)`, where (B, T) are `leading` of each field."""
        self.begin(sum(_aligned(fields[name].nbytes * b * t) for name, (b, t) in leading.items()))
        return {name: self.empty(leading[name] + field.shape, field.dtype) for name, field in fields.items()}

    def pack(self, batch: Any) -> Any:
        """What is sent instead of the batch; unpickling it gives the batch."""
        assert self._current is not None  # `begin` chose it.
        self._make_room_for(batch)
        tree = tree_map_only(torch.Tensor, self._leaf, batch)
        arguments = (os.getpid(), self._current.__getstate__(), self._current is not self._shared, self._slot, tree)
        self._current = None
        return _Packed(arguments)

    def _make(self, num_slots: int, num_bytes: int) -> SharedArrays:
        uint8 = np.dtype(np.uint8)
        memory = SharedArrays({"flags": ((num_slots,), uint8), "slots": ((num_slots, _aligned(num_bytes)), uint8)})
        self._open.append(memory)
        return memory

    def _use(self, memory: SharedArrays, slot: int) -> None:
        self._current, self._slot = memory, slot
        memory["flags"][slot] = _FULL
        self._memory, self._used = memory["slots"][slot], 0

    def _release(self) -> None:
        assert self._current is not None  # `begin` chose it.
        self._current["flags"][self._slot] = _FREE

    def _make_room_for(self, batch: Any) -> None:
        """Move to new memory if a transform has made the batch too large for its slot."""
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and _can_share(leaf)]
        needed = self._used + sum(map(_bytes_to_copy, (tensor for tensor in tensors if self._offset(tensor) is None)))
        if needed > len(self._memory):
            # So the next slot has room for the fields and for what the transform makes of them.
            self._minimal_size = needed
            self._release()
            self._use(self._make(1, sum(map(_bytes_to_copy, tensors))), 0)

    def _offset(self, tensor: torch.Tensor) -> int | None:
        """Where a tensor lies in the memory of the batch; None if it lies elsewhere, or is no plain view of it."""
        offset = tensor.data_ptr() - self._memory.ctypes.data
        is_inside = offset >= 0 and offset + _num_items(tensor) * tensor.itemsize <= self._used
        return offset if is_inside and _is_plain(tensor) else None

    def _leaf(self, tensor: torch.Tensor) -> Any:
        if not _can_share(tensor):
            return tensor
        offset, shape, stride = self._offset(tensor), tuple(tensor.shape), tensor.stride()
        num_bytes = _num_items(tensor) * tensor.itemsize
        if offset is None:
            offset, source = self._used, _without_overlap(tensor)
            copied = self.empty(tuple(source.shape), source.dtype).copy_(source)
            num_bytes, stride = copied.nbytes, copied.stride() if source is tensor else stride
        return _Leaf(offset, num_bytes, shape, stride, tensor.dtype)


def _can_share(tensor: torch.Tensor) -> bool:
    is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    return is_plain and not (tensor.requires_grad or tensor.is_nested or tensor.is_quantized)


def _num_items(tensor: torch.Tensor) -> int:
    """Items from the first to the last of a tensor, with those in between that a view leaves out."""
    if tensor.is_contiguous():  # As are those without items.
        return tensor.numel()
    return sum(step * (size - 1) for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it can be sent as bytes and strides. torch cannot pin a tensor with an item that stands for many."""
    repeats = not tensor.is_contiguous() and 0 in tensor.stride()
    return not (repeats or tensor.is_conj() or tensor.is_neg())


def _without_overlap(tensor: torch.Tensor) -> torch.Tensor:
    """What to copy of a tensor: of a view that has items more than once, all from the first to the last, once."""
    num_items = _num_items(tensor)
    return tensor.as_strided((num_items,), (1,)) if num_items < tensor.numel() and _is_plain(tensor) else tensor


def _bytes_to_copy(tensor: torch.Tensor) -> int:
    return _aligned(_without_overlap(tensor).nbytes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class _Packed(NamedTuple):
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _unpack, self.arguments


# The trainer's side.

# The slots of each running worker, by its process id, mapped once.
_opened: dict[int, tuple[Any, SharedArrays]] = {}


def forget(workers: Iterable[int]) -> None:
    """Close the slots of workers that have ended; batches in them keep their memory."""
    for worker in workers:
        _opened.pop(worker, None)


def _unpack(worker: int, state: dict[str, Any], is_single_use: bool, slot: int, tree: Any) -> Any:
    """The batch, over the worker's memory."""
    token, shared = _opened.get(worker, (None, None))
    if shared is None or is_single_use or token != state["token"]:
        try:
            shared = SharedArrays.opened(state)
        except RuntimeError as error:
            raise RuntimeError(f"DataLoader worker (pid {worker}) ended before its batch was taken.") from error
    # A new array over the slot: it lives exactly as long as a tensor of the batch.
    memory = np.frombuffer(memoryview(shared["slots"][slot]), np.uint8)
    if is_single_use:
        shared["flags"][slot] = _FREE  # It is mapped here, so the worker may close it. It is not used again.
    else:
        _opened[worker] = state["token"], shared
        weakref.finalize(memory, _free, shared, slot, os.getpid()).atexit = False
    return tree_map_only(_Leaf, lambda leaf: _tensor_at(memory, leaf), tree)


def _free(shared: SharedArrays, slot: int, trainer: int) -> None:
    # A process that the trainer forked also drops its copy of the batch, and must not free the slot.
    if os.getpid() == trainer:
        shared["flags"][slot] = _FREE


def _tensor_at(memory: np.ndarray, leaf: _Leaf) -> torch.Tensor:
    items = torch.from_numpy(memory[leaf.offset : leaf.offset + leaf.num_bytes]).view(leaf.dtype)
    return items.as_strided(leaf.shape, leaf.stride)
