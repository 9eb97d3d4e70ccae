"""Reading files that may have no descriptor, because their bytes come from elsewhere."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from typing import Any

__all__ = ["RangeFile", "fill_from", "read_at", "size_of"]


class RangeFile(io.RawIOBase):
    """A file whose bytes come by ranges. Reading it from its position on brings all of it, once."""

    #: In bytes.
    size: int
    _position = 0

    @abstractmethod
    def read_at(self, num_bytes: int, offset: int) -> bytes:
        """Bytes from an offset on, fewer where the file ends before."""

    @abstractmethod
    def whole(self) -> memoryview:
        """All bytes."""

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; an OSError, as of a file, before the beginning."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(22, "Invalid argument")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the position on, as far as there are bytes."""
        memory = memoryview(buffer).cast("B")
        found = self.whole()[self._position : self._position + len(memory)]
        memory[: len(found)] = found
        self._position += len(found)
        return len(found)


def fill_from(descriptor: int, memory: memoryview, offset: int) -> bool:
    """Fill memory with the bytes of an open file from an offset on; False if the file ends before."""
    # One call reads at most 2 GB.
    while memory:
        num = os.preadv(descriptor, [memory], offset)
        if not num:
            return False
        memory, offset = memory[num:], offset + num
    return True


def size_of(file: io.FileIO | RangeFile) -> int:
    """The size of a file in bytes."""
    return file.size if isinstance(file, RangeFile) else os.fstat(file.fileno()).st_size


def read_at(file: io.FileIO | RangeFile, num_bytes: int, offset: int) -> bytes:
    """Bytes from an offset on, fewer where the file ends before."""
    return (
        file.read_at(num_bytes, offset) if isinstance(file, RangeFile) else os.pread(file.fileno(), num_bytes, offset)
    )
