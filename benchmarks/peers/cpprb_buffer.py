"""cpprb: loose rows, B * T of them where others draw B sequences of T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cpprb

from benchmarks.contestant import Contestant, Rows
from benchmarks.workloads import ALPHA, BETA, Store, TaggedEnvs, transitions_of


class Cpprb(Contestant):
    """`ReplayBuffer` with the fields as they are, and `next_obs` where transitions are drawn."""

    draws_sequences = False

    def __init__(self, kind: str = "ReplayBuffer", **options: Any) -> None:
        super().__init__()
        self._kind, self._options = getattr(cpprb, kind), options

    def make(self, store: Store) -> None:
        self._buffer: Any = None
        self._made = store
        self._fields = {**store.fields, **({"next_obs": store.fields["obs"]} if store.transitions else {})}
        described = {name: {"shape": shape or 1, "dtype": dtype} for name, (shape, dtype) in self._fields.items()}
        self._buffer = self._kind(store.num_steps, described, **self._options)

    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        data = transitions_of(rows, length) if self._made.transitions else rows
        buffer = self._buffer
        return lambda: buffer.add(**data)

    def step_adder(self, envs: TaggedEnvs) -> Callable[[], Any]:
        buffer, rows = self._buffer, envs.rows
        return lambda: buffer.add(**rows)

    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        buffer, num_rows = self._buffer, batch_size * length
        return lambda: buffer.sample(num_rows)

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        return {n: batch[n].reshape(batch_size, length, *shape) for n, (shape, _) in self._fields.items()}


class PrioritizedCpprb(Cpprb):
    """`PrioritizedReplayBuffer`."""

    priority_rule = "each row by its own"

    def __init__(self) -> None:
        super().__init__("PrioritizedReplayBuffer", alpha=ALPHA)

    def prioritized_drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        buffer, num_rows = self._buffer, batch_size * length
        return lambda: buffer.sample(num_rows, BETA)

    def index_of(self, batch: Any) -> Any:
        return batch["indexes"]

    def update(self, index: Any, priorities: Any) -> None:
        self._buffer.update_priorities(index, priorities)
