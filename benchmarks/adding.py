"""Adding steps, and what a stored step and episode take in memory."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.timing import interleave, print_table
from benchmarks.workloads import EPISODE_LENGTH, FIELDS, rows
from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.dataset.fields import Fields
from buffers.dataset.info import EpisodeDatasetInfo


def step_adder(fields: Fields, num_envs: int | None, as_tensors: bool = False) -> Callable[[], None]:
    """A function that adds one step of every environment; episodes have 200 steps and end at different times."""
    leading = () if num_envs is None else (num_envs,)
    row: dict[str, Any] = rows(fields, *leading)
    if as_tensors:
        row = {name: torch.from_numpy(np.asarray(value)) for name, value in row.items()}
    ring = RingBufferDataset(max(20_000, 2 * EPISODE_LENGTH * (num_envs or 1)), EpisodeDatasetInfo(fields))
    buffer = ReplayBuffer(ring, 32, 16, num_envs=num_envs or 1)
    if num_envs is None:
        ends: list[Any] = [step == EPISODE_LENGTH - 1 for step in range(EPISODE_LENGTH)]
    else:
        offsets = np.arange(num_envs) * EPISODE_LENGTH // num_envs
        ends = [(offsets + step) % EPISODE_LENGTH == 0 for step in range(EPISODE_LENGTH)]
        if as_tensors:
            ends = [torch.from_numpy(done) for done in ends]
    done = itertools.cycle(ends)
    return lambda: buffer.add_step(row, next(done))


def bare_writes(fields: Fields, num_envs: int | None) -> Callable[[], None]:
    """A function that writes the rows into preallocated arrays: nothing checked, no episodes."""
    leading = () if num_envs is None else (num_envs,)
    row = list(rows(fields, *leading).values())
    num_places = 2_000 if num_envs is None else 100
    arrays = [np.empty((num_places, *np.shape(value)), np.asarray(value).dtype) for value in row]
    places = itertools.cycle(range(num_places))

    def write() -> None:
        place = next(places)
        for array, value in zip(arrays, row, strict=True):
            array[place] = value

    return write


def adding(rounds: int) -> None:
    """`add_step` of 1, 16 and 256 environments."""
    torch.set_num_threads(1)
    table = []
    for kind, counts in (("state", (None, 1, 16, 256)), ("pixels", (None, 16))):
        for num_envs in counts:
            found = interleave(
                {
                    "writes": bare_writes(FIELDS[kind], num_envs),
                    "numpy": step_adder(FIELDS[kind], num_envs),
                    "torch": step_adder(FIELDS[kind], num_envs, as_tensors=True),
                },
                rounds,
            )
            name = "single" if num_envs is None else f"{num_envs} environments"
            table.append(
                (f"{kind}, {name}", *(f"{found[column].median:.1f}" for column in ("writes", "numpy", "torch")))
            )
    print_table(
        "Adding a step, episodes of 200 steps, microseconds",
        ("rows", "bare numpy writes", "ours, numpy", "ours, tensors"),
        table,
    )


def memory() -> None:
    """Bytes allocated by a full ring, beside its payload, at two lengths of episodes."""
    table = []
    for length in (1, 10, 200):
        fields = FIELDS["state"]
        episode = rows(fields, length)
        tracemalloc.start()
        ring = RingBufferDataset(200_000, EpisodeDatasetInfo(fields))
        for _ in range(3 * ring.capacity // length):
            ring.add_episode(episode)
        ring.get_loader(32, 1, seed=0).stream.take()
        assert ring._memory is not None
        # Of the log's entries, which are reserved for the worst case, those that are used take memory.
        log = ring._memory["log/entries"]
        used = int((log[:, 2] != 0).sum()) * log[0].nbytes
        allocated = tracemalloc.get_traced_memory()[0] + ring._memory.num_bytes - log.nbytes + used
        tracemalloc.stop()
        payload = fields.nbytes * ring.capacity
        extra = (allocated - payload) / ring.num_episodes
        table.append((length, f"{ring.num_episodes:,}", f"{allocated / payload:.4f}", f"{extra:.1f}"))
    print_table(
        "Memory: state, 200,000 steps, one stream drawing",
        ("steps an episode", "episodes", "allocated / payload", "bytes an episode beyond the payload"),
        table,
    )
