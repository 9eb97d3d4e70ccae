"""The limits: what the memory allows, with nothing checked and no episodes.

The memory copy copies as many bytes as a batch has from one place that stays warm. The bare gather is one
`torch.index_select` a field over the view of all windows, from random places that are given, into fresh tensors; its
rows lie in memory of numpy, for which the kernel gives huge pages where it can.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.contestant import Contestant, Rows
from benchmarks.workloads import (
    ONLINE,
    PRIORITIZED,
    RECENCY,
    UNIFORM,
    UPDATED,
    Store,
    TaggedEnvs,
    Workload,
    blocks,
    offsets_of,
)

_NUM_PLACES = 512
_MAX_ROWS_TO_WRITE = 30_000


class RawArrays(Contestant):
    """Preallocated arrays, written at a cursor. Nothing is drawn by priorities: the memory does not mind them."""

    tasks = (UNIFORM, PRIORITIZED, UPDATED, RECENCY, ONLINE)

    def spread_priorities(self, values: np.ndarray) -> None:
        pass

    def _task(self, workload: Workload) -> Callable[[], Any]:
        return self.drawer(workload.batch_size, workload.length)

    def make(self, store: Store) -> None:
        self._arrays: Rows = {}
        self._arrays = {n: np.empty((store.num_steps, *shape), dtype) for n, (shape, dtype) in store.fields.items()}
        self._cursor, self._made = 0, store

    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        pairs = [(self._arrays[name], values) for name, values in rows.items()]
        return self._writer(pairs, len(rows["reward"]))

    def step_adder(self, envs: TaggedEnvs) -> Callable[[], Any]:
        return self._writer([(self._arrays[name], values) for name, values in envs.rows.items()], len(envs.was_done))

    def _writer(self, pairs: list[tuple[np.ndarray, np.ndarray]], num_rows: int) -> Callable[[], Any]:
        capacity = self._made.num_steps

        def write() -> None:
            begin = self._cursor if self._cursor + num_rows <= capacity else 0
            for array, values in pairs:
                array[begin : begin + num_rows] = values
            self._cursor = begin + num_rows

        return write

    def fill_rows(self, store: Store) -> None:
        for rows in blocks(store):
            self.add_rows(rows, store.episode_length)

    def set_threads(self, number: int) -> None:
        torch.set_num_threads(number)


class MemoryCopy(RawArrays):
    """As many bytes as a batch, field by field. Nothing is read from what is stored, so little is."""

    def make(self, store: Store) -> None:
        super().make(replace(store, num_steps=min(store.num_steps, _MAX_ROWS_TO_WRITE)))

    def fill_rows(self, store: Store) -> None:
        super().fill_rows(self._made)

    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        return self._copier(batch_size, dict.fromkeys(self._made.fields, 2 if self._made.transitions else length))

    def offset_drawer(self, batch_size: int) -> Callable[[], Any]:
        return self._copier(batch_size, {name: len(offsets_of(name)) for name in self._made.fields})

    def _copier(self, batch_size: int, num_rows: dict[str, int]) -> Callable[[], Any]:
        pairs = []
        for name, (shape, dtype) in self._made.fields.items():
            source = torch.from_numpy(np.ones((batch_size, num_rows[name], *shape), dtype))
            pairs.append((torch.empty_like(source), source))

        def copy() -> None:
            for target, source in pairs:
                target.copy_(source)

        return copy

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        raise NotImplementedError("A memory copy draws nothing.")


class BareGather(RawArrays):
    """Windows at random places within episodes."""

    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        num_rows = 2 if self._made.transitions else length
        views = [_window_view(array, num_rows) for array in self._arrays.values()]
        places = (torch.from_numpy(first + step) for first, step in self._places(batch_size, num_rows))
        cycle = itertools.cycle(list(places))

        def gather() -> list[torch.Tensor]:
            place = next(cycle)
            return [torch.index_select(view, 0, place) for view in views]

        return gather

    def offset_drawer(self, batch_size: int) -> Callable[[], Any]:
        """Rows one by one: beyond an episode's ends, those at its ends."""
        last = self._made.episode_length - 1
        views = [_window_view(array, 1) for array in self._arrays.values()]
        offsets = [offsets_of(name) for name in self._arrays]
        places = [
            [torch.from_numpy((first[:, None] + np.clip(step[:, None] + n, 0, last)).ravel()) for n in offsets]
            for first, step in self._places(batch_size, 1)
        ]
        cycle = itertools.cycle(places)

        def gather() -> list[torch.Tensor]:
            return [torch.index_select(view, 0, place) for view, place in zip(views, next(cycle), strict=True)]

        return gather

    def _places(self, batch_size: int, num_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Random episodes' first rows, and steps within them that `num_rows` begin at, each `(B,)`."""
        store, rng = self._made, np.random.default_rng(1)
        for _ in range(_NUM_PLACES):
            episode = rng.integers(store.num_steps // store.episode_length, size=batch_size)
            step = rng.integers(store.episode_length - num_rows + 1, size=batch_size)
            yield episode * store.episode_length, step

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        rows = {}
        for (name, (shape, dtype)), values in zip(self._made.fields.items(), batch, strict=True):
            rows[name] = values.numpy().view(dtype).reshape(batch_size, -1, *shape)
        if self._made.transitions:
            rows = {**rows, "obs": rows["obs"][:, :1], "next_obs": rows["obs"][:, 1:]}
        return rows


def _window_view(array: np.ndarray, length: int) -> torch.Tensor:
    """All windows of `(num_steps, *shape)`, one a row, as words of 8 bytes where rows allow it."""
    flat = torch.from_numpy(array).view(len(array), -1)
    if flat.dtype == torch.uint8 and flat.shape[1] % 8 == 0:
        flat = flat.view(torch.int64)
    row = flat.shape[1]
    return flat.as_strided((len(array) - length + 1, length * row), (row, 1))
