"""Workers: fresh data, batches that stay as they were drawn, and nobody left behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset

from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from tests import tagged

ROOT = Path(__file__).parent.parent
METHODS = ("fork", "spawn", "forkserver")


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true, in a time in which something that hangs is known to hang."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def filled(num_steps: int = 500) -> RingBufferDataset:
    dataset = RingBufferDataset(2 * num_steps)
    dataset.add_episode(tagged.episode(num_steps, 0))
    return dataset


def children() -> set[int | None]:
    """Processes that this one has started and that run."""
    return {process.pid for process in multiprocessing.active_children()}


def workers_of(batches: Any) -> list[int]:
    return [worker.pid for worker in batches._batches._workers]


# Fresh data.


@pytest.mark.parametrize(("num_workers", "prefetch_factor"), [(1, 3), (2, 1)])
def test_a_new_episode_is_drawn_after_what_was_prefetched(num_workers, prefetch_factor) -> None:
    dataset = RingBufferDataset(10)
    dataset.add_episode(tagged.episode(10, 0))
    loader = dataset.get_loader(2, 10, num_workers=num_workers, prefetch_factor=prefetch_factor)
    batches = iter(loader)
    next(batches)
    for number in range(1, 5):
        time.sleep(0.1)  # Let the workers fill what they may.
        dataset.add_episode(tagged.episode(10, number))  # In the place of the one before.
        seen = [tagged.origins(next(batches))[0][1] for _ in range(num_workers * prefetch_factor + 1)]
        assert seen[-1] == number


# Nobody is left behind.

# torch raises the news of a dead worker wherever the trainer happens to be, be it in a finalizer.
RAISES_ANYWHERE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    ("method", "activity"),
    [("fork", "fetching"), ("spawn", "idle"), ("forkserver", "idle"), ("forkserver", "fetching")],
)
def test_workers_end_when_the_trainer_is_killed(method: str, activity: str) -> None:
    trainer, workers, sibling = start_trainer(method, activity)
    try:
        trainer.kill()
        trainer.wait()
        assert eventually(lambda: not any(is_running(worker) for worker in workers))
    finally:
        end(sibling)


@pytest.mark.parametrize(
    "method", ["fork", "forkserver", *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS * 16)]
)
def test_ctrl_c_leaves_nobody(method: str) -> None:
    trainer, workers, sibling = start_trainer(method, "fetching")
    os.killpg(trainer.pid, signal.SIGINT)
    trainer.wait()
    try:
        assert eventually(lambda: not any(is_running(worker) for worker in workers))
    finally:
        end(sibling)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_outlive_a_ctrl_c_that_the_trainer_outlives(method: str) -> None:
    # Jupyter and terminals send it to the whole group.
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(9, 0))
    loader = ring.get_loader(4, 3, num_workers=2, multiprocessing_context=method, seed=0)
    batches = iter(loader)
    for _ in range(3):
        for _ in range(2):  # One of each: by then it has begun.
            next(batches)
        for worker in batches._batches._workers:
            os.kill(worker.pid, signal.SIGINT)
    for _ in range(12):
        tagged.origins(next(batches))
    assert all(worker.is_alive() for worker in batches._batches._workers)


def test_a_worker_may_iterate_in_a_thread_of_its_own() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(9, 0))
    batches = DataLoader(Threaded(ring.sequences(3, seed=0)), batch_size=4, num_workers=1)
    assert len(tagged.origins(next(iter(batches)))) == 4


class Threaded(IterableDataset):
    """A user's own, that reads ahead."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Any:
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            batches = executor.submit(iter, self._dataset).result()
            yield from (executor.submit(next, batches).result() for _ in range(8))


def end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def start_trainer(method: str, activity: str) -> tuple[subprocess.Popen[str], list[int], int]:
    trainer = subprocess.Popen(
        [sys.executable, "-m", "tests.trainer", method, activity],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert trainer.stdout is not None
    *workers, sibling = map(int, trainer.stdout.readline().split())
    trainer.stdout.close()
    assert len(workers) == 2
    return trainer, workers, sibling


@RAISES_ANYWHERE
@pytest.mark.parametrize("persistent", [False, True])
def test_a_killed_worker_is_an_error_and_a_new_iteration_works(persistent: bool) -> None:
    loader = filled().get_loader(8, 4, num_workers=2, persistent_workers=persistent, seed=0)
    for _ in range(3):
        batches = iter(loader)
        next(batches)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            os.kill(workers_of(batches)[0], signal.SIGKILL)
            for _ in range(100):
                next(batches)
    tagged.origins(next(iter(loader)))


@RAISES_ANYWHERE
def test_a_persistent_worker_killed_between_iterations_is_replaced() -> None:
    loader = filled().get_loader(8, 4, num_workers=2, persistent_workers=True, seed=0)
    batches = iter(loader)
    next(batches)
    victim = workers_of(batches)[0]
    with contextlib.suppress(RuntimeError):  # The news of it is raised wherever the trainer is.
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: not is_running(victim))
    tagged.origins(next(iter(loader)))


@RAISES_ANYWHERE
def test_sample_starts_over_after_a_worker_was_killed() -> None:
    before = children()
    with ReplayBuffer(filled(), 8, 4, num_workers=2, seed=0) as buffer:
        buffer.sample()
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            os.kill((children() - before).pop(), signal.SIGKILL)  # type: ignore[arg-type]
            for _ in range(100):
                buffer.sample()
        tagged.origins(buffer.sample())


def test_close_and_garbage_collection_end_workers_at_once() -> None:
    before = children()
    buffer = ReplayBuffer(filled(), 8, 4, num_workers=2)
    buffer.sample()
    assert len(children() - before) == 2
    buffer.close()
    assert children() <= before
    batches = iter(filled().get_loader(8, 4, num_workers=2))
    next(batches)
    assert len(children() - before) == 2
    del batches
    gc.collect()
    assert children() <= before


# Nothing grows.


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("num_batches", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_descriptors_stay_flat_under_a_low_limit(num_batches: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        loader = filled().get_loader(8, 4, num_workers=2, include=("index", "step", "mask"))
        batches = iter(loader)
        kept = [next(batches) for _ in range(100)]
        before = descriptors()
        for n in range(num_batches):
            kept[n % 100] = next(batches)
        assert descriptors() <= before + 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_dev_shm_has_nothing_after_the_trainer_is_killed() -> None:
    trainer, workers, sibling = start_trainer("fork", "fetching")
    trainer.kill()
    trainer.wait()
    end(sibling)
    assert eventually(lambda: not any(is_running(worker) for worker in workers))
    mine = [f"torch_{process}_" for process in (trainer.pid, *workers)]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(tuple(mine))]


def test_a_dev_shm_of_8_mb_does_not_matter() -> None:
    code = """
import numpy as np
from buffers.dataset import RingBufferDataset
ring = RingBufferDataset(10_000)
for _ in range(100):
    ring.add_episode({"x": np.ones((100, 10_000), np.uint8)})
kept = []
for batch in ring.get_loader(64, 50, num_workers=2):
    assert (batch["x"] == 1).all()
    kept.append(batch)
    if len(kept) == 8:
        break
print("done")
"""
    script = f"mount -t tmpfs -o size=8m tmpfs /dev/shm && exec {sys.executable} -c '{code}'"
    found = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if "ermitted" in found.stderr or "denied" in found.stderr:
        pytest.skip("mounting is not permitted here")
    assert found.stdout.strip() == "done", found.stderr


def resident(process: int) -> int:
    """Bytes of memory that a process has to itself or shares with its relatives, without the pages of files."""
    # Pages of files, such as torch's libraries, are shared with strangers: their share grows as a stranger ends.
    fields = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()]
    return sum(int(field[1]) * 1024 for field in fields if field[0] in ("Pss_Anon:", "Pss_Shmem:"))


@pytest.mark.parametrize("num_episodes", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_memory_stays_flat_while_episodes_come_and_go(num_episodes: int) -> None:
    dataset = RingBufferDataset(2000)
    episode = {"x": np.zeros((10, 20), np.float32)}
    for _ in range(200):
        dataset.add_episode(episode)
    batches = iter(dataset.get_loader(8, 4, num_workers=2))
    processes = [os.getpid(), *workers_of(batches)]
    measured = []
    for n in range(num_episodes):
        dataset.add_episode(episode)
        if n % 20 == 0:
            next(batches)
        if n % (num_episodes // 10) == num_episodes // 10 - 1:
            measured.append(sum(map(resident, processes)))
    # The first half warms up: allocators, prefetched batches. A row of the index that stayed for each episode would be
    # 12 MB over half a million.
    assert max(measured[5:]) - measured[5] < 3e6, measured
