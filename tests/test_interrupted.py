"""Ctrl-C at any call inside of drawing and adding: what is drawn afterwards, here and by readers, is never torn."""

from __future__ import annotations

import collections
import copy
import itertools
import pickle
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
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
    return left <= 0  # It came, and the collector passed over it.


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
        assert reader.dataset.table.rows.tolist() == ring.table.rows.tolist()
        if not cut_off:
            break
    assert num_events > 60


def chain(kinds: str, directory: Path) -> list[EpisodeDataset]:
    """Datasets, each extended by the next."""
    found: list[EpisodeDataset] = []
    for position, kind in enumerate(kinds.split("+")):
        capacity = (23 if "+" in kinds else 300, 400, 500)[position]
        if kind == "ring":
            found.append(RingBufferDataset(capacity))
        else:
            found.append(IndividualFileDataset(capacity, directory=directory / str(position), durability="rename"))
    for front, other in reversed(list(itertools.pairwise(found))):
        front.extend(other, seed=0)
    return found


def stored_rows(dataset: EpisodeDataset) -> collections.Counter[tuple[int, ...]]:
    """How often each (environment, episode, step) is there, in episodes that are checked whole."""
    rows: collections.Counter[tuple[int, ...]] = collections.Counter()
    for episode in dataset.episodes():
        tagged.number_and_length(episode)
        rows.update(map(tuple, episode["obs"]["state"].int().tolist()))
    return rows


# What was cut off while it opened a file is closed by the collector, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:An episode of 24 steps is longer")
@pytest.mark.parametrize(
    ("kinds", "num_envs", "num_open"),
    [
        ("ring", 1, 2),
        ("ring", 3, 2),
        ("ring", 8, 2),
        ("file", 1, 2),
        ("ring+file", 1, 2),
        ("file+ring", 1, 2),
        *itertools.product(("ring+ring", "ring+file+ring"), (1,), (2, 23)),
    ],
)
def test_no_row_is_doubled_or_lost_when_a_step_that_ends_episodes_was_cut_off(
    kinds, num_envs, num_open, tmp_path
) -> None:
    envs = np.arange(num_envs)
    for num_events in range(1, 2000):
        datasets = chain(kinds, tmp_path / str(num_events))
        buffer = ReplayBuffer(datasets[0], 4, num_envs=num_envs, seed=0)
        for number in (100, 101):  # They leave the first for what comes.
            buffer.add_episode(tagged.episode(9, number))
        was_added = collections.Counter({(0, number, step): 1 for number in (100, 101) for step in range(9)})

        def add(number: int, step: int, done: bool, buffer: ReplayBuffer = buffer) -> None:
            if num_envs == 1:
                buffer.add_step(tagged.rows(0, number, step), done)
            else:
                buffer.add_step(tagged.rows(envs, number, step), np.full(num_envs, done))

        for step in range(num_open):
            add(0, step, False)
            was_added.update((env, 0, step) for env in envs.tolist())
        last = (0, num_open) if num_envs == 1 else (1, 0)
        cut_off = is_cut_off(partial(add, *last, True), num_events)
        assert all(map(is_lock_free, datasets)), num_events
        buffer.flush()
        is_added = {(env, *last) for env in envs.tolist()} & stored_rows(datasets[-1]).keys()
        if num_open == 2:
            assert is_added <= stored_rows(datasets[0]).keys(), num_events
        for number in (102, 103):  # Others come back with them.
            buffer.add_episode(tagged.episode(9, number))
            was_added.update((0, number, step) for step in range(9))
            found = [stored_rows(dataset) for dataset in datasets]
            assert max(map(max, map(collections.Counter.values, found))) == 1, num_events
            assert found[-1].keys() - is_added == was_added.keys(), num_events
            # Whatever is at the front is behind it, too.
            assert all(front.keys() <= other.keys() for front, other in itertools.pairwise(found)), num_events
        for dataset in datasets:
            if isinstance(dataset, IndividualFileDataset):
                dataset.close()
        if not cut_off:
            break
    assert 60 < num_events < 1999


def test_a_refill_that_was_cut_off_and_repeated_brings_each_once() -> None:
    for num_events in range(1, 3000):
        ring, large = RingBufferDataset(100), ListDataset(100)
        for number in range(4):
            large.add_episode(tagged.episode(5, number))
        ring.extend(large, seed=0)
        cut_off = is_cut_off(ring.refill, num_events)
        ring.refill()
        assert stored_rows(ring) == stored_rows(large), num_events
        if not cut_off:
            break
    assert 60 < num_events < 2999


def test_readers_of_files_are_told_of_an_episode_also_if_the_addition_was_cut_off_just_before(
    tmp_path, monkeypatch
) -> None:
    files = IndividualFileDataset(100, directory=tmp_path, durability="rename")
    files.add_episode(tagged.episode(3, 0))
    reader = pickle.loads(pickle.dumps(files))
    publish = files._publish

    def interrupted(*numbers: int) -> None:
        monkeypatch.setattr(files, "_publish", publish)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.add_episode(tagged.episode(4, 1))
    files.add_episode(tagged.episode(5, 2))
    reader.refresh()
    assert reader.table.rows.tolist() == files.table.rows.tolist() and files.num_episodes == 3


def test_ctrl_c_while_files_are_opened_and_closed_is_never_swallowed(tmp_path, monkeypatch) -> None:
    swallowed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)
    files = IndividualFileDataset(1000, directory=tmp_path, durability="rename")
    for number in range(12):
        files.add_episode(tagged.episode(4, number))
    stream = files.get_loader(8, 2, seed=0).stream
    stream.take()
    assert files._reader is not None
    files._reader._max_open_files = 2
    for num_events in range(1, 2000):
        if not is_cut_off(stream.take, num_events):
            break
    assert 100 < num_events < 1999
    assert not [hook for hook in swallowed if hook.exc_type is KeyboardInterrupt]
    check(stream)
    files.close()


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
