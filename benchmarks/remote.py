"""Shards on Ray, on one machine: batches from a shard beside those of a local worker, and episodes into shards.

Each quantity is measured in turn with what it is compared to, in one run. A machine with few processors measures how
these share them: shard, learner, writer and Ray's own processes are on the same ones.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.ours import info_of
from benchmarks.timing import print_table
from benchmarks.workers import fill
from benchmarks.workloads import Store
from buffers.dataset import EpisodeDataset, RingBufferDataset
from buffers.remote import RemoteLoader, RemoteWriter, Shards, start_shards

STORE = Store("pixels", 20_000)
BATCH_SIZE, LENGTH = 16, 64
NUM_BATCHES, NUM_LARGE, NUM_SMALL = 60, 60, 5_000
LARGE_STEPS = 163


def filled_ring(shard: int) -> EpisodeDataset:
    dataset = RingBufferDataset(STORE.num_steps, info_of(STORE))
    fill(dataset, STORE)
    return dataset


def empty_ring(shard: int) -> EpisodeDataset:
    return RingBufferDataset(50_000)


def ring_that_is_soon_full(shard: int) -> EpisodeDataset:
    # The kernel hands out its memory in the round that warms, as in a run that goes on for long.
    return RingBufferDataset(NUM_LARGE * LARGE_STEPS)


def remote(rounds: int) -> None:
    """All of it; starts a Ray of its own, and ends it."""
    import ray

    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    ray.init(
        address="local", num_cpus=1, object_store_memory=2_000_000_000, include_dashboard=False, log_to_driver=False
    )
    try:
        _batches(max(1, rounds // 4))
        _large_episodes(max(1, rounds // 4))
        _small_episodes(max(1, rounds // 4))
    finally:
        ray.shutdown()


def _batches(rounds: int) -> None:
    """Batches of pixels, 12.6 MB, from a worker of a local ring, and from a shard that holds the same.

    `ray.put` alone, of as many bytes, is what any batch must take that crosses by Ray.
    """
    import ray

    batch = np.random.randint(0, 256, (BATCH_SIZE, LENGTH, 64, 64, 3), np.uint8)

    def put() -> float:
        begin = time.perf_counter()
        for _ in range(NUM_BATCHES):
            ray.put(batch)
        return time.perf_counter() - begin

    loader = filled_ring(0).get_loader(BATCH_SIZE, LENGTH, num_workers=1, seed=0)
    with start_shards(1, filled_ring, num_cpus=0) as shards:
        iterators: dict[str, Iterator[Any]] = {
            "a worker": iter(loader),
            "a shard": RemoteLoader(shards, BATCH_SIZE, LENGTH, seed=0),
        }
        measured = {name: partial(_take, batches) for name, batches in iterators.items()}
        found = _in_turn({**measured, "ray.put alone": put}, rounds)
        measured.clear()
        iterators.clear()
    rows = [(name, f"{times * 1e6 / NUM_BATCHES:,.0f}", f"{NUM_BATCHES / times:,.0f}") for name, times in found.items()]
    print_table("Batches of pixels, 16 x 64, 12.6 MB", ("from", "us a batch", "batches a second"), rows)


def _take(batches: Iterator[Any]) -> float:
    for _ in itertools.islice(batches, 5):  # What was made ahead while others were measured.
        pass
    begin = time.perf_counter()
    for _ in itertools.islice(batches, NUM_BATCHES):
        pass
    return time.perf_counter() - begin


def _large_episodes(rounds: int) -> None:
    """Episodes of 2 MB into a shard, until it has stored them; beside `ray.put` of the same arrays."""
    import ray

    episodes = [{"image": np.random.randint(0, 256, (LARGE_STEPS, 64, 64, 3), np.uint8)} for _ in range(4)]
    num_bytes = NUM_LARGE * episodes[0]["image"].nbytes

    def put() -> float:
        begin = time.perf_counter()
        for number in range(NUM_LARGE):
            ray.put(episodes[number % 4])
        return time.perf_counter() - begin

    with start_shards(1, ring_that_is_soon_full, num_cpus=0) as shards, RemoteWriter(shards, num_envs=1) as writer:
        found = _in_turn({"ray.put": put, "a writer": lambda: _add(writer, episodes, NUM_LARGE)}, rounds)
    rows = [
        (name, f"{times / NUM_LARGE * 1e6:,.0f}", f"{num_bytes / times / 1e6:,.0f}") for name, times in found.items()
    ]
    print_table("Episodes of 2 MB into a shard", ("by", "us an episode", "MB a second"), rows)


def _add(writer: RemoteWriter, episodes: list[dict[str, np.ndarray]], num: int) -> float:
    begin = time.perf_counter()
    for number in range(num):
        writer.add_episode(episodes[number % len(episodes)])
    writer.wait_until_stored()
    return time.perf_counter() - begin


def _small_episodes(rounds: int) -> None:
    """Episodes of 200 steps of state, 4 + 2 numbers a step: alone, packed, and into a ring of this process."""
    names = {"obs": (200, 4), "action": (200,), "reward": (200,)}
    episode = {name: np.zeros(shape, np.float32) for name, shape in names.items()}
    ring = empty_ring(0)

    def locally() -> float:
        begin = time.perf_counter()
        for _ in range(NUM_SMALL):
            ring.add_episode(episode)
        return time.perf_counter() - begin

    def into(shards: Shards, pack_bytes: int) -> Callable[[], float]:
        writer = RemoteWriter(shards, num_envs=1, pack_bytes=pack_bytes)
        return lambda: _add(writer, [episode], NUM_SMALL)

    with start_shards(1, empty_ring, num_cpus=0) as shards:
        measured = {"a ring": locally, "a shard, packed": into(shards, 1_000_000), "a shard, alone": into(shards, 1)}
        found = _in_turn(measured, rounds)
    rows = [(name, f"{NUM_SMALL / times:,.0f}") for name, times in found.items()]
    print_table("Episodes of 200 steps, 4.8 kB", ("into", "episodes a second"), rows)


def _in_turn(measured: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each; the first round warms."""
    found: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(rounds + 1):
        for name, function in measured.items():
            seconds = function()
            if number:
                found[name].append(seconds)
    return {name: float(np.median(times)) for name, times in found.items()}
