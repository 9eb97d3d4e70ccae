"""Ctrl-C at any call inside of drawing and adding: what is drawn afterwards, here and by readers, is never torn."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, MixtureDataset, RingBufferDataset
from buffers.utils import ThreadLock
from tests import tagged
from tests.list_dataset import ListDataset


def is_cut_off(function: Callable[[], Any], num_events: int) -> bool:
    """Whether Ctrl-C at the n-th call or return inside of a function, of Python or of C, came before its end."""
    left = num_events

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        # Between the end of a `with` and the exit of a lock, which is C, Python handles no signal.
        left -= not (event == "c_call" and argument.__name__ == "__exit__")
        if left == 0:
            raise KeyboardInterrupt

    try:
        sys.setprofile(profile)
        try:
            function()
        finally:
            sys.setprofile(None)
    except KeyboardInterrupt:
        return True
    return False


def is_lock_free(dataset: EpisodeDataset) -> bool:
    """Whether another thread can take the lock."""
    found: list[bool] = []

    def take() -> None:
        assert isinstance(dataset._lock, ThreadLock)
        found.append(dataset._lock.acquire(blocking=False))
        if found[0]:
            dataset._lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


def ring_of(num_episodes: int, capacity: int) -> RingBufferDataset:
    ring = RingBufferDataset(capacity)
    for number in range(num_episodes):
        ring.add_episode(tagged.episode(3 + number % 5, number))
    return ring


def check(*streams: Any) -> None:
    for stream in streams:
        for _ in range(2):
            tagged.origins(stream.batch(stream.position))  # Refuses what is not one episode's.
            stream.position += 1


@pytest.mark.parametrize("num_episodes", [5, 63, 64])
def test_after_a_draw_that_was_cut_off_no_sequence_crosses(num_episodes) -> None:
    for num_events in range(1, 200):
        ring = ring_of(num_episodes, 1000)
        stream = ring.get_loader(32, 3, seed=0).stream
        if num_episodes == 63:  # A guide that is there already is brought up.
            stream.take()
            ring.add_episode(tagged.episode(9, 99))
        cut_off = is_cut_off(stream.take, num_events)
        assert is_lock_free(ring)
        check(stream)
        ring.add_episode(tagged.episode(4, 100))
        check(stream)
        if not cut_off:
            break
    assert num_events > 60


@pytest.mark.parametrize(("num_episodes", "capacity"), [(5, 1000), (64, 1000), (30, 70)])
def test_after_an_addition_that_was_cut_off_no_sequence_crosses_here_or_in_readers(num_episodes, capacity) -> None:
    for num_events in range(1, 400):
        ring = ring_of(num_episodes, capacity)
        stream, reader = (
            dataset.get_loader(32, 3, seed=0).stream for dataset in (ring, pickle.loads(pickle.dumps(ring)))
        )
        check(stream, reader)
        cut_off = is_cut_off(partial(ring.add_episode, tagged.episode(9, 100)), num_events)
        assert is_lock_free(ring)
        for number in (101, 102):
            ring.add_episode(tagged.episode(4 + number % 2, number))
            check(stream, reader)
        # Readers know what is here, no more and no less, each once.
        reader.dataset._refresh()
        assert reader.dataset.index.rows.tolist() == ring.index.rows.tolist()
        if not cut_off:
            break
    assert num_events > 60


def filled(kind: str) -> Any:
    if kind == "list":
        dataset: EpisodeDataset = ListDataset(10_000)
        for number in range(3):
            dataset.add_episode(tagged.episode(3 + number % 5, number))
        return dataset
    ring = ring_of(3, 10_000)
    return {"ring": ring, "mixture": MixtureDataset([ring], [1.0]), "buffer": ReplayBuffer(ring, 4)}[kind]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("kind", ["ring", "mixture", "buffer", "list"])
def test_a_copy_of_what_was_drawn_from_draws_no_sequence_across_episodes(kind, copied) -> None:
    original = filled(kind)
    source = original.dataset if kind == "buffer" else original
    source.get_loader(64, 3, seed=0).stream.take()
    if kind == "buffer" and copied is not copy.deepcopy:
        pytest.skip("a buffer is not pickled")
    other = copied(original)
    source = other.dataset if kind == "buffer" else other
    writer = source._leaves[0] if kind == "mixture" else source
    if copied is copy.deepcopy or kind == "list":
        for number in range(3, 40):
            writer.add_episode(tagged.episode(3 + number % 5, number))
    batch = source.get_loader(4096, 3, seed=0).stream.take()
    numbers = {number for _, number, _, _ in tagged.origins(batch)}
    assert len(numbers) == source.num_episodes
