"""Import: the episodes of another format into a directory of our own, whole or not at all.

DIRECTORY.importing/        episodes so far, and origin.json; found again after a kill
DIRECTORY/                  the same folder, renamed when all of it is there
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from buffers.dataset import IndividualFileDataset
from buffers.dataset.files.directory import FileName
from buffers.disk import DAMAGED, TEMPORARY
from buffers.disk.lock import LOCK
from buffers.fields import Fields
from buffers.interop.alignment import arrays_in
from buffers.interop.base import Episode, FormatError, FormatReader, UnknownFieldError
from buffers.interop.fingerprint import fingerprint
from buffers.interop.formats import check_options, module_of
from buffers.interop.origin import ORIGIN, Origin, Summary, described, read_origin, sync_directory, write_origin
from buffers.utils import integer, progress_bar

__all__ = ["import_episodes"]

_SUFFIX = ".importing"
_LEAST_CAPACITY = 1 << 20
# What a request knows of the source.
_OF_SOURCE = ("episodes", "steps", "files")


def import_episodes(
    format: str,
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Summary:
    """Import a dataset of another format into a new directory of episodes, which `IndividualFileDataset` opens.

    Rows are aligned on arrival, as a `Recorder` stores them. The directory appears when all of it is there. After a
    kill, the same call goes on where that one was, and nothing is there twice; after an error of the source, nothing is
    left. One episode is in memory at a time.

    Args:
        format: The name of a module of `buffers.interop`.
        source: A file, a directory, or a name, as the `read` of that module takes it.
        directory: Must not exist, or be empty, or be what the same call has imported before.
        fields: The fields to import, where "obs" stands for all below it; None for all.
        limit: The number of episodes to import; None for all.
        progress: Whether to show a bar (of tqdm).
        **options: Those of the module's `read`.

    Returns:
        What is in the directory, and what was missing in the source.

    Raises:
        FormatError: The source is damaged, or no such format; names the path.
        TypeError: No such option; names those that there are.
        ValueError: An argument out of its range; no such field; the directory holds something else.
        RuntimeError: Another process imports to the same directory.
        ImportError: The library of an extra is missing; names the extra.
        OSError: The directory cannot be written. What is imported stays, for the same call to go on.
    """
    # A link to an empty directory is a place for the import, too.
    target, most = os.path.realpath(os.fspath(directory)), None if limit is None else integer("limit", limit, 0)
    where = os.fspath(source)
    check_options(format, module_of(format).read, options)
    try:
        return _read_into(format, where, target, fields, most, progress, options)
    except UnknownFieldError as error:
        try:
            known = _names_of(format, where, options)
        except (ValueError, OSError, ImportError):
            raise error from None
        raise UnknownFieldError(error.where, error.missing, known) from None


def _names_of(format: str, where: str, options: Mapping[str, Any]) -> list[str]:
    """The fields that a source has, as a reader that was asked for some may not have looked at others."""
    others = {name: value for name, value in options.items() if name != "dtypes"}
    with module_of(format).read(where, **others) as reader:
        return [name for episode in islice(reader, 1) for name in Fields.from_episode(episode.rows)]


def _read_into(
    format: str,
    where: str,
    target: str,
    fields: Sequence[str] | None,
    most: int | None,
    progress: bool,
    options: Mapping[str, Any],
) -> Summary:
    with module_of(format).read(where, fields=fields, **options) as reader:
        request = {"fields": _plain(reader.fields), "limit": most}
        # So that a source that has changed is not mixed with what was imported before.
        request |= {"episodes": reader.num_episodes, "steps": reader.num_steps, "files": fingerprint(reader.files())}
        given = {name: value for name, value in options.items() if name != "dtypes"}
        request |= {"dtypes": _plain(reader.dtypes), **{name: _plain(value) for name, value in given.items()}}
        place = os.path.abspath(where) if os.path.exists(where) else where
        origin = Origin(format, place, request, lost=list(reader.notes), metadata=reader.metadata)
        was_there = _is_finished(target, origin)
        if not was_there:
            _import(reader, target, origin, most, progress)
    found = read_origin(target)
    assert found is not None  # It was written, or found.
    return replace(_summary(target, found), was_there=was_there)


def _plain(value: Any) -> Any:
    """As JSON holds it; arrays by their content, because one asks for the same by the same values."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype} {value.shape} {content}"
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


# The place.


def _is_finished(target: str, origin: Origin) -> bool:
    """Whether the same was imported before; ValueError if something else is in the way."""
    if not os.path.lexists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return False
    found = read_origin(target)
    if found is None:
        raise ValueError(f"{target} exists and was not imported. Choose another directory.")
    _check_same(target, found, origin)
    if not found.is_finished:
        raise ValueError(f"{target} is a part of an import: rename it to {target}{_SUFFIX}, then it goes on.")
    return True


def _check_same(path: str, found: Origin, origin: Origin) -> None:
    if (found.format, found.source, found.request) == (origin.format, origin.source, origin.request):
        return
    same = {name: found.request.get(name) for name in _OF_SOURCE}
    if (found.format, found.source, {**origin.request, **same}) == (origin.format, origin.source, found.request):
        raise ValueError(
            f"{origin.source} has changed since {path} was imported from it: other names, sizes or times of files. "
            "Ask for the same of a source that has not changed, or choose another directory."
        )
    raise ValueError(
        f"{path} holds an import of {found.source} ({found.format}) with {found.request}, not of {origin.source} "
        f"({origin.format}) with {origin.request}. Ask for the same of a source that has not changed, or choose "
        "another directory."
    )


def _strangers(work: str) -> list[str]:
    """What is in the folder of an import that no import puts there."""
    own = {LOCK, ORIGIN, DAMAGED, "late"}
    names = os.listdir(work) if os.path.isdir(work) else []
    kept = [name for name in names if name not in own and not name.startswith(TEMPORARY) and ".next" not in name]
    return sorted(name for name in kept if FileName.parse(name) is None)


def _remove(work: str) -> None:
    """Remove the folder of an import; what tells whose it is goes last, so that a removal that is cut off goes on."""
    if not _strangers(work):
        for name in sorted(os.listdir(work), key=lambda name: name == ORIGIN):
            path = os.path.join(work, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        os.rmdir(work)


def _earlier_part(work: str, origin: Origin) -> int:
    """The steps of an import that was cut off and is to go on, 0 if there are none; `origin` gets what it knows."""
    if strangers := _strangers(work):
        raise ValueError(f"{work} holds {strangers[0]}, which no import has put there. Move it away.")
    found = read_origin(work)
    if found is None:
        if os.path.isdir(work) and any(FileName.parse(name) for name in os.listdir(work)):
            raise ValueError(f"{work} exists and is no import. Move it away.")
        return 0
    _check_same(work, found, origin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Of damaged files.
        with IndividualFileDataset(directory=work, mode="r", verify="full") as dataset:
            is_whole = dataset.table.ids.tolist() == [*range(dataset.table.next_id)]
            num_steps = dataset.num_timesteps
    if not is_whole:
        _remove(work)  # After a loss of power, so it begins anew.
        return 0
    origin.lost = list(dict.fromkeys([*found.lost, *origin.lost]))
    origin.metadata = {**found.metadata, **origin.metadata}
    return num_steps


# The import.


def _import(reader: FormatReader, target: str, origin: Origin, limit: int | None, progress: bool) -> None:
    work = target + _SUFFIX
    num_steps = _earlier_part(work, origin)
    os.makedirs(work, exist_ok=True)
    try:
        store = _Store(work, max(_LEAST_CAPACITY, reader.num_steps or 0, num_steps))
    except RuntimeError as error:
        raise RuntimeError(
            f"{target} is being imported by another process: wait for it. Once that has ended, or was killed, the same "
            f"import goes on where it stopped. ({error})"
        ) from error
    try:
        write_origin(work, origin)
        reader.notes.texts[:] = origin.lost
        _add_all(reader, store, origin, limit, progress)
        origin.lost, origin.is_finished = list(reader.notes), True
        origin.metadata = {**origin.metadata, **reader.metadata}
        write_origin(work, origin)
    except (ValueError, TypeError, LookupError):
        store.dataset.close()
        _remove(work)
        raise
    finally:
        store.dataset.close()
    # Once for all files, because one fsync a file takes most of the time of small episodes.
    os.sync()
    os.rename(work, target)
    sync_directory(os.path.dirname(target))


def _add_all(reader: FormatReader, store: _Store, origin: Origin, limit: int | None, progress: bool) -> None:
    """Store what is missing."""
    first = store.dataset.table.next_id
    total = reader.num_episodes if limit is None else min(limit, reader.num_episodes or limit)
    with progress_bar(progress, total, "import", "episode", first) as bar:
        episodes = reader.episodes(first) if limit is None else islice(reader.episodes(first), max(0, limit - first))
        for number, episode in enumerate(episodes, first):
            if len(reader.notes) > len(origin.lost):
                # Before the episode is stored, so that a later call need not read it again to know.
                origin.lost = list(reader.notes)
                origin.metadata = {**origin.metadata, **reader.metadata}
                write_origin(store.work, origin)
            try:
                store.add(episode)
            except (ValueError, TypeError) as error:
                advice = f"`limit={number}` (--limit {number}) imports the episodes before it"
                raise FormatError(reader.path, f"Episode {number} cannot be stored: {error}", advice) from error
            bar.update(1)


class _Store:
    """The folder of an import, from which nothing is evicted: it is opened with twice the capacity instead."""

    def __init__(self, work: str, capacity: int) -> None:
        self.work = work
        self.dataset = IndividualFileDataset(capacity, directory=work, durability="rename")

    def add(self, episode: Episode) -> None:
        """As `add_episode`."""
        dataset, length = self.dataset, len(next(arrays_in(episode.rows))[1])
        if dataset.num_timesteps + length > dataset.capacity:
            dataset.close()
            capacity = 2 * dataset.capacity + length
            self.dataset = IndividualFileDataset(capacity, directory=self.work, durability="rename")
        self.dataset.add_episode(*episode)


def _summary(target: str, origin: Origin) -> Summary:
    with IndividualFileDataset(directory=target, mode="r") as dataset:
        counts = dataset.num_episodes, dataset.num_timesteps
        kinds, row_bytes = ({}, 0) if dataset.fields is None else (described(dataset.fields), dataset.fields.nbytes)
        return Summary(origin.format, origin.source, target, *counts, kinds, origin.lost, counts[1] * row_bytes)
