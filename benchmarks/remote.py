"""Shards on Ray, on one machine: batches from shards beside those of a local worker, episodes into shards, a kill.

Each quantity is measured in turn with what it is compared to, in one run. A machine with few processors measures how
these share them: shard, learner, writer and Ray's own processes are on the same ones.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environments import python_of
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
SECONDS_OF_LEARNING = 0.01


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
        _coming_back(max(1, rounds // 4))
        _large_episodes(max(1, rounds // 4))
        _small_episodes(max(1, rounds // 4))
    finally:
        ray.shutdown()


def _batches(rounds: int) -> None:
    """Batches of pixels, 12.6 MB, from a worker of a local ring, from shards that hold the same, and from peers.

    `ray.put` alone, of as many bytes, is what any batch must take that crosses by Ray. Two shards can be faster than
    one only where there are processors for them, and for the learner.
    """
    import ray

    batch = np.random.randint(0, 256, (BATCH_SIZE, LENGTH, 64, 64, 3), np.uint8)

    def put() -> float:
        begin = time.perf_counter()
        for _ in range(NUM_BATCHES):
            ray.put(batch)
        return time.perf_counter() - begin

    loader = filled_ring(0).get_loader(BATCH_SIZE, LENGTH, num_workers=1, seed=0)
    with (
        start_shards(1, filled_ring, num_cpus=0) as one,
        start_shards(2, filled_ring, num_cpus=0) as two,
        _peer("torchrl") as torchrl,
        _peer("reverb") as reverb,
    ):
        iterators: dict[str, Iterator[Any]] = {
            "a worker": iter(loader),
            "a shard": RemoteLoader(one, BATCH_SIZE, LENGTH, seed=0),
            "two shards": RemoteLoader(two, BATCH_SIZE, LENGTH, seed=0),
        }
        measured = {name: partial(_take, batches) for name, batches in iterators.items()}
        found = _in_turn({**measured, "ray.put alone": put, **torchrl, **reverb}, rounds)
        _behind_a_learner(iterators, rounds)
        measured.clear()
        iterators.clear()
    rows = [
        (name, f"{t * 1e6 / NUM_BATCHES:,.0f}", f"{NUM_BATCHES / t:,.0f}", f"{found['a shard'] / t:.2f}")
        for name, t in found.items()
    ]
    header = ("from", "us a batch", "batches a second", "of a shard's")
    print_table(f"Batches of pixels, 16 x 64, 12.6 MB, {os.cpu_count()} processors", header, rows)


#: By environment, the module that draws there, and what it is.
_PEERS = {
    "torchrl": ("benchmarks.peers.torchrl_ray", "TorchRL's RayReplayBuffer"),
    "reverb": ("benchmarks.peers.reverb_server", "Reverb, a server"),
}


@contextlib.contextmanager
def _peer(environment: str) -> Iterator[dict[str, Callable[[], float]]]:
    """A peer in processes of its own, if its environment is there: `python -m benchmarks environments`."""
    python, (module, title) = python_of(environment), _PEERS[environment]
    if python is None:
        print(f"{environment}: left out, as it has no environment", flush=True)
        yield {}
        return
    command = [str(python), "-m", module, *map(str, (STORE.num_steps, BATCH_SIZE, LENGTH))]
    process = subprocess.Popen(
        [*command, str(NUM_BATCHES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    sent, received = process.stdin, process.stdout

    def draw() -> float:
        print(file=sent, flush=True)
        return float(received.readline())

    # Ray itself prints there, too.
    assert any(line == "ready\n" for line in received), f"{environment}: it has ended"
    try:
        yield {title: draw}
    finally:
        process.communicate()


def _behind_a_learner(iterators: dict[str, Iterator[Any]], rounds: int) -> None:
    """What `next` takes while a learner computes for 10 ms between two batches."""

    def wait_for(batches: Iterator[Any]) -> float:
        waited = 0.0
        for _ in range(NUM_BATCHES):
            _compute(SECONDS_OF_LEARNING)
            begin = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - begin
        return waited

    found = _in_turn({name: partial(wait_for, batches) for name, batches in iterators.items()}, rounds)
    rows = [(name, f"{times * 1e6 / NUM_BATCHES:,.0f}") for name, times in found.items()]
    print_table("The same behind a learner that computes for 10 ms", ("from", "us in `next`"), rows)


def _compute(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _coming_back(rounds: int) -> None:
    """One of two shards is killed while a learner draws: until it answers again, and how long batches stay away.

    Without episodes of note, it is what Ray and the imports of a process take; with 123 MB, a save is loaded as well.
    """
    rows = []
    for title, num_steps in (("1 MB each", 100), ("123 MB each", 10_000)):
        found = [_kill_one(num_steps) for _ in range(rounds)]
        rows.append((title, *(f"{value:.2f}" for value in np.median(found, axis=0))))
    header = ("two shards of", "s until it answers", "s until it sends a batch", "s the longest gap between batches")
    print_table("A shard that is killed, and the batches meanwhile", header, rows)


def _kill_one(num_steps: int) -> tuple[float, float, float]:
    """Seconds until the shard answers, until a batch comes from it, and the most between two batches."""
    import ray

    episode = {"image": np.random.randint(0, 256, (100, 64, 64, 3), np.uint8)}
    with (
        tempfile.TemporaryDirectory() as directory,
        warnings.catch_warnings(),
        start_shards(2, empty_ring, directory=directory, num_cpus=0) as shards,
        RemoteWriter(shards, num_envs=1) as writer,
    ):
        warnings.simplefilter("ignore")
        for _ in range(2 * num_steps // 100):
            writer.add_episode(episode)
        writer.wait_until_saved()
        loader = RemoteLoader(shards, BATCH_SIZE, 1, include=("source",))
        for _ in range(20):
            next(loader)
        handle = shards.transport.handles[0]
        os.kill(ray.get(handle.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        begin = before = time.perf_counter()
        answered, gap, is_lost = 0.0, 0.0, False
        while True:
            source = int(next(loader)["source"][0])
            now = time.perf_counter()
            gap, before = max(gap, now - before), now
            is_lost |= 0 in loader.troubles
            if is_lost and not answered and 0 not in loader.troubles:
                answered = now - begin
            if answered and source == 0:
                return answered, now - begin, gap


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
