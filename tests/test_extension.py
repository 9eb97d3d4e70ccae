"""A ring extended by files: everything is kept, the newest is at hand, old episodes come back whole."""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import Evictor, ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.sampler import UniformEpisodeSampler
from tests import reading, tagged
from tests.faults import kill_worker
from tests.list_dataset import ListDataset
from tests.tagged import numbers


def files(path: Path, capacity: int = 100_000) -> IndividualFileDataset:
    return IndividualFileDataset(capacity, directory=path, durability="rename")


class LastEvictor(Evictor):
    """Always the newest, which an extension must not let go."""

    def evict(self, dataset: EpisodeDataset) -> int:
        return dataset.num_episodes - 1


def check_after_addition(fast: EpisodeDataset, large: EpisodeDataset, number: int) -> set[int]:
    here = numbers(fast)
    assert fast.num_timesteps <= fast.capacity
    assert len(set(here)) == len(here), "an episode is here twice"
    assert number in here, "the newest is not here"
    assert set(here) <= set(range(number + 1))
    assert large.num_episodes == number + 1
    return set(here)


def test_all_are_kept_and_old_ones_come_back_to_workers(tmp_path) -> None:
    ring, large = RingBufferDataset(200), files(tmp_path)
    ring.extend(large, other_batch_size=4, other_num_workers=2, seed=0)
    rng, here = np.random.default_rng(0), set()
    came_back, drawn = set(), set()
    ring.add_episode(tagged.episode(9, 0))
    batches = iter(ring.get_loader(16, 3, num_workers=1, seed=0))
    for number in range(1, 120):
        ring.add_episode(tagged.episode(int(rng.integers(3, 30)), number))
        before, here = here, check_after_addition(ring, large, number)
        came_back |= here - before - {number}
        drawn |= {n for _, n, _, _ in tagged.origins(next(batches)) if n < number - 60}
    assert numbers(large) == list(range(120))
    assert len(came_back) > 40 and len(drawn) > 10
    ring.end_workers()


@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=40),
    st.integers(0, 6),
    st.integers(8, 30),
    st.sampled_from([1, 2, 5, 64]),
    st.integers(1, 3),
    st.sampled_from([None, LastEvictor()]),
)
@settings(max_examples=60)
def test_additions_of_any_lengths_keep_the_promises(lengths, num_before, capacity, batch_size, every, evictor) -> None:
    fast: EpisodeDataset = RingBufferDataset(capacity) if evictor is None else ListDataset(capacity, evictor=evictor)
    large, kept = ListDataset(10_000), []
    for number, length in enumerate(lengths[:num_before]):
        fast.add_episode(tagged.episode(min(length, capacity), number))
        kept = numbers(fast)
    fast.extend(large, batch_size, fetch_from_other_every=every, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, length in enumerate(lengths[num_before:], num_before):
            episode_id = fast.add_episode(tagged.episode(length, number))
            kept.append(number)
            here = numbers(fast)
            assert (episode_id == -1) is (length > capacity)
            assert (number in here) is (length <= capacity)
            assert len(set(here)) == len(here)
            assert fast.num_timesteps <= capacity
    assert numbers(large) == kept
    too_long = [length for length in lengths[num_before:] if length > capacity]
    expected = [f"An episode of {length} steps is longer than the `capacity` of {capacity}" for length in too_long[:1]]
    assert [str(warning.message)[: len(text)] for warning, text in zip(caught, expected, strict=True)] == expected


def test_no_episode_is_here_twice_however_many_have_come() -> None:
    ring, large = RingBufferDataset(40), ListDataset(80)
    ring.extend(large, other_batch_size=8, seed=0)
    for number in range(600):
        ring.add_episode(tagged.episode(8, number))
        here = [int(episode["obs"]["state"][0, 1]) for episode in ring.episodes()]
        assert len(set(here)) == len(here)


def test_every_so_many_additions_bring_episodes() -> None:
    fast, large = ListDataset(20), ListDataset(10_000)
    fast.extend(large, other_batch_size=1, fetch_from_other_every=3, seed=0)
    added = []
    for number in range(16):
        before = fast.table.next_id
        fast.add_episode(tagged.episode(4, number))
        added.append(fast.table.next_id - before)
    assert added[:5] == [1] * 5, "nothing has to leave yet"
    # Of the additions from 5 on, each third draws an episode, which comes if it is not here already.
    assert all(count == 1 for n, count in enumerate(added[5:]) if n % 3 != 2)
    assert sum(added[7::3]) > 3


def test_what_comes_back_is_drawn_uniformly() -> None:
    fast, large = ListDataset(8), ListDataset(10_000)
    for number in range(20):
        large.add_episode(tagged.episode(1 + number % 3, number))
    fast.extend(large, other_batch_size=3, seed=0)
    counts = np.zeros(20)
    before: set[int] = set()
    for number in range(20, 520):
        fast.add_episode(tagged.episode(2, number))
        here = {int(episode["obs"]["state"][0, 1]) for episode in fast.episodes()}
        for came in here - before - {number}:
            if came < 20:
                counts[came] += 1
        before = here
        large.evict_episode(-1)  # The large set stays the same 20.
    assert tagged.chi_square_is_plausible(counts, np.ones(20))


def test_only_the_large_set_bounds_an_episode_in_pieces() -> None:
    ring = RingBufferDataset(20)
    ring.extend(ListDataset(10_000))
    with pytest.raises(ValueError, match="`max_episode_length`=10001 exceeds the `capacity` of 10000"):
        ReplayBuffer(ring, 4, max_episode_length=10_001)
    ReplayBuffer(ring, 4, max_episode_length=10_000)


# Before, between and after runs.


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(5, 40), st.integers(0, 3))
@settings(max_examples=60)
def test_refilling_brings_the_newest_and_others_in_order(lengths, capacity, num_here) -> None:
    ring, large = RingBufferDataset(capacity), ListDataset(1000)
    for number, length in enumerate(lengths):
        large.add_episode(tagged.episode(length, number))
    ring.extend(large, seed=0)
    for number in range(100, 100 + num_here):
        ring.add_episode(tagged.episode(1, number))
    before = numbers(ring)
    num, after = ring.refill(), numbers(ring)
    came = after[len(before) :]
    assert after[: len(before)] == before and len(came) == num and ring.num_evicted == 0
    assert came == sorted(set(came)), "in order, so the newest stays longest"
    if lengths and not num_here and lengths[-1] <= capacity:
        assert after[-1] == len(lengths) - 1, "the newest is among them"
    # What fits is there, or too little room is left for one of those that are not.
    absent = [length for number, length in enumerate(lengths) if number not in came]
    assert ring.num_timesteps + max(absent, default=capacity) > capacity or not absent


CRASH = """
import sys, numpy as np
from buffers.dataset import IndividualFileDataset, RingBufferDataset
from tests import tagged
def main():
    ring = RingBufferDataset(120)
    large = IndividualFileDataset(100_000, directory=sys.argv[1], durability="rename")
    ring.extend(large, other_batch_size=4, other_num_workers=2, seed=0)
    ring.refill()
    for number in range(large.table.next_id, 100_000):
        ring.add_episode(tagged.episode(3 + number % 17, number))
        print(number, flush=True)
if __name__ == "__main__":
    main()
"""


def test_a_crash_loses_nothing_that_was_acknowledged(tmp_path) -> None:
    script = tmp_path / "record.py"
    script.write_text(CRASH)
    directory, acknowledged = tmp_path / "episodes", -1
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for _ in range(2):
        command = [sys.executable, str(script), str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for _, line in zip(range(60), process.stdout, strict=False):
                acknowledged = int(line)
            os.kill(process.pid, signal.SIGKILL)
            for line in process.stdout:
                acknowledged = int(line)
        with files(directory) as large:
            assert numbers(large)[: acknowledged + 1] == list(range(acknowledged + 1))
            # One may be on the disk that was not acknowledged: it has its number all the same.
            assert large.num_episodes <= acknowledged + 2
            ring = RingBufferDataset(120)
            ring.extend(large, seed=0)
            assert ring.refill() > 5
            tagged.origins(ring.get_loader(32, 3, sampler=UniformEpisodeSampler()).stream.take())
    assert acknowledged >= 2 * 59


# Workers and copies.


def extended_by_a_worker(path: Path) -> tuple[RingBufferDataset, IndividualFileDataset, Any]:
    """A ring, the files behind it, and the process that reads them for it."""
    ring, large = RingBufferDataset(40), files(path)
    ring.extend(large, other_batch_size=2, other_num_workers=1, seed=0)
    before = multiprocessing.active_children()
    for number in range(12):
        ring.add_episode(tagged.episode(8, number))
    (worker,) = set(multiprocessing.active_children()) - set(before)
    return ring, large, worker


def test_killed_workers_are_replaced_and_lose_no_episode(tmp_path) -> None:
    ring, large, worker = extended_by_a_worker(tmp_path)
    kill_worker(worker)
    with pytest.warns(UserWarning, match="cannot be read: RuntimeError.*worker") as caught:
        for number in range(12, 40):  # What had been read beforehand comes first.
            ring.add_episode(tagged.episode(8, number))
            assert large.num_episodes == number + 1 and number in numbers(ring)
    assert len(caught) == 1
    came_back = set()
    for number in range(40, 60):
        ring.add_episode(tagged.episode(8, number))
        came_back |= {n for n in check_after_addition(ring, large, number) if n < 40 - 5}
    assert came_back, "old ones come again"
    ring.end_workers()


def test_closing_the_buffer_ends_the_workers_of_both(tmp_path) -> None:
    before = set(multiprocessing.active_children())
    ring, _, worker = extended_by_a_worker(tmp_path)
    with ReplayBuffer(ring, 4, 2, num_workers=1) as buffer:
        buffer.sample()
        workers = set(multiprocessing.active_children()) - before
        assert worker in workers and len(workers) == 2
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("how", [copy.deepcopy, reading.reader_of])
def test_a_copy_is_not_extended(how) -> None:
    ring, large = RingBufferDataset(20), ListDataset(100)
    ring.extend(large)
    ring.add_episode(tagged.episode(5, 0))
    copied = how(ring)
    assert copied.extension is None and numbers(copied) == [0]
    assert len(reading.handle_of(ring)) < 65_536


def test_the_same_seed_brings_the_same_episodes() -> None:
    def history() -> list[list[int]]:
        ring = RingBufferDataset(60)
        ring.extend(ListDataset(1000), other_batch_size=3, seed=5)
        found = []
        for number in range(40):
            ring.add_episode(tagged.episode(4 + number % 5, number))
            found.append(numbers(ring))
        return found

    assert history() == history()


def test_threads_draw_from_all_while_another_adds(tmp_path) -> None:
    large = files(tmp_path)
    ring = RingBufferDataset(100)
    ring.extend(large, other_batch_size=2, seed=0)
    for number in range(30):
        ring.add_episode(tagged.episode(5, number))
    sources = [ring, large, MixtureDataset([large, ring], [1, 1]), MixtureDataset([ring, large], [1, 1])]

    def draw(source: EpisodeSource) -> None:
        for batch in itertools.islice(source.get_loader(8, 3), 60):
            tagged.origins(batch)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        drawing = [pool.submit(draw, source) for source in sources]
        for number in itertools.count(30):
            ring.add_episode(tagged.episode(5, number))
            if all(each.done() for each in drawing):
                break
    assert [each.result() for each in drawing] == [None] * 4
