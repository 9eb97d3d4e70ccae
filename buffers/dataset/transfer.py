"""Copying directories of episodes, or of saves, to stores of objects and back."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from buffers.dataset.files.directory import FileName
from buffers.dataset.files.individual_file import IndividualFileDataset
from buffers.dataset.files.sending import Contents, Transfer, local_files, read_index, send
from buffers.disk import Descriptor, Directory, open_directory
from buffers.disk.lock import LOCK, capacity_in, sign, take_lock
from buffers.objects import INDEX, ObjectFile, ObjectFiles, ObjectInfo, ObjectStore, Page
from buffers.saving import is_save_directory, list_saves
from buffers.saving.saved import file_name, folders_of_links, save_numbers
from buffers.utils import progress_bar

__all__ = ["Transfer", "download", "upload"]

SAVES = "saves"
# What may be downloaded: names from elsewhere never become other paths.
_MARKER = re.compile(r"[0-9]{10,15}-[0-9]{12,15}\.next")
_LATE_FILE = re.compile(r"late/[a-z0-9_%~-]+\.safetensors")
_SAVE_FILE = re.compile(r"save-[0-9]{10}\.safetensors")
_SAVE_FOLDER = re.compile(r"save-[0-9]{10}-[0-9]+\.episodes")
_BATCH_FILES, _BATCH_BYTES = 64, 2**27


def upload(
    directory: str | os.PathLike[str],
    url: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    timeout: float = 10.0,
    progress: bool = False,
) -> Transfer:
    """Copy a directory of episodes, or of saves, to a URL: what is not there yet, and an index of all of it, last.

    Killed at any point, the URL holds what it held before, and the same call goes on. What the directory does not have
    any more is removed from the URL in the end. The directory may be written to meanwhile: the index names only what
    was uploaded. One upload to a URL at a time.

    Args:
        directory: Of episodes (see `IndividualFileDataset`), or of saves.
        url: A folder of a store, "s3://bucket/folder" for example.
        storage_options: What fsspec needs to reach the store.
        timeout: Seconds until the store must have answered a request; an upload may take longer by its size.
        progress: Show a bar.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: The URL holds something else, which would be removed; or it has episodes, and the directory none.
        RuntimeError: Files of the directory go faster than they are uploaded.
        ObjectStoreError: The store does not do what it was asked.
    """
    path, store = os.fspath(directory), ObjectStore(url, storage_options, timeout)
    if is_save_directory(path):
        return send(path, partial(_saves_in, path), store, progress)
    with IndividualFileDataset(directory=path, mode="r") as dataset:
        return dataset.upload(url, storage_options=storage_options, timeout=timeout, progress=progress)


def _saves_in(path: str) -> Contents:
    """All saves of a directory: the newest makes the others count."""
    saves = list_saves(path)
    newest = saves[-1][2]()
    newest.check()
    names = os.listdir(path)
    linked = [f"{name}/{file}" for name in sorted(folders_of_links(names)) for file in _episodes_in(path, name)]
    files = [file_name(number) for number in save_numbers(names)]
    return Contents({"kind": SAVES, "run": newest.run}, linked + files, files[-1:], set())


def _episodes_in(path: str, folder: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):  # A later save needs it no more, nor is the one that did there.
        return sorted(name for name in os.listdir(os.path.join(path, folder)) if FileName.parse(name))
    return []


def download(
    url: str,
    directory: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    timeout: float = 10.0,
    progress: bool = False,
) -> Transfer:
    """Copy episodes, or saves, from a URL into a directory, which is then like the one that was uploaded.

    Files that are there are left. Killed at any point, the same call goes on.

    Args:
        url: A folder of a store.
        directory: Made if necessary. It must not hold other episodes or saves.
        storage_options: What fsspec needs to reach the store.
        timeout: Seconds until the store must have answered a request.
        progress: Show a bar.

    Raises:
        FileNotFoundError: There are neither episodes nor saves under the URL.
        ValueError: The directory holds others.
        RuntimeError: Somebody writes to the directory.
        ObjectStoreError: The store does not do what it was asked.
    """
    store, path = ObjectStore(url, storage_options, timeout), os.path.abspath(os.fspath(directory))
    objects, capacity = _objects_of(store)
    if not objects:
        raise FileNotFoundError(2, "There are neither episodes nor saves under this URL. Check it", url)
    descriptor = Descriptor(open_directory(path, True))
    root, lock = Directory(path, descriptor, durable=True), take_lock(path, descriptor.number)
    try:
        _check_others(path, objects)
        missing = [name for name in _in_order(objects) if not _is_there(path, name, *objects[name])]
        num_bytes = sum(objects[name][0].size for name in missing)
        with progress_bar(progress, num_bytes, "downloading") as bar:
            for some in _batches(missing, objects):
                bar.update(_fetch(root, some, objects, ObjectFiles(store, None)))
        if capacity:
            sign(lock, capacity)
    finally:
        lock.close()
        root.close()
    return Transfer(len(missing), num_bytes, len(objects) - len(missing), 0)


_Objects = dict[str, tuple[ObjectInfo, int | None]]


def _objects_of(store: ObjectStore) -> tuple[_Objects, int]:
    """What is to be downloaded, with the marks that an index knows, and the capacity if it is known."""
    index = read_index(store)
    if index is not None:
        rows = zip(index.names, index.table.tolist(), strict=True)
        found: _Objects = {
            name: (ObjectInfo(size, stamp), mark) for name, (size, stamp, mark) in rows if _is_ours(name)
        }
        for name in [name for name in found if _LATE_FILE.fullmatch(name)]:
            if (info := store.info(name)) != found[name][0]:  # An upload has been killed since.
                found[name] = info, None
        return found, int(index.said.get("capacity", 0))
    found, capacity, folders = {}, 0, [""]
    for folder in folders:
        for page in _pages(store, folder):
            names = [(f"{folder}/{name}" if folder else name, info) for name, info in page.objects]
            found.update({name: (info, None) for name, info in names if _is_ours(name)})
            if any(name == LOCK for name, _ in names):
                capacity = capacity_in(store.read(LOCK).decode(errors="replace"))
            if not folder:
                folders += [name for name in page.folders if name == "late" or _SAVE_FOLDER.fullmatch(name)]
    return found, capacity


def _pages(store: ObjectStore, folder: str) -> Iterator[Page]:
    with contextlib.suppress(FileNotFoundError):
        yield from store.pages(folder)


def _is_ours(name: str) -> bool:
    folder, _, inner = name.rpartition("/")
    if folder and FileName.parse(inner):
        return _SAVE_FOLDER.fullmatch(folder) is not None
    kinds = _MARKER, _LATE_FILE, _SAVE_FILE
    return FileName.parse(name) is not None or any(kind.fullmatch(name) for kind in kinds)


def _check_others(path: str, objects: _Objects) -> None:
    others = sorted(name for name in os.listdir(path) if name not in objects and name != INDEX and _is_ours(name))
    if others:
        raise ValueError(
            f"{path} holds {len(others)} files that the URL does not have ({others[0]}, for example). Choose another "
            "directory."
        )


def _in_order(objects: _Objects) -> list[str]:
    """The newest save last: it makes the others count."""
    return sorted(objects, key=lambda name: (_SAVE_FILE.fullmatch(name) is not None, name))


def _is_there(path: str, name: str, info: ObjectInfo, mark: int | None) -> bool:
    found = local_files(path, [name]).get(name)
    if found is None:
        return False
    # What may change has no mark, and is fetched again.
    return found.size == info.size and (mark == found.mark if mark is not None else FileName.parse(name) is not None)


def _batches(names: Sequence[str], objects: _Objects) -> list[list[str]]:
    """Runs of files that are read at once."""
    sizes = np.array([objects[name][0].size for name in names], np.int64)
    groups = np.maximum(np.arange(len(names)) // _BATCH_FILES, sizes.cumsum() // _BATCH_BYTES)
    edges = np.flatnonzero(np.diff(groups)) + 1
    return [[names[at] for at in part.tolist()] for part in np.split(np.arange(len(names)), edges) if len(part)]


def _fetch(root: Directory, names: Sequence[str], objects: _Objects, files: ObjectFiles) -> int:
    """Bring files into the directory; the number of their bytes."""
    found = [files.file(name, objects[name][0]) for name in names]
    files.read_heads([(file, min(file.size, _BATCH_BYTES)) for file in found])
    for name, file in zip(names, found, strict=True):
        folder, _, last = name.rpartition("/")
        target = root.folder(folder, create=True) if folder else root
        assert target is not None  # It was created.
        target.commit(last, partial(_copy, file), replaces=True)
        file.head = b""
    return sum(file.size for file in found)


def _copy(file: ObjectFile, copy: Any) -> None:
    for offset in range(0, file.size, _BATCH_BYTES):
        copy.write(file.read_at(_BATCH_BYTES, offset))
