"""The contract of a contestant: a few primitives, of which every workload is made.

A contestant lives in a process of its own (`serving.py`), where its library is installed. What it is given is ready
in the form it takes best, made outside of what is timed: arrays, tensors, a TensorDict.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.workloads import Store, TaggedEnvs, Workload, blocks, tagged_rows

Rows = dict[str, np.ndarray]


class Contestant(ABC):
    """A way to store rows and to draw from them.

    Attributes:
        draws_sequences: False where B x T loose rows are drawn instead of B sequences.
        prefetched: Batches that workers may have made ahead.
        folder: Where files may be written.
    """

    draws_sequences = True
    prefetched = 0
    folder = "."

    def __init__(self) -> None:
        self.store: Store | None = None
        self._envs: TaggedEnvs | None = None
        # It goes on from the filling to what is timed, so that all that it keeps is in use by then.
        self._add_step: Callable[[], Any] | None = None

    @abstractmethod
    def make(self, store: Store) -> None:
        """An empty store; the one before is given up."""

    @abstractmethod
    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        """A function that adds these rows, whole episodes of `length` one after the other."""

    @abstractmethod
    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        """A function that draws a batch."""

    def offset_drawer(self, batch_size: int) -> Callable[[], Any]:
        """A function that draws anchors, any rows, and reads `OFFSETS` around them: beyond an end, the nearest row."""
        raise NotImplementedError

    def step_adder(self, envs: TaggedEnvs) -> Callable[[], Any]:
        """A function that adds `envs.rows`, a row of each environment."""
        raise NotImplementedError

    @abstractmethod
    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        """A batch as `field -> (B, T, *shape)`, of offsets as `field -> (B, n, *shape)`."""

    def set_threads(self, number: int) -> None:  # noqa: B027
        """How many threads may compute; nothing to do for what has one, or was started with as many."""

    # What follows from them.

    def add_rows(self, rows: Rows, length: int) -> None:
        self.episode_adder(rows, length)()

    def fill(self, store: Store) -> None:
        """Make the store, and fill it if it shall be."""
        self.store = self._add_step = None
        self.make(store)
        # They go on in what is timed, so that no episode is left without an end.
        self.store, self._envs = store, TaggedEnvs(store)
        if store.is_filled:
            self.fill_rows(store)

    def fill_rows(self, store: Store) -> None:
        """Add rows until the store is full, also where the rows of open episodes are kept beside it."""
        if store.num_envs == 1:
            for rows in blocks(store):
                self.add_rows(rows, store.episode_length)
            return
        envs, add = self._stepped()
        for _ in range(store.num_steps // store.num_envs + store.episode_length):
            add()
            envs.step()

    def drawers(self, workload: Workload) -> dict[str, Callable[[], Any]]:
        """The functions that draw, by variant; nearly all contestants have one way, ""."""
        if workload.part == "offsets":
            return {"": self.offset_drawer(workload.batch_size)}
        return {"": self.drawer(workload.batch_size, workload.length)}

    def functions(self, workload: Workload) -> dict[str, Callable[[], Any]]:
        """What is timed, by variant."""
        if workload.part == "adding":
            return {"": self._adding(workload.store)}
        return {variant: self._after_adding(draw, workload) for variant, draw in self.drawers(workload).items()}

    def _after_adding(self, draw: Callable[[], Any], workload: Workload) -> Callable[[], Any]:
        """What the workload adds before a draw, and the draw."""
        store = workload.store
        if workload.adds_episode:
            return self._then(self.episode_adder(self.one_episode(store), store.episode_length), draw)
        if workload.part == "training":
            envs, add = self._stepped()
            return self._then(self._then(add, envs.step), draw)
        return draw

    def one_episode(self, store: Store) -> Rows:
        return tagged_rows(store.kind, store.num_steps // store.episode_length, 1, store.episode_length)

    def _stepped(self) -> tuple[TaggedEnvs, Callable[[], Any]]:
        """The environments, and what adds their rows."""
        assert self._envs is not None
        if self._add_step is None:
            self._add_step = self.step_adder(self._envs)
        return self._envs, self._add_step

    def _adding(self, store: Store) -> Callable[[], Any]:
        """Rows that never change but for the flags, so that next to nothing but adding is timed."""
        envs, add = self._stepped()
        length, terminated, was_done = store.episode_length, envs.rows["terminated"], envs.was_done
        ends = [(envs.age + step) % length == length - 1 for step in range(length)]
        clock = 0

        def add_next() -> None:
            nonlocal clock
            add()
            was_done[:] = terminated
            clock = (clock + 1) % length
            terminated[:] = ends[clock]

        return add_next

    @staticmethod
    def _then(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], Any]:
        def both() -> Any:
            first()
            return second()

        return both
