"""The contract of a contestant: a few primitives, of which every workload is made.

A contestant lives in a process of its own (`serving.py`), where its library is installed. What it is given is ready
in the form it takes best, made outside of what is timed: arrays, tensors, a TensorDict.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import (
    PRIORITIZED,
    UNIFORM,
    UPDATE,
    UPDATED,
    Store,
    TaggedEnvs,
    Workload,
    blocks,
    log_uniform,
    tagged_rows,
)

Rows = dict[str, np.ndarray]
_ROWS_AT_ONCE = 100_000
_NUM_UPDATES = 16


class Contestant(ABC):
    """A way to store rows and to draw from them.

    Attributes:
        draws_sequences: False where B x T loose rows are drawn instead of B sequences.
        prefetched: Batches that workers may have made ahead.
        folder: Where files may be written.
        tasks: What it does of "priorities".
        priority_rule: Of `verification.PRIORITY_RULES`, by which it draws.
        syncs: Whether what `save` has written is on the disk when it returns; if not, "saving" sees to that.
        saves_in_place: Whether its rows live in the files of its save, below `folder`, so that it never saves all.
        saves_in_background: Whether it has `save_in_background`.
    """

    draws_sequences = True
    prefetched = 0
    folder = "."
    tasks: tuple[str, ...] = (PRIORITIZED, UPDATED, UPDATE)
    priority_rule = ""
    syncs = saves_in_place = saves_in_background = False

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

    def prioritized_drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        """A function that draws a batch by priorities, with weights, of which `index_of` tells where its rows are."""
        raise NotImplementedError

    def index_of(self, batch: Any) -> Any:
        """Where the rows of a prioritized batch are, in the form that `update` takes best."""
        return batch["index"]

    def update(self, index: Any, priorities: Any) -> None:
        """Write priorities, of `as_priorities`, of the rows at an index of `index_of`, or at int64 `(N,)`."""
        raise NotImplementedError

    def as_priorities(self, values: np.ndarray, length: int) -> Any:
        """Priorities float32 `(B * T,)` in the form that `update` takes best."""
        return values

    def step_adder(self, envs: TaggedEnvs) -> Callable[[], Any]:
        """A function that adds `envs.rows`, a row of each environment."""
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        """Save what is stored into a folder that is empty, or what is new where the save before went there, too."""
        raise NotImplementedError

    def save_in_background(self, directory: Path) -> Future[Any]:
        """Begin to save into an empty folder; the future waits for it."""
        raise NotImplementedError

    def load(self, directory: Path) -> Any:
        """What the last save stored, in a new store."""
        raise NotImplementedError

    def rows_of(self, loaded: Any) -> Rows:
        """All rows of what was loaded, in any order."""
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
            if store.prioritized:
                self.spread_priorities(log_uniform(store.num_steps))

    def spread_priorities(self, values: np.ndarray) -> None:
        """Priorities of the rows of a store that was filled once, in their order."""
        for begin in range(0, len(values), _ROWS_AT_ONCE):
            part = values[begin : begin + _ROWS_AT_ONCE]
            self.update(np.arange(begin, begin + len(part)), self.as_priorities(part, 1))

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
        if workload.task:
            return {"": self._task(workload)} if self.takes(workload) and workload.task != UPDATE else {}
        return {"": self.drawer(workload.batch_size, workload.length)}

    def functions(self, workload: Workload) -> dict[str, Callable[[], Any]]:
        """What is timed, by variant."""
        if workload.part == "adding":
            return {"": self._adding(workload.store)}
        if workload.part == "saving":
            return {}
        if workload.task == UPDATE:
            return {"": self._updates(workload)} if self.takes(workload) else {}
        return {variant: self._after_adding(draw, workload) for variant, draw in self.drawers(workload).items()}

    def takes(self, workload: Workload) -> bool:
        """Whether it can do a task of "priorities"."""
        return workload.task in self.tasks

    def _task(self, workload: Workload) -> Callable[[], Any]:
        """A function that draws as a task of "priorities" says."""
        size = workload.batch_size, workload.length
        if workload.task == UNIFORM:
            return self.drawer(*size)
        draw = self.prioritized_drawer(*size)
        if workload.task == PRIORITIZED:
            return draw
        values = self._fresh_priorities(workload)

        def draw_and_update() -> Any:
            batch = draw()
            self.update(self.index_of(batch), next(values))
            return batch

        return draw_and_update

    def _updates(self, workload: Workload) -> Callable[[], Any]:
        """New priorities of rows that were drawn before, over and over."""
        draw, values = self.prioritized_drawer(workload.batch_size, workload.length), self._fresh_priorities(workload)
        places = itertools.cycle([self.index_of(draw()) for _ in range(_NUM_UPDATES)])
        # Kept, so that an update also costs what it changes for who draws.
        self._draw = draw
        return lambda: self.update(next(places), next(values))

    def _fresh_priorities(self, workload: Workload) -> Iterator[Any]:
        num, length = workload.batch_size * workload.length, workload.length
        # One more than there are places, so that no place gets the same values again.
        seeds = range(1, _NUM_UPDATES + 2)
        return itertools.cycle([self.as_priorities(log_uniform(num, seed), length) for seed in seeds])

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
