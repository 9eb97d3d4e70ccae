"""Ours: a `ReplayBuffer` over a ring, and over files.

Builds from before are measured by this module, too, so it uses only what they have in common with today's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contestant import Contestant, Rows
from benchmarks.workloads import (
    ALPHA,
    BETA,
    OFFSETS,
    ONLINE,
    PADDING,
    PRIORITIZED,
    RECENCY,
    UNIFORM,
    UPDATE,
    UPDATED,
    Store,
    TaggedEnvs,
    Workload,
    tagged_rows,
)
from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset
from buffers.dataset.fields import Fields, TensorType
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.sampler import Sampler, UniformEpisodeSampler, UniformSampler
from buffers.transforms import to_transitions

# Long episodes, of 900 to 1,100 steps, go round a ring so many times.
_NUM_LAPS = 5


class OwnSampler(UniformSampler):
    """A sampler of the user's own, which draws as its parent does."""


def stacked(batch: Any) -> Any:
    from buffers.transforms import stack_frames  # Which builds from before do not have.

    return stack_frames(batch, "obs", 4)


def info_of(store: Store) -> EpisodeDatasetInfo:
    return EpisodeDatasetInfo(
        Fields(**{name: TensorType(shape, getattr(torch, dtype)) for name, (shape, dtype) in store.fields.items()})
    )


def ring_of_long_episodes(store: Store) -> RingBufferDataset:
    """A ring of the same capacity, of whose episodes none divides it."""
    ring, rng = RingBufferDataset(store.num_steps, info_of(store)), np.random.default_rng(0)
    num_added = 0
    while num_added < _NUM_LAPS * store.num_steps:
        length = int(rng.integers(900, 1_101))
        ring.add_episode(tagged_rows(store.kind, num_added, 1, length))
        num_added += length
    return ring


class _Ours(Contestant):
    dataset: EpisodeDataset
    tasks = (UNIFORM, PRIORITIZED, UPDATED, UPDATE, RECENCY, ONLINE)
    priority_rule = "windows by 0.9 of the largest and 0.1 of the mean of their rows"

    def __init__(self, tensors: bool = False, num_workers: int = 0) -> None:
        super().__init__()
        self._tensors, self._num_workers = tensors, num_workers
        self.prefetched = 2 * num_workers

    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        dataset = self.dataset
        episodes = [
            {name: values[begin : begin + length] for name, values in rows.items()}
            for begin in range(0, len(rows["reward"]), length)
        ]

        def add() -> None:
            for episode in episodes:
                dataset.add_episode(episode)

        return add

    def step_adder(self, envs: TaggedEnvs) -> Callable[[], Any]:
        num_envs = len(envs.was_done)
        buffer = ReplayBuffer(self.dataset, 32, 1, num_envs=num_envs)
        rows: dict[str, Any] = envs.rows
        done: Any = envs.was_done
        if num_envs == 1:
            # A single environment: rows without an axis for it, and `done` with its last row.
            rows, ended = {name: values.reshape(values.shape[1:]) for name, values in rows.items()}, rows["terminated"]
            return lambda: buffer.add_step(rows, bool(ended[0]))
        if self._tensors:
            rows, done = {name: torch.from_numpy(values) for name, values in rows.items()}, torch.from_numpy(done)
        return lambda: buffer.add_step(rows, done)

    def drawer(self, batch_size: int, length: int, sampler: Sampler | None = None) -> Callable[[], Any]:
        if self._is_of_transitions:
            return ReplayBuffer(self.dataset, batch_size, 2, transform=to_transitions, seed=0).sample
        return ReplayBuffer(self.dataset, batch_size, length, sampler=sampler, seed=0).sample

    def prioritized_drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        from buffers.sampler import PrioritizedSampler  # Which builds from before do not have.

        options: Any = {"sampler": PrioritizedSampler(ALPHA, BETA), "include": ("index", "weight"), "seed": 0}
        return ReplayBuffer(self.dataset, batch_size, length, **options).sample

    def _task(self, workload: Workload) -> Callable[[], Any]:
        size = workload.batch_size, workload.length
        if workload.task == RECENCY:
            from buffers.sampler import RecencySampler

            return self.drawer(*size, RecencySampler(workload.store.num_steps / 10))
        if workload.task == ONLINE:
            from buffers.sampler import OnlineSampler

            return self.drawer(*size, OnlineSampler())
        return super()._task(workload)

    def spread_priorities(self, values: np.ndarray) -> None:
        self.prioritized_drawer(1, 1)  # From the first such sampler on, rows have priorities.
        super().spread_priorities(values)

    def update(self, index: Any, priorities: Any) -> None:
        self.dataset.update(torch.as_tensor(index).view(priorities.shape), {"priority": priorities})

    def as_priorities(self, values: np.ndarray, length: int) -> Any:
        return torch.from_numpy(values).view(-1, length)

    def offset_drawer(self, batch_size: int) -> Callable[[], Any]:
        options: Any = {"offsets": OFFSETS, "pad": "edge", "seed": 0}
        return ReplayBuffer(self.dataset, batch_size, num_workers=self._num_workers, **options).sample

    def drawers(self, workload: Workload) -> dict[str, Callable[[], Any]]:
        found = super().drawers(workload)
        size = workload.batch_size, workload.length
        if workload.part == "samplers":
            found["episodes"] = self.drawer(*size, UniformEpisodeSampler())
            found["own"] = self.drawer(*size, OwnSampler())
        if workload.part == "padding":
            for pad in ("zero", "edge"):
                options: Any = {"pad": pad, **PADDING, "seed": 0}
                found[pad] = ReplayBuffer(self.dataset, *size, **options).sample
            found["stacks"] = ReplayBuffer(self.dataset, *size, transform=stacked, seed=0).sample
        if workload.part == "wrapping":
            found["long"] = ReplayBuffer(ring_of_long_episodes(workload.store), *size, seed=0).sample
        return found

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        return {name: values.numpy() for name, values in batch.items() if name != "mask"}

    def set_threads(self, number: int) -> None:
        torch.set_num_threads(number)


class Ring(_Ours):
    """In memory."""

    syncs = saves_in_background = True

    def save(self, directory: Path) -> None:
        self.dataset.save(directory)

    def save_in_background(self, directory: Path) -> Future[Any]:
        return self.dataset.save(directory, block=False)

    def load(self, directory: Path) -> RingBufferDataset:
        return RingBufferDataset.load(directory)

    def rows_of(self, loaded: RingBufferDataset) -> Rows:
        episodes = [loaded.get_episode(number) for number in range(loaded.num_episodes)]
        return {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}

    def make(self, store: Store) -> None:
        self.dataset = None  # type: ignore[assignment]  # Its memory is given back before the next takes some.
        self.dataset = RingBufferDataset(store.num_steps, info_of(store))
        self._is_of_transitions = store.transitions


class Files(_Ours):
    """On disk, one file an episode."""

    def make(self, store: Store) -> None:
        directory = Path(self.folder) / "ours"
        shutil.rmtree(directory, ignore_errors=True)
        self.dataset = IndividualFileDataset(store.num_steps, info_of(store), directory=directory, durability="rename")
        self._is_of_transitions = store.transitions
