"""Episodes in a store of objects: what `EpisodeDirectory` is for those in a directory, for readers.

What is there, an index object says, or a list of the objects. Sizes and stamps are kept as a table of integers, whose
rows are found by the numbers in an episode's name.
"""

from __future__ import annotations

import io
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from buffers.dataset.files.directory import EpisodeDirectory, EpisodeFiles, FileName, Listing
from buffers.dataset.files.late_files import LATE
from buffers.disk import DamagedEpisodeError, Files, parse_fields
from buffers.disk.lock import LOCK, capacity_in
from buffers.fields import Fields
from buffers.objects import (
    DEFAULT_CACHE_BYTES,
    INDEX,
    Index,
    ObjectCache,
    ObjectFile,
    ObjectFiles,
    ObjectInfo,
    ObjectStore,
    is_url,
)

__all__ = ["EPISODES", "ObjectDirectory", "ObjectOptions", "open_files"]

#: The kind of an index, see `Index.said`.
EPISODES = "episodes"
# Of a file whose header's size is not as expected, so many bytes are read at first.
_HEAD = 2**14
_LARGEST_HEAD = 2**20
_MOST_EXPECTED_BYTES = 2**28
_WIDTH = 6  # id, start, length, cut, size, stamp


class ObjectOptions(NamedTuple):
    """How a store is reached, and what is kept of it here: arguments of `IndividualFileDataset`."""

    storage_options: Mapping[str, Any] | None = None
    cache_directory: str | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
    timeout: float = 10.0


def open_files(
    path: str, suffix: str, writable: bool, durable: bool, lock: bool, options: ObjectOptions
) -> EpisodeFiles:
    """The files of a dataset: those of a directory or, for a URL, of a store.

    ValueError for a URL that is to be written to, and for options of stores where there is none.
    """
    if not is_url(path):
        if options.storage_options is not None:
            raise ValueError(f"`storage_options` are for URLs, and `directory` is {path!r}.")
        return EpisodeDirectory(path, suffix, writable, durable, lock)
    if writable:
        raise ValueError(
            f"{path} is a URL, which can only be read: pass mode='r'. To bring episodes there, write them to a local "
            "directory, and call `upload(url)` of its dataset."
        )
    return ObjectDirectory(path, suffix, options)


class ObjectDirectory(EpisodeFiles):
    """Episodes under a URL.

    Args:
        url: Of the folder.
        suffix: Of episode files.
        options: For the store.

    Raises:
        FileNotFoundError: There is nothing under the URL.
        ObjectStoreError: The store cannot be asked.
    """

    def __init__(self, url: str, suffix: str, options: ObjectOptions) -> None:
        self.path, self.suffix, self.options = url, suffix, options
        cache = ObjectCache(options.cache_directory, options.cache_bytes) if options.cache_bytes else None
        self.store = ObjectStore(url, options.storage_options, options.timeout)
        self.files = ObjectFiles(self.store, cache)
        self._index: Index | None = None
        self._index_seen: ObjectInfo | None = None
        # (n, 6), in the order of the ids.
        self._table = np.empty((0, _WIDTH), np.int64)
        self._late: list[str] | None = None
        self._expected: dict[str, ObjectFile] = {}
        self._look_at_index()
        if self._index is None:
            self._check_presence()
        else:
            self.last_capacity = int(self._index.said["capacity"])

    def _check_presence(self) -> None:
        advice = "Check the URL, or bring episodes there with `python -m buffers upload DIRECTORY URL`"
        error = FileNotFoundError(2, f"There is nothing under this URL. {advice}", self.path)
        try:
            page = next(self.store.pages())
        except FileNotFoundError:
            raise error from None
        if not page.objects and not page.folders:
            raise error
        if LOCK in dict(page.objects):
            self.last_capacity = capacity_in(self.store.read(LOCK).decode(errors="replace"))

    # What is there.

    def _look_at_index(self) -> bool:
        """Read the index if it has changed; whether it has."""
        try:
            info = self.store.info(INDEX)
            if info == self._index_seen:
                return False
            data = self.store.read(INDEX)
        except FileNotFoundError:
            had_one, self._index, self._index_seen = self._index is not None, None, None
            return had_one
        try:
            index = Index.decode(data)
        except DamagedEpisodeError as error:
            warnings.warn(f"{self.path}/{INDEX} {error}: the objects are listed instead.", stacklevel=6)
            self._index, self._index_seen = None, info
            return True
        except ValueError as error:
            raise ValueError(f"{self.path}/{INDEX} {error}.") from None
        if index.said.get("kind") != EPISODES:
            kind = index.said.get("kind")
            raise ValueError(f"{self.path} holds {kind}, not episodes. `python -m buffers download` brings them here.")
        self._index, self._index_seen = index, info
        return True

    def _entries(self) -> Iterator[tuple[str, Callable[[], int]]]:
        found = array("q")
        late: list[str] | None = None
        if self._index is not None:
            for name, (size, stamp, _) in zip(self._index.names, self._index.table.tolist(), strict=True):
                folder, is_inner, inner = name.partition("/")
                if not is_inner:
                    _take(found, name, size, stamp)
                    yield name, partial(int, size)
                elif folder == LATE:
                    late = [*(late or []), inner]
        else:
            for page in self.store.pages():
                for name, info in page.objects:
                    _take(found, name, *info)
                    if name != INDEX:
                        yield name, partial(int, info.size)
                if LATE in page.folders:
                    late = [name for inner in self.store.pages(LATE) for name, _ in inner.objects]
        table = np.frombuffer(found, np.int64).reshape(-1, _WIDTH) if found else np.empty((0, _WIDTH), np.int64)
        self._table = table[np.argsort(table[:, 0], kind="stable")]
        self._late = late

    def names(self) -> list[str]:
        """As `Files.names`."""
        return sorted(name for name, _ in self._entries())

    def list(self, known: Any = ()) -> Listing:
        """As `EpisodeFiles.list`; the headers of what an index names have been checked before."""
        listing = super().list(known)
        said = {} if self._index is None else self._index.said
        if said.get("fields") is None or said["suffix"] != self.suffix:
            return listing
        return listing._replace(fields=parse_fields(said["fields"]))

    def _look(self, scan: Callable[[], None], is_urgent: bool) -> bool:
        if self._look_at_index() or self._index is None:
            scan()
        return True

    def _info(self, name: str) -> ObjectInfo:
        """Size and stamp; FileNotFoundError if no list had this name."""
        parsed = FileName.parse(name)
        if parsed is not None:
            first, last = self._table[:, 0].searchsorted([parsed.id, parsed.id + 1]).tolist()
            for row in self._table[first:last].tolist():
                if tuple(row[:4]) == parsed[:4]:
                    return ObjectInfo(row[4], row[5])
        raise FileNotFoundError(2, "There is no such object", f"{self.path}/{name}")

    # Reading.

    def open(self, name: str) -> io.FileIO:
        """As `Files.open`. Nothing is read unless it was expected."""
        file = self._expected.pop(name, None)
        return as_file(self.files.file(name, self._info(name)) if file is None else file)

    def expect(self, names: Sequence[str], lengths: Sequence[int], fields: Fields, whole: bool) -> None:
        """As `EpisodeFiles.expect`: read them, all at once."""
        self._expected, heads, left = {}, [], _MOST_EXPECTED_BYTES
        for name, length in zip(names, lengths, strict=True):
            try:
                file = self.files.file(name, self._info(name))
            except FileNotFoundError:
                continue  # The one who opens it finds out.
            header = file.size - length * fields.nbytes
            size = file.size if whole else min(file.size, header if 0 < header <= _LARGEST_HEAD else _HEAD)
            if (left := left - size) < 0:
                break
            self._expected[name] = file
            heads.append((file, size))
        self.files.read_heads(heads)

    def folder(self, name: str) -> Files | None:
        """As `Files.folder`, for that of late fields."""
        return _ObjectFolder(self, name, self._late) if name == LATE and self._late else None

    def close(self) -> None:
        """Connections are closed with the last reference to the store."""


class _ObjectFolder(Files):
    """A folder of small files, which may be replaced by others of the same name."""

    def __init__(self, parent: ObjectDirectory, name: str, names: list[str]) -> None:
        self.path, self._name, self._names, self._files = f"{parent.path}/{name}", name, names, parent.files

    def folder(self, name: str) -> None:
        """There is none."""

    def names(self) -> list[str]:
        """As `Files.names`."""
        return sorted(self._names)

    def open(self, name: str) -> io.FileIO:
        """Read it, whole."""
        return as_file(self._files.whole_file(f"{self._name}/{name}"))

    def close(self) -> None:
        """Nothing is open."""


def as_file(file: ObjectFile) -> io.FileIO:
    """An object as the formats take files: those that use the descriptor use `read_at` and `size_of` instead."""
    return cast(io.FileIO, file)


def _take(found: array[int], name: str, size: int, stamp: int) -> None:
    parsed = FileName.parse(name)
    if parsed is not None:
        found.extend((parsed.id, parsed.start, parsed.length, parsed.cut, size, stamp))
