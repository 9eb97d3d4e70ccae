"""Batches a second while recording: a ring alone, files alone, and a ring extended by files.

As in training: a batch for every step of an environment, and an episode of 200 steps added after 200 of them. All three
hold as many episodes as fit the ring, and the files of the third hold ten times as many.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.ours import info_of
from benchmarks.timing import print_table
from benchmarks.workloads import EPISODE_LENGTH, Store, empty_rows
from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset, RingBufferDataset

CAPACITIES = {"state": 200_000, "pixels": 20_000}
SIZES = (("state", 256, 64), ("state", 32, 16), ("pixels", 16, 64), ("pixels", 256, 3))


def trainer(buffer: ReplayBuffer, episode: Any) -> Callable[[], None]:
    """A function that takes a batch for each step of an episode, and adds the episode."""

    def train() -> None:
        for _ in range(EPISODE_LENGTH):
            buffer.sample()
        buffer.add_episode(episode)

    return train


def composing(rounds: int) -> None:
    """The three, for state and pixels."""
    torch.set_num_threads(1)
    table = []
    for kind, batch_size, length in SIZES:
        with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
            capacity = CAPACITIES[kind]
            info, episode = info_of(Store(kind, capacity)), empty_rows(kind, EPISODE_LENGTH)

            def files(name: str, capacity: int) -> IndividualFileDataset:
                path = Path(directory) / name  # noqa: B023
                return stack.enter_context(IndividualFileDataset(capacity, info, directory=path, durability="rename"))  # noqa: B023

            ring, extended = RingBufferDataset(capacity, info), RingBufferDataset(capacity, info)
            behind = files("behind", 10 * capacity)
            datasets = {"ring": ring, "files": files("alone", capacity), "extended": extended}
            for dataset in (ring, datasets["files"], behind):
                for _ in range(dataset.capacity // EPISODE_LENGTH):
                    dataset.add_episode(episode)
            extended.extend(behind, other_num_workers=1, seed=0)
            extended.refill()
            trainers = {
                name: trainer(stack.enter_context(ReplayBuffer(dataset, batch_size, length, seed=0)), episode)
                for name, dataset in datasets.items()
            }
            measured: dict[str, list[float]] = {name: [] for name in trainers}
            for number in range(max(2, rounds // 6) + 1):
                for name, train in trainers.items():
                    begin = time.perf_counter()
                    train()
                    if number:  # The first warms up.
                        measured[name].append(EPISODE_LENGTH / (time.perf_counter() - begin))
            found = {name: float(np.median(rates)) for name, rates in measured.items()}
            table.append(
                (
                    f"{kind} {batch_size} x {length}",
                    *(f"{rate:,.0f}" for rate in found.values()),
                    f"{found['ring'] / found['extended']:.2f}",
                )
            )
    print_table(
        "Composing: batches a second while recording, one thread",
        ("batch", "ring", "files", "ring extended by files", "ring / extended"),
        table,
    )
