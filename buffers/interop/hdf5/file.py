"""An HDF5 file that is read with care: nothing outside it is followed, and no shape is believed without its bytes."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from buffers.conversion import TO_TORCH
from buffers.disk import Descriptor
from buffers.interop.base import FormatError, fill, library

__all__ = ["HDF5File", "Piece", "Stored"]

_WHOLE = "Get a whole copy of it"
_INSIDE = "Copy what it names into the file, with `h5repack` for example"
# deflate, shuffle, fletcher32, and LZF, which h5py brings along. Others would load plugins.
_FILTERS = (1, 2, 3, 32000)
# Deflate makes at most 1,032 bytes of one, LZF 88.
_MOST_RATIO = 1100
_MOST_LEVELS = 32
_MOST_MEMBERS = 1 << 16
_MOST_ATTRIBUTE = 1 << 20


class Stored(NamedTuple):
    """A dataset of an HDF5 file."""

    name: str  # The whole path to it.
    shape: tuple[int, ...]
    dtype: np.dtype  # Of native byte order; of objects for what is no number.
    offset: int | None  # Of the first row in the file, if the rows lie there one after another as in memory.

    @property
    def is_numeric(self) -> bool:
        """Whether torch has its dtype."""
        return self.dtype.kind in "biufc" and self.dtype in TO_TORCH

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Piece(NamedTuple):
    """Rows of an episode: those of a dataset from `first` on, or all of one value."""

    num: int
    stored: Stored | None = None
    first: int = 0
    value: int = 0


class HDF5File:
    """The file, open to read.

    Args:
        path: Of the file.
        version: What `version` was when the file was first looked at; None for the first time.

    Raises:
        FormatError: There is none, it is no HDF5 file, it is damaged, or it has changed.
        ImportError: h5py is missing.
    """

    def __init__(self, path: str, version: tuple[int, ...] | None = None) -> None:
        self._h5py: Any = library("h5py", "hdf5")
        self.path = path
        try:
            self._descriptor = Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FormatError(path, "is not there", "Check the path") from error
        found = os.fstat(self._descriptor.number)
        self.size = found.st_size
        #: Changes with the file.
        self.version = (found.st_ino, found.st_size, found.st_mtime_ns)
        self._claimed = 0
        self._kinds: dict[np.dtype, Any] = {}
        self._handle: Any = None
        try:
            if not stat.S_ISREG(found.st_mode):
                raise self.damaged("is no file", "An HDF5 file is expected")
            if version is not None and self.version != version:
                raise self.damaged("has changed since it was opened", "Open it again, when nobody writes to it")
        except FormatError:
            self.close()
            raise

    def close(self) -> None:
        """Close it."""
        self._descriptor.close()
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    def __enter__(self) -> HDF5File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def damaged(self, found: str, advice: str = _WHOLE) -> FormatError:
        """The error to raise."""
        return FormatError(self.path, found, advice)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turn what h5py raises for damaged bytes into a FormatError."""
        try:
            yield
        except FormatError:
            raise
        except (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise self.damaged(f"`{name}` cannot be read ({type(error).__name__}: {str(error)[:200]})") from error

    @property
    def handle(self) -> Any:
        """The `h5py.File`."""
        if self._handle is None:
            try:
                self._handle = self._h5py.File(self.path, "r")
            except OSError as error:
                found = f"cannot be opened as HDF5 ({str(error)[:200]})"
                raise self.damaged(found, f"It is no HDF5 file, was cut off, or is being written. {_WHOLE}") from error
        return self._handle

    def members(self, group: str) -> dict[str, bool]:
        """`name -> whether it is a group` of what is in a group, in the order of the names; links are refused."""
        with self._reading(group):
            found = self._children(self._opened(group), group)
            return {name: isinstance(member, self._h5py.h5g.GroupID) for name, member in found}

    def walk(self, group: str) -> dict[str, Stored]:
        """`path below the group -> dataset` of all datasets below a group, in the order of the names."""
        found: dict[str, Stored] = {}
        with self._reading(group):
            self._walk(self._opened(group), group, "", found, 0)
        return found

    def stored(self, name: str) -> Stored:
        """A dataset of the file."""
        with self._reading(name):
            return self._described(name, self._opened(name))

    def _opened(self, name: str) -> Any:
        """The object of a name. Only for names that `members` has given."""
        return self._h5py.h5o.open(self.handle.id, name.encode("utf-8", "surrogateescape"))

    def _children(self, parent: Any, path: str) -> list[tuple[str, Any]]:
        """Groups and datasets in a group, in the order of the names. FormatError for a link."""
        kinds: list[tuple[bytes, int]] = []
        parent.links.iterate(lambda name, info: kinds.append((name, info.type)), info=True)
        h5py, found = self._h5py, []
        for raw, kind in kinds:
            name = raw.decode("utf-8", "surrogateescape")
            if kind != h5py.h5l.TYPE_HARD:
                raise self.damaged(f"`{_joined(path, name)}` is a link, which is not followed", _INSIDE)
            member = h5py.h5o.open(parent, raw)
            if isinstance(member, (h5py.h5g.GroupID, h5py.h5d.DatasetID)):
                found.append((name, member))
        return found

    def _walk(self, parent: Any, parent_path: str, below: str, found: dict[str, Stored], level: int) -> None:
        if level > _MOST_LEVELS or len(found) > _MOST_MEMBERS:
            raise self.damaged(f"`{parent_path}` nests too deeply, or has too many members")
        for name, member in self._children(parent, parent_path):
            path, whole = f"{below}/{name}" if below else name, _joined(parent_path, name)
            if isinstance(member, self._h5py.h5g.GroupID):
                self._walk(member, whole, path, found, level + 1)
            else:
                found[path] = self._described(whole, member)

    def _described(self, name: str, dataset: Any) -> Stored:
        """A dataset, after comparing its shape with the bytes that are there. FormatError if they do not fit."""
        shape = dataset.shape
        if shape is None:  # A dataset without a dataspace.
            return Stored(name, (), np.dtype(object), None)
        kind = dataset.get_type()
        offset = self._check_storage(name, dataset, shape, kind.get_size())
        try:
            dtype = kind.dtype
        except TypeError:
            dtype = np.dtype(object)
        if dtype.kind not in "biufc":
            return Stored(name, shape, np.dtype(object), None)
        native = np.dtype(dtype.newbyteorder("=").str)
        if native not in self._kinds:
            self._kinds[native] = self._h5py.h5t.py_create(native, logical=True)
        return Stored(name, shape, native, offset if self._kinds[native].equal(kind) else None)

    def _check_storage(self, name: str, dataset: Any, shape: Sequence[int], size: int) -> int | None:
        """Where the rows begin, if they lie one after another; FormatError if they are not all in the file."""
        stored, expected = dataset.get_storage_size(), math.prod(shape) * size
        # None for what does not lie in this file in one piece.
        offset = dataset.get_offset()
        if offset is not None:
            is_there = stored >= expected and offset <= self.size - expected
        else:
            is_there = self._has_chunks(name, dataset, shape, size)
        self._claimed += stored
        if not is_there or self._claimed > self.size:
            found = f"`{name}` says that it has the shape {tuple(shape)}, {expected:,} bytes, and {stored:,} are there"
            raise self.damaged(found, f"It was not written to its end, or is damaged. {_WHOLE}")
        return offset

    def _has_chunks(self, name: str, dataset: Any, shape: Sequence[int], size: int) -> bool:
        """Whether all rows are there, for a dataset that does not lie in one piece, or has none."""
        h5d, plan, stored = self._h5py.h5d, dataset.get_create_plist(), dataset.get_storage_size()
        layout = plan.get_layout()
        if layout == h5d.VIRTUAL or plan.get_external_count():
            raise self.damaged(f"`{name}` has its rows in other files, which are not opened", _INSIDE)
        filters = [plan.get_filter(number) for number in range(plan.get_nfilters())]
        if others := [code for code, *_ in filters if code not in _FILTERS]:
            advice = "Rewrite it with gzip: `h5repack -f GZIP=4 OLD NEW`"
            raise self.damaged(f"`{name}` is compressed by the filters {others}, which are not read", advice)
        if layout != h5d.CHUNKED:
            return bool(stored >= math.prod(shape) * size)
        chunk = plan.get_chunk()
        num_chunks = math.prod(-(-extent // step) for extent, step in zip(shape, chunk, strict=True))
        # A whole chunk is inflated for any of its rows.
        can_be = num_chunks * math.prod(chunk) * size <= stored * (_MOST_RATIO if filters else 1)
        return can_be and dataset.get_num_chunks() >= num_chunks

    def attributes(self, name: str) -> tuple[dict[str, Any], list[str]]:
        """Numbers, bools and texts among the attributes of a group, and the names of the others."""
        found: dict[str, Any] = {}
        others = []
        with self._reading(name):
            attributes = self.handle[name].attrs
            for key in sorted(attributes):
                value = self._attribute(attributes, key)
                if value is None:
                    others.append(key)
                else:
                    found[key] = value
        return found, others

    def _attribute(self, attributes: Any, key: str) -> Any:
        found = attributes.get_id(key)
        is_single = found.shape is not None and math.prod(found.shape) == 1
        if not is_single or found.get_storage_size() > _MOST_ATTRIBUTE:
            return None
        try:
            return _plain(attributes[key])
        except TypeError:  # A type that numpy does not have.
            return None

    def text(self, stored: Stored) -> Any:
        """The number or text of a dataset with a single value; None for what is neither."""
        with self._reading(stored.name):
            dataset = self.handle[stored.name]
            is_text = self._h5py.check_string_dtype(dataset.dtype) is not None
            return _plain(dataset[()]) if math.prod(stored.shape) == 1 and (is_text or stored.is_numeric) else None

    def texts(self, stored: Stored) -> list[str]:
        """The texts of a dataset with one dimension. FormatError if it holds anything else."""
        with self._reading(stored.name):
            dataset = self.handle[stored.name]
            if len(stored.shape) != 1 or self._h5py.check_string_dtype(dataset.dtype) is None:
                raise self.damaged(f"`{stored.name}` is no list of texts")
            return [item.decode("utf-8", "replace") for item in dataset[()].tolist()]

    def read(self, stored: Stored, first: int, out: np.ndarray) -> None:
        """Copy rows from `first` on into `out`, which is contiguous."""
        if not out.size:
            return
        if stored.offset is None:
            self._read_by_h5py(stored, first, out)
        else:
            self._read_plain(stored, first, out)
        if out.dtype == np.bool_:
            # A byte of the file may be anything.
            numbers = out.view(np.uint8)
            np.minimum(numbers, 1, out=numbers)

    def _read_plain(self, stored: Stored, first: int, out: np.ndarray) -> None:
        assert stored.offset is not None  # As the caller has seen.
        offset = stored.offset + first * stored.row_bytes
        if not fill(self._descriptor.number, out, offset):
            raise self.damaged(f"`{stored.name}` ends before row {first + len(out)}", "The file was cut off")

    def _read_by_h5py(self, stored: Stored, first: int, out: np.ndarray) -> None:
        with self._reading(stored.name):
            dataset = self._opened(stored.name)
            count = (len(out), *stored.shape[1:])
            space = dataset.get_space()
            space.select_hyperslab((first, *(0 for _ in count[1:])), count)
            dataset.read(self._h5py.h5s.create_simple(count), space, out)

    def copy(self, pieces: Sequence[Piece], start: int, stop: int, out: np.ndarray) -> None:
        """Copy the rows [start, stop) of an episode that lies in pieces."""
        row = 0
        for num, stored, first, value in pieces:
            begin, end = max(start - row, 0), min(stop - row, num)
            if begin < end:
                target = out[row + begin - start : row + end - start]
                if stored is None:
                    target[...] = value
                else:
                    self.read(stored, first + begin, target)
            row += num


def _joined(group: str, name: str) -> str:
    return f"{group.rstrip('/')}/{name}".lstrip("/")


def _plain(value: Any) -> Any:
    """A Python number, bool or text; None for anything else."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, (bool, int, float, str)) else None
