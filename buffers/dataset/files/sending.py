"""Bringing a directory to a store of objects: content first, then what readers go by, then what is old leaves.

The index comes last. A kill at any point leaves it as it was, and all that it names; the same call then goes on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from buffers.dataset.files.directory import EpisodeDirectory, FileName
from buffers.dataset.files.late_files import LATE
from buffers.dataset.files.object_directory import EPISODES
from buffers.disk import DamagedEpisodeError, described_fields
from buffers.fields import Fields
from buffers.objects import INDEX, Index, ObjectInfo, ObjectStore, ObjectStoreError, mark_of
from buffers.table import EpisodeTable
from buffers.utils import format_bytes, progress_bar

__all__ = ["Contents", "Transfer", "episodes_in", "local_files", "read_index", "send"]

_FORMAT = ".safetensors"
_MARKED = 4096
_NUM_COMPARED = 64
# A directory that is written to is listed so many times, until all of a list could be sent.
_NUM_LISTS = 5


class Transfer(NamedTuple):
    """What an upload or a download has done."""

    num_files: int  # Files that were copied. With those that were there, these are what the index names.
    num_bytes: int
    num_kept: int  # Files that were there.
    num_removed: int

    def __str__(self) -> str:
        sent = f"{self.num_files} files ({format_bytes(self.num_bytes)}) copied"
        return f"{sent}, {self.num_kept} were there, {self.num_removed} removed."


class Contents(NamedTuple):
    """The files of a directory that belong together.

    Attributes:
        said: What the index says of them.
        names: In the order in which they are sent.
        last: Of these, what makes the others count: it is sent when they are there.
        changing: Those that may be replaced by others of the same name.
    """

    said: dict[str, Any]
    names: list[str]
    last: list[str]
    changing: set[str]


class _LocalFile(NamedTuple):
    name: str
    size: int
    mark: int


def episodes_in(directory: EpisodeDirectory, table: EpisodeTable, fields: Fields | None, capacity: int) -> Contents:
    """The episodes of a table, and the late fields beside them."""
    names = [str(directory.name_of(*row)) for row in table.rows.tolist()]
    late = directory.folder(LATE)
    changing = (
        [] if late is None else [name for name in late.names() if name.endswith(".safetensors") and name[0] != "."]
    )
    said = {
        "kind": EPISODES,
        "capacity": capacity,
        "suffix": directory.suffix,
        "fields": None if fields is None or not names else described_fields(fields),
    }
    late_names = [f"{LATE}/{name}" for name in changing]
    return Contents(said, names + directory.list(names).markers + late_names, [], set(late_names))


def read_index(store: ObjectStore) -> Index | None:
    """The index of a store; None if there is none, or a damaged one. ValueError if it is of another version."""
    with contextlib.suppress(FileNotFoundError, DamagedEpisodeError):
        return Index.decode(store.read(INDEX))
    return None


def send(root: str, list_contents: Callable[[], Contents], store: ObjectStore, progress: bool) -> Transfer:
    """Bring files of a directory to a store, as far as they are not there.

    The directory may be written to meanwhile: if files go or change before they are sent, it is listed again, a few
    times. The index names what the last list has, without those that have gone since.

    Args:
        root: The directory.
        list_contents: Lists it.
        store: Where the files go.
        progress: Show a bar.

    Raises:
        ValueError: The store holds other things, or the directory has no episodes and the store has.
        RuntimeError: Files go or change faster than they are sent.
        ObjectStoreError: It does not do what it was asked. The same call goes on where this one was.
    """
    store.prepare()
    upload = _Upload(root, store, read_index(store), progress)
    for _ in range(_NUM_LISTS):
        contents = list_contents()
        upload.check(contents)
        if upload.bring(contents):
            break
    else:
        upload.check_gone(contents)
    return upload.finish(contents)


class _Upload:
    """An upload, which may list the directory several times."""

    def __init__(self, root: str, store: ObjectStore, old: Index | None, progress: bool) -> None:
        self._root, self._store, self._old, self._progress = root, store, old, progress
        self._was_there = set() if old is None else {*old.names, *old.said.get("leaving", [])}
        self._present: dict[str, ObjectInfo] | None = None  # Without what has been sent.
        #: What the store has, as it was in the directory, and which of it has been sent.
        self._there: dict[str, _LocalFile] = {}
        self._sent: set[str] = set()

    def check(self, contents: Contents) -> None:
        """ValueError if the store holds what this would remove."""
        url = self._store.url
        _check_kind(url, self._old, contents.said)
        if not _has_content(contents, contents.names) and (found := _content_of(self._store, self._old)):
            raise ValueError(
                f"{self._root} has no episodes, and {url} has some ({found}, for example), which would all be removed. "
                "Check the directory, or choose another URL. To empty this one, remove its objects with another tool."
            )

    def bring(self, contents: Contents) -> bool:
        """Send what is not there; False if files were gone, or have changed, before they were sent."""
        files = local_files(self._root, contents.names)
        if self._present is None:
            self._present = _present(self._store, {*files, *self._was_there})
            self._was_there &= {*self._present}
        left = {name: file for name, file in files.items() if self._there.get(name) != file}
        kept = _kept(self._store, left, self._present, self._old, contents.changing)
        self._there.update({name: left.pop(name) for name in kept})
        with progress_bar(self._progress, sum(file.size for file in left.values()), "uploading") as bar:
            first = [file for name, file in left.items() if name not in contents.last]
            self._send(first, contents.changing, bar)
            if all(name in self._there for name in contents.names if name not in contents.last):
                self._send([file for name, file in left.items() if name in contents.last], set(), bar)
        return all(name in self._there for name in contents.names)

    def _send(self, files: Sequence[_LocalFile], changing: set[str], bar: Any) -> None:
        assert self._present is not None
        for file in files:
            self._there.pop(file.name, None)  # A late field, as it was.
        for at in self._store.upload([(os.path.join(self._root, file.name), file.name, file.size) for file in files]):
            self._there[files[at].name] = files[at]
            self._sent.add(files[at].name)
            self._present.pop(files[at].name, None)
            bar.update(files[at].size)
        replaced = [file for file in files if file.name in changing and file.name in self._there]
        found = local_files(self._root, [file.name for file in replaced])
        for file in replaced:
            if found.get(file.name) != file:  # What was sent may be the one or the other.
                del self._there[file.name]

    def check_gone(self, contents: Contents) -> None:
        """RuntimeError if what could not be sent leaves nothing that is whole."""
        gone = [name for name in contents.names if name not in self._there]
        needed = [name for name in gone if contents.last or name in contents.changing]
        if needed or not _has_content(contents, self._there.keys() & {*contents.names}):
            name = (needed or gone)[0]
            raise RuntimeError(
                f"Files of {self._root} are removed or replaced faster than they can be uploaded ({name}, for "
                f"example): it was listed {_NUM_LISTS} times. The index of {self._store.url} is as it was. Upload "
                "again when less is written."
            )

    def finish(self, contents: Contents) -> Transfer:
        """Replace the index, and remove what the directory has no more."""
        files = {name: self._there[name] for name in contents.names if name in self._there}
        leaving = sorted((self._was_there | self._sent) - {*files})
        said = {**contents.said, "num_objects": len(files), "leaving": leaving}
        self._store.write(INDEX, Index(said, [*files], _table(self._store, files)).encode())
        self._store.remove(leaving)
        sent = [file.size for name, file in files.items() if name in self._sent]
        return Transfer(len(sent), sum(sent), len(files) - len(sent), len(leaving))


def _has_content(contents: Contents, names: Iterable[str]) -> bool:
    """Whether there are episodes, or saves, among names."""
    return contents.said["kind"] != EPISODES or any(map(FileName.parse, names))


def _content_of(store: ObjectStore, old: Index | None) -> str:
    """The name of an episode that a reader of the store would find, "" if there is none."""
    if old is not None:
        return next(filter(FileName.parse, old.names), "")
    with contextlib.suppress(FileNotFoundError):
        names = (name for page in store.pages() for name, _ in page.objects)
        return next(filter(FileName.parse, names), "")
    return ""


def _check_kind(url: str, old: Index | None, said: Mapping[str, Any]) -> None:
    for key in ("kind", "run"):
        if old is not None and old.said.get(key) != said.get(key):
            found = f"{old.said.get('kind')}{' of another run' if key == 'run' else ''}"
            raise ValueError(f"{url} holds {found}, which would be removed. Choose another URL.")


def local_files(root: str, names: Iterable[str]) -> dict[str, _LocalFile]:
    """Size and mark of each file of a directory, as far as they are there."""
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError), open(os.path.join(root, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = os.pread(file.fileno(), _MARKED, 0)
            found[name] = _LocalFile(name, size, mark_of(size, head, os.pread(file.fileno(), _MARKED, _tail(size))))
    return found


def _tail(size: int) -> int:
    return max(0, size - _MARKED)


def _present(store: ObjectStore, names: Iterable[str]) -> dict[str, ObjectInfo]:
    """Those of the names that are in the store."""
    wanted = {*names}
    found: dict[str, ObjectInfo] = {}
    for folder in sorted({name.rpartition("/")[0] for name in wanted}):
        with contextlib.suppress(FileNotFoundError):
            for page in store.pages(folder):
                for name, info in page.objects:
                    full = f"{folder}/{name}" if folder else name
                    if full in wanted:
                        found[full] = info
    return found


def _kept(
    store: ObjectStore,
    files: Mapping[str, _LocalFile],
    present: Mapping[str, ObjectInfo],
    old: Index | None,
    changing: set[str],
) -> set[str]:
    """The files that are in the store already.

    ValueError if an index names a file that has other content there, as then all of it is another dataset.
    """
    known = {} if old is None else {name: row for name, row in zip(old.names, old.table.tolist(), strict=True)}
    kept, unknown = set(), []
    for name, file in files.items():
        if name not in present:
            continue
        size, stamp = present[name]
        row = known.get(name)
        if row is not None and name not in changing and (row[0], row[2]) != (file.size, file.mark):
            raise ValueError(
                f"{store.url} holds another {name}, of another dataset: episodes never change. Choose another URL."
            )
        if row is not None and (size, stamp) == (row[0], row[1]) and (file.size, file.mark) == (row[0], row[2]):
            kept.add(name)
        elif size == file.size and name not in changing:
            unknown.append(file)  # Sent by a call that was killed, or brought by another tool.
    for first in range(0, len(unknown), _NUM_COMPARED):
        some = unknown[first : first + _NUM_COMPARED]
        kept |= {file.name for file, mark in zip(some, _marks_of(store, some), strict=True) if mark == file.mark}
    return kept


def _marks_of(store: ObjectStore, files: Sequence[_LocalFile]) -> Iterator[int]:
    """The marks of the objects of these names and sizes."""
    ranges = []
    for name, size, _ in files:
        ranges += [(name, 0, min(size, _MARKED), size), (name, _tail(size), size, size)]
    answers = dict(store.read_ranges([asked for asked in ranges if asked[1] < asked[2]]))
    parts = iter(answers[at] for at in range(len(answers)))
    for _, size, _ in files:
        head, tail = (next(parts), next(parts)) if size else (b"", b"")
        yield mark_of(size, head, tail) if isinstance(head, bytes) and isinstance(tail, bytes) else -1


def _table(store: ObjectStore, files: Mapping[str, _LocalFile]) -> np.ndarray:
    """The table of an index; ObjectStoreError if a file has not come as it was sent."""
    present = _present(store, files)
    rows = []
    for name, file in files.items():
        info = present.get(name)
        if info is None or info.size != file.size:
            found = "nothing" if info is None else f"{info.size} bytes"
            what = f"The store has {found} of {name} after {file.size} bytes were sent. Upload again"
            raise ObjectStoreError(5, what, store.url)
        rows.append((info.size, info.stamp, file.mark))
    return np.array(rows, np.int64).reshape(-1, 3)
