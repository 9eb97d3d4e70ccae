"""Bringing a directory to a store of objects: content first, then what readers go by, then what is old leaves.

The index comes last. A kill at any point leaves it as it was, and all that it names; the same call then goes on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from buffers.dataset.files.directory import EpisodeDirectory
from buffers.dataset.files.late_files import LATE
from buffers.dataset.files.object_directory import EPISODES
from buffers.disk import DamagedEpisodeError, described_fields
from buffers.fields import Fields
from buffers.objects import INDEX, Index, ObjectInfo, ObjectStore, ObjectStoreError, mark_of
from buffers.table import EpisodeTable
from buffers.utils import format_bytes, progress_bar

__all__ = ["Contents", "Transfer", "episodes_in", "read_index", "send"]

_FORMAT = ".safetensors"
_MARKED = 4096
_NUM_COMPARED = 64


class Transfer(NamedTuple):
    """What an upload or a download has done."""

    num_files: int
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


def send(root: str, contents: Contents, store: ObjectStore, progress: bool) -> Transfer:
    """Bring files of a directory to a store, as far as they are not there.

    Raises:
        ValueError: The store holds other things, which would be overwritten.
        ObjectStoreError: It does not do what it was asked. The same call goes on where this one was.
    """
    store.prepare()
    old = read_index(store)
    _check_kind(store.url, old, contents.said)
    files = _local_files(root, contents.names)
    was_there = set() if old is None else {*old.names, *old.said.get("leaving", [])}
    present = _present(store, {*files, *was_there})
    kept = _kept(store, files, present, old, contents.changing)
    to_send = [file for name, file in files.items() if name not in kept]
    with progress_bar(progress, sum(file.size for file in to_send), "uploading") as bar:
        for last in (False, True):
            some = [file for file in to_send if (file.name in contents.last) is last]
            for at in store.upload([(os.path.join(root, file.name), file.name, file.size) for file in some]):
                bar.update(some[at].size)
    files = {name: file for name, file in files.items() if os.path.exists(os.path.join(root, name))}
    names = list(files)
    leaving = sorted((was_there & {*present}) - {*names})
    said = {**contents.said, "num_objects": len(names), "leaving": leaving}
    store.write(INDEX, Index(said, names, _table(store, files)).encode())
    store.remove(leaving)
    num_bytes = sum(file.size for file in to_send)
    return Transfer(len(to_send), num_bytes, len(kept), len(leaving))


def _check_kind(url: str, old: Index | None, said: Mapping[str, Any]) -> None:
    for key in ("kind", "run"):
        if old is not None and old.said.get(key) != said.get(key):
            found = f"{old.said.get('kind')}{' of another run' if key == 'run' else ''}"
            raise ValueError(f"{url} holds {found}, which would be removed. Choose another URL.")


def _local_files(root: str, names: Iterable[str]) -> dict[str, _LocalFile]:
    """Size and mark of each file, as far as they are still there."""
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
