"""Whether the files of a source are those that they were, without reading them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator

__all__ = ["fingerprint"]


def fingerprint(places: Iterable[str]) -> str | None:
    """A hash of the names, sizes and times of change of files, and of all files below directories.

    One look at each entry, and no list of them. Hidden files, such as the state of a download, are left out.

    Returns:
        None if there is no file.
    """
    digest, has_files = hashlib.sha256(), False
    for place in places:
        for path in _files(place):
            try:
                found = os.stat(path)
            except FileNotFoundError:  # A link to nothing.
                continue
            has_files = True
            name = os.path.basename(place) + path[len(place) :]
            digest.update(os.fsencode(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0"))
    return digest.hexdigest() if has_files else None


def _files(place: str) -> Iterator[str]:
    """The files at, or below, a path, in the order of their names."""
    if not os.path.isdir(place):
        yield place
        return
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))
