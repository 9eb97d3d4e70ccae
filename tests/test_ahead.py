"""What is drawn ahead is what would have been drawn then, and nobody can tell but by the time."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.ahead import Ahead
from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.dataset.index import EpisodeIndex, Windows
from buffers.randomness import BatchRandom
from buffers.sampler import Sampler, UniformEpisodeSampler, UniformSampler
from buffers.stream import SequenceStream
from tests import tagged
from tests.list_dataset import ListDataset

# Take so many batches, add an episode of so many steps, evict the oldest.
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 70)),
        st.tuples(st.just("add"), st.integers(3, 9)),
        st.tuples(st.just("evict"), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


def alone(stream: SequenceStream) -> SequenceStream:
    """The same stream, which draws each batch when it is asked for."""
    other = SequenceStream(stream.dataset, stream.batch_size, stream.sequence_length, include=stream.include)
    other.random = BatchRandom(stream.random.seed)
    other._ahead = NothingAhead()
    return other


class NothingAhead(Ahead):
    """Draws each batch when it is asked for."""

    def get(self, stream, n, step):
        return stream.draw(range(n, n + 1))


def assert_same(one: Any, two: Any) -> None:
    one, two = tagged.flatten(one), tagged.flatten(two)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@given(OPERATIONS, st.integers(1, 9), st.integers(1, 3), st.sampled_from([RingBufferDataset, ListDataset]))
@settings(max_examples=60)
def test_batches_are_those_that_would_have_been_drawn_alone(operations, batch_size, length, kind) -> None:
    dataset = kind(40)
    dataset.add_episode(tagged.episode(9, 0))
    stream = dataset.get_loader(batch_size, length, include=("index", "step"), seed=3).stream
    reference, number = alone(stream), 1
    for operation, value in operations:
        if operation == "add":
            dataset.add_episode(tagged.episode(value, number))
            number += 1
        elif operation == "evict" and dataset.num_episodes > 1:
            dataset.evict_episode(0)
        elif operation == "take":
            for _ in range(value):
                assert_same(stream.take(), reference.take())


def test_an_episode_is_drawn_from_the_very_next_batch_on() -> None:
    ring = RingBufferDataset(1000)
    ring.add_episode(tagged.episode(4, 0))
    stream = ring.get_loader(64, 2, seed=0).stream
    for number in range(1, 60):
        for _ in range(number):
            drawn = {n for _, n, _, _ in tagged.origins(stream.take())}
        ring.add_episode(tagged.episode(4, number))
        ring.evict_episode(0)
        drawn = {n for _, n, _, _ in tagged.origins(stream.take())}
        assert drawn == {number}


def test_a_batch_can_be_changed_kept_and_saved_like_one_that_was_made_alone() -> None:
    ring = RingBufferDataset(1000)
    ring.add_episode({"x": np.arange(100, dtype=np.float32), "y": torch.arange(100).to(torch.bfloat16)})
    stream = ring.get_loader(8, 2, seed=0).stream
    reference = alone(stream)
    kept = []
    for batch in (stream.take() for _ in range(100)):
        for value in batch.values():
            assert value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        kept.append({name: value.clone() for name, value in batch.items()})
        batch["x"].zero_()
        batch["y"].zero_()
    for batch in kept:
        assert_same(batch, reference.take())


def test_going_on_elsewhere_gives_the_batches_of_there() -> None:
    ring = RingBufferDataset(1000)
    ring.add_episode(tagged.episode(100, 0))
    loader, other = ring.get_loader(4, 2, seed=0), ring.get_loader(4, 2, seed=9)
    for _ in range(5):
        loader.stream.take(), other.stream.take()
    loader.load_state_dict(other.state_dict())
    for _ in range(40):
        assert_same(loader.stream.take(), other.stream.take())
    # In any order, too.
    for n in (7, 3, 900, 8, 3):
        assert_same(loader.stream.batch(n), alone(other.stream).batch(n))


def test_files_that_vanish_meanwhile_are_drawn_again(tmp_path) -> None:
    files = IndividualFileDataset(1000, directory=tmp_path, durability="rename")
    for number in range(6):
        files.add_episode(tagged.episode(6, number))
    stream = files.get_loader(8, 2, seed=0).stream
    for _ in range(20):
        stream.take()
    for path in sorted(tmp_path.glob("*.safetensors"))[:3]:
        path.unlink()
    files._reader.close()
    drawn = set()
    for _ in range(60):
        drawn |= {n for _, n, _, _ in tagged.origins(stream.take())}
    assert drawn >= {3, 4, 5} and files.num_episodes == 3
    for _ in range(40):
        assert {n for _, n, _, _ in tagged.origins(stream.take())} <= {3, 4, 5}


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_make_the_same_ahead_of_their_own_batches(num_workers) -> None:
    ring = RingBufferDataset(1000)
    for number in range(5):
        ring.add_episode(tagged.episode(20, number))
    loader = ring.get_loader(4, 2, seed=1, num_workers=num_workers)
    reference = alone(loader.stream)
    for batch in itertools.islice(loader, 80):
        assert_same(batch, reference.take())


def test_a_worker_makes_ahead_those_of_its_own_single_sequences(monkeypatch) -> None:
    ring = RingBufferDataset(1000)
    ring.add_episode(tagged.episode(100, 0))
    worker = SimpleNamespace(id=1, num_workers=3)
    monkeypatch.setattr("buffers.stream.get_worker_info", lambda: worker)
    monkeypatch.setattr("buffers.stream.end_with", lambda trainer: None)
    stream, drawn = ring.sequences(2, seed=0), []
    draw = stream.draw
    stream.draw = lambda numbers: (drawn.extend(numbers), draw(numbers))[1]
    for _ in itertools.islice(stream, 32 * 63):  # 1, 1, 2, 4, ... blocks of 32 sequences at a time.
        pass
    assert drawn == [1 + 3 * k for k in range(len(drawn))]


@pytest.mark.parametrize("num_workers", [1, 16, 64])
@pytest.mark.parametrize("batch_size", [1, 256, 3000])
def test_what_is_made_ahead_is_bounded_however_many_workers_there_are(batch_size, num_workers) -> None:
    ring = RingBufferDataset(1000)
    ring.add_episode(tagged.episode(100, 0))
    stream = ring.get_loader(batch_size, 2, seed=0).stream
    for n in range(0, 70 * num_workers, num_workers):
        stream._ahead.get(stream, n, num_workers)
        assert stream.random._integers._words.nbytes <= 1 << 20
        assert batch_size == 3000 or len(stream._ahead._numbers) * batch_size <= 1 << 14


@pytest.mark.parametrize("batch_size", [4, 3000])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("taken", range(1, 9))
def test_after_a_read_that_failed_batches_are_right(batch_size, error, taken, monkeypatch) -> None:
    ring = RingBufferDataset(1000)
    ring.add_episode(tagged.episode(900, 0))
    stream = ring.get_loader(batch_size, 8, seed=0).stream
    reference = alone(stream)
    expected = [reference.take() for _ in range(taken + 40)]
    for n in range(taken):
        assert_same(stream.take(), expected[n])

    def fail(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(RingBufferDataset, "_which_are_whole", fail)
        patched.setattr(RingBufferDataset, "_prepare", fail)
        with pytest.raises(error):
            for n in range(taken, len(expected)):  # Some may have been made before.
                assert_same(stream.batch(n), expected[n])
    for m in range(n, len(expected)):
        assert_same(stream.batch(m), expected[m])


class OnlyStarts(Sampler):
    """The first window of each episode, drawn in ways that a uniform sampler does not use."""

    def draw(self, index: EpisodeIndex, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        position = rng.integers(0, len(index), size=num_windows, dtype=np.int64)
        rng.random(3)
        return index.windows(position, np.zeros(num_windows, np.int64), length or 1)


def test_what_a_stream_is_told_later_holds_from_the_next_batch_on() -> None:
    ring = RingBufferDataset(1000)
    for number in range(5):
        ring.add_episode(tagged.episode(20, number))
    stream = ring.get_loader(4, 8, include=("step",), seed=0).stream
    for _ in range(13):
        stream.take()
    stream.sampler = OnlyStarts()
    for _ in range(40):
        assert (stream.take()["step"][:, 0] == 0).all()
    stream.sampler = UniformEpisodeSampler()
    for _ in range(40):
        tagged.origins(stream.take())
    stream.sampler = UniformSampler()
    for length in (8, 16, 3, 3):
        stream.sequence_length = length
        for _ in range(10):
            assert stream.take()["reward"].shape == (4, length)


def test_nothing_made_ahead_keeps_a_dataset_in_memory_or_travels() -> None:
    ring = RingBufferDataset(1000)
    ring.add_episode(tagged.episode(100, 0))
    buffer = ReplayBuffer(ring, 64, 2)
    for _ in range(50):
        buffer.sample()
    assert len(pickle.dumps(buffer.dataloader.stream)) < 65_536
    is_alive = weakref.ref(ring)
    gc.disable()
    try:
        del buffer, ring
        assert is_alive() is None
    finally:
        gc.enable()
