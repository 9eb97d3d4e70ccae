"""Named arrays: those of an `.npz` archive, of a directory of `.npy` files, or in memory."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import IO, Any

import numpy as np

from buffers.conversion import as_array
from buffers.disk import DamagedEpisodeError
from buffers.interop.alignment import mapped
from buffers.interop.base import FormatError, Notes
from buffers.interop.npy import Column, FileColumn, GivenColumn, Header, NotNumbersError, read_header, reading

__all__ = [
    "Archive",
    "ArrayFile",
    "as_flags",
    "given_arrays",
    "in_order",
    "note_unread",
    "npy_directory",
    "tree_of",
]

# Deflate makes at most 1,032 bytes of one.
_MOST_EXPANSION = 1100
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1  # A flag of a member.
_LOCAL_HEADER = 30  # Bytes before the name of a member.
_STANDARD = ("obs", "action", "reward", "terminated", "truncated", "done", "is_first", "final_obs_missing")


class ArrayFile:
    """Named arrays of one source.

    Attributes:
        path: Of the source, for errors.
        columns: By name.
        unread: `name -> what it is`, of arrays and files that are no rows of numbers.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.columns: dict[str, Column] = {}
        self.unread: dict[str, str] = {}

    def close(self) -> None:
        """Close what is open; reading opens it again."""
        for column in self.columns.values():
            column.close()

    def add(self, name: str, stream: IO[bytes], num_bytes: int, opened: Callable[[], IO[bytes]]) -> None:
        """Take in an array of `num_bytes` with its header, whose stream is at its beginning."""
        try:
            header = read_header(stream)
        except NotNumbersError as reason:
            self.unread[name] = str(reason)
            return
        except DamagedEpisodeError as error:
            raise DamagedEpisodeError(f"`{name}` {error}") from None
        if header.num_bytes + header.values_bytes != num_bytes:
            raise DamagedEpisodeError(
                f"`{name}` says that it has the shape {header.shape!r:.80} of {header.dtype}, which are "
                f"{header.values_bytes} bytes, and has {num_bytes - header.num_bytes}"
            )
        if not header.shape:
            self.unread[name] = "one value without rows"
        elif 0 in header.shape[1:]:
            self.unread[name] = f"empty, of shape {header.shape}"
        else:
            self.columns[name] = FileColumn(self.path, name, header, opened)


class Archive(ArrayFile):
    """An `.npz` file; FormatError if it is none, or not whole."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._file: io.BufferedReader | None = None
        self._archive: zipfile.ZipFile | None = None
        try:
            with reading(path):
                self._add_members()
        except BaseException:
            self.close()
            raise

    def _add_members(self) -> None:
        archive = self._opened()
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                self.unread[member.filename] = "no array"
                continue
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as stream:
                self.add(name, stream, member.file_size, partial(self._stream, name))

    def _opened(self) -> zipfile.ZipFile:
        if self._archive is None:
            self._file = _regular_file(self.path)
            self._archive = zipfile.ZipFile(self._file)
            _check_members(self._archive.infolist(), os.path.getsize(self.path))
        return self._archive

    def _stream(self, name: str) -> IO[bytes]:
        return self._opened().open(name + ".npy")

    def close(self) -> None:
        """As `ArrayFile.close`."""
        super().close()
        archive, self._archive, file, self._file = self._archive, None, self._file, None
        if archive is not None:
            archive.close()
        if file is not None:
            file.close()

    def stored_array(self, name: str) -> tuple[int, Header] | None:
        """Where the values of an array begin in the file, and its header; None where they are compressed."""
        column = self.columns[name]
        assert isinstance(column, FileColumn)
        with reading(self.path):
            member = self._opened().getinfo(name + ".npy")
            if member.compress_type != zipfile.ZIP_STORED:
                return None
            with _regular_file(self.path) as file:
                file.seek(member.header_offset)
                local = file.read(_LOCAL_HEADER)
            num_name, num_extra = struct.unpack("<HH", local[26:])
            begin = member.header_offset + _LOCAL_HEADER + num_name + num_extra + column.header.num_bytes
            if begin + column.header.values_bytes > os.path.getsize(self.path):
                raise DamagedEpisodeError(f"ends within `{name}`")
            return begin, column.header


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    names = [member.filename for member in members]
    if len({*names}) != len(names):
        raise DamagedEpisodeError("has two members of one name")
    if sum(member.compress_size for member in members) > size:
        raise DamagedEpisodeError(f"has {size} bytes, less than its members say that they take")
    for member in members:
        if member.compress_type not in _METHODS or member.flag_bits & _ENCRYPTED:
            raise DamagedEpisodeError(f"`{member.filename}` is encrypted, or compressed by another method than deflate")
        is_stored = member.compress_type == zipfile.ZIP_STORED
        most = member.compress_size if is_stored else _MOST_EXPANSION * (member.compress_size + 1)
        if member.file_size > most:
            raise DamagedEpisodeError(
                f"`{member.filename}` says that its {member.compress_size} bytes are {member.file_size}"
            )


def _regular_file(path: str) -> io.BufferedReader:
    """The file, opened; a pipe would block for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DamagedEpisodeError("is no file")
    return open(path, "rb")


def npy_directory(path: str) -> ArrayFile:
    """The arrays of a directory of `.npy` files, by the names of the files without the suffix."""
    found = ArrayFile(path)
    with reading(path):
        for name in sorted(os.listdir(path)):
            where = os.path.join(path, name)
            if not name.endswith(".npy") or not os.path.isfile(where):
                found.unread[name] = "no array"
                continue
            with _regular_file(where) as stream:
                found.add(name.removesuffix(".npy"), stream, os.path.getsize(where), partial(_regular_file, where))
    return found


def given_arrays(arrays: Mapping[str, Any]) -> ArrayFile:
    """Arrays or tensors in memory, nested dicts allowed, which are not copied before they are read."""
    found = ArrayFile("the given arrays")

    def take(name: str, value: Any) -> None:
        try:
            values = as_array(name, value)
        except TypeError:
            found.unread[name] = "no array of numbers"
            return
        if values.ndim == 0 or 0 in values.shape[1:]:
            found.unread[name] = "one value without rows" if values.ndim == 0 else f"empty, of shape {values.shape}"
        else:
            found.columns[name] = GivenColumn(name, values)

    mapped(arrays, take)
    return found


def note_unread(arrays: ArrayFile, notes: Notes) -> None:
    """Say what is left alone because it is no rows of numbers."""
    for name, kind in arrays.unread.items():
        notes.add(f"`{name}` is {kind}, and is not read.")


def as_flags(path: str, name: str, values: np.ndarray) -> np.ndarray:
    """Flags of rows as bool (N,), from bools or numbers that are 0 or 1, of shape (N,) or (N, 1)."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    flags = values.astype(bool)
    if values.ndim != 1 or not np.array_equal(flags, values):
        advice = "Flags are 0 or 1, one for each row"
        raise FormatError(path, f"`{name}` ({values.dtype}, {values.shape}) is no array of flags", advice)
    return flags


def tree_of(path: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`name -> leaf` as nested dicts, where "/" separates levels."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        if "" in (*parents, last):
            raise FormatError(path, f"The array {name!r} has an empty name between slashes", "Rename it")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise FormatError(path, f"`{name}` is below, or above, an array of the same name", "Rename one of them")
        node[last] = leaf
    return tree


def in_order(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Rows with the standard fields first."""
    names = [name for name in _STANDARD if name in rows]
    return {name: rows[name] for name in [*names, *(name for name in rows if name not in names)]}
