"""Sources of every kind that can be saved, what is in them, and how they are compared."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from buffers.conversion import as_array
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.saving import Save, open_save
from tests import tagged
from tests.list_dataset import ListDataset

KINDS = ("ring", "half", "files", "extended", "mixture", "list")


def make(kind: str, folder: Path, capacity: int = 60) -> EpisodeSource:
    """An empty source; files in the folder, which may be those of an earlier one."""
    if kind in ("ring", "half"):
        return RingBufferDataset(capacity, half_precision=kind == "half")
    if kind == "list":
        return ListDataset(capacity)
    files = IndividualFileDataset(3 * capacity, directory=folder / "episodes", durability="rename")
    if kind == "files":
        return files
    ring = RingBufferDataset(capacity)
    if kind == "extended":
        ring.extend(files, other_batch_size=2, seed=0)
        return ring
    return MixtureDataset([ring, files], [0.7, 0.3])


def writable(source: EpisodeSource) -> EpisodeDataset:
    """What episodes are added to."""
    return source.stores[0]


def close(source: EpisodeSource) -> None:
    """Give up the directories, as the death of the process does."""
    for store in source.stores:
        if isinstance(store, IndividualFileDataset):
            store._directory.close()


def contents(source: EpisodeSource) -> list[Any]:
    """Everything that is stored, in a form that compares by value."""
    found = []
    for store in source.stores:
        table = store.table
        counts = table.next_id, table.next_start, store.num_evicted, store.num_lost, store.num_dismissed
        episodes = [
            {name: rows.tobytes() for name, rows in (store.arrays_of_id(number) or {}).items()}
            for number in table.ids.tolist()
        ]
        infos = [store.episode_info(number) for number in table.ids.tolist()]
        steps = np.concatenate([np.arange(start, start + n) for start, n, *_ in table.rows.tolist()] or [np.arange(0)])
        late = {name: as_array(name, field.rows(steps)).tobytes() for name, field in store.late.items()}
        found.append([table.rows.tolist(), counts, episodes, infos, late])
    return found


def same(one: Any, other: Any) -> bool:
    """Whether batches are equal to the last bit."""
    leaves, others = tree_leaves(one), tree_leaves(other)
    return len(leaves) == len(others) and all(map(torch.equal, leaves, others))


def loaded(directory: Path, source: EpisodeSource | None = None, **options: Any) -> Any:
    """`load`, without the warning of files that were set aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return EpisodeSource.load(directory, source, **options)


def opened_save(directory: Path) -> Save:
    return open_save(str(directory))


def add(dataset: EpisodeDataset, number: int, length: int = 7) -> None:
    dataset.add_episode(tagged.episode(length, number), info={"number": number} if number % 3 else None)


def hold_the_writer(source: Any, gate: threading.Event) -> None:
    """Let the thread of a save wait, but not the one that adds, which writes what it is about to overwrite."""
    begin = type(writable(source)).begin_save

    def held(self: Any, unsaved: Any) -> None:
        for part in unsaved:
            write_all = part.write_all
            part.write_all = lambda write_all=write_all: (gate.wait(), write_all())
        begin(self, unsaved)

    for store in source.stores:
        store.begin_save = held.__get__(store)
