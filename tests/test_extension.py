"""A ring extended by files: everything is kept, the newest is at hand, old episodes come back whole."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import Evictor, ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.fields import Fields, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.sampler import UniformEpisodeSampler
from buffers.utils import ThreadLock
from tests import tagged
from tests.list_dataset import ListDataset


def numbers(dataset: EpisodeDataset) -> list[int]:
    """The numbers of the episodes that live, each checked whole."""
    return [tagged.number_and_length(episode)[0] for episode in dataset.episodes()]


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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_300_episodes_are_all_kept_the_newest_is_here_and_old_ones_come_back(tmp_path, num_workers) -> None:
    ring, large = RingBufferDataset(200), files(tmp_path)
    ring.extend(large, other_batch_size=4, other_num_workers=num_workers, seed=0)
    rng, came_back, before = np.random.default_rng(0), set(), set()
    loader = ring.get_loader(16, 3, seed=0)
    for number in range(300):
        ring.add_episode(tagged.episode(int(rng.integers(3, 30)), number))
        here = check_after_addition(ring, large, number)
        came_back |= here - before - {number}
        before = here
        for _, drawn, _, _ in tagged.origins(next(iter(loader))):
            assert drawn in here
    assert numbers(large) == list(range(300))
    assert len(came_back) > 100
    ring.end_workers()


@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=40),
    st.integers(8, 30),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([None, LastEvictor()]),
)
@settings(max_examples=60)
def test_any_lengths_and_batches_keep_the_promises(lengths, capacity, batch_size, every, evictor) -> None:
    fast: EpisodeDataset = RingBufferDataset(capacity) if evictor is None else ListDataset(capacity, evictor=evictor)
    large = ListDataset(10_000)
    fast.extend(large, batch_size, fetch_from_other_every=every, seed=0)
    num_too_long = sum(length > capacity for length in lengths)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, length in enumerate(lengths):
            episode_id = fast.add_episode(tagged.episode(length, number))
            here = numbers(fast)
            assert (episode_id == -1) is (length > capacity)
            assert (number in here) is (length <= capacity)
            assert len(set(here)) == len(here)
            assert fast.num_timesteps <= capacity
    assert numbers(large) == list(range(len(lengths)))
    assert len(caught) == min(1, num_too_long)


def test_every_so_many_additions_bring_episodes_once_something_had_to_leave() -> None:
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


def test_what_comes_back_is_drawn_uniformly_from_the_large_set() -> None:
    fast, large = ListDataset(8), ListDataset(10_000)
    for number in range(50):
        large.add_episode(tagged.episode(1 + number % 3, number))
    fast.extend(large, other_batch_size=3, seed=0)
    counts = np.zeros(50)
    before: set[int] = set()
    for number in range(50, 3050):
        fast.add_episode(tagged.episode(2, number))
        here = set(numbers(fast))
        for came in here - before - {number}:
            if came < 50:
                counts[came] += 1
        before = here
        large.evict_episode(-1)  # The large set stays the same 50.
    assert tagged.chi_square_is_plausible(counts, np.ones(50))


def test_the_newest_stays_while_a_batch_as_large_as_the_capacity_comes() -> None:
    ring, large = RingBufferDataset(40), ListDataset(10_000)
    ring.extend(large, other_batch_size=64, seed=0)
    for number in range(100):
        ring.add_episode(tagged.episode(10, number))
        check_after_addition(ring, large, number)


def test_steps_of_a_buffer_may_form_an_episode_that_only_the_large_set_takes() -> None:
    ring, large = RingBufferDataset(20), ListDataset(10_000)
    ring.extend(large)
    buffer = ReplayBuffer(ring, 4, 2, num_envs=1, max_episode_length=100)
    with pytest.warns(UserWarning, match="50 steps is longer than the `capacity` of 20 steps: .* by the ListDataset"):
        for step in range(50):
            buffer.add_step(tagged.rows(0, 0, step), step == 49)
    assert numbers(large) == [0] and ring.is_empty
    for step in range(5):
        buffer.add_step(tagged.rows(0, 1, step), step == 4)
    assert numbers(large) == [0, 1] and numbers(ring) == [1]
    with pytest.raises(ValueError, match="`max_episode_length`=10001 exceeds the `capacity` of 10000"):
        ReplayBuffer(ring, 4, max_episode_length=10_001)


# Errors leave both as they were.


class FullDisk(ListDataset):
    evicts_before_writing = False
    is_full_now = False

    def _write(self, episode, start, episode_id) -> None:
        if self.is_full_now:
            raise OSError("no space")
        super()._write(episode, start, episode_id)


@pytest.mark.parametrize("fails", ["other", "here"])
def test_an_episode_that_one_of_the_two_cannot_take_is_in_neither(fails) -> None:
    fast, large = FullDisk(30), FullDisk(10_000)
    fast.extend(large, other_batch_size=2, seed=0)
    for number in range(20):
        fast.add_episode(tagged.episode(5, number))
    failing = large if fails == "other" else fast
    failing.is_full_now = True
    before = numbers(fast), numbers(large)
    for _ in range(3):
        with pytest.raises(OSError, match="no space"):
            fast.add_episode(tagged.episode(5, 99))
        assert (numbers(fast), numbers(large)) == before
    failing.is_full_now = False
    fast.add_episode(tagged.episode(5, 20))
    assert 20 in numbers(fast) and numbers(large) == list(range(21))


class FailingEvictor(Evictor):
    """The oldest leaves, but for the calls that fail."""

    def __init__(self) -> None:
        self.num_until_failure = 10**9

    def evict(self, dataset: EpisodeDataset) -> int:
        self.num_until_failure -= 1
        if self.num_until_failure < 0:
            raise RuntimeError("evictor failed")
        return 0


@pytest.mark.parametrize("behind", ["ring", "list", "chain"])
def test_an_evictor_that_fails_leaves_all_as_it_was_also_where_only_the_oldest_can_go(tmp_path, behind) -> None:
    evictor = FailingEvictor()
    fast = IndividualFileDataset(20, directory=tmp_path, evictor=evictor, durability="rename")
    large: EpisodeDataset = ListDataset(100) if behind == "list" else RingBufferDataset(30)
    sets = [fast, large]
    if behind == "chain":
        sets.append(RingBufferDataset(1000))
        large.extend(sets[2])
    fast.extend(large, other_batch_size=1, fetch_from_other_every=1000, seed=0)
    for number in range(8):
        fast.add_episode(tagged.episode(5, number))
    evictor.num_until_failure = 0
    before = [numbers(dataset) for dataset in sets]
    for _ in range(6):
        with pytest.raises(RuntimeError, match="evictor failed"):
            fast.add_episode(tagged.episode(5, 100))
        assert [numbers(dataset) for dataset in sets] == before
    evictor.num_until_failure = 10**9
    fast.add_episode(tagged.episode(5, 8))
    assert all(8 in numbers(dataset) for dataset in sets)


def test_what_cannot_be_brought_back_is_no_error_of_the_addition_which_is_done(tmp_path) -> None:
    evictor = FailingEvictor()
    fast, large = IndividualFileDataset(20, directory=tmp_path, evictor=evictor, durability="rename"), ListDataset(1000)
    fast.extend(large, other_batch_size=8, seed=0)
    buffer = ReplayBuffer(fast, 2, num_envs=1)
    for number in range(6):
        buffer.add_episode(tagged.episode(5, number))
    evictor.num_until_failure = 1
    with pytest.warns(UserWarning, match="cannot be brought back: RuntimeError"):
        for step in range(5):
            buffer.add_step(tagged.rows(0, 6, step), step == 4)
    assert numbers(large) == list(range(7)) and numbers(fast)[-1] == 6
    evictor.num_until_failure = 10**9
    for number in range(7, 30):
        buffer.add_episode(tagged.episode(5, number))
        check_after_addition(fast, large, number)


def test_in_a_chain_what_the_first_cannot_take_leaves_the_last_too() -> None:
    small, middle, large = FullDisk(20), ListDataset(7), ListDataset(1000)
    middle.extend(large, other_batch_size=1, fetch_from_other_every=1000)
    small.extend(middle, other_batch_size=1, fetch_from_other_every=1000)
    middle.evicts_before_writing = False
    small.add_episode(tagged.episode(5, 0))
    small.is_full_now = True
    for length in (5, 9):  # The second is too long for the middle one.
        with (
            warnings.catch_warnings(),
            pytest.raises(OSError, match="no space"),
        ):
            warnings.simplefilter("ignore")
            small.add_episode(tagged.episode(length, 1))
        assert numbers(small) == [0] and numbers(large) == [0]
    small.is_full_now = False
    small.add_episode(tagged.episode(5, 1))
    assert numbers(small) == numbers(large) == [0, 1]


def test_what_a_ring_in_the_middle_keeps_the_last_keeps_too() -> None:
    small, middle, large = FullDisk(20), RingBufferDataset(50), FullDisk(1000)
    small.evicts_before_writing = large.evicts_before_writing = False
    middle.extend(large, other_batch_size=1, fetch_from_other_every=1000)
    small.extend(middle, other_batch_size=1, fetch_from_other_every=1000)
    small.add_episode(tagged.episode(5, 0))
    small.is_full_now = True
    with pytest.raises(OSError, match="no space"):
        small.add_episode(tagged.episode(5, 1))
    assert numbers(small) == [0] and numbers(middle) == numbers(large)


@pytest.mark.filterwarnings("ignore:An episode of 9 steps is longer")
@pytest.mark.parametrize("length", [5, 9])  # The second is too long for the middle one.
def test_ctrl_c_when_the_last_has_an_episode_completes_the_addition(length, monkeypatch) -> None:
    small, middle, large = RingBufferDataset(20), ListDataset(7), ListDataset(1000)
    middle.extend(large, other_batch_size=1, fetch_from_other_every=1000)
    small.extend(middle, fetch_from_other_every=1)
    small.add_episode(tagged.episode(5, 0))

    def interrupted(*numbers: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(large, "_publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.add_episode(tagged.episode(length, 1))
    monkeypatch.undo()
    assert numbers(small) == numbers(large) == [0, 1]
    assert numbers(middle) == ([1] if length == 5 else [0])
    # What is behind is known by its number there, also what others add there: it comes once others leave.
    middle.add_episode(tagged.episode(5, 2))
    for number in (3, 4):
        small.add_episode(tagged.episode(9, number))
    assert 2 in numbers(small)


def test_an_extension_that_cannot_copy_what_is_here_leaves_both_as_they_were() -> None:
    ring = RingBufferDataset(20)
    for number, length in enumerate((3, 10)):
        ring.add_episode(tagged.episode(length, number))
    with pytest.raises(ValueError, match="10 steps is here, which does not fit the `capacity` of 5 steps of `other`"):
        ring.extend(RingBufferDataset(5))
    large = FullDisk(100)
    large.is_full_now = True
    with pytest.raises(OSError, match="no space"):
        ring.extend(large)
    large.is_full_now = False
    assert large.is_empty and numbers(ring) == [0, 1]
    ring.extend(large)
    assert numbers(large) == [0, 1]


def test_a_warning_that_is_an_error_adds_nothing() -> None:
    ring, large = RingBufferDataset(5), ListDataset(100)
    ring.extend(large)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="10 steps is longer"):
        warnings.simplefilter("error")
        ring.add_episode(tagged.episode(10, 0))
    assert large.is_empty
    ring.add_episode(tagged.episode(10, 0))
    assert numbers(large) == [0]


def test_ctrl_c_while_waiting_for_the_second_lock_gives_up_the_first() -> None:
    class Interrupted(ThreadLock):
        def __enter__(self) -> None:
            raise KeyboardInterrupt

    first, second = ListDataset(10), ListDataset(10)
    second._lock = Interrupted()
    with pytest.raises(KeyboardInterrupt), LocksOf(first, second):
        pass
    assert can_be_taken(first._lock)


def can_be_taken(lock: Any) -> bool:
    """By another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(lock.acquire(timeout=0.1) and not lock.release()))
    thread.start()
    thread.join()
    return found[0]


def test_a_mixture_takes_the_lock_that_a_member_has_since_it_was_extended() -> None:
    ring, demonstrations, large = ListDataset(10), ListDataset(10), ListDataset(100)
    mixture = MixtureDataset([ring, demonstrations], [0.5, 0.5])
    before = ring._lock
    ring.extend(large)
    assert ring._lock is large._lock is not before
    with mixture._lock:
        assert not can_be_taken(ring._lock) and not can_be_taken(demonstrations._lock)
    assert can_be_taken(ring._lock) and can_be_taken(demonstrations._lock)


def test_a_bad_episode_is_refused_by_both() -> None:
    ring, large = RingBufferDataset(20), ListDataset(100)
    ring.extend(large)
    ring.add_episode(tagged.episode(5, 0))
    with pytest.raises(ValueError, match=r"missing \['reward'\]"):
        ring.add_episode({name: value for name, value in tagged.episode(5, 1).items() if name != "reward"})
    assert numbers(ring) == numbers(large) == [0]


def test_a_row_that_only_the_large_set_refuses_is_refused_when_it_comes() -> None:
    ring, large = RingBufferDataset(20), RingBufferDataset(100, half_precision=True)
    ring.extend(large)
    buffer = ReplayBuffer(ring, 4, num_envs=1)
    buffer.add_step({"x": 1.0}, False)
    with pytest.raises(ValueError, match="half_precision=True cannot store"):
        buffer.add_step({"x": 1e6}, True)
    buffer.add_step({"x": 2.0}, True)
    assert ring.get_episode(0)["x"].tolist() == large.get_episode(0)["x"].tolist() == [1.0, 2.0]


def test_what_a_half_precision_set_cannot_take_back_stays_away_with_one_warning() -> None:
    ring, large = RingBufferDataset(6, half_precision=True), ListDataset(1000)
    for value in (1e6, 2e6, 3.0):
        large.add_episode({"x": np.full(2, value, np.float32)})
    ring.extend(large, other_batch_size=8, seed=0)
    with pytest.warns(UserWarning, match="cannot all be brought back: Field `x` holds numbers beyond") as caught:
        for _ in range(20):
            ring.add_episode({"x": np.ones(2, np.float32)})
    assert len(caught) == 1


def test_bad_arguments_are_refused_and_change_nothing(tmp_path) -> None:
    ring, large = RingBufferDataset(20), ListDataset(100)
    with pytest.raises(TypeError, match="`other` must be an EpisodeDataset, found list"):
        ring.extend([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the dataset itself"):
        ring.extend(ring)
    for name in ("other_batch_size", "fetch_from_other_every"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, found 0"):
            ring.extend(large, **{name: 0})
    with pytest.raises(ValueError, match="`other_num_workers` must be at least 0"):
        ring.extend(large, other_num_workers=-1)
    with pytest.raises(RuntimeError, match="holds no episodes of its own"):
        ring.extend(MixtureDataset([large], [1]))
    files(tmp_path).close()
    with pytest.raises(RuntimeError, match="This dataset only reads .* mode='r'"):
        ring.extend(IndividualFileDataset(100, directory=tmp_path, mode="r"))
    with pytest.raises(RuntimeError, match=r"call `extend\(other\)` first"):
        ring.refill()
    ring.add_episode(tagged.episode(3, 0))
    assert numbers(ring) == [0] and large.is_empty
    ring.extend(large)
    with pytest.raises(RuntimeError, match="extended already, by a ListDataset"):
        ring.extend(ListDataset(100))
    with pytest.raises(ValueError, match="leads back to it"):
        large.extend(ring)
    with pytest.raises(RuntimeError, match="behind another dataset already"):
        large.extend(ListDataset(1000))


def test_fields_must_agree_and_are_settled_for_both() -> None:
    vectors = EpisodeDatasetInfo(Fields(x=Vector(3)))
    ring, large = RingBufferDataset(20), ListDataset(100, info=vectors)
    with pytest.raises(ValueError, match=r"field `x` is float32 \(2,\), expected float32 \(3,\)"):
        RingBufferDataset(20, EpisodeDatasetInfo(Fields(x=Vector(2)))).extend(large)
    ring.extend(large)
    assert ring.fields == large.fields
    other = ListDataset(100)
    RingBufferDataset(20, vectors).extend(other)
    assert other.fields == vectors.fields
    # Neither knows; then the large one gets an episode from elsewhere.
    ring, large = RingBufferDataset(20), ListDataset(100)
    ring.extend(large)
    large.add_episode({"x": np.zeros((2, 3), np.float32)})
    with pytest.raises(ValueError, match=r"missing \['x'\], unexpected \['y'\]"):
        ring.add_episode({"y": np.zeros(2, np.float32)})
    assert ring.is_empty and large.num_episodes == 1
    ring.add_episode({"x": np.ones((2, 3), np.float32)})
    assert ring.num_episodes == 1 and large.num_episodes == 2


# Before, between and after runs.


def test_what_is_there_before_is_copied_to_an_empty_large_set_once() -> None:
    ring, large = RingBufferDataset(20), ListDataset(100)
    for number in range(3):
        ring.add_episode(tagged.episode(4, number))
    ring.extend(large, other_batch_size=4, seed=0)
    assert numbers(large) == [0, 1, 2]
    for number in range(3, 20):
        ring.add_episode(tagged.episode(4, number))
        check_after_addition(ring, large, number)


def test_after_a_restart_the_fast_set_is_refilled_and_recording_goes_on(tmp_path) -> None:
    ring, large = RingBufferDataset(60), files(tmp_path)
    ring.extend(large, other_batch_size=2, seed=0)
    for number in range(30):
        ring.add_episode(tagged.episode(5 + number % 4, number))
    large.close()
    ring, large = RingBufferDataset(60), files(tmp_path)
    ring.extend(large, other_batch_size=2, seed=1)
    assert ring.is_empty
    num = ring.refill()
    here = numbers(ring)
    assert len(here) == num == len(set(here)) and here[-1] == 29, "the newest comes last, so it stays longest"
    assert 60 - 8 < ring.num_timesteps <= 60
    assert ring.refill() <= 1  # There may be room for a short one.
    for number in range(30, 40):
        ring.add_episode(tagged.episode(5, number))
        check_after_addition(ring, large, number)


def test_refilling_takes_each_episode_once_and_none_that_is_too_long() -> None:
    ring, large = RingBufferDataset(100), ListDataset(1000)
    for number, length in enumerate([5, 200, 7, 101, 100]):
        large.add_episode(tagged.episode(length, number))
    ring.extend(large, seed=0)
    assert ring.refill() == 1 and numbers(ring) == [4]
    ring, large = RingBufferDataset(100), ListDataset(1000)
    ring.extend(large, seed=0)
    assert ring.refill() == 0
    for number in range(4):
        large.add_episode(tagged.episode(10, number))
    assert ring.refill() == 4 and ring.refill() == 0
    assert sorted(numbers(ring)) == [0, 1, 2, 3]


CRASH = """
import sys, numpy as np
from buffers.dataset import IndividualFileDataset, RingBufferDataset
from tests import tagged
def main():
    ring = RingBufferDataset(120)
    large = IndividualFileDataset(100_000, directory=sys.argv[1], durability="rename")
    ring.extend(large, other_batch_size=4, other_num_workers=int(sys.argv[2]), seed=0)
    ring.refill()
    for number in range(large.table.next_id, 100_000):
        ring.add_episode(tagged.episode(3 + number % 17, number))
        print(number, flush=True)
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_crash_in_the_middle_loses_nothing_that_was_acknowledged(tmp_path, num_workers) -> None:
    script = tmp_path / "record.py"
    script.write_text(CRASH)
    directory, acknowledged = tmp_path / "episodes", -1
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for _ in range(3):
        command = [sys.executable, str(script), str(directory), str(num_workers)]
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
    assert acknowledged >= 3 * 59


# Workers and copies.


def test_when_a_worker_is_killed_an_addition_brings_nothing_and_the_next_starts_others(tmp_path) -> None:
    ring, large = RingBufferDataset(40), files(tmp_path)
    ring.extend(large, other_batch_size=2, other_num_workers=1, seed=0)
    for number in range(12):
        ring.add_episode(tagged.episode(8, number))
    extension = ring._extension
    assert extension is not None and extension._drawn is not None
    (worker,) = extension._drawn._batches._workers
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    number = 12
    with pytest.warns(UserWarning, match="cannot be read: RuntimeError.*worker"):
        deadline = time.monotonic() + 60
        while not extension._warned and time.monotonic() < deadline:  # What had been read beforehand comes first.
            ring.add_episode(tagged.episode(8, number))
            number += 1
            assert large.num_episodes == number and number - 1 in numbers(ring)
    for _ in range(5):
        ring.add_episode(tagged.episode(8, number))
        check_after_addition(ring, large, number)
        number += 1
    assert min(numbers(ring)) < number - 5, "old ones come again"
    ring.end_workers()


def test_closing_the_buffer_ends_the_workers_of_both(tmp_path) -> None:
    ring = RingBufferDataset(40)
    ring.extend(files(tmp_path), other_batch_size=2, other_num_workers=1, seed=0)
    with ReplayBuffer(ring, 4, 2, num_workers=1) as buffer:
        for number in range(12):
            buffer.add_episode(tagged.episode(8, number))
            buffer.sample()
        extension = ring._extension
        assert extension is not None and extension._drawn is not None
        workers = list(extension._drawn._batches._workers)
        assert all(worker.is_alive() for worker in workers)
    assert not any(worker.is_alive() for worker in workers)


def test_workers_of_the_fast_set_draw_what_comes_back(tmp_path) -> None:
    ring, large = RingBufferDataset(60), files(tmp_path)
    ring.extend(large, other_batch_size=2, seed=0)
    for number in range(10):
        ring.add_episode(tagged.episode(8, number))
    with ReplayBuffer(ring, 16, 4, num_workers=2, seed=0) as buffer:
        drawn = set()
        for number in range(10, 60):
            buffer.add_episode(tagged.episode(8, number))
            drawn |= {n for _, n, _, _ in tagged.origins(buffer.sample())}
    assert len(drawn) > 30 and min(drawn) < 10


@pytest.mark.parametrize("how", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_is_not_extended(how) -> None:
    ring, large = RingBufferDataset(20), ListDataset(100)
    ring.extend(large)
    ring.add_episode(tagged.episode(5, 0))
    copied = how(ring)
    assert copied._extension is None and numbers(copied) == [0]
    assert len(pickle.dumps(ring)) < 65_536


def test_the_same_seed_brings_the_same_episodes() -> None:
    histories = []
    for _ in range(2):
        ring, large = RingBufferDataset(60), ListDataset(1000)
        ring.extend(large, other_batch_size=3, seed=5)
        history = []
        for number in range(40):
            ring.add_episode(tagged.episode(4 + number % 5, number))
            history.append(numbers(ring))
        histories.append(history)
    assert histories[0] == histories[1]


def test_threads_may_add_while_others_draw_from_both_and_from_a_mixture_of_them(tmp_path) -> None:
    import threading

    large = files(tmp_path)
    ring = RingBufferDataset(100)
    ring.extend(large, other_batch_size=2, seed=0)
    for number in range(30):
        ring.add_episode(tagged.episode(5, number))
    sources = [ring, large, MixtureDataset([large, ring], [1, 1]), MixtureDataset([ring, large], [1, 1])]
    errors: list[BaseException] = []

    def draw(source: EpisodeDataset) -> None:
        try:
            for batch in itertools.islice(source.get_loader(8, 3), 100):
                tagged.origins(batch)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=draw, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    number = 30
    while any(thread.is_alive() for thread in threads):
        ring.add_episode(tagged.episode(5, number))
        number += 1
    for thread in threads:
        thread.join(60)
    assert not errors
