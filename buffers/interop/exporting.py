"""Export: episodes of a dataset into another format. The target appears when all of it is there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from buffers.dataset import EpisodeDataset, IndividualFileDataset
from buffers.dataset.episode_info import EpisodeInfo
from buffers.disk import Descriptor, open_directory
from buffers.disk.lock import LOCK, take_lock
from buffers.fields import Fields
from buffers.interop.alignment import MARKS, Transitions, transitions_of
from buffers.interop.base import Notes, chosen_fields
from buffers.interop.formats import check_options, module_of
from buffers.interop.origin import Summary, described, read_origin, sync_directory
from buffers.table import context_of
from buffers.utils import integer, progress_bar

__all__ = ["Exported", "Exporter", "export_episodes", "new_target"]

_SUFFIX = ".exporting"
# In the folder of an export.
_CONTENT = "content"


class Exported(NamedTuple):
    """An episode to write."""

    number: int  # 0 for the first that is written.
    transitions: Transitions
    info: EpisodeInfo


class Exporter:
    """The episodes of a dataset as a format needs them, oldest first, one at a time; it counts them for the summary.

    Args:
        dataset: Of episodes whose rows are aligned on arrival, with the field `obs`.
        format: The name of the format.
        path: What is written.
        fields: The fields to write, where "obs" stands for all below it; None for all. The marks `is_first` and
            `final_obs_missing` say what rows are, and are read in any case.
        limit: The number of episodes to write; None for all.
        progress: Whether to show a bar (of tqdm).

    Attributes:
        keeps_first: The fields of which the format holds first rows, too; those of others are left out with a note.
        notes: What the format cannot hold.
        metadata: What the dataset was imported with, if it was imported from the same format, else {}.

    Raises:
        TypeError: The dataset is a mixture, for example.
        ValueError: The dataset is empty, or there is no such field.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        format: str,
        path: str | os.PathLike[str],
        fields: Sequence[str] | None = None,
        limit: int | None = None,
        progress: bool = False,
    ) -> None:
        known = _known_fields(dataset, fields)
        chosen = chosen_fields("The dataset", known, fields)
        chosen = known.select({*chosen, *(mark for mark in MARKS if mark in known)})
        if opaque := [name for name, kind in chosen.items() if kind.dtype == torch.bfloat16]:
            raise ValueError(f"{opaque} are bfloat16, which other formats do not have. Leave them out of `fields`.")
        self.dataset, self.fields = dataset, chosen
        self.format, self.path = format, os.path.abspath(os.fspath(path))
        self.notes, self._progress = Notes(), progress
        self.keeps_first: Collection[str] = ()
        most = dataset.num_episodes if limit is None else min(integer("limit", limit, 0), dataset.num_episodes)
        _, _, ids, cuts = dataset.table.rows[:most].T
        self.ids: list[int] = ids.tolist()
        self._contexts: list[int] = context_of(cuts).tolist()
        self._counts = [0, 0]
        source = dataset.describe_store().get("directory")
        origin = None if source is None else read_origin(source)
        self.metadata: dict[str, Any] = origin.metadata if origin is not None and origin.format == format else {}
        self.source = type(dataset).__name__ if source is None else str(source)
        if dataset.table.has_cuts:
            self.notes.add("Pieces that `max_episode_length` cut are episodes of their own.")
        if dataset.late_fields is not None:
            self.notes.add(f"The late fields {list(dataset.late_fields)} are left out.")

    def __iter__(self) -> Iterator[Exported]:
        """The episodes; those with no transition are left out, which the summary says."""
        number, num_gone, self._counts = 0, 0, [0, 0]
        with progress_bar(self._progress, len(self.ids), "export", "episode") as bar:
            for episode_id, context in zip(self.ids, self._contexts, strict=True):
                found = self._transitions(episode_id, context)
                if found is None:
                    num_gone += 1
                elif found.num_steps == 0:
                    self.notes.add("Episodes of one row, without a transition, are left out.")
                else:
                    if not context:  # Else, row 0 belongs to a transition of the piece before.
                        self._note(found)
                    yield Exported(number, found, self.dataset.episode_info(episode_id))
                    number += 1
                    self._counts[0] += 1
                    self._counts[1] += found.num_steps + 1
                bar.update(1)
        if num_gone:
            of_all = f"{num_gone} of {len(self.ids)} episodes"
            self.notes.add(f"{of_all} could not be read any more (evicted, lost or damaged), and are left out.")

    def _transitions(self, episode_id: int, context: int) -> Transitions | None:
        """Those of an episode that begins with `context` rows of the piece before it; None if it is gone."""
        rows = self.dataset.arrays_of_id(episode_id)
        if rows is None:
            return None
        # Its first transition begins at the last row of context; those between rows of context are in that piece.
        if context > 1:
            self.notes.add("Transitions that a piece repeats from the piece before it (`overlap`) are written once.")
            rows = {name: values[context - 1 :] for name, values in rows.items()}
        return transitions_of(self.fields.unflatten(rows))

    def _note(self, found: Transitions) -> None:
        for name in found.losses():
            if name not in self.keeps_first:
                text = f"`{name}` of first rows, which belong to no transition, is left out where it is not zero."
                self.notes.add(text)

    def summary(self) -> Summary:
        """What was written."""
        num_episodes, num_steps = self._counts
        kinds = described(self.fields)
        num_bytes = num_steps * self.fields.nbytes
        return Summary(self.format, self.source, self.path, num_episodes, num_steps, kinds, list(self.notes), num_bytes)


def _known_fields(dataset: EpisodeDataset, names: Sequence[str] | None) -> Fields:
    """The fields of a dataset that can be written."""
    if isinstance(names, str):
        raise TypeError(f"`fields` must be a sequence of names, found {names!r:.60}.")
    if not isinstance(dataset, EpisodeDataset):
        raise TypeError(f"Only an EpisodeDataset can be written, found a {type(dataset).__name__}. Write its members.")
    if dataset.fields is None or dataset.is_empty:
        raise ValueError("There is no episode to write.")
    if late := [name for name in names or () if name in (dataset.late_fields or ())]:
        raise ValueError(f"The late fields {late} cannot be written. Leave them out of `fields`.")
    return dataset.fields


def export_episodes(
    format: str,
    directory: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Summary:
    """Write a directory of episodes in another format: `write` of the module, for a dataset that is opened to read.

    Args are those of `import_episodes`, with the `options` of the module's `write`. After a kill, there is no target,
    and the same call writes it anew.

    Raises:
        ValueError: The format is only read; the target exists; the episodes do not fit the format.
        ImportError: The library of an extra is missing; names the extra.
    """
    module = module_of(format)
    if not hasattr(module, "write"):
        raise ValueError(f"The format {format!r} is only read. Write hdf5, lerobot, minari or npz.")
    check_options(format, module.write, options)
    if not os.path.isdir(directory):
        there = "is no directory" if os.path.lexists(directory) else "is not there"
        raise ValueError(f"{os.fspath(directory)} {there}. Give a directory of episodes, as an import makes it.")
    with IndividualFileDataset(directory=directory, mode="r") as dataset:
        return module.write(dataset, target, fields=fields, limit=limit, progress=progress, **options)


@contextmanager
def new_target(path: str | os.PathLike[str]) -> Iterator[str]:
    """A path in a folder beside the target, which is renamed to it at the end of the block, and removed after an error.

    Raises:
        ValueError: The target exists, or something else has the name of the folder.
        RuntimeError: Another process is writing the same target.
    """
    # A link to an empty directory is a place for the export, too.
    target = os.path.realpath(os.fspath(path))
    if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise ValueError(f"{target} exists. Choose another path, or move it away.")
    folder = target + _SUFFIX
    if os.path.lexists(folder) and (not os.path.isdir(folder) or {*os.listdir(folder)} - {LOCK, _CONTENT}):
        raise ValueError(f"{folder} exists and is no export. Move it away.")
    os.makedirs(folder, exist_ok=True)
    directory = Descriptor(open_directory(folder, False))
    lock, work = take_lock(folder, directory.number), os.path.join(folder, _CONTENT)
    try:
        _remove(work)  # Of an export that was killed.
        with _room_advised(target):
            yield work
            os.sync()
        if os.path.isdir(target) and not os.path.isdir(work):
            os.rmdir(target)
        os.rename(work, target)
        sync_directory(os.path.dirname(target))
    finally:
        _remove(folder)
        lock.close()
        directory.close()


@contextmanager
def _room_advised(target: str) -> Iterator[None]:
    """Say of a full disk what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        text = f"{error.strerror}: nothing of the export was kept. Make room, or choose another place, and export again"
        raise OSError(error.errno, text, target) from error


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
