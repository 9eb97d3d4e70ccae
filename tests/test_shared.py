"""One writer, many readers, no lock: nothing torn, and every mutant of the protocol is caught."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.dataset.fields import ColorImage, Fields, Scalar
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.sharing import SharedArrays
from tests import reading, tagged

METHODS = ("fork", "spawn", "forkserver")


MILLION = [pytest.param(m, n, 64_000 // n, 5000, marks=pytest.mark.slow) for m in METHODS for n in (2, 4)]


@pytest.mark.parametrize(
    ("method", "num_readers", "num_batches", "num_laps"), [("fork", 2, 1500, 20), ("forkserver", 2, 1500, 20), *MILLION]
)
def test_no_window_is_torn_under_a_writer_that_laps_the_ring(method, num_readers, num_batches, num_laps) -> None:
    ring = reading.tiny_ring(128)
    ring.add_episode(reading.tagged_episode(ring, 5))
    readers = [reading.start(ring, method, num_batches, seed) for seed in range(num_readers)]
    rng, may_stop = np.random.default_rng(0), False
    while not all(connection.poll() for _, connection in readers):
        for _ in range(20):
            ring.add_episode(reading.tagged_episode(ring, int(rng.integers(1, 9))))
        if not may_stop and ring.table.next_start > num_laps * 128:
            may_stop = True
            for _, connection in readers:
                connection.send("may stop")
    for process, connection in readers:
        assert connection.recv() == 0
        process.join()


# The writer and the readers do not depend on each other's life.


def write_forever(ring_info: EpisodeDatasetInfo, connection: Any) -> None:
    ring = RingBufferDataset(128, ring_info)
    ring.add_episode(reading.tagged_episode(ring, 5))
    connection.send(reading.handle_of(ring))
    rng = np.random.default_rng(os.getpid())
    while True:
        ring.add_episode(reading.tagged_episode(ring, int(rng.integers(1, 9))))


def test_a_reader_survives_its_writer_killed_in_the_middle() -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(4):
        mine, theirs = context.Pipe()
        writer = context.Process(target=write_forever, args=(EpisodeDatasetInfo(reading.WIDE), theirs), daemon=True)
        writer.start()
        ring = pickle.loads(mine.recv())
        stream = ring.get_loader(64, 3, include=("index", "step"), seed=attempt).stream
        time.sleep(0.01 + 0.005 * attempt)
        writer.kill()
        writer.join()
        for n in range(20):
            assert reading.count_inconsistent(stream.batch(n)) == 0
        with pytest.raises(RuntimeError, match="Only the process that made"):
            ring.add_episode(reading.tagged_episode(ring, 2))


def test_the_writer_never_waits_for_a_reader_that_is_stopped() -> None:
    ring = reading.tiny_ring(128)
    ring.add_episode(reading.tagged_episode(ring, 5))
    reader, connection = reading.start(ring, "fork", 0, 0)
    os.kill(reader.pid, signal.SIGSTOP)
    for _ in range(2000):
        ring.add_episode(reading.tagged_episode(ring, 5))
    os.kill(reader.pid, signal.SIGCONT)
    connection.send("may stop")
    assert connection.recv() == 0
    reader.join()


def test_forking_while_another_thread_adds_neither_hangs_nor_confuses() -> None:
    ring = reading.tiny_ring(128)
    ring.add_episode(reading.tagged_episode(ring, 5))
    with reading.adding(ring):
        for n in range(40):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    torch.set_num_threads(1)  # As a DataLoader worker does: thread pools do not survive a fork.
                    loader = ring.get_loader(8, 3, include=("index", "step"), seed=n)
                    status = reading.count_inconsistent(reading.batch_of(loader.stream, n))
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_uses_nothing_that_was_half_done() -> None:
    ring = reading.tiny_ring(128)
    ring.add_episode(reading.tagged_episode(ring, 5))
    reader = reading.reader_of(ring)
    # Another thread reads on when the process forks: it has counted rows, and not written down their episode.
    reader.table._state = reader.table._state._replace(num_steps=12)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            reader._refresh()
            status = 0 if reader.table.num_steps == 5 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# What is handed to another process.


@pytest.mark.filterwarnings("ignore:A `capacity` of 800000 steps needs")
def test_pickling_ten_gigabytes_of_ring_takes_kilobytes() -> None:
    fields = Fields(obs=ColorImage((64, 64, 3)), reward=Scalar())
    ring = RingBufferDataset(800_000, EpisodeDatasetInfo(fields))
    ring.add_episode({"obs": np.zeros((10, 64, 64, 3), np.uint8), "reward": np.arange(10, dtype=np.float32)})
    handle = reading.handle_of(ring)
    assert len(handle) < 64_000
    reader = pickle.loads(handle)
    assert reader.get_episode(0)["reward"].tolist() == list(range(10))
    ring.add_episode({"obs": np.zeros((3, 64, 64, 3), np.uint8), "reward": np.ones(3, np.float32)})
    assert reader.num_episodes == 1
    reader.get_loader(1).stream.take()
    assert reader.episode_lengths == [10, 3], "it looks before it draws"


@pytest.mark.parametrize("save", [pickle.dumps, lambda held: torch.save(held, io.BytesIO()), ForkingPickler.dumps])
@pytest.mark.parametrize("hold", [list, lambda held: MixtureDataset(held, [1]), lambda held: ReplayBuffer(*held, 2)])
def test_a_ring_is_not_pickled_unless_a_process_starts(save, hold) -> None:
    ring = reading.tiny_ring(16)
    ring.add_episode(reading.tagged_episode(ring, 5))
    with pytest.raises(TypeError, match="the rows are lost when this process ends. `dataset.save\\(directory\\)`"):
        save(hold([ring]))
    for other in (copy.copy(ring), copy.deepcopy(ring)):
        assert other.get_episode(0)["length"].tolist() == [5] * 5


def test_memory_that_is_not_there_any_more_is_refused() -> None:
    layout = {"x": ((10,), np.dtype(np.int64))}
    shared, other = SharedArrays(layout), SharedArrays(layout)
    handle, state = reading.handle_of(shared), shared.__getstate__()
    assert (pickle.loads(handle)["x"] == 0).all()
    # On another machine, say, all numbers may happen to be those of something else.
    state["handle"] = other.__getstate__()["handle"]
    with pytest.raises(RuntimeError, match="does not have the memory that it shared"):
        SharedArrays.opened(state)
    del shared
    gc.collect()
    with pytest.raises(RuntimeError, match="does not have the memory that it shared"):
        pickle.loads(handle)


def test_arrays_of_all_layouts_are_seen_by_both_sides() -> None:
    layout = {"a": ((3, 5), np.dtype(np.float32)), "b": ((), np.dtype("V2")), "c": ((0, 4), np.dtype(np.int64))}
    shared = SharedArrays({**layout, "d": ((100_000,), np.dtype(np.uint8))})
    other = reading.reader_of(shared)
    assert {name: (array.shape, array.dtype) for name, array in other.items() if name != "d"} == layout
    shared["a"][...] = 3
    shared["d"][-1] = 7
    assert (other["a"] == 3).all() and other["d"][-1] == 7
    with pytest.raises(RuntimeError, match="only be passed on by the process that made it"):
        reading.handle_of(other)
    own = copy.deepcopy(other)
    shared["a"][...] = 4
    assert (own["a"] == 3).all() and own["d"][-1] == 7


# A reader that finds nothing between two episodes.


def stream_of_reader(dataset: Any) -> Any:
    """A reader's, which has drawn already."""
    stream = reading.reader_of(dataset).get_loader(4, 5, seed=0).stream
    stream.take()
    return stream


@pytest.mark.parametrize("kind", ["ring", "mixture"])
@pytest.mark.parametrize("lengths", [[8], [12, 2]])
def test_a_reader_waits_for_an_episode_that_is_coming(kind, lengths, monkeypatch) -> None:
    ring = RingBufferDataset(sum(lengths) + 1)
    for number, length in enumerate(lengths):
        ring.add_episode(tagged.episode(length, number))
    dataset = ring if kind == "ring" else MixtureDataset([ring], [1.0])
    stream = stream_of_reader(dataset)
    has_left, may_come, write = threading.Event(), threading.Event(), ring._write

    def write_later(*arguments: Any) -> None:
        has_left.set()
        assert may_come.wait(30)
        write(*arguments)

    monkeypatch.setattr(ring, "_write", write_later)
    # It comes once the reader has begun to wait.
    monkeypatch.setattr("buffers.loading.drawing.time.sleep", lambda seconds: may_come.set())
    writer = threading.Thread(target=ring.add_episode, args=(tagged.episode(lengths[0], 7),))
    writer.start()
    assert has_left.wait(30)
    origins = tagged.origins(stream.take())
    writer.join()
    assert {number for _, number, _, _ in origins} == {7} and may_come.is_set()


def test_a_reader_does_not_wait_where_nothing_is_to_come(monkeypatch) -> None:
    def never(seconds: float) -> None:
        raise AssertionError("It waits for nothing.")

    monkeypatch.setattr("buffers.loading.drawing.time.sleep", never)
    ring = RingBufferDataset(10)
    for number in range(4):  # Each leaves for the next.
        ring.add_episode(tagged.episode(8, number))
    stream = stream_of_reader(ring)
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
    stream = stream_of_reader(ring)
    monkeypatch.setattr(ring, "_write", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ring.add_episode(tagged.episode(8, 1))
    clock = itertools.count()
    monkeypatch.setattr(
        "buffers.loading.drawing.time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    )
    with pytest.raises(RuntimeError, match="The dataset is empty"):
        stream.take()
    monkeypatch.undo()
    ring.add_episode(tagged.episode(8, 2))
    assert {number for _, number, _, _ in tagged.origins(stream.take())} == {2}
