"""Import: the episodes of another format into a directory of our own, whole or not at all.

DIRECTORY.importing/        episodes so far, and origin.json; found again after a kill
DIRECTORY/                  the same folder, renamed when all of it is there
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any

from buffers.dataset import IndividualFileDataset
from buffers.interop.alignment import arrays_in
from buffers.interop.base import Episode, FormatError, FormatReader, Notes
from buffers.interop.formats import module_of
from buffers.interop.origin import Origin, Summary, described, read_origin, sync_directory, write_origin
from buffers.utils import integer, progress_bar

__all__ = ["import_episodes"]

_SUFFIX = ".importing"
_LEAST_CAPACITY = 1 << 20


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
        ValueError: An argument out of its range; the directory holds something else.
        ImportError: The library of an extra is missing; names the extra.
        OSError: The directory cannot be written. What is imported stays, for the same call to go on.
    """
    target, most = os.path.abspath(os.fspath(directory)), None if limit is None else integer("limit", limit, 0)
    where = os.fspath(source)
    with module_of(format).read(where, fields=fields, **options) as reader:
        request = {"fields": reader.fields, "limit": most, **{name: str(value) for name, value in options.items()}}
        # So that a source that has changed is not mixed with what was imported before.
        request |= {"episodes": reader.num_episodes, "steps": reader.num_steps}
        if os.path.isfile(where):
            request["modified"] = os.stat(where).st_mtime_ns
        place = os.path.abspath(where) if os.path.exists(where) else where
        origin = Origin(format, place, request, lost=list(reader.notes), metadata=reader.metadata)
        if not _is_finished(target, origin):
            _import(reader, target, origin, most, progress)
    found = read_origin(target)
    assert found is not None  # It was written, or found.
    return _summary(target, found)


def _is_finished(target: str, origin: Origin) -> bool:
    """Whether the same was imported before; ValueError if something else is in the way."""
    if not os.path.lexists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return False
    found = read_origin(target)
    if found is None:
        raise ValueError(f"{target} exists and was not imported. Choose another directory.")
    _check_same(target, found, origin)
    return True


def _check_same(path: str, found: Origin, origin: Origin) -> None:
    asked = (origin.format, origin.source, _plain(origin.request))
    if (found.format, found.source, _plain(found.request)) != asked:
        raise ValueError(
            f"{path} holds an import of {found.source} ({found.format}) with {found.request}, not of {origin.source} "
            f"({origin.format}) with {origin.request}. Ask for the same, or choose another directory."
        )


def _plain(request: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in request.items()}


def _import(reader: FormatReader, target: str, origin: Origin, limit: int | None, progress: bool) -> None:
    work = target + _SUFFIX
    if os.path.isdir(work) and os.listdir(work):
        found = read_origin(work)
        if found is None:
            raise ValueError(f"{work} exists and is no import. Move it away.")
        _check_same(work, found, origin)
        if not _is_contiguous(work):
            shutil.rmtree(work)  # After a loss of power.
        origin.lost = list(dict.fromkeys([*found.lost, *origin.lost]))
    os.makedirs(work, exist_ok=True)
    write_origin(work, origin)
    reader.notes = Notes(origin.lost)
    try:
        _add_all(reader, work, origin, limit, progress)
    except (ValueError, TypeError):
        shutil.rmtree(work)
        raise
    origin.is_finished = True
    write_origin(work, origin)
    # Once for all files, because one fsync a file takes most of the time of small episodes.
    os.sync()
    if os.path.isdir(target):
        os.rmdir(target)
    os.rename(work, target)
    sync_directory(os.path.dirname(target))


def _is_contiguous(work: str) -> bool:
    """Whether the first episodes are there, whole, without a gap."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Of damaged files.
        with IndividualFileDataset(directory=work, mode="r", verify="full") as dataset:
            return dataset.table.ids.tolist() == [*range(dataset.table.next_id)]


def _add_all(reader: FormatReader, work: str, origin: Origin, limit: int | None, progress: bool) -> None:
    dataset = _opened(work, max(_LEAST_CAPACITY, reader.num_steps or 0))
    try:
        first = dataset.table.next_id
        total = reader.num_episodes if limit is None else min(limit, reader.num_episodes or limit)
        with progress_bar(progress, total, "import", "episode", first) as bar:
            episodes = reader.episodes(first) if limit is None else islice(reader.episodes(first), limit - first)
            for number, episode in enumerate(episodes, first):
                if len(reader.notes) > len(origin.lost):
                    # Before the episode is stored, so that a later call need not read it again to know.
                    origin.lost = list(reader.notes)
                    write_origin(work, origin)
                dataset = _add(dataset, episode, number, reader, work)
                bar.update(1)
    finally:
        dataset.close()


def _opened(work: str, capacity: int) -> IndividualFileDataset:
    return IndividualFileDataset(capacity, directory=work, durability="rename")


def _add(
    dataset: IndividualFileDataset, episode: Episode, number: int, reader: FormatReader, work: str
) -> IndividualFileDataset:
    """Store an episode. Nothing is evicted: if there is no room, the directory is opened with twice the capacity."""
    try:
        length = len(next(arrays_in(episode.rows))[1])
        if dataset.num_timesteps + length > dataset.capacity:
            dataset.close()
            dataset = _opened(work, 2 * dataset.capacity + length)
        dataset.add_episode(*episode)
    except (ValueError, TypeError) as error:
        advice = f"`limit={number}` (--limit {number}) imports the episodes before it"
        raise FormatError(reader.path, f"Episode {number} cannot be stored: {error}", advice) from error
    return dataset


def _summary(target: str, origin: Origin) -> Summary:
    with IndividualFileDataset(directory=target, mode="r") as dataset:
        counts = dataset.num_episodes, dataset.num_timesteps
        kinds, row_bytes = ({}, 0) if dataset.fields is None else (described(dataset.fields), dataset.fields.nbytes)
        return Summary(origin.format, origin.source, target, *counts, kinds, origin.lost, counts[1] * row_bytes)
