"""Checks of ours."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from benchmarks.checks.common import LENGTH, NUM_EPISODES, killed_after, same, small_store, tagged_env
from benchmarks.peers.ours import Ring
from benchmarks.workloads import tagged_rows, tags_of
from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.wrappers import VectorRecordEpisodes


def live_data(folder: str) -> str:
    """Two workers of a loader, which run while episodes are added."""
    ring = Ring()
    small_store(ring)
    batches = iter(ring.dataset.get_loader(50, 1, num_workers=2, seed=0))
    for _ in range(6):
        assert (tags_of(next(batches)["obs"].numpy())[0] < 1_000).all()
    ring.add_rows(tagged_rows("state", 1_000, NUM_EPISODES, LENGTH), LENGTH)
    seen = any((tags_of(next(batches)["obs"].numpy())[0] >= 1_000).any() for _ in range(12))
    return "yes" if seen else "no"


def _write(folder: str) -> Any:
    dataset = IndividualFileDataset(1_000, directory=Path(folder) / "killed")
    for episode in range(5):
        dataset.add_episode(tagged_rows("state", episode, 1, LENGTH))
    return dataset


def survives_kill(folder: str) -> str:
    """A process adds five episodes to files and is killed; they are opened again."""
    killed_after(_write, folder)
    with IndividualFileDataset(1_000, directory=Path(folder) / "killed") as dataset:
        found = [np.asarray(episode["obs"])[:, 1].tolist() for episode in dataset.episodes()]
    return "yes" if found == [list(range(LENGTH))] * 5 else f"{len(found)} of 5 episodes"


def same_batches(folder: str) -> str:
    """The first batches for 0, 1 and 2 workers."""
    ring = Ring()
    small_store(ring)
    found = []
    for num_workers in (0, 1, 2):
        loader = ring.dataset.get_loader(8, 4, num_workers=num_workers, seed=3)
        found.append([batch["obs"].numpy().copy() for batch in itertools.islice(loader, 6)])
    return "yes" if same(found[0], found[1]) and same(found[0], found[2]) else "no"


def final_observation(folder: str) -> str:
    """Two environments under each of Gymnasium's modes that reset by themselves; an episode's last row is looked at."""
    lasts = []
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        ring = RingBufferDataset(1_000)
        envs = SyncVectorEnv([lambda: tagged_env(7), lambda: tagged_env(4)], autoreset_mode=mode)
        recording = VectorRecordEpisodes(envs, ReplayBuffer(ring, 4))
        recording.reset(seed=0)
        for _ in range(60):
            recording.step(recording.action_space.sample())
        lasts += [(len(episode["obs"]) - 1, float(episode["obs"][-1, 0])) for episode in ring.episodes()]
    return "yes" if lasts and all(last in ((7, 7.0), (4, 4.0)) for last in lasts) else "no"


def whole_episodes(folder: str) -> str:
    """Batches of whole episodes of 2 to 9 rows: the mask says which rows are real, and these are the episode's."""
    ring = RingBufferDataset(1_000)
    for length in range(2, 10):
        ring.add_episode(tagged_rows("state", length, 1, length))
    for batch in itertools.islice(ring.get_loader(16, seed=0), 10):
        episode, step = tags_of(batch["obs"].numpy())
        for b, mask in enumerate(batch["mask"].numpy()):
            length = episode[b, 0]
            if mask.sum() != length or step[b, :length].tolist() != list(range(length)):
                return "no"
            assert not torch.any(batch["obs"][b, length:])
    return "yes"
