"""Batches of pixels from 0, 1 and 2 workers, from the ring and from files, without and with work on each batch.

A loader is measured as a trainer meets it: `next` after `next`, for as many batches as fill some seconds. The number
of workers changes between measurements (0 1 2 0 1 2 ...), each with loaders that are warm.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.ours import info_of
from benchmarks.timing import print_table
from benchmarks.workloads import Store, blocks
from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset

NUM_STEPS = 50_000
SECONDS_OF_WORK = 0.005


def busy(batch: Any) -> Any:
    """Some work on a batch: 5 ms of a processor."""
    end = time.perf_counter() + SECONDS_OF_WORK
    while time.perf_counter() < end:
        pass
    return batch


def fill(dataset: EpisodeDataset, store: Store) -> None:
    for rows in blocks(store):
        for begin in range(0, len(rows["reward"]), store.episode_length):
            dataset.add_episode({name: values[begin : begin + store.episode_length] for name, values in rows.items()})


def measure(iterators: dict[int, Iterator[Any]], rounds: int, num_batches: int) -> dict[int, float]:
    """Median microseconds a batch by number of workers."""
    measured: dict[int, list[float]] = {num: [] for num in iterators}
    for _ in range(rounds):
        for num, batches in iterators.items():
            for _ in itertools.islice(batches, 10):  # What the workers have prefetched while others were measured.
                pass
            begin = time.perf_counter()
            for _ in itertools.islice(batches, num_batches):
                pass
            measured[num].append((time.perf_counter() - begin) / num_batches * 1e6)
    return {num: float(np.median(times)) for num, times in measured.items()}


def workers(rounds: int) -> None:
    """Ring and files, 16 x 64 and 256 x 3."""
    torch.set_num_threads(1)
    table = []
    with tempfile.TemporaryDirectory() as directory:
        store = Store("pixels", NUM_STEPS)
        files = IndividualFileDataset(NUM_STEPS, info_of(store), directory=Path(directory), durability="rename")
        datasets: dict[str, EpisodeDataset] = {"ring": RingBufferDataset(NUM_STEPS, info_of(store)), "files": files}
        for name, dataset in datasets.items():
            fill(dataset, store)
            for batch_size, length in ((16, 64), (256, 3)):
                for transform in (None, busy):
                    iterators = {
                        num: iter(dataset.get_loader(batch_size, length, num_workers=num, transform=transform, seed=0))
                        for num in (0, 1, 2)
                    }
                    found = measure(iterators, max(1, rounds // 6), 30 if transform else 60)
                    work = "5 ms of work" if transform else "nothing"
                    times = [f"{time_:,.0f}" for time_ in found.values()]
                    table.append((f"{name} {batch_size} x {length}", work, *times, f"{found[0] / found[2]:.2f}"))
                    del iterators
        files.close()
    print_table(
        "Workers: pixels, one thread in each process, microseconds a batch",
        ("batch", "transform", "0 workers", "1 worker", "2 workers", "0 / 2"),
        table,
    )
