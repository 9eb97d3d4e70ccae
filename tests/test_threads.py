"""Threads of one process: they draw and read while another adds, wait for nobody, and get nothing torn."""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.sampler import UniformSampler
from buffers.sharing.column import Column
from buffers.table import DrawContext, EpisodeTable, Selection, Windows
from tests import reading, tagged
from tests.list_dataset import ListDataset

INCLUDE = ("index", "step")


def wide_ring(num_episodes: int = 12) -> RingBufferDataset:
    ring = reading.tiny_ring(64)
    for _ in range(num_episodes):
        ring.add_episode(reading.tagged_episode(ring, 5))
    return ring


# By numpy, and, from 4 MB on or for two threads of torch, by torch, which lets other threads go on meanwhile.
@pytest.mark.parametrize("batch_size", [16, 192])
def test_what_threads_draw_while_another_adds_is_whole(batch_size, threads) -> None:
    ring = wide_ring()
    streams = [ring.get_loader(batch_size, 3, include=INCLUDE, seed=seed).stream for seed in range(2)]

    def num_torn(stream: Any) -> int:
        found, n = 0, 0
        while n < 3000 // batch_size or ring.num_evicted <= 12:
            found += reading.count_inconsistent(reading.batch_of(stream, n))
            n += 1
        return found

    with reading.adding(ring), concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(num_torn, streams)) == [0, 0]


# The same with the other side at work between any two fields, where mutants cannot hide.


def between_fields(patch: pytest.MonkeyPatch, methods: tuple[str, ...], function: Callable[[], None]) -> None:
    """Call a function before and after each call of these methods of a column, but not within itself."""
    is_inside = False

    def call() -> None:
        nonlocal is_inside
        if not is_inside:
            is_inside = True
            function()
            is_inside = False

    def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
        def around(*arguments: Any) -> Any:
            call()
            found = method(*arguments)
            call()
            return wrapped(found) if callable(found) else found

        return around

    for name in methods:
        patch.setattr(Column, name, wrapped(getattr(Column, name)))


def num_torn_while_adding(patch: pytest.MonkeyPatch, batch_size: int) -> int:
    """Windows that were drawn before, and just now, by the writer and a reader, at each moment of some additions."""
    ring, num_torn = wide_ring(), 0
    windows = ring.draw([UniformSampler()], batch_size, 3, np.random.default_rng(0), Selection(), DrawContext())
    reader = reading.reader_of(ring)
    drawn = reader.get_loader(batch_size, 3, include=INCLUDE, seed=0).stream

    def look() -> None:
        nonlocal num_torn
        num_torn += reading.count_inconsistent(drawn.take())
        for each in (ring, reader):
            rows, was_read = each.read(windows)
            kept = windows if was_read is None else windows[was_read]
            steps = np.arange(3)
            batch = {name: tensor if was_read is None else tensor[was_read] for name, tensor in rows.items()}
            batch |= {"index": kept.start[:, None] + steps, "step": kept.step[:, None] + steps}
            num_torn += reading.count_inconsistent({name: np.asarray(value) for name, value in batch.items()})

    with patch.context() as inner:
        between_fields(inner, ("write",), look)
        for length in (5, 7, 3, 12):
            ring.add_episode(reading.tagged_episode(ring, length))
    return num_torn


def num_torn_while_reading(patch: pytest.MonkeyPatch, batch_size: int) -> int:
    """Batches of the writer and of a reader, with additions at each moment of reading them."""
    ring, num_torn = wide_ring(), 0
    sources = ring, reading.reader_of(ring)
    streams = [source.get_loader(batch_size, 3, include=INCLUDE, seed=0).stream for source in sources]
    lengths = iter([4, 9, 2, 5] * 3)

    def add() -> None:
        length = next(lengths, None)
        if length is not None:
            ring.add_episode(reading.tagged_episode(ring, length))

    with patch.context() as inner:
        between_fields(inner, ("gather", "items"), add)
        for _ in range(4):
            num_torn += sum(reading.count_inconsistent(stream.take()) for stream in streams)
    assert next(lengths, None) is None
    return num_torn


def test_a_ring_is_copied_whole_while_threads_add(monkeypatch) -> None:
    ring, episode_of_id, threads = reading.tiny_ring(16), RingBufferDataset.episode_of_id, []
    episodes = [ring.get_episode(ring.add_episode(reading.tagged_episode(ring, 5))) for _ in range(3)]

    def read(dataset: RingBufferDataset, episode_id: int) -> Any:
        threads.append(threading.Thread(target=ring.add_episode, args=(reading.tagged_episode(ring, 5),)))
        threads[-1].start()
        threads[-1].join(0.1)  # It waits for the copy, or has added.
        return episode_of_id(dataset, episode_id)

    with monkeypatch.context() as inner:
        inner.setattr(RingBufferDataset, "episode_of_id", read)
        copied = copy.deepcopy(ring)
    [thread.join() for thread in threads]
    assert (copied.table.ids.tolist(), copied.num_evicted, copied.table.next_id) == ([0, 1, 2], 0, 3)
    for found, expected in zip(copied.episodes(), episodes, strict=True):
        assert all(found[name].equal(rows) for name, rows in expected.items())


@pytest.mark.parametrize("batch_size", [16, 192])
@pytest.mark.parametrize("play", [num_torn_while_adding, num_torn_while_reading])
def test_nothing_is_torn_wherever_the_other_side_comes_in(play, batch_size, monkeypatch) -> None:
    assert play(monkeypatch, batch_size) == 0


def no_check_after_the_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RingBufferDataset, "which_are_whole", lambda self, windows: None)


def retire_after_the_write(patch: pytest.MonkeyPatch) -> None:
    write, retired = RingBufferDataset._write, []
    patch.setattr(RingBufferDataset, "_erase", lambda ring, *episode: retired.append(episode))

    def write_first(ring: RingBufferDataset, *arguments: Any) -> None:
        write(ring, *arguments)
        for _, start, length in retired:
            ring._oldest_step = start + length
            ring._published.retire(start + length)
        retired.clear()

    patch.setattr(RingBufferDataset, "_write", write_first)


def publish_before_the_write(patch: pytest.MonkeyPatch) -> None:
    write, publish = RingBufferDataset._write, RingBufferDataset._publish
    patch.setattr(RingBufferDataset, "_publish", lambda *arguments: None)

    def write_last(ring: RingBufferDataset, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        publish(ring, (start, len(episode["x"]), episode_id, 0))
        write(ring, episode, start, episode_id)

    patch.setattr(RingBufferDataset, "_write", write_last)


@pytest.mark.parametrize("mutant", [no_check_after_the_copy, retire_after_the_write, publish_before_the_write])
def test_every_mutant_of_the_order_gives_torn_windows(mutant, monkeypatch) -> None:
    mutant(monkeypatch)
    assert any(play(monkeypatch, 16) for play in (num_torn_while_adding, num_torn_while_reading))


# Who waits for whom.


class Blocked(UniformSampler):
    """A user's own, which waits for something."""

    def __init__(self) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        self.has_begun.set()
        assert self.may_go_on.wait(60)
        return super().draw(table, num_windows, length, rng)


@pytest.mark.parametrize("kind", ["ring", "list", "mixture"])
def test_a_draw_that_takes_its_time_holds_up_no_addition(kind) -> None:
    dataset = ListDataset(100) if kind == "list" else RingBufferDataset(100)
    dataset.add_episode(tagged.episode(9, 0))
    source = MixtureDataset([dataset], [1]) if kind == "mixture" else dataset
    sampler = Blocked()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        batch = pool.submit(source.get_loader(8, 3, sampler=sampler).stream.take)
        assert sampler.has_begun.wait(60)
        pool.submit(dataset.add_episode, tagged.episode(9, 1)).result(60)
        assert not batch.done() and dataset.num_episodes == 2
        sampler.may_go_on.set()
        origins = tagged.origins(batch.result(60))
    assert {number for _, number, _, _ in origins} == {0}, "it draws from what there was when it began"


def test_threads_that_draw_from_one_stream_share_its_batches() -> None:
    ring = RingBufferDataset(1000)
    for number in range(20):
        ring.add_episode(tagged.episode(30, number))
    stream, reference = (ring.get_loader(4, 3, seed=0).stream for _ in range(2))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [tuple(batch["code"].flatten().tolist()) for batch in pool.map(lambda _: stream.take(), range(400))]
    expected = [tuple(reference.take()["code"].flatten().tolist()) for _ in range(400)]
    assert sorted(found) == sorted(expected) and len(set(expected)) == 400
    assert stream.position == 400


def test_a_storage_of_ones_own_needs_no_care_for_threads() -> None:
    dataset = ListDataset(40)
    dataset.add_episode(tagged.episode(9, 0))
    stream = dataset.get_loader(8, 3, chunk_size=4, seed=0).stream

    def draw() -> None:
        # On, until windows were evicted between draw and read.
        for n in itertools.count():
            tagged.origins(stream.take())
            tagged.number_and_length(dataset.get_episode(-1))
            if n > 300 and stream.num_rejected > 0:
                break

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw)
        for number in itertools.count(1):
            dataset.add_episode(tagged.episode(3 + number % 7, number))
            if number > 100 and drawing.done():
                break
    assert drawing.result() is None
