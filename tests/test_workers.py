"""Workers: fresh data, batches that stay as they were drawn, and nobody left behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import itertools
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from buffers import ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.loading.slots import Slots, _opened, _unpack
from tests import reading, tagged

ROOT = Path(__file__).parent.parent
METHODS = ("fork", "spawn", "forkserver")


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition comes true within a time that is a promise, not a measurement."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def filled(num_steps: int = 500) -> RingBufferDataset:
    dataset = RingBufferDataset(2 * num_steps)
    dataset.add_episode(tagged.episode(num_steps, 0))
    return dataset


def workers_of(batches: Any) -> list[int]:
    return [worker.pid for worker in batches._batches._workers]


# Fresh data.


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("prefetch_factor", [1, 3])
def test_a_new_episode_is_drawn_as_soon_as_what_was_prefetched_is_used_up(num_workers, prefetch_factor) -> None:
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


def test_an_age_limited_by_the_workers_holds_under_a_live_writer() -> None:
    ring = reading.tiny_ring(300)
    ring.add_episode(reading.tagged_episode(ring, 5))
    loader = ring.get_loader(8, 3, num_workers=2, include=("index", "step"))
    for batch in itertools.islice(loader, 300):
        assert reading.count_inconsistent(batch) == 0
        for length in (3, 7, 4):
            ring.add_episode(reading.tagged_episode(ring, length))


# Batches stay as they were drawn.


@pytest.mark.parametrize("keep_every", [1, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_kept_batches_are_never_written_over(keep_every: int, persistent: bool) -> None:
    loader = filled().get_loader(8, 4, num_workers=2, include=("index",), persistent_workers=persistent, seed=0)
    kept = []
    for n, batch in enumerate(itertools.islice(loader, 200)):
        if n % keep_every == 0:
            flat = tagged.flatten(batch)
            kept.append((flat, {name: tensor.clone() for name, tensor in flat.items()}))
            kept = kept[-100:]
    del loader, batch
    gc.collect()
    for flat, copies in kept:
        for name, tensor in flat.items():
            assert torch.equal(tensor, copies[name])


def test_a_part_of_a_batch_keeps_it_and_a_forked_child_does_not_give_it_away() -> None:
    loader = filled().get_loader(4, 4, num_workers=1, seed=0)
    batches = iter(loader)
    part = next(batches)["obs"]["pixels"][1, 2:]
    expected = part.clone()
    child = os.fork()
    if child == 0:
        del part  # The finalizer of this copy must not free the trainer's slot.
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    for _ in range(30):
        next(batches)
    assert torch.equal(part, expected)


def test_slots_are_used_again_and_extra_memory_only_while_batches_are_kept() -> None:
    slots, kept = Slots(2), []
    for n in range(20):
        slots.begin(1000)
        tensor = slots.empty((10, 10), torch.float32)
        assert tensor is not None
        tensor.fill_(n)
        function, arguments = slots.pack({"x": tensor, "y": torch.full((3,), n)}).__reduce__()
        assert function is _unpack
        batch = function(*arguments)
        assert (batch["x"] == n).all() and (batch["y"] == n).all()
        is_extra = arguments[2]
        assert is_extra is (len(kept) >= 2)
        if n >= 10:
            kept.append(batch)
        del batch
    assert all((batch["x"] == 10 + i).all() for i, batch in enumerate(kept))
    assert len(slots._parting) == 1


def test_a_batch_that_outgrew_its_slot_finds_room_in_one_the_next_time() -> None:
    slots, was_extra = Slots(2), []
    for n in range(4):
        slots.begin(1_000_000)
        field = slots.empty((1_000_000,), torch.uint8)
        assert field is not None
        _, arguments = slots.pack({"x": field.fill_(n).float()}).__reduce__()
        assert (_unpack(*arguments)["x"] == n).all()
        was_extra.append(arguments[2])
    assert was_extra == [True, False, False, False]


def test_a_batch_of_a_worker_that_is_gone_is_an_error_that_says_so() -> None:
    slots = Slots(2)
    slots.begin(1000)
    _, arguments = slots.pack({"x": torch.zeros(3)}).__reduce__()
    del slots
    gc.collect()
    with pytest.raises(RuntimeError, match="DataLoader worker .* ended before its batch was taken"):
        _unpack(0, *arguments[1:])


def test_a_batch_whose_transform_failed_gives_its_slot_back() -> None:
    slots = Slots(2)
    for _ in range(5):
        slots.begin(1000)
    slots.begin(1000)
    assert slots._current is slots._shared


def fail_on_odd(batch: dict[str, Any]) -> dict[str, Any]:
    if int(batch["episode"][0]) % 2:
        raise KeyError("odd")
    return {"total": batch["reward"].sum(), "copy": batch["reward"][:, 1:], "list": [batch["code"]], "text": "even"}


def test_what_a_transform_makes_crosses_whatever_it_is() -> None:
    dataset = RingBufferDataset(100)
    dataset.add_episode(tagged.episode(20, 0))
    loader = dataset.get_loader(4, 4, num_workers=1, include=("episode",), transform=fail_on_odd, seed=0)
    reference = dataset.get_loader(4, 4, include=("episode",), transform=fail_on_odd, seed=0)
    for one, two in zip(itertools.islice(loader, 5), itertools.islice(reference, 5), strict=True):
        assert one.keys() == two.keys() and one["text"] == "even"
        assert torch.equal(one["total"], two["total"]) and torch.equal(one["copy"], two["copy"])
        assert torch.equal(one["list"][0], two["list"][0])


def to_float(batch: dict[str, Any]) -> dict[str, Any]:
    pixels = batch["obs"]["pixels"]
    return {"pixels": pixels.float() / 255, "conj": torch.view_as_complex(pixels[..., :2].float().contiguous()).conj()}


def test_batches_that_a_transform_makes_larger_cross_in_slots_and_lazily_conjugated_ones_as_they_are() -> None:
    dataset = RingBufferDataset(2000)
    for number in range(4):
        dataset.add_episode(tagged.episode(500, number))
    options: dict[str, Any] = {"transform": to_float, "seed": 0}
    before = set(os.listdir("/dev/shm"))
    loader = dataset.get_loader(64, 100, num_workers=1, **options)
    reference = dataset.get_loader(64, 100, **options)
    batches = iter(loader)
    for expected in itertools.islice(reference, 8):
        found = next(batches)
        assert torch.equal(found["pixels"], expected["pixels"])
        assert torch.equal(found["conj"].resolve_conj(), expected["conj"].resolve_conj())
        del found
    assert {name for name in os.listdir("/dev/shm") if name.startswith("torch_")} <= before
    assert len(_opened) >= 1


@pytest.mark.parametrize("persistent", [False, True])
def test_a_state_that_is_loaded_reaches_workers(persistent: bool) -> None:
    dataset = filled()
    reference = [dataset.get_loader(4, 3, seed=9).stream.batch(n) for n in range(5, 8)]
    buffer = ReplayBuffer(dataset, 4, 3, num_workers=2, seed=0, persistent_workers=persistent)
    buffer.sample()
    buffer.dataloader.load_state_dict({"seed": 9, "position": 5})
    for expected in reference:
        assert torch.equal(buffer.sample()["code"], expected["code"])
    workers = workers_of(buffer._batches)
    buffer.close()
    assert not any(is_running(worker) for worker in workers)
    gc.collect()
    assert not set(workers) & set(_opened)


def test_batches_of_every_length_cross() -> None:
    dataset = RingBufferDataset(3000)
    for number in range(30):
        dataset.add_episode(tagged.episode(1 + number * number // 2, number))
    loader = dataset.get_loader(3, None, num_workers=2, seed=0)
    reference = dataset.get_loader(3, None, seed=0)
    kept = list(itertools.islice(loader, 60))
    for one, two in zip(kept, itertools.islice(reference, 60), strict=True):
        assert tagged.origins(one, one["mask"]) == tagged.origins(two, two["mask"])


# Nobody is left behind.

# torch raises the news of a dead worker wherever the trainer happens to be, be it in a finalizer.
RAISES_ANYWHERE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("activity", ["idle", "fetching"])
@pytest.mark.parametrize("method", METHODS)
def test_workers_end_when_the_trainer_is_killed(method: str, activity: str) -> None:
    trainer, workers, sibling = start_trainer(method, activity)
    try:
        trainer.kill()
        trainer.wait()
        assert eventually(lambda: not any(is_running(worker) for worker in workers), 5)
    finally:
        end(sibling)


@pytest.mark.parametrize("round_", range(3))
def test_ctrl_c_leaves_nobody(round_: int) -> None:
    trainer, workers, sibling = start_trainer(METHODS[round_], "fetching")
    os.killpg(trainer.pid, signal.SIGINT)
    trainer.wait(timeout=20)
    try:
        assert eventually(lambda: not any(is_running(worker) for worker in workers), 3)
    finally:
        end(sibling)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.slow
def test_ctrl_c_leaves_nobody_fifty_times() -> None:
    for round_ in range(50):
        test_ctrl_c_leaves_nobody(round_ % 3)


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
def test_a_persistent_worker_that_is_killed_between_iterations_is_replaced() -> None:
    loader = filled().get_loader(8, 4, num_workers=2, persistent_workers=True, seed=0)
    batches = iter(loader)
    next(batches)
    victim = workers_of(batches)[0]
    with contextlib.suppress(RuntimeError):  # The news of it is raised wherever the trainer is.
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: not is_running(victim), 5)
    tagged.origins(next(iter(loader)))


@RAISES_ANYWHERE
def test_sample_starts_over_after_a_worker_was_killed() -> None:
    buffer = ReplayBuffer(filled(), 8, 4, num_workers=2, seed=0)
    buffer.sample()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        os.kill(workers_of(buffer._batches)[1], signal.SIGKILL)
        for _ in range(100):
            buffer.sample()
    tagged.origins(buffer.sample())
    buffer.close()


def test_close_and_garbage_collection_end_workers_at_once() -> None:
    buffer = ReplayBuffer(filled(), 8, 4, num_workers=2)
    buffer.sample()
    workers = workers_of(buffer._batches)
    buffer.close()
    assert not any(is_running(worker) for worker in workers)
    batches = iter(filled().get_loader(8, 4, num_workers=2))
    next(batches)
    workers = workers_of(batches)
    del batches
    gc.collect()
    assert not any(is_running(worker) for worker in workers)


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


def test_dev_shm_is_as_before_after_the_trainer_is_killed() -> None:
    def names() -> set[str]:
        return set(os.listdir("/dev/shm"))

    before = names()
    trainer, _, sibling = start_trainer("fork", "fetching")
    during = names()
    trainer.kill()
    trainer.wait()
    end(sibling)
    assert names() - before == set(), during - before


def test_a_dev_shm_of_8_mb_does_not_matter_to_a_ring_of_100_mb() -> None:
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
    """Proportional set size in bytes."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss")


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


# Between two episodes.


@pytest.mark.parametrize("kind", ["ring", "mixture"])
@pytest.mark.parametrize("lengths", [[8], [12, 2]])
def test_a_reader_waits_for_an_episode_that_those_it_could_draw_have_left_for(kind, lengths, monkeypatch) -> None:
    ring = RingBufferDataset(sum(lengths) + 1)
    for number, length in enumerate(lengths):
        ring.add_episode(tagged.episode(length, number))
    dataset = ring if kind == "ring" else MixtureDataset([ring], [1.0])
    stream = pickle.loads(pickle.dumps(dataset)).get_loader(4, 5, seed=0).stream
    stream.take()
    has_left, may_come, write = threading.Event(), threading.Event(), ring._write

    def write_later(*arguments: Any) -> None:
        has_left.set()
        assert may_come.wait(30)
        write(*arguments)

    monkeypatch.setattr(ring, "_write", write_later)
    # It comes once the reader has begun to wait.
    monkeypatch.setattr("buffers.stream.time.sleep", lambda seconds: may_come.set())
    writer = threading.Thread(target=ring.add_episode, args=(tagged.episode(lengths[0], 7),))
    writer.start()
    assert has_left.wait(30)
    origins = tagged.origins(stream.take())
    writer.join()
    assert {number for _, number, _, _ in origins} == {7} and may_come.is_set()


def test_a_reader_does_not_wait_where_nothing_is_to_come(monkeypatch) -> None:
    def never(seconds: float) -> None:
        raise AssertionError("It waits for nothing.")

    monkeypatch.setattr("buffers.stream.time.sleep", never)
    ring = RingBufferDataset(10)
    for number in range(4):  # Each leaves for the next.
        ring.add_episode(tagged.episode(8, number))
    stream = pickle.loads(pickle.dumps(ring)).get_loader(4, 5, seed=0).stream
    stream.take()
    ring.evict_episode(0)
    for own in (ring.get_loader(4, 5).stream, stream):
        with pytest.raises(RuntimeError, match="The dataset is empty"):
            own.take()
    ring.add_episode(tagged.episode(4, 5))
    with pytest.raises(RuntimeError, match="longer than every stored episode"):
        stream.take()


def test_a_reader_waits_no_longer_than_writing_takes(monkeypatch) -> None:
    ring = RingBufferDataset(10)
    ring.add_episode(tagged.episode(8, 0))
    stream = pickle.loads(pickle.dumps(ring)).get_loader(4, 5, seed=0).stream
    monkeypatch.setattr(ring, "_write", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ring.add_episode(tagged.episode(8, 1))
    clock = itertools.count()
    monkeypatch.setattr(
        "buffers.stream.time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    )
    with pytest.raises(RuntimeError, match="The dataset is empty"):
        stream.take()
    monkeypatch.undo()
    ring.add_episode(tagged.episode(8, 2))
    assert {number for _, number, _, _ in tagged.origins(stream.take())} == {2}
