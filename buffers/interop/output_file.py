"""OutputFile: a new file for HDF5's library, which does not outlive an error of the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = ["OutputFile"]


class OutputFile:
    """A new file that `h5py.File(file, "w")` writes; `check`, and the end of the block, raise what the disk has raised.

    HDF5 keeps what it could not write and tries again when the file is closed, or when Python frees it: h5py may then
    report success, or end the process. So writing always succeeds here. The first error is kept, and nothing more is
    written.

    Args:
        path: Of the file, which must not exist.

    Raises:
        OSError: At `check` and at the end: the disk is full, for example.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "x+b", buffering=0)  # noqa: SIM115  # The end of the block closes it.
        self._error: OSError | None = None

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, found: BaseException | None, _: TracebackType | None) -> None:
        if self._error is None and found is None:
            self._try(lambda: os.fsync(self._file.fileno()))  # Some disks find out only now that they are full.
        self._try(self._file.close)
        # What HDF5 raises after an error of the disk is a consequence of it.
        if self._error is not None and (found is None or (isinstance(found, Exception) and found is not self._error)):
            raise self._error from found

    def check(self) -> None:
        """Raise the first error of the disk, if there was one."""
        if self._error is not None:
            raise self._error

    def _try(self, function: Callable[[], object]) -> None:
        try:
            function()
        except OSError as error:
            self._error = self._error or error

    # What h5py calls.

    def write(self, data: Any) -> int:
        """Write at the position, unless an earlier call has failed."""
        left = memoryview(data)
        try:
            while left and self._error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._error = error
        return len(data)

    def read(self, size: int) -> bytes:
        """Bytes from the position on; zeros where nothing was written."""
        return self._file.read(size).ljust(size, b"\0")

    def readinto(self, out: Any) -> int:
        """As `read`, into a buffer."""
        memoryview(out)[:] = self.read(len(out))
        return len(out)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def truncate(self, size: int) -> int:
        """Make the file so many bytes long."""
        if self._error is None:
            self._try(lambda: self._file.truncate(size))
        return size

    def flush(self) -> None:
        """Nothing is kept back."""
