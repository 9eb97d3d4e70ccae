"""Export: episodes of a dataset into another format. The target appears when all of it is there."""

from __future__ import annotations

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
from buffers.interop.alignment import Transitions, transitions_of
from buffers.interop.base import Notes, chosen_fields
from buffers.interop.formats import check_options, module_of
from buffers.interop.origin import Summary, described, read_origin, sync_directory
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
        fields: The fields to write, where "obs" stands for all below it; None for all.
        limit: The number of episodes to write; None for all.
        progress: Whether to show a bar (of tqdm).

    Attributes:
        keeps_first: The fields of which the format holds first rows, too; those of others are left out with a note.
        notes: What the format cannot hold.
        metadata: What the dataset was imported with, if it was imported from the same format, else {}.

    Raises:
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
        if isinstance(fields, str):
            raise TypeError(f"`fields` must be a sequence of names, found {fields!r:.60}.")
        if dataset.fields is None or dataset.is_empty:
            raise ValueError("There is no episode to write.")
        chosen = chosen_fields("The dataset", dataset.fields, fields)
        if opaque := [name for name, kind in chosen.items() if kind.dtype == torch.bfloat16]:
            raise ValueError(f"{opaque} are bfloat16, which other formats do not have. Leave them out of `fields`.")
        self.dataset, self.fields = dataset, chosen
        self.format, self.path = format, os.path.abspath(os.fspath(path))
        self.notes, self._progress = Notes(), progress
        self.keeps_first: Collection[str] = ()
        most = dataset.num_episodes if limit is None else min(integer("limit", limit, 0), dataset.num_episodes)
        self.ids: list[int] = dataset.table.ids[:most].tolist()
        self._counts = [0, 0]
        source = dataset.describe_store().get("directory")
        origin = None if source is None else read_origin(source)
        self.metadata: dict[str, Any] = origin.metadata if origin is not None and origin.format == format else {}
        self.source = type(dataset).__name__ if source is None else str(source)
        if dataset.table.has_cuts:
            self.notes.add("Pieces that `max_episode_length` cut are episodes of their own.")

    def __iter__(self) -> Iterator[Exported]:
        """The episodes; those with no transition are left out, which the summary says."""
        number, self._counts = 0, [0, 0]
        with progress_bar(self._progress, len(self.ids), "export", "episode") as bar:
            for episode_id in self.ids:
                rows = self.dataset.arrays_of_id(episode_id)
                if rows is not None:  # It may be evicted meanwhile.
                    found = transitions_of(self.fields.unflatten(rows))
                    if found.num_steps == 0:
                        self.notes.add("Episodes of one row, without a transition, are left out.")
                    else:
                        self._note(found)
                        yield Exported(number, found, self.dataset.episode_info(episode_id))
                        number += 1
                        self._counts[0] += 1
                        self._counts[1] += found.num_steps + 1
                bar.update(1)

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
    target = os.path.abspath(os.fspath(path))
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


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
