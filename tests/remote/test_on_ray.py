"""Shards on Ray itself: what is acknowledged is there once, whoever is killed or hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from buffers import SamplesPerInsert
from buffers.dataset import RingBufferDataset
from buffers.remote import RemoteLoader, RemoteWriter, Shards, on_ray, start_shards
from buffers.sampler import MixedSampler, PrioritizedSampler, UniformSampler
from tests.remote.actors import (
    AddingByALimiter,
    DrawingByALimiter,
    Learning,
    Writing,
    ask,
    make_ring,
    process_of,
    record,
    shared_ring,
    start_ray,
    stored,
    with_a_child,
)
from tests.remote.simulated import episode, number_of

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("default")  # Ray has warnings of its own.


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One of this module's own, whatever runs on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        # Of all processes that it starts: they import `tests`.
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # It starts a process for each CPU, which takes seconds of one.
        start_ray(num_cpus=1, object_store_memory=300_000_000)
        yield
        ray.shutdown()
    with pytest.raises(RuntimeError, match="Call `ray.init"):
        start_shards(1, make_ring)
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def shards(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    """Two that save, for tests that add episodes of different numbers: a process takes seconds to start."""
    started = start_shards(2, make_ring, directory=tmp_path_factory.mktemp("saves"), num_cpus=0)
    yield started
    started.transport.end()


def numbers(shards: Shards, first: int, most: int = 10_000) -> list[int]:
    """Of episodes with numbers from `first` on, less than `most` more."""
    found = sorted(number_of(rows) for side in stored(shards) for rows in side)
    return [number for number in found if first <= number < first + most]


def wait_until_back(shards: Shards, timeout: float = 240.0) -> None:
    end = time.monotonic() + timeout
    while shards.stats(2.0)["num_shards"] < len(shards):
        assert time.monotonic() < end
        time.sleep(0.2)


def test_recorders_in_other_processes_store_what_their_environments_logged(cluster: None) -> None:
    shards = start_shards(2, make_ring, num_cpus=0)
    task = ray.remote(record).options(num_cpus=0).remote(shards, 200, 0)
    own = record(shards, 200, 2)
    logs = [*ray.get(task, timeout=240), *own]
    found = {(int(rows["obs"][0, 0]), int(rows["obs"][0, 1])): rows for side in stored(shards) for rows in side}
    expected = {(env, n): told for env, log in enumerate(logs) for n, told in enumerate(log) if told["action"]}
    # A first row without a transition is not kept; nor is there one behind the last reset.
    assert found.keys() == expected.keys() and len(found) == sum(map(len, stored(shards))) > 100
    for key, told in expected.items():
        np.testing.assert_array_equal(found[key]["obs"], np.stack(told["obs"]))
        for name in ("action", "reward"):
            np.testing.assert_array_equal(found[key][name], [0, *told[name]])
    shards.close()
    with pytest.raises(RuntimeError, match="No shard answers: shard 0: "):
        for _ in range(100):  # Ray ends them a moment later.
            RemoteWriter(shards)
            time.sleep(0.2)


def test_a_shard_that_is_killed_loses_nothing_and_doubles_nothing(shards: Shards) -> None:
    writer = RemoteWriter(shards, num_envs=1)
    loader = RemoteLoader(shards, 8, 1, include=("source",), deadline=5.0)
    added = 0
    for part in range(3):
        for _ in range(200):
            writer.add_episode(episode(added))
            added += 1
        if part == 0:
            writer.wait_until_stored()
            shards.save()
        else:
            os.kill(process_of(shards, part - 1), signal.SIGKILL)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                begin = time.monotonic()
                while part - 1 not in {*loader.troubles, *writer.troubles}:
                    next(loader)
                    assert time.monotonic() - begin < 90
                for _ in range(20):
                    assert next(loader)["number"].shape == (8, 1)
                writer.add_episode(episode(added))
                added += 1
            wait_until_back(shards)
    writer.wait_until_saved(60.0)
    assert numbers(shards, 0) == list(range(added))
    writer.close()


def test_fewer_shards_than_have_saved_are_refused(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "shard-0002").mkdir()
    with pytest.raises(ValueError, match="has the saves of 3 shards: `num_shards`=2 would leave episodes out"):
        start_shards(2, make_ring, directory=tmp_path)


def test_a_url_is_no_directory_of_saves(cluster: None) -> None:
    with pytest.raises(ValueError, match="s3://bucket/replay is a URL, and a local directory is needed. Shards save"):
        start_shards(2, make_ring, directory="s3://bucket/replay")


def test_shards_draw_by_priorities_that_come_back(shards: Shards) -> None:
    with RemoteWriter(shards, num_envs=1) as writer:
        for number in range(30_000, 30_040):
            writer.add_episode(episode(number))
        writer.wait_until_stored()
        sampler = MixedSampler({PrioritizedSampler(alpha=1.0): 0.5, UniformSampler(): 0.5})
        with RemoteLoader(shards, 8, 1, sampler=sampler, include=("index", "weight", "source"), deadline=5.0) as loader:
            batches = iter(loader)
            batch = next(batches)
            assert batch["weight"].shape == (8,)
            loader.update_priorities(batch["index"], np.ones((8, 1), np.float32), batch["source"])
            assert next(batches)["index"].shape == (8, 1)


def test_a_shard_that_hangs_is_named_and_all_others_go_on(shards: Shards) -> None:
    writer = RemoteWriter(shards, num_envs=1, deadline=5.0)
    loader = RemoteLoader(shards, 8, 1, include=("source",), deadline=5.0)
    for number in range(20_000, 20_100):
        writer.add_episode(episode(number))
    writer.wait_until_stored()
    process = process_of(shards, 1)
    os.kill(process, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        with pytest.warns(RuntimeWarning, match="Shard 1 has not answered for [5-9] s"):
            while 1 not in loader.troubles:
                next(loader)
            next(loader)  # It may have become so since the last one.
        assert time.monotonic() - begin < 60
        assert {int(next(loader)["source"][0]) for _ in range(30)} == {0}
        with pytest.warns(RuntimeWarning, match="Shard 1 has not answered"):
            for number in range(20_100, 20_400):
                writer.add_episode(episode(number))
                time.sleep(0.02)
    finally:
        os.kill(process, signal.SIGCONT)
    writer.wait_until_stored()
    assert numbers(shards, 20_000) == list(range(20_000, 20_400))
    begin = time.monotonic()
    while {int(next(loader)["source"][0]) for _ in range(30)} != {0, 1}:
        assert time.monotonic() - begin < 60
    writer.close()


def test_a_writer_that_is_killed_takes_nothing_that_was_stored(shards: Shards) -> None:
    actor, other = ray.remote(Writing).options(num_cpus=0).remote(shards, 40_000), Writing(shards, 60_000)
    ray.get(actor.add.remote(0.5), timeout=120)
    other.add(0.5)
    sure = ray.get(actor.wait.remote(), timeout=120)
    process = ray.get(actor.process.remote(), timeout=120)
    actor.add.remote(30.0)
    time.sleep(0.5)
    os.kill(process, signal.SIGKILL)
    end = other.wait()
    time.sleep(0.5)
    found = numbers(shards, 40_000)
    assert found == list(range(40_000, 40_000 + len(found))) and len(found) >= sure - 40_000
    assert numbers(shards, 60_000) == list(range(60_000, end))
    other.writer.close()


def test_a_learner_that_is_killed_holds_up_nobody(shards: Shards) -> None:
    with RemoteWriter(shards, num_envs=1) as writer:
        for number in range(80_000, 80_050):
            writer.add_episode(episode(number))
        writer.wait_until_stored()
        actor, other = ray.remote(Learning).options(num_cpus=0).remote(shards), Learning(shards)
        process = ray.get(actor.process.remote(), timeout=120)
        actor.take.remote(1_000_000)
        os.kill(process, signal.SIGKILL)
        assert {*other.take(100)} == {0, 1}
        assert numbers(shards, 80_000) == list(range(80_000, 80_050))
        other.loader.close()


@pytest.mark.slow
def test_whoever_is_killed_or_stopped_again_and_again(cluster: None, tmp_path: Path) -> None:
    """For a minute: shards are killed and stopped, a writer and a learner are killed, others go on."""
    rng = np.random.default_rng(0)
    shards = start_shards(3, make_ring, directory=tmp_path, save_every=2.0, num_cpus=0)
    writers = [ray.remote(Writing).options(num_cpus=0).remote(shards, 100_000 * (n + 1)) for n in range(3)]
    learners = [ray.remote(Learning).options(num_cpus=0).remote(shards) for _ in range(2)]
    sure = [ray.get(writer.wait.remote(), timeout=240) for writer in writers]
    killed: set[int] = set()
    for turn in range(12):
        calls = [writer.add.remote(2.0) for n, writer in enumerate(writers) if n not in killed]
        batches = [learner.take.remote(20) for learner in learners]
        stopped = None
        with contextlib.suppress(Exception):
            victim = process_of(shards, int(rng.integers(3)))
            if turn % 3 == 2:
                stopped = victim
                os.kill(victim, signal.SIGSTOP)
            else:
                os.kill(victim, signal.SIGKILL)
        if turn == 6:
            process = ray.get(learners[1].process.remote(), timeout=240)
            os.kill(process, signal.SIGKILL)
            del learners[1]
        ray.get(batches[: len(learners)], timeout=120)
        ray.get(calls, timeout=120)
        if stopped is not None:
            os.kill(stopped, signal.SIGCONT)
        if turn == 8:
            sure[0] = ray.get(writers[0].wait.remote(), timeout=120)
            wait_until_back(shards)
            shards.save()
            os.kill(ray.get(writers[0].process.remote(), timeout=240), signal.SIGKILL)
            killed.add(0)
        wait_until_back(shards)
    ends = {n: ray.get(writers[n].wait.remote(), timeout=120) for n in (1, 2)}
    time.sleep(2.0)
    found = numbers(shards, 100_000, 300_000)
    own = [number for number in found if number < 200_000]
    assert own == list(range(100_000, 100_000 + len(own))) and len(own) >= sure[0] - 100_000 > 0
    assert [number for number in found if number >= 200_000] == [
        *range(200_000, ends[1]),
        *range(300_000, ends[2]),
    ]
    assert len(ray.get(learners[0].take.remote(50), timeout=240)) == 50
    shards.close()


@pytest.mark.slow
def test_a_shard_that_starts_again_waits_until_the_one_before_has_ended(cluster: None, tmp_path: Path) -> None:
    shards = start_shards(1, make_ring, directory=tmp_path, num_cpus=0)
    with RemoteWriter(shards, num_envs=1) as writer:
        writer.add_episode(episode(1))
        writer.wait_until_saved()
    process, child = process_of(shards, 0), ask(shards, 0, with_a_child)
    try:
        os.kill(process, signal.SIGKILL)
        time.sleep(on_ray._SECONDS_TO_END + 15.0)
        assert shards.stats(1.0)["num_shards"] == 0
    finally:
        os.kill(child, signal.SIGKILL)
    wait_until_back(shards)
    assert numbers(shards, 0) == [1]
    shards.close()


@pytest.mark.slow
def test_a_limiter_keeps_the_ratio_over_all_processes(cluster: None, tmp_path: Path) -> None:
    limiter = SamplesPerInsert(ratio=4, tolerance=400, min_steps=100)
    shards = start_shards(2, make_ring, limiter=limiter, num_cpus=0)
    writers = [ray.remote(AddingByALimiter).options(num_cpus=0).remote(shards) for _ in range(2)]
    learners = [ray.remote(DrawingByALimiter).options(num_cpus=0).remote(shards) for _ in range(2)]
    # Of others, nobody knows an episode on its way and one in each shard, or batches under way and as many answers.
    unknown_added, unknown_drawn = 2 * 3 * 10, 2 * 6 * 40
    stop = tmp_path / "stop"

    def add(is_patient: bool) -> int:
        return sum(ray.get([writer.add.remote(2_000, is_patient) for writer in writers], timeout=500))

    draws = [learner.draw.remote(str(stop)) for learner in learners]
    added = add(is_patient=True)
    stop.touch()
    drawn = sum(ray.get(draws, timeout=500))
    assert added == 4_000 and -400 - unknown_drawn <= 4 * (added - 100) - drawn <= 400 + 4 * unknown_added
    # Learners that draw nothing hold the writers up.
    added = add(is_patient=False)
    assert added > 4_000 and 4 * (added - 100) - drawn <= 400 + 4 * unknown_added
    shards.close()


@pytest.mark.slow
def test_a_learner_of_the_same_machine_attaches_to_the_ring_of_a_shard(cluster: None, tmp_path: Path) -> None:
    name = f"test-{os.getpid()}"
    shards = start_shards(1, shared_ring(name), directory=tmp_path, num_cpus=0)
    writer = RemoteWriter(shards, num_envs=1)
    for number in range(20):
        writer.add_episode(episode(number))
    writer.wait_until_saved()
    ring = RingBufferDataset.attach(f"{name}-0")
    batches = iter(ring.get_loader(64, 1, seed=0))
    assert {number for _ in range(20) for number in next(batches)["number"].flatten().tolist()} == {*range(20)}
    for number in range(20, 40):
        writer.add_episode(episode(number))
    writer.wait_until_stored()
    assert {number for _ in range(40) for number in next(batches)["number"].flatten().tolist()} == {*range(40)}
    os.kill(process_of(shards, 0), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=f"which shared a ring as `{name}-0`, has ended or has given the ring up"):
        while True:
            next(batches)
    wait_until_back(shards)
    writer.wait_until_saved()
    ring = RingBufferDataset.attach(f"{name}-0")
    assert sorted(int(rows["number"][0]) for rows in ring.episodes()) == list(range(40))
    local, remote = ring.get_loader(8, 1, seed=1), RemoteLoader(shards, 8, 1, seed=1)
    for one, other, _ in zip(local, remote, range(5), strict=False):
        assert (one["number"] == other["number"]).all()
    writer.close()
    shards.close()


def test_a_shard_that_cannot_start_says_why(cluster: None) -> None:
    def fail(shard: int) -> None:
        raise ValueError(f"no disk for {shard}")

    with pytest.raises(RuntimeError, match="1 of 1 shards did not start: shard 0: .*ValueError: no disk for 0."):
        start_shards(1, fail, num_cpus=0)  # type: ignore[arg-type]


def test_no_episode_is_longer_than_the_smallest_shard_takes(cluster: None) -> None:
    with start_shards(2, lambda shard: RingBufferDataset(100 - 50 * shard), num_cpus=0) as shards:
        writer = RemoteWriter(shards, num_envs=1)
        with pytest.raises(ValueError, match="An episode of 51 steps does not fit a `capacity` of 50 steps"):
            writer.add_episode({"row": np.arange(51)})
        writer.close()


def test_batches_are_the_learners_own(cluster: None) -> None:
    with start_shards(1, make_ring, num_cpus=0) as shards, RemoteWriter(shards, num_envs=1) as writer:
        writer.add_episode({"image": np.arange(20 * 64 * 64 * 3).reshape(20, 64, 64, 3).astype(np.uint8)})
        writer.wait_until_stored()
        batches = [next(RemoteLoader(shards, 16, 8, seed=1))["image"] for _ in range(2)]
        assert batches[0].nbytes > 1_000_000  # In Ray's shared memory.
        expected = batches[1].clone()
        batches[0].add_(1)
        assert (batches[1] == expected).all()
