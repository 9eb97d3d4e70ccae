"""Named arrays in memory that processes share."""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch

from buffers.sharing.huge_pages import HugePages, map_file, map_file_again
from buffers.utils import format_bytes

__all__ = ["SharedArrays"]

_PAGE = 4096
_TOKEN_BYTES = 16


class SharedArrays(dict[str, np.ndarray]):
    """Named arrays in one piece of anonymous memory that other processes can map, from a few pickled bytes.

    On Linux this is a memfd: it has no name, does not count towards the limit of `/dev/shm`, and ends with the last
    process that maps it. Forked processes inherit it, others open its descriptor under `/proc`. Elsewhere it is torch's
    shared memory. Pages take memory once they are touched.

    `layout` is `name -> (shape, numpy dtype)`. Arrays that are `sparse` may be far larger than the memory: only single
    pages of theirs are ever used, and `release` gives them back. MemoryError if the allocation fails.
    """

    _tensor: torch.Tensor  # Not on Linux.

    def __init__(self, layout: Mapping[str, tuple[tuple[int, ...], np.dtype]], sparse: bool = False) -> None:
        self._layout, self._is_sparse = dict(layout), sparse
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._layout.values()]
        self.num_bytes = sum(-(-size // _PAGE) * _PAGE for size in sizes) + _PAGE
        self._descriptor, self._handle, self._mapping, self._offset = -1, None, None, 0
        self._token = os.urandom(_TOKEN_BYTES)
        try:
            if sys.platform == "linux":
                self._descriptor = os.memfd_create("buffers", os.MFD_CLOEXEC)
                self._mapping, self._offset = map_file(self._descriptor, self.num_bytes)
                status = os.fstat(self._descriptor)
                # Where to find the memory (process, descriptor), and how to recognize it.
                self._handle = os.getpid(), self._descriptor, status.st_dev, status.st_ino
                memory = np.frombuffer(self._mapping, np.uint8)
            else:
                self._tensor = torch.empty(self.num_bytes, dtype=torch.uint8, device="cpu").share_memory_()
                memory = self._tensor.numpy()
        except (OSError, ValueError, OverflowError, RuntimeError) as error:
            message = f"{format_bytes(self.num_bytes)} of shared memory could not be allocated: {error}"
            raise MemoryError(message) from None
        memory[-_TOKEN_BYTES:] = np.frombuffer(self._token, np.uint8)
        self._lay_out(memory)

    def _lay_out(self, memory: np.ndarray) -> None:
        offset = 0
        for name, (shape, dtype) in self._layout.items():
            size = math.prod(shape) * dtype.itemsize
            piece = memory[offset : offset + size]
            self[name] = piece.view(dtype).reshape(shape) if size else np.empty(shape, dtype)
            offset += -(-size // _PAGE) * _PAGE

    def __reduce__(self) -> Any:
        if get_spawning_popen() is None:
            raise TypeError(
                "Memory that processes share (a RingBufferDataset, a mixture, a loader with workers) cannot be pickled "
                "so: only a handle would be, and the rows are lost when this process ends. `dataset.save(directory)` "
                "and `ReplayBuffer.save` keep them. Only processes that multiprocessing starts can be given such "
                "memory, as an argument."
            )
        return SharedArrays.opened, (self.__getstate__(),)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"layout": self._layout, "num_bytes": self.num_bytes, "token": self._token}
        if sys.platform != "linux":
            return {**state, "tensor": self._tensor}
        # A forked process has the memory under the same descriptor.
        assert self._handle is not None
        handle = os.getpid(), self.descriptor, *self._handle[2:]
        return {**state, "handle": handle, "offset": self._offset}

    @staticmethod
    def opened(state: dict[str, Any]) -> SharedArrays:
        """The arrays of another process, from its `__getstate__`; RuntimeError if they are gone."""
        shared = SharedArrays.__new__(SharedArrays)
        shared._layout, shared.num_bytes, shared._token = state["layout"], state["num_bytes"], state["token"]
        shared._descriptor, shared._handle, shared._mapping = -1, state.get("handle"), None
        shared._is_sparse = True
        if shared._handle is None:
            shared._tensor = state["tensor"]
            shared._lay_out(shared._tensor.numpy())
            return shared
        try:
            if shared.is_orphaned:
                raise FileNotFoundError(_path(shared._handle))
            size = state["offset"] + shared.num_bytes
            memory = map_file_again(_path(shared._handle), size).numpy()[state["offset"] :]
            # On another machine, the same numbers may be those of other memory.
            if memory[-_TOKEN_BYTES:].tobytes() != shared._token:
                raise FileNotFoundError(_path(shared._handle))
        except (OSError, RuntimeError) as error:
            message = f"The process {shared._handle[0]} does not have the memory that it shared: {error}."
            raise RuntimeError(message) from None
        shared._lay_out(memory)
        return shared

    @staticmethod
    def received(state: dict[str, Any], descriptor: int) -> SharedArrays:
        """As `opened`, by a descriptor of this process, which it keeps; so it can be passed on."""
        status = os.fstat(descriptor)
        handle = os.getpid(), descriptor, status.st_dev, status.st_ino
        shared = SharedArrays.opened({**state, "handle": handle})
        shared._descriptor, shared._offset = descriptor, state["offset"]
        return shared

    @property
    def descriptor(self) -> int:
        """Of the memory, in this process; RuntimeError if it has none."""
        if self._descriptor < 0:
            raise RuntimeError("Shared memory can only be passed on by the process that made it.")
        return self._descriptor

    def huge_pages(self, name: str) -> HugePages | None:
        """The pages of an array; None if it is empty or sparse, or this process did not make the memory."""
        if self._mapping is None or self._is_sparse or not self[name].size:
            return None
        return HugePages(self._mapping, self._offset, self[name])

    def release(self, name: str, begin: int, end: int) -> None:
        """Give back the pages that lie within rows [begin, end) of an array, which become 0; on Linux only."""
        if self._mapping is None:
            return
        array = self[name]
        first = array.ctypes.data - np.frombuffer(self._mapping, np.uint8).ctypes.data
        row_bytes = array[:1].nbytes
        page = mmap.PAGESIZE
        start, stop = -(-(first + begin * row_bytes) // page) * page, (first + end * row_bytes) // page * page
        if start < stop:
            self._mapping.madvise(mmap.MADV_REMOVE, start, stop - start)

    @property
    def is_orphaned(self) -> bool:
        """Whether the process that made it has ended or released it; its content stays. Known on Linux only."""
        if self._handle is None:
            return False
        try:
            status = os.stat(_path(self._handle))
        except OSError as error:
            return isinstance(error, FileNotFoundError)  # Otherwise it exists, but we may not look at it.
        return (status.st_dev, status.st_ino) != self._handle[2:]

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedArrays:
        """Copy the content to new memory."""
        other = SharedArrays(self._layout)
        for name, array in self.items():
            other[name][...] = array
        return other

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)


def _path(handle: tuple[int, int, int, int]) -> str:
    return f"/proc/{handle[0]}/fd/{handle[1]}"
