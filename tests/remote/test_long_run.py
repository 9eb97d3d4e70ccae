"""Everybody dies, many times over, machines as well: what `docs/remote.md` promises holds to the end.

Two nodes of Ray's own test cluster have 3 shards, 4 writers and 2 learners. The last writer, the last learner, and at
least one shard are on the node that is lost and replaced, as the other one has room for two shards.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from buffers.dataset import EpisodeDataset, RingBufferDataset
from buffers.remote import RemoteLoader, start_shards
from tests.remote.actors import process_of, stored
from tests.remote.long_run import (
    BATCH_SIZE,
    LENGTH,
    NUM_ENVS,
    PATIENCE,
    LoggingLearner,
    LoggingWriter,
    drawn,
    episode_of,
    is_equal,
    length_of,
    process_that_writes,
    promised,
)

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

#: Steps of all writers, and rounds of five events, four of which kill.
SHORT, MILLION = (40_000, 1), (1_000_000, 5)
STEPS_PER_SECOND = 2_000
NUM_SHARDS, NUM_WRITERS, NUM_LEARNERS = 3, 4, 2
#: Longer than the deadlines of writers and learners.
SECONDS_STOPPED = 8.0
_NODE = {"num_cpus": 1, "object_store_memory": 200_000_000}


def make_ring(number: int) -> EpisodeDataset:
    return RingBufferDataset(capacity=1_000_000)


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.5)


class Running(NamedTuple):
    """A writer or a learner: its log, its actor, and the call that runs there. The log's name is its number."""

    log: Path
    actor: Any
    call: Any


class World:
    """The cluster and all that runs on it.

    Attributes:
        writers: Who writes now, by slot; so are the learners.
        kept: For the log of each dead writer, the promise that holds of it: "stored" or "saved".
    """

    def __init__(self, cluster: Any, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self.add_node()
        ray.init(address=cluster.address, log_to_driver=False)
        room = {"num_cpus": 0, "resources": {"room": 1}, "scheduling_strategy": "SPREAD"}
        self.shards = start_shards(NUM_SHARDS, make_ring, directory=directory / "saves", save_every=5.0, **room)
        self.num_started = 0
        self.writers = [self.new_writer(slot) for slot in range(NUM_WRITERS)]
        self.learners = [self.new_learner(slot) for slot in range(NUM_LEARNERS)]
        self.kept: dict[Path, str] = {}
        self.see_all_go_on()

    def add_node(self) -> None:
        self.node = self.cluster.add_node(resources={"room": 2, "last": 100}, **_NODE)

    def _start(self, kind: type, is_last: bool, *arguments: object) -> Running:
        log = self.directory / str(self.num_started)
        self.num_started += 1
        options = {"num_cpus": 0, "resources": {"last" if is_last else "first": 1}}
        actor = ray.remote(kind).options(**options).remote(self.shards, log)
        return Running(log, actor, actor.run.remote(*arguments))

    def new_writer(self, slot: int) -> Running:
        return self._start(LoggingWriter, slot == NUM_WRITERS - 1, STEPS_PER_SECOND / NUM_WRITERS)

    def new_learner(self, slot: int) -> Running:
        return self._start(LoggingLearner, slot == NUM_LEARNERS - 1)

    @property
    def num_steps(self) -> int:
        """Of all episodes that were acknowledged."""
        logs = [*self.kept, *(writer.log for writer in self.writers)]
        return sum(length_of(int(log.name), number) for log in logs for number in promised(log).acknowledged)

    def see_all_go_on(self) -> None:
        """Wait until all shards answer, and then until each learner and each writer has got something done."""
        calls = [running.call for running in (*self.writers, *self.learners)]
        wait_until(lambda: self.shards.stats(2.0)["num_shards"] == NUM_SHARDS, "all shards answer")
        batches = [drawn(learner.log) for learner in self.learners]
        waits = [promised(writer.log).num_waits for writer in self.writers]

        def have_gone_on() -> bool:
            ray.get(ray.wait(calls, num_returns=len(calls), timeout=0)[0])
            return all(
                drawn(learner.log) >= num + 30 for learner, num in zip(self.learners, batches, strict=True)
            ) and all(
                promised(writer.log).num_waits >= num + 3 for writer, num in zip(self.writers, waits, strict=True)
            )

        wait_until(have_gone_on, "learners get batches, and writers promises")

    # What happens to them. Everything goes on between two events, so a shard has what was stored before it died.

    def kill_shard(self, round_number: int) -> None:
        os.kill(process_of(self.shards, round_number % NUM_SHARDS), signal.SIGKILL)

    def stop_shard(self, round_number: int) -> None:
        process = process_of(self.shards, (round_number + 1) % NUM_SHARDS)
        os.kill(process, signal.SIGSTOP)
        time.sleep(SECONDS_STOPPED)
        os.kill(process, signal.SIGCONT)

    def kill_learner(self, round_number: int) -> None:
        os.kill(process_that_writes(self.learners[0].log), signal.SIGKILL)
        self.learners[0] = self.new_learner(0)

    def kill_writer(self, round_number: int) -> None:
        """In every other round, shards save next, so that what was stored of it outlives their death, too."""
        slot = round_number % (NUM_WRITERS - 1)
        os.kill(process_that_writes(self.writers[slot].log), signal.SIGKILL)
        if round_number % 2 == 0:
            self.shards.save()
        self.kept[self.writers[slot].log] = "saved" if round_number % 2 else "stored"
        self.writers[slot] = self.new_writer(slot)

    def lose_node(self, round_number: int) -> None:
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.kept[self.writers[-1].log] = "saved"
        self.add_node()
        # Until Ray has seen that the node is gone, it places actors there, which never run.
        self.cluster.wait_for_nodes(PATIENCE)
        self.writers[-1], self.learners[-1] = self.new_writer(NUM_WRITERS - 1), self.new_learner(NUM_LEARNERS - 1)

    def end_writers(self) -> None:
        """Let them come to an end, and kill the shards: from now on, nobody can send anything again."""
        (self.directory / "enough").touch()
        ray.get([writer.call for writer in self.writers], timeout=PATIENCE)
        for writer in self.writers:
            ray.kill(writer.actor)
        for number in range(NUM_SHARDS):
            os.kill(process_of(self.shards, number), signal.SIGKILL)
        wait_until(lambda: self.shards.stats(2.0)["num_shards"] == NUM_SHARDS, "all shards answer")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Others must get to run beside whoever draws and adds all the time.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    head = {"include_dashboard": False, "resources": {"room": 2, "first": 100}, **_NODE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield World(cluster, tmp_path)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize(("num_steps", "num_rounds"), [SHORT, MILLION], ids=["short", "million"])
def test_what_was_promised_is_there_whoever_died(world: World, num_steps: int, num_rounds: int) -> None:
    kinds = [world.kill_shard, world.kill_writer, world.lose_node, world.kill_learner, world.stop_shard]
    events = [(kind, round_number) for round_number in range(num_rounds) for kind in kinds]
    for number, (event, round_number) in enumerate(events, 1):
        least = num_steps * number // (len(events) + 1)
        wait_until(lambda least=least: world.num_steps >= least, f"{least} steps")  # type: ignore[misc]
        event(round_number)
        world.see_all_go_on()
    wait_until(lambda: world.num_steps >= num_steps, "all steps")
    world.end_writers()
    found = stored(world.shards)
    check_episodes(world, found)
    check_stats(world, found)
    check_shares(world, found)


def check_episodes(world: World, found: list[list[dict[str, np.ndarray]]]) -> None:
    """Those that were promised, each once, with all values; and of others only what writers added before they died."""
    episodes = [rows for side in found for rows in side]
    names = [(int(rows["writer"][0]), int(rows["episode"][0])) for rows in episodes]
    assert max(Counter(names).values()) == 1
    assert all(is_equal(rows, episode_of(*name)) for rows, name in zip(episodes, names, strict=True))
    by_writer: dict[int, set[int]] = {}
    for writer, number in names:
        by_writer.setdefault(writer, set()).add(number)
    for log, promise in world.kept.items():
        told, own = promised(log), by_writer.pop(int(log.name), set())
        missing = getattr(told, promise) - own
        assert not missing, f"writer {log.name}, {promise}: {sorted(missing)}"
        # Its last call may have completed some before its log could say so.
        assert len(own - told.acknowledged) <= NUM_ENVS
    assert by_writer == {int(writer.log.name): promised(writer.log).acknowledged for writer in world.writers}


def check_stats(world: World, found: list[list[dict[str, np.ndarray]]]) -> None:
    stats = world.shards.stats()
    assert stats["num_missing"] == stats["num_refused"] == stats["num_evicted"] == 0
    assert stats["num_added"] == stats["num_timesteps"] == sum(len(rows["step"]) for side in found for rows in side)


def check_shares(world: World, found: list[list[dict[str, np.ndarray]]]) -> None:
    """Of the first n batches, a shard with the share w of all windows has n * w, rounded up or down."""
    windows = np.array([sum(len(rows["step"]) - LENGTH + 1 for rows in side) for side in found])
    with RemoteLoader(world.shards, BATCH_SIZE, LENGTH, include=("source",)) as loader:
        sources = [int(next(loader)["source"][0]) for _ in range(200)]
    had = np.cumsum(np.eye(NUM_SHARDS)[sources], axis=0)
    owed = np.arange(1, len(sources) + 1)[:, None] * windows / windows.sum()
    assert (abs(had - owed) < 1 + 1e-9).all()
