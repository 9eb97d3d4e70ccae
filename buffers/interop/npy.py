"""Arrays in the format of `.npy` files, read by ranges of rows, wherever their bytes are.

Nothing is unpickled. What a header says is compared with the bytes that are there before anything is allocated. Values
come as they are, in the byte order of the machine.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

import numpy as np

from buffers.conversion import TO_TORCH
from buffers.disk import DamagedEpisodeError, as_damage
from buffers.interop.base import FormatError

__all__ = ["Column", "FileColumn", "GivenColumn", "Header", "NotNumbersError", "read_header", "reading"]

_MAGIC = b"\x93NUMPY"
_MOST_HEADER_BYTES = 1 << 16
_DESCR = re.compile(r"""['"]descr['"]\s*:\s*['"]([<>|=]?)([A-Za-z?])(\d{0,9})(?:\[\w*\])?['"]""")
_ORDER = re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)""")
_SHAPE = re.compile(r"""['"]shape['"]\s*:\s*\(((?:\s*\d{1,18}L?\s*,?)*)\)""")
_NO_NUMBERS = {"O": "pickled objects", "U": "text", "S": "text", "M": "dates", "m": "time spans", "V": "opaque bytes"}


class Header(NamedTuple):
    """What precedes the values of an array."""

    dtype: np.dtype  # In the byte order of the file.
    shape: tuple[int, ...]
    fortran_order: bool
    num_bytes: int  # Of the header itself.

    @property
    def values_bytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


class NotNumbersError(Exception):
    """An array of something else, which is left alone."""


@contextmanager
def reading(path: str, advice: str = "Get a whole copy of it") -> Iterator[None]:
    """Turn what parsers raise for damaged bytes into a FormatError that names the path."""
    try:
        with as_damage():
            yield
    except FileNotFoundError:
        raise FormatError(path, "is not there", "Check the path") from None
    except DamagedEpisodeError as error:
        raise FormatError(path, str(error), advice) from error


def read_header(file: IO[bytes]) -> Header:
    """That of a `.npy` file, by our own parser; NotNumbersError for what torch cannot hold, DamagedEpisodeError."""
    start = file.read(8)
    if len(start) < 8 or not start.startswith(_MAGIC) or start[6] not in (1, 2, 3):
        raise DamagedEpisodeError(f"is no .npy array: it begins with {start!r:.40}")
    num_length_bytes = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(num_length_bytes), "little")
    if length > _MOST_HEADER_BYTES:
        raise DamagedEpisodeError(f"says that its header has {length} bytes")
    text = file.read(length).decode("latin-1")
    descr, order, shape = _DESCR.search(text), _ORDER.search(text), _SHAPE.search(text)
    if order is None or shape is None or "descr" not in text:
        raise DamagedEpisodeError(f"has the header {text!r:.100}")
    if descr is None:
        raise NotNumbersError("records of several values")
    sizes = tuple(int(size.strip().rstrip("L")) for size in shape[1].split(",") if size.strip())
    return Header(_dtype(*descr.groups()), sizes, order[1] == "True", 8 + num_length_bytes + length)


def _dtype(order: str, kind: str, size: str) -> np.dtype:
    if kind in _NO_NUMBERS:
        raise NotNumbersError(_NO_NUMBERS[kind])
    if kind not in "biufc?":
        raise DamagedEpisodeError(f"has values of the unknown type {kind + size!r}")
    try:
        dtype = np.dtype(order + kind + size)
    except TypeError:
        raise DamagedEpisodeError(f"has values of the unknown type {kind + size!r}") from None
    if dtype.newbyteorder("=") not in TO_TORCH:
        raise NotNumbersError(f"{dtype.newbyteorder('=')}, which torch does not have")
    return dtype


class Column(ABC):
    """An array whose first axis is the rows.

    Attributes:
        name: Its name, in which "/" separates levels.
        dtype: Of the values as they come, in the byte order of the machine.
        shape: (N, *shape).
    """

    def __init__(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """A copy of the rows [start, stop), which is cheap where reading goes forward."""

    def all(self) -> np.ndarray:
        """All rows."""
        return self.rows(0, len(self))

    def close(self) -> None:  # noqa: B027  # Arrays in memory keep nothing open.
        """Close what is open; reading opens it again."""


class GivenColumn(Column):
    """An array in memory."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        super().__init__(name, values.dtype, values.shape)
        self._values = values

    def rows(self, start: int, stop: int) -> np.ndarray:
        """As `Column.rows`."""
        return self._values[start:stop].copy()


class FileColumn(Column):
    """An array in a file or archive, which is read forward. One in Fortran order is held in memory as a whole."""

    def __init__(self, path: str, name: str, header: Header, opened: Callable[[], IO[bytes]]) -> None:
        super().__init__(name, header.dtype.newbyteorder("="), header.shape)
        self.path, self.header, self._opened = path, header, opened
        self._stream: IO[bytes] | None = None
        self._next = 0  # The row at which the stream is.
        self._whole: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """As `Column.rows`."""
        with reading(self.path):
            if not self.header.fortran_order:
                return self._read(start, stop, self.shape[1:])
            if self._whole is None:
                values = self._read(0, len(self), self.shape[1:])
                self._whole = values.reshape(self.shape[::-1]).T
            return np.ascontiguousarray(self._whole[start:stop])

    def _read(self, start: int, stop: int, shape: tuple[int, ...]) -> np.ndarray:
        values = np.empty((stop - start, *shape), self.header.dtype)
        row_bytes = math.prod(shape) * self.dtype.itemsize
        if self._stream is None or start < self._next:
            self.close()
            self._stream, self._next = self._opened(), 0
            if read_header(self._stream) != self.header:
                raise DamagedEpisodeError(f"has another array `{self.name}` than when it was opened")
        if start > self._next:
            self._stream.seek(self.header.num_bytes + start * row_bytes)
        _read_exactly(self._stream, values.reshape(-1).view(np.uint8).data, self.name)
        self._next = stop
        return values.astype(self.dtype, copy=False)

    def close(self) -> None:
        """As `Column.close`."""
        stream, self._stream, self._whole = self._stream, None, None
        if stream is not None:
            stream.close()


def _read_exactly(stream: IO[bytes], view: memoryview, name: str) -> None:
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise DamagedEpisodeError(f"ends within `{name}`, {len(view) - filled} bytes early")
        filled += count
