"""Checks of files by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.checks.common import LENGTH, child_sees_additions, killed_after, same, small_store
from benchmarks.peers.files import NpzFiles
from benchmarks.workloads import Store, tagged_rows


def _files(folder: str) -> NpzFiles:
    contestant = NpzFiles()
    contestant.folder = folder
    return contestant


def live_data(folder: str) -> str:
    """A forked process, which has the list of files as it was."""
    return "yes" if child_sees_additions(_files(folder)) else "no"


def _write(folder: str) -> None:
    contestant = _files(folder)
    contestant.fill(Store("state", 1_000, LENGTH, is_filled=False))
    contestant.add_rows(tagged_rows("state", 0, 5, LENGTH), LENGTH)


def survives_kill(folder: str) -> str:
    """A process writes five files and is killed; then one is cut off, as a kill in the middle of writing leaves it."""
    killed_after(_write, folder)
    paths = sorted((Path(folder) / "by_hand").glob("*.npz"))
    whole = sum(len(np.load(path)["reward"]) == LENGTH for path in paths)
    paths[0].write_bytes(paths[0].read_bytes()[:500])
    try:
        np.load(paths[0])["reward"]
    except Exception:
        return "yes; one cut off ends the reader" if whole == 5 else f"{whole} of 5 episodes"
    return "yes"


def same_batches(folder: str) -> str:
    """The first batches of a DataLoader, everything seeded alike, for 0, 1 and 2 workers."""
    contestant = _files(folder)
    small_store(contestant)
    found = []
    for num_workers in (0, 1, 2):
        torch.manual_seed(3)
        contestant._num_workers = num_workers
        draw = contestant.drawer(8, 4)
        found.append([draw()["obs"].numpy() for _ in range(6)])
    return "yes" if same(found[0], found[1]) and same(found[0], found[2]) else "no"


def whole_episodes(folder: str) -> str:
    """Episodes of unlike length, batched by the DataLoader's own way."""
    episodes = [tagged_rows("state", length, 1, length) for length in range(2, 10)]
    try:
        next(iter(DataLoader(episodes, batch_size=8)))  # type: ignore[arg-type]
    except RuntimeError:
        return "no, cannot be stacked"
    return "yes"
