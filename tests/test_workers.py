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
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset

from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from tests import reading, tagged
from tests.faults import kill_worker, limited

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
def test_workers_end_when_the_trainer_is_killed_and_leave_nothing(method: str, activity: str) -> None:
    with trainer_of(method, activity) as (trainer, workers):
        trainer.kill()
        trainer.wait()
        assert eventually(lambda: not any(is_running(worker) for worker in workers))
        mine = [f"torch_{process}_" for process in (trainer.pid, *workers)]
        assert not [name for name in os.listdir("/dev/shm") if name.startswith(tuple(mine))]


@pytest.mark.parametrize(
    "method", ["fork", "forkserver", *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS * 16)]
)
def test_ctrl_c_leaves_nobody(method: str) -> None:
    with trainer_of(method, "fetching") as (trainer, workers):
        os.killpg(trainer.pid, signal.SIGINT)
        trainer.wait()
        assert eventually(lambda: not any(is_running(worker) for worker in workers))


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


@contextlib.contextmanager
def trainer_of(method: str, activity: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A trainer, and its workers."""
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
    try:
        yield trainer, workers
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(sibling, signal.SIGKILL)


@RAISES_ANYWHERE
@pytest.mark.parametrize("persistent", [False, True])
def test_a_killed_worker_is_an_error_and_a_new_iteration_works(persistent: bool) -> None:
    loader = filled().get_loader(8, 4, num_workers=2, persistent_workers=persistent, seed=0)
    for _ in range(2):
        batches = iter(loader)
        next(batches)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            os.kill(workers_of(batches)[0], signal.SIGKILL)
            for _ in range(100):
                next(batches)
    batches = iter(loader)
    next(batches)
    kill_worker(batches._batches._workers[0])
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


def test_close_and_garbage_collection_end_the_workers() -> None:
    before = children()
    with ReplayBuffer(filled(), 8, 4, num_workers=2) as buffer:
        buffer.sample()
        assert children() > before
    assert eventually(lambda: children() <= before)
    batches = iter(filled().get_loader(8, 4, num_workers=2))
    next(batches)
    assert children() > before
    del batches
    gc.collect()
    assert eventually(lambda: children() <= before)


# Nothing grows.


def test_descriptors_stay_flat_under_a_low_limit() -> None:
    with limited(resource.RLIMIT_NOFILE, 128):
        batches = iter(filled().get_loader(8, 4, num_workers=2, include=("index", "step", "mask")))
        kept = [next(batches) for _ in range(100)]
        before = len(os.listdir("/proc/self/fd"))
        for n in range(400):
            kept[n % 100] = next(batches)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


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


def test_memory_stays_flat_while_episodes_come_and_go() -> None:
    dataset = RingBufferDataset(2000)
    episode = {"x": np.zeros((10, 20), np.float32)}
    for _ in range(200):
        dataset.add_episode(episode)
    reader = reading.reader_of(dataset)  # What a worker has.
    streams = [each.get_loader(8, 4).stream for each in (dataset, reader)]
    measured = []
    tracemalloc.start()
    try:
        for n in range(10_000):
            dataset.add_episode(episode)
            if n % 20 == 0:
                [stream.take() for stream in streams]
            if n % 1000 == 999:
                gc.collect()
                measured.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # The first half warms up. A number that stayed for each episode would be 40 KB over the other.
    assert max(measured[5:]) - measured[4] < 20_000, measured
