"""Parquet files of a source: opened with errors that name them, read by row groups, the last ones kept in memory."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from buffers.interop.base import FormatError, library

__all__ = ["EXTRA", "ParquetFiles", "UNFINISHED", "checked_file", "has_footer", "opened", "reading", "table_of"]

EXTRA = "lerobot"
_MAGIC = b"PAR1"
_LEAST_BYTES = 12  # Magic bytes at both ends, and the length of the footer.
_MOST_OPEN = 64
_PARSER_ERRORS = (ValueError, LookupError, TypeError, AttributeError, NotImplementedError, EOFError, OSError)
#: What to do about a dataset that was not finalized.
UNFINISHED = "Call `finalize()` on the dataset that records; after the program has ended, record again"


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what pyarrow raises for damaged bytes into a FormatError that names the path."""
    arrow = library("pyarrow", EXTRA)
    try:
        yield
    except FormatError:
        raise
    except (*_PARSER_ERRORS, arrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # Of the disk.
        found = f"cannot be read ({type(error).__name__}: {str(error)[:200]})"
        raise FormatError(path, found, "Get a whole copy of it") from error


def checked_file(path: str) -> str:
    """The path of a file that is there; a pipe would block for ever."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(path, "is not there", "Get the whole dataset") from None
    if not stat.S_ISREG(mode):
        raise FormatError(path, "is no file", "Get a whole copy of it")
    return path


def has_footer(path: str) -> bool:
    """Whether a Parquet file was closed. FormatError if it is no Parquet file."""
    with open(checked_file(path), "rb") as file:
        begin, size = file.read(4), file.seek(0, os.SEEK_END)
        file.seek(max(size - 4, 0))
        end = file.read()
    if begin != _MAGIC:
        raise FormatError(path, f"is no Parquet file: it begins with {begin!r}", "Get a whole copy of it")
    return end == _MAGIC and size >= _LEAST_BYTES


def opened(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`, by its footer."""
    if not has_footer(path):
        raise FormatError(path, "has no footer: the dataset was not finalized, or this is part of a file", UNFINISHED)
    parquet = library("pyarrow.parquet", EXTRA)
    with reading(path):
        return parquet.ParquetFile(path)


def table_of(path: str, leave_out: str) -> Any:
    """A small file as a table, without the columns whose names begin with `leave_out`."""
    file = opened(path)
    with file, reading(path):
        names = [name for name in file.schema_arrow.names if not name.startswith(leave_out)]
        return file.read(columns=names).select(names)


class ParquetFiles:
    """The Parquet files of a directory, columns of whose row groups are kept in memory up to a number of bytes.

    The row group that was read last is kept in any case: rows of it are asked for next.
    """

    def __init__(self, path: str, most_bytes: int) -> None:
        self.path, self.most_bytes = path, most_bytes
        self._files: OrderedDict[str, tuple[Any, np.ndarray]] = OrderedDict()
        # (file, row group, column) -> its values, the one that was used last at the end.
        self._columns: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self._bytes = 0

    def open_file(self, name: str) -> tuple[Any, np.ndarray]:
        """A file, and the rows at which its row groups begin and the last one ends."""
        if name not in self._files:
            file = opened(os.path.join(self.path, name))
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            self._files[name] = file, np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
            if len(self._files) > _MOST_OPEN:
                self._files.popitem(last=False)[1][0].close()
        self._files.move_to_end(name)
        return self._files[name]

    def rows(self, name: str, column: str, start: int, stop: int) -> list[Any]:
        """The arrow arrays that hold the rows [start, stop) of a column, in order."""
        _, bounds = self.open_file(name)
        found = []
        for group in range(int(np.searchsorted(bounds, start, "right")) - 1, int(np.searchsorted(bounds, stop))):
            first = int(bounds[group])
            values = self._column(name, group, column)
            begin = max(start - first, 0)
            found += values.slice(begin, min(stop, int(bounds[group + 1])) - first - begin).chunks
        if (length := sum(len(values) for values in found)) != stop - start:
            where = os.path.join(self.path, name)
            raise FormatError(where, f"has {length} of the rows [{start}, {stop})", "Get a whole copy of it")
        return found

    def _column(self, name: str, group: int, column: str) -> Any:
        key = name, group, column
        if key not in self._columns:
            file, _ = self.open_file(name)
            with reading(os.path.join(self.path, name)):
                values = file.read_row_group(group, columns=[column], use_threads=False).column(column)
            self._columns[key] = values
            self._bytes += values.nbytes
            self._evict(name, group)
        self._columns.move_to_end(key)
        return self._columns[key]

    def _evict(self, name: str, group: int) -> None:
        for key in list(self._columns):
            if self._bytes <= self.most_bytes:
                break
            if key[:2] != (name, group):
                self._bytes -= self._columns.pop(key).nbytes

    def close(self) -> None:
        """Close the files, and forget what was read."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()
        self._columns.clear()
        self._bytes = 0
