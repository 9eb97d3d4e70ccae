"""TorchRL: `ReplayBuffer` with a `SliceSampler`.

What it is given is a TensorDict already, and of a batch, a flat one of B * T rows, nothing is asked: it is not even
given its two axes. Its marks of slices (`truncated`, `is_init`) are off, which is quicker. Episodes end where
`terminated` is set. Rows of several environments go into a storage of two dimensions, along the second.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchrl
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    PrioritizedSampler,
    PrioritizedSliceSampler,
    RandomSampler,
    ReplayBuffer,
    SliceSampler,
)

from benchmarks.contestant import Contestant, Rows
from benchmarks.workloads import ALPHA, BETA, Store, TaggedEnvs, Workload, transitions_of

assert torchrl


class TorchRL(Contestant):
    """A storage in memory, or memory-mapped."""

    def __init__(self, cached: bool = False, memmap: bool = False) -> None:
        super().__init__()
        self._cached, self._memmap = cached, memmap
        self.saves_in_place = memmap
        self._buffer: Any = None

    def make(self, store: Store) -> None:
        self._buffer = None
        ndim = 1 if store.num_envs == 1 else 2
        if self._memmap:
            directory = self._in(Path(self.folder)) / "storage"
            shutil.rmtree(directory, ignore_errors=True)
            storage: Any = LazyMemmapStorage(store.num_steps, scratch_dir=directory, ndim=ndim)
        else:
            storage = LazyTensorStorage(store.num_steps, ndim=ndim)
        self._made = store
        self._buffer = ReplayBuffer(storage=storage, dim_extend=ndim - 1)

    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        data = _as_tensordict(transitions_of(rows, length) if self._made.transitions else rows)
        buffer = self._buffer
        return lambda: buffer.extend(data)

    def step_adder(self, envs: TaggedEnvs) -> Callable[[], Any]:
        data, buffer = _as_tensordict(envs.rows), self._buffer
        if len(envs.was_done) == 1:
            row = data[0]
            return lambda: buffer.add(row)
        column = data.unsqueeze(1)
        return lambda: buffer.extend(column)

    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        buffer = self._buffer
        buffer.set_sampler(RandomSampler() if self._made.transitions else self._slices(batch_size))
        num_rows = batch_size * length
        return lambda: buffer.sample(num_rows)

    def _slices(self, num_slices: int) -> SliceSampler:
        return SliceSampler(
            num_slices=num_slices,
            end_key="terminated",
            cache_values=self._cached,
            truncated_key=None,
            init_key=None,
        )

    def save(self, directory: Path) -> None:
        self._buffer.dumps(self._in(directory))

    def load(self, directory: Path) -> ReplayBuffer:
        path, num = self._in(directory), self._made.num_steps
        storage = LazyMemmapStorage(num, scratch_dir=path / "storage") if self._memmap else LazyTensorStorage(num)
        loaded = ReplayBuffer(storage=storage)
        loaded.loads(path)
        return loaded

    def rows_of(self, loaded: ReplayBuffer) -> Rows:
        data = loaded[:]
        return {name: data[name].numpy() for name in self._made.fields}

    @staticmethod
    def _in(directory: Path) -> Path:
        """Of a save; `storage` in it is what a memory-mapped storage need not copy to be saved."""
        return directory / "torchrl"

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        rows = {name: batch[name] for name in (*self._made.fields, *(["next_obs"] if self._made.transitions else []))}
        shapes = {**self._made.fields, "next_obs": self._made.fields["obs"]}
        return {n: values.reshape(batch_size, length, *shapes[n][0]).numpy() for n, values in rows.items()}

    def set_threads(self, number: int) -> None:
        torch.set_num_threads(number)


class PrioritizedTorchRL(TorchRL):
    """`PrioritizedSliceSampler`, which refuses slices of one row: for those, its `PrioritizedSampler`."""

    priority_rule = "windows by their first row"

    def takes(self, workload: Workload) -> bool:
        # Additions throw the cache away, and rows need no bounds of episodes: with a cache, it would be the same again.
        return super().takes(workload) and not (self._cached and (workload.adds_episode or workload.length == 1))

    def spread_priorities(self, values: np.ndarray) -> None:
        # A sampler keeps them, and there is a new one for each length.
        self._values = torch.from_numpy(values)

    def prioritized_drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        buffer, num_rows = self._buffer, batch_size * length
        sampler = self._prioritized_slices(batch_size) if length > 1 else self._prioritized_rows()
        buffer.set_sampler(sampler)
        buffer.update_priority(torch.arange(len(self._values)), self._values)
        return lambda: buffer.sample(num_rows, return_info=True)

    def _prioritized_rows(self) -> PrioritizedSampler:
        return PrioritizedSampler(self._made.num_steps, ALPHA, BETA)

    def _prioritized_slices(self, num_slices: int) -> PrioritizedSliceSampler:
        return PrioritizedSliceSampler(
            self._made.num_steps,
            ALPHA,
            BETA,
            num_slices=num_slices,
            end_key="terminated",
            cache_values=self._cached,
            truncated_key=None,
            init_key=None,
        )

    def index_of(self, batch: Any) -> Any:
        index = batch[1]["index"]
        return index[0] if isinstance(index, tuple) else index

    def update(self, index: Any, priorities: Any) -> None:
        self._buffer.update_priority(index, priorities)

    def as_priorities(self, values: np.ndarray, length: int) -> Any:
        return torch.from_numpy(values)

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        return super().arrays(batch[0], batch_size, length)


def _as_tensordict(rows: Rows) -> TensorDict:
    """Over the same memory, so that rows that change in place are added as they are then."""
    tensors = {name: torch.from_numpy(values) for name, values in rows.items()}
    return TensorDict(tensors, batch_size=[len(rows["reward"])])
