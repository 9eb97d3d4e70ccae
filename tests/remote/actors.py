"""What runs in processes of Ray's, in the tests of `buffers.remote`."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from buffers import Recorder
from buffers.dataset import EpisodeDataset, RingBufferDataset
from buffers.remote import RemoteLoader, RemoteWriter, Shards
from buffers.remote.on_ray import RayTransport, ShardActor
from tests.logged_game import Game, Games
from tests.remote.simulated import episode


def start_ray(**options: Any) -> None:
    """A Ray of this process's own; tried again where a busy machine takes longer than Ray waits for its processes."""
    import ray

    for attempt in range(4):
        try:
            ray.init(address="local", log_to_driver=False, include_dashboard=False, **options)
            return
        except Exception:
            ray.shutdown()
            if attempt == 3:
                raise
            # Those that were killed end, and another thing that the machine does, perhaps.
            time.sleep(10.0)
            gc.collect()


def make_ring(number: int) -> EpisodeDataset:
    return RingBufferDataset(capacity=50_000)


def shared_ring(name: str) -> Callable[[int], EpisodeDataset]:
    """Makes rings that other processes of the machine attach to."""

    def make(number: int) -> EpisodeDataset:
        ring = RingBufferDataset(capacity=50_000)
        ring.share(f"{name}-{number}")
        return ring

    return make


def ask(shards: Shards, number: int, function: Callable[[ShardActor], Any]) -> Any:
    """What a function returns in the process of a shard."""
    import ray

    assert isinstance(shards.transport, RayTransport)
    return ray.get(shards.transport.handles[number].__ray_call__.remote(function), timeout=120)


def process_of(shards: Shards, number: int) -> int:
    """The process id of a shard."""
    found: int = ask(shards, number, lambda _: os.getpid())
    return found


def with_a_child(shard: ShardActor) -> int:
    """Start a process that has the lock of the shard as well; its id."""
    assert shard._held is not None
    return subprocess.Popen(["sleep", "600"], pass_fds=[shard._held.number], start_new_session=True).pid


def stored(shards: Shards) -> list[list[dict[str, np.ndarray]]]:
    """All episodes of each shard."""
    import ray

    assert isinstance(shards.transport, RayTransport)
    return [ray.get(handle.episodes.remote(), timeout=120) for handle in shards.transport.handles]


class Writing:
    """Adds numbered episodes, until it is killed."""

    def __init__(self, shards: Shards, first: int) -> None:
        self.writer, self.number = RemoteWriter(shards, num_envs=1, deadline=20.0), first
        self.stored = first

    def process(self) -> int:
        return os.getpid()

    def add(self, seconds: float) -> int:
        """Add episodes for a while; the number of the next one."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.writer.add_episode(episode(self.number))
            self.number += 1
            time.sleep(0.002)
        return self.number

    def wait(self) -> int:
        """Wait until all that was added is stored; the number of the next one."""
        self.writer.wait_until_stored(60.0)
        return self.number


class Learning:
    """Takes batches, until it is killed."""

    def __init__(self, shards: Shards) -> None:
        self.loader = RemoteLoader(shards, 8, 1, include=("source",), deadline=3.0)

    def process(self) -> int:
        return os.getpid()

    def take(self, num: int) -> list[int]:
        """Take so many batches; the shards that they came from."""
        return [int(next(self.loader)["source"][0]) for _ in range(num)]


class AddingByALimiter:
    """Adds episodes of 10 steps as the limiter lets it; how many steps it has added."""

    def __init__(self, shards: Shards) -> None:
        self.writer, self.added = RemoteWriter(shards, num_envs=1, deadline=60.0), 0

    def add(self, num_steps: int, is_patient: bool = True) -> int:
        """Add so many steps at most; if it is not patient, only until it may not."""
        end = self.added + num_steps
        while self.added < end:
            if self.writer.may_add:
                self.writer.add_episode({"row": np.arange(10)})
                self.added += 10
                # It has news of the shard, then.
                self.writer.wait_until_stored()
            elif not is_patient:
                break
            else:
                time.sleep(0.01)
        return self.added


class DrawingByALimiter:
    """Draws batches of 8 x 5 steps as the limiter lets it; how many steps it has drawn."""

    def __init__(self, shards: Shards) -> None:
        self.loader, self.drawn = RemoteLoader(shards, 8, 5, deadline=60.0), 0

    def draw(self, until: str) -> int:
        """Draw what is due, until there is a file and nothing is due."""
        while True:
            num = self.loader.num_batches_due
            if num:
                next(self.loader)
                self.drawn += 40
            elif os.path.exists(until):
                return self.drawn
            else:
                time.sleep(0.01)


def record(shards: Shards, num_steps: int, first_env: int) -> list[list[dict[str, list[Any]]]]:
    """Record two games that step together, in a task of Ray's; the logs of the environments."""
    games = Games(2, "next_step")
    games.games = [Game(first_env), Game(first_env + 1)]
    with RemoteWriter(shards) as writer:
        recorder = Recorder(writer, 2, "next_step")
        recorder.reset(games.reset())
        for step in range(num_steps):
            actions = np.full(2, step)
            recorder.step(actions, *games.step(actions))
    return games.logs
