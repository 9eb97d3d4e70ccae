"""A packed file: arrays of rows behind a JSON header, in the layout of safetensors, whose library can read it.

    8 bytes     length of the header
    header      name, dtype, shape and place of each array; in "__metadata__", what the file says of itself
    arrays      without gaps, the widest numbers first
                one of them is `pieces`, int64 (n, 4): number of an array (by name), first row, rows, checksum

All sizes are known beforehand, so rows may be written in any order and by any thread. Each piece that is written has
its checksum; the first row of `pieces`, whose array has the number -1, holds that of the header and the other pieces.
"""

from __future__ import annotations

import io
import json
import os
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from buffers.conversion import TO_NUMPY
from buffers.disk import DTYPES, DamagedEpisodeError, as_damage, parse_json, safetensors_type
from buffers.fields import TensorType

__all__ = ["DamagedSaveError", "PackedReader", "PackedWriter", "checksum"]

FORMAT_VERSION = 1
# Of files with compressed fields, which earlier versions of this library cannot load.
COMPRESSED_VERSION = 2
_PIECES, _SAID = "pieces", "buffers"
_MAX_HEADER = 64 * 2**20
_ROW_OF_HEADER = -1
# Above so many bytes, the sums of columns are checked, at the speed of the memory, in place of every byte.
# A prime number of columns, so that blocks that have changed places do not add up to the same.
_LARGE, _NUM_COLUMNS = 1 << 16, 509
_MOST_AT_ONCE = 1 << 24


class DamagedSaveError(DamagedEpisodeError):
    """A file of a save is not what it was when it was written, or belongs to another save."""


def checksum(memory: npt.NDArray[np.uint8]) -> int:
    """Of contiguous bytes: CRC-32; of many, that of the sums of 509 columns of 64-bit words, and of the rest."""
    num_words = len(memory) // (8 * _NUM_COLUMNS) * _NUM_COLUMNS
    if len(memory) <= _LARGE:
        return zlib.crc32(memory.data)
    words = memory[: 8 * num_words].view(np.uint64).reshape(-1, _NUM_COLUMNS)
    return zlib.crc32(memory[8 * num_words :].data, zlib.crc32(np.add.reduce(words, axis=0).data))


def bytes_of(array: np.ndarray) -> npt.NDArray[np.uint8]:
    """The memory of an array, or of a contiguous copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class PackedWriter:
    """Writes a packed file.

    Args:
        arrays: Type of a row, and number of rows, of each array.
        num_pieces: How often `put` will be called.
        said: What the file says of itself, as JSON can hold it.
    """

    def __init__(self, arrays: Mapping[str, tuple[TensorType, int]], num_pieces: int, said: Mapping[str, Any]) -> None:
        described = {
            name: [str(kind.dtype).removeprefix("torch."), list(kind.shape), num]
            for name, (kind, num) in sorted(arrays.items())
        }
        self._header = _header(described, num_pieces + 1, said)
        if len(self._header) > _MAX_HEADER:
            raise ValueError(f"The states take {len(self._header):,} bytes besides arrays, more than {_MAX_HEADER:,}.")
        self._places, _ = _layout(described, num_pieces + 1, len(self._header))
        self._numbers = {name: number for number, name in enumerate(described)}
        self._pieces = np.empty((num_pieces + 1, 4), np.int64)
        self._num_pieces = 1
        self._lock = threading.Lock()
        self._file = -1

    def begin(self, file: io.BufferedWriter) -> None:
        """Write the header into an empty file, which the caller keeps open."""
        self._file = file.fileno()
        _write(self._file, bytes_of(np.frombuffer(self._header, np.uint8)), 0)

    def put(self, name: str, row: int, rows: np.ndarray) -> None:
        """Write a piece: the rows `(n, *shape)` of an array from a row on."""
        memory = bytes_of(rows)
        offset, row_bytes = self._places[name]
        _write(self._file, memory, offset + row * row_bytes)
        found = self._numbers[name], row, len(rows), checksum(memory)
        with self._lock:
            self._pieces[self._num_pieces] = found
            self._num_pieces += 1

    def end(self) -> None:
        """Write the checksums."""
        assert self._num_pieces == len(self._pieces)  # All pieces were written.
        others = zlib.crc32(bytes_of(self._pieces[1:]).data, zlib.crc32(self._header))
        self._pieces[0] = _ROW_OF_HEADER, 0, 0, others
        _write(self._file, bytes_of(self._pieces), self._places[_PIECES][0])


class PackedReader:
    """Reads a packed file; a DamagedSaveError names it where it is damaged.

    Attributes:
        path: For errors.
        said: What the file says of itself.
        num_rows: Of each array.
        kinds: The types of rows.
    """

    def __init__(self, file: io.FileIO, path: str) -> None:
        self.path, self._file = path, file
        self.num_bytes = os.fstat(file.fileno()).st_size
        try:
            with as_damage():
                header, described, num_pieces, self.said = _parse(file.fileno(), self.num_bytes)
                self.kinds = {n: TensorType(tuple(shape), DTYPES[dtype]) for n, (dtype, shape, _) in described.items()}
                self.num_rows = {name: num for name, (*_, num) in described.items()}
                self._places, size = _layout(described, num_pieces, len(header))
                if size != self.num_bytes:
                    raise DamagedEpisodeError(f"has {self.num_bytes} bytes, its header says {size}")
                pieces = np.empty((num_pieces, 4), np.int64)
                self._read_into(pieces, self._places[_PIECES][0])
                others = zlib.crc32(bytes_of(pieces[1:]).data, zlib.crc32(header))
                if pieces[:1].tolist() != [[_ROW_OF_HEADER, 0, 0, others]]:
                    raise DamagedEpisodeError("has a header or checksums that are not those it was written with")
        except DamagedSaveError:
            raise
        except DamagedEpisodeError as error:
            raise self.damaged(str(error)) from error
        self._numbers = {name: number for number, name in enumerate(described)}
        self._pieces = pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))]

    def damaged(self, what: str) -> DamagedSaveError:
        """The error that this file, which `what`, is damaged."""
        advice = "Load the save before it with `newest_whole=True`, or restore the file from a copy"
        return DamagedSaveError(f"{self.path} {what}. {advice}.")

    def pieces(self, name: str) -> npt.NDArray[np.int64]:
        """First row, rows and checksum `(n, 3)` of the pieces of an array, in the order of its rows."""
        first, end = self._pieces[:, 0].searchsorted([self._numbers[name], self._numbers[name] + 1])
        found = self._pieces[first:end, 1:]
        ends = found[:, 0] + found[:, 1]
        if [0, *ends.tolist()] != [*found[:, 0].tolist(), self.num_rows[name]]:
            raise self.damaged(f"lacks rows of `{name}`")
        return found

    def read_piece(self, name: str, piece: npt.NDArray[np.int64], out: np.ndarray | None = None) -> np.ndarray:
        """The rows `(n, *shape)` of a piece, into `out` if that is given, after comparing the checksum."""
        row, num_rows, expected = piece.tolist()
        kind, (offset, row_bytes) = self.kinds[name], self._places[name]
        rows = np.empty((num_rows, *kind.shape), kind.numpy_dtype) if out is None else out
        self._read_into(rows, offset + row * row_bytes)
        if checksum(bytes_of(rows)) != expected:
            last = row + num_rows - 1
            raise self.damaged(f"has other rows of `{name}`, {row} to {last}, than those it was written with")
        return rows

    def read(self, name: str) -> np.ndarray:
        """A whole array `(rows, *shape)`."""
        kind = self.kinds[name]
        rows = np.empty((self.num_rows[name], *kind.shape), kind.numpy_dtype)
        for piece in self.pieces(name):
            self.read_piece(name, piece, rows[piece[0] : piece[0] + piece[1]])
        return rows

    def verify(self) -> None:
        """Read everything, and compare all checksums."""
        for name in self.num_rows:
            for piece in self.pieces(name):
                self.read_piece(name, piece)

    def _read_into(self, array: np.ndarray, offset: int) -> None:
        memory = array.reshape(-1).view(np.uint8).data
        while memory:
            num = os.preadv(self._file.fileno(), [memory[:_MOST_AT_ONCE]], offset)
            if not num:
                raise self.damaged("is shorter than its header says")
            memory, offset = memory[num:], offset + num


def _write(descriptor: int, memory: npt.NDArray[np.uint8], offset: int) -> None:
    left = memory.data
    while left:
        num = os.pwrite(descriptor, left[:_MOST_AT_ONCE], offset)
        left, offset = left[num:], offset + num


def _entries(described: Mapping[str, Any], num_pieces: int) -> list[tuple[str, TensorType, int, int]]:
    """Name, type, rows and offset behind the header of all arrays, in the order in which they lie in the file."""
    kinds = {name: (TensorType(tuple(shape), DTYPES[dtype]), num) for name, (dtype, shape, num) in described.items()}
    kinds[_PIECES] = TensorType((4,), DTYPES["int64"]), num_pieces
    entries, offset = [], 0
    for name, (kind, num) in sorted(kinds.items(), key=lambda item: (-TO_NUMPY[item[1][0].dtype].itemsize, item[0])):
        entries.append((name, kind, num, offset))
        offset += kind.nbytes * num
    return entries


def _layout(described: Mapping[str, Any], num_pieces: int, header_bytes: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each array begins and the bytes of a row; and the size of the file."""
    entries = _entries(described, num_pieces)
    places = {name: (header_bytes + offset, kind.nbytes) for name, kind, _, offset in entries}
    _, kind, num, offset = entries[-1]
    return places, header_bytes + offset + kind.nbytes * num


def _header(described: Mapping[str, Any], num_pieces: int, said: Mapping[str, Any]) -> bytes:
    version = COMPRESSED_VERSION if any(name.endswith("/region_bytes") for name in described) else FORMAT_VERSION
    about = {"version": version, "arrays": described, "num_pieces": num_pieces, "said": said}
    tensors: dict[str, Any] = {"__metadata__": {_SAID: json.dumps(about, separators=(",", ":"))}}
    for name, kind, num, offset in _entries(described, num_pieces):
        dtype, shape = safetensors_type(kind)
        end = offset + kind.nbytes * num
        tensors[name] = {"dtype": dtype, "shape": [num, *shape], "data_offsets": [offset, end]}
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(descriptor: int, file_bytes: int) -> tuple[bytes, dict[str, Any], int, dict[str, Any]]:
    """The header, the described arrays, the number of pieces, and what the file says."""
    size = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    header = os.pread(descriptor, 8 + size, 0) if size <= min(_MAX_HEADER, file_bytes) else b""
    if len(header) < 8 + size or not size:
        raise DamagedEpisodeError("has no whole header")
    about = parse_json(parse_json(header[8:])["__metadata__"][_SAID])
    if about["version"] not in (FORMAT_VERSION, COMPRESSED_VERSION):
        raise DamagedEpisodeError(f"is of version {about['version']!r:.20}; this library knows {COMPRESSED_VERSION}")
    described, num_pieces = about["arrays"], about["num_pieces"]
    numbers = [n for _, shape, num in described.values() for n in (*shape, num)]
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*numbers, num_pieces)):
        raise DamagedEpisodeError("has sizes that cannot be")
    # Before memory is allocated: all sizes must add up to those of the file.
    if _header(described, num_pieces, about["said"]) != header:
        raise DamagedEpisodeError("has a header that does not describe itself")
    return header, described, num_pieces, about["said"]
