"""OnlineSampler: what is added comes once, whoever draws it."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.sampler import EpisodeFilter, MixedSampler, OnlineSampler, PrioritizedSampler, UniformSampler
from tests import samplers_model as model
from tests.samplers_model import Shape, add, stored

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process .* multi-threaded")
INCLUDE = ("episode", "step", "mask")
SHAPES = [Shape(), Shape(3), Shape(4, 0, 2), Shape(4, 3, 3), Shape(5, 4, 0), Shape(None), Shape(offsets=True)]


def expected_starts(num_rows: int, shape: Shape) -> list[int]:
    """Where the windows of a new episode begin, in order."""
    length = 1 if shape.offsets else shape.length
    if length is None:
        return [0]
    starts = list(range(0, num_rows, length))
    if starts[-1] + length > num_rows + shape.after:  # The last one would be padded by more than is allowed.
        starts[-1] = num_rows - length
    return starts if starts[-1] >= -shape.before else []


def new_windows(lengths: dict[int, int], shape: Shape) -> list[tuple[int, int]]:
    return [(number, start) for number, length in lengths.items() for start in expected_starts(length, shape)]


class _Marked(UniformSampler):
    """Draws whole or first windows of the first episode alone, which no test adds to."""

    counts_batches = True

    def draw(self, table: Any, num_windows: int, length: int | None, rng: np.random.Generator) -> Any:
        position = np.zeros(num_windows, np.int64)
        first, _ = table.steps_to_draw(position, length or 1)
        longest = int(table.lengths[0]) if length is None else length
        return table.windows(position, position if length is None else position + first, longest)


def online() -> OnlineSampler:
    return OnlineSampler(then=_Marked())


def seen(batch: Any) -> list[tuple[int, int]]:
    """The windows of a batch that are not of the first episode."""
    return [(episode, start) for _, episode, start in model.places(batch) if episode]


def with_old(dataset: Any) -> Any:
    add(dataset, 40)
    return dataset


@given(
    st.sampled_from(["ring", "list"]),
    st.sampled_from(SHAPES),
    st.lists(st.lists(st.integers(1, 14), max_size=4), min_size=1, max_size=12),
    st.integers(1, 9),
)
@settings(max_examples=200)
def test_each_new_window_comes_once_and_in_order(kind, shape, additions, batch_size) -> None:
    with stored(kind, None, [40], 10_000) as dataset:  # type: ignore[arg-type]
        stream = dataset.get_loader(batch_size, sampler=online(), include=INCLUDE, seed=0, **shape.options).stream
        found, waiting, lengths = list[tuple[int, int]](), 0, dict[int, int]()
        for lengths_added in additions:
            for length in lengths_added:
                number = add(dataset, length)
                lengths[number] = length
            num_new = len(new_windows(lengths, shape)) - len(found)
            batch = seen(stream.take())
            assert len(batch) == min(num_new, batch_size)
            found += batch
            waiting = num_new - len(batch)
        for _ in range(-(-waiting // batch_size)):
            found += seen(stream.take())
        assert found == new_windows(lengths, shape)
        assert stream.drawer.samplers[0].num_missed == 0
        assert not seen(stream.take())


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [Shape(), Shape(3), Shape(4, 0, 3), Shape(None), Shape(offsets=True)])
def test_what_is_added_while_workers_draw_comes_once(num_workers, shape) -> None:
    ring, lengths = with_old(RingBufferDataset(10_000)), {}
    rng = np.random.default_rng(num_workers)
    loader = ring.get_loader(4, sampler=online(), num_workers=num_workers, include=INCLUDE, seed=0, **shape.options)
    found: Counter[tuple[int, int]] = Counter()
    batches = iter(loader)
    for _ in range(25):
        length = int(rng.integers(1, 12))
        lengths[add(ring, length)] = length
        found.update(seen(next(batches)))
    expected = new_windows(lengths, shape)
    for _ in range(len(expected) // 4 + 8):
        found.update(seen(next(batches)))
    assert found == Counter(expected)


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_an_iteration_that_is_broken_off_loses_nothing(num_workers) -> None:
    ring, lengths = with_old(RingBufferDataset(10_000)), {}
    loader = ring.get_loader(3, 2, sampler=online(), num_workers=num_workers, include=INCLUDE, seed=0)
    found: list[tuple[int, int]] = []
    for round_ in range(5):
        for length in (7, 1, 4, 2, 9):
            lengths[add(ring, length)] = length
        for batch in itertools.islice(loader, 2 + round_):
            found += seen(batch)
    for batch in itertools.islice(loader, 20):
        found += seen(batch)
    assert found == new_windows(lengths, Shape(2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_loader_goes_on_from_a_state(num_workers) -> None:
    ring = with_old(RingBufferDataset(10_000))
    options: dict[str, Any] = {"num_workers": num_workers, "include": INCLUDE, "seed": 0}
    first = ring.get_loader(3, 2, sampler=online(), **options)
    second = ring.get_loader(3, 2, sampler=online(), **options)
    lengths = {add(ring, length): length for length in (7, 1, 4, 2, 9, 8, 8)}
    found = [window for batch in itertools.islice(first, 2) for window in seen(batch)]
    state = first.state_dict()
    assert all(isinstance(part, dict) for part in state["samplers"])
    [seen(batch) for batch in itertools.islice(first, 3)]  # What it does afterwards does not matter.
    second.load_state_dict(state)
    for batch in itertools.islice(second, 8):
        found += seen(batch)
    assert found == new_windows(lengths, Shape(2))
    with pytest.raises(ValueError, match="not one of an OnlineSampler, found"):
        second.load_state_dict({**state, "samplers": [{"beta": 1.0}]})
    with pytest.raises(ValueError, match="one of 2 datasets, and there are 1"):
        second.load_state_dict({**state, "samplers": state["samplers"] * 2})


def test_rows_that_pieces_of_a_stream_share_come_once() -> None:
    ring = with_old(RingBufferDataset(1000))
    options: dict[str, Any] = {"max_episode_length": 7, "overlap": 2, "num_envs": 1, "seed": 0}
    with ReplayBuffer(ring, 4, 1, sampler=online(), include=INCLUDE, **options) as buffer:
        for step in range(50):
            buffer.add_step({"x": step + 1000}, done=step == 49)
        steps = [step for _ in range(30) for step in buffer.sample()["x"].flatten().tolist() if step >= 1000]
        assert steps == list(range(1000, 1050))
        assert buffer.stats()["num_missed_windows"] == 0


@pytest.mark.parametrize("shape", [Shape(1), Shape(3), Shape(4, 0, 3), Shape(None)])
def test_windows_whose_episode_has_left_are_counted(shape) -> None:
    ring = with_old(RingBufferDataset(60))
    with ReplayBuffer(ring, 4, sampler=OnlineSampler(), include=INCLUDE, seed=0, **shape.options) as buffer:
        ring.evict_episode(0)
        lengths, found, rng = {}, Counter(), np.random.default_rng(0)
        for _ in range(200):
            length = int(rng.integers(4, 16))
            lengths[add(ring, length)] = length
            if rng.random() < 0.3:
                found.update(seen(buffer.sample())[: len(new_windows(lengths, shape))])
        while not ring.is_empty:
            ring.evict_episode(0)
        num_drawn = len(lengths) and sum((found & Counter(new_windows(lengths, shape))).values())
        missed = buffer.stats()["num_missed_windows"]
        # Windows that `then` has drawn may be new ones by chance, so there are at least so many.
        assert len(new_windows(lengths, shape)) - num_drawn <= missed < len(new_windows(lengths, shape))


def test_all_windows_are_drawn_or_counted_as_missed() -> None:
    with stored("list", None, [40], 140) as dataset:  # type: ignore[arg-type]
        dataset.evictor = _SecondOldest()
        buffer = ReplayBuffer(dataset, 4, 3, sampler=online(), include=INCLUDE, seed=0)
        rng, lengths, num_drawn = np.random.default_rng(0), {}, 0
        for _ in range(300):
            length = int(rng.integers(1, 12))
            lengths[add(dataset, length)] = length
            if rng.random() < 0.4:
                num_drawn += len(seen(buffer.sample()))
        for _ in range(60):
            num_drawn += len(seen(buffer.sample()))
        missed = buffer.stats()["num_missed_windows"]
        assert missed > 50 and num_drawn + missed == len(new_windows(lengths, Shape(3)))


class _SecondOldest(model.RandomEvictor):
    def evict(self, dataset: Any) -> int:
        return 1


def test_episodes_that_it_never_draws_from_are_not_missed() -> None:
    for sampler, options in (
        (EpisodeFilter(OnlineSampler(), model.is_accepted), {}),
        (OnlineSampler(), {"split": ("train", 0.5, 0)}),
    ):
        ring = RingBufferDataset(1000)
        with ReplayBuffer(ring, 50, 2, sampler=sampler, seed=0, **options) as buffer:
            for _ in range(30):
                add(ring, 4)
            for _ in range(3):
                buffer.sample()
            while not ring.is_empty:
                ring.evict_episode(0)
            assert buffer.stats()["num_missed_windows"] == 0


def test_a_filter_brings_new_windows_of_what_it_accepts() -> None:
    ring = RingBufferDataset(1000)
    sampler = EpisodeFilter(online(), model.is_accepted)
    stream = ring.get_loader(5, 2, sampler=sampler, include=INCLUDE, seed=0).stream
    lengths = {number: length for length in [4] * 20 if (number := add(ring, length)) % 3 != 1 and number}
    found = [window for _ in range(9) for window in seen(stream.take())]
    expected = new_windows(lengths, Shape(2))
    assert found == expected


# Where others draw beside it.


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_a_batch_without_a_share_for_it_holds_up_nobody(num_workers) -> None:
    ring = with_old(RingBufferDataset(1000))
    sampler = MixedSampler({online(): 0.2, _Marked(): 0.8})
    loader = ring.get_loader(2, 2, sampler=sampler, num_workers=num_workers, include=INCLUDE, seed=0)
    lengths = {add(ring, 6): 6 for _ in range(4)}
    found = [window for batch in itertools.islice(loader, 60) for window in seen(batch)]
    assert found == new_windows(lengths, Shape(2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_member_of_a_mixture_brings_its_own_once(num_workers) -> None:
    members = [with_old(RingBufferDataset(1000)) for _ in range(2)]
    mixture = MixtureDataset(members, [0.1, 0.9])
    loader = mixture.get_loader(3, 2, sampler=online(), num_workers=num_workers, include=(*INCLUDE, "source"), seed=0)
    lengths = [{add(member, 6): 6 for _ in range(4)} for member in members]
    found: list[list[tuple[int, int]]] = [[], []]
    for batch in itertools.islice(loader, 80):
        for source, *window in model.places(batch):
            if window[0]:
                found[source].append(tuple(window))  # type: ignore[arg-type]
    assert found == [new_windows(each, Shape(2)) for each in lengths]


def test_a_member_without_weight_keeps_its_new_windows() -> None:
    members = [with_old(RingBufferDataset(1000)) for _ in range(2)]
    mixture = MixtureDataset(members, [0.0, 1.0])
    loader = mixture.get_loader(3, 2, sampler=online(), num_workers=2, include=(*INCLUDE, "source"), seed=0)
    lengths = {add(members[0], 6): 6 for _ in range(3)}
    batches = iter(loader)
    for _ in range(8):
        assert (next(batches)["source"] == 1).all()
    mixture.weights = [1.0, 1.0]
    found = [window[1:] for _ in range(20) for window in model.places(next(batches)) if window[0] == 0 and window[1]]
    assert found == new_windows(lengths, Shape(2))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_an_error_in_a_batch_holds_up_nobody(num_workers) -> None:
    ring = with_old(RingBufferDataset(1000))
    sampler = MixedSampler({online(): 0.5, PrioritizedSampler(): 0.5})
    loader = ring.get_loader(4, 2, sampler=sampler, num_workers=num_workers, include=INCLUDE, seed=0)
    ring.update(np.arange(40), {"priority": np.zeros(40, np.float32)})
    batches, num_errors = iter(loader), 0
    for n in range(20):
        if n == 6:
            ring.update(np.arange(40), {"priority": np.ones(40, np.float32)})
        try:
            next(batches)
        except RuntimeError as error:
            assert "All priorities are 0" in str(error)
            num_errors += 1
    assert 6 <= num_errors <= 6 + 2 * num_workers + 1
    lengths = {add(ring, 5): 5 for _ in range(2)}
    found = Counter(window for batch in itertools.islice(batches, 20) for window in seen(batch))
    assert not Counter(new_windows(lengths, Shape(2))) - found


def test_it_does_not_pack() -> None:
    with pytest.raises(ValueError, match="OnlineSampler counts batches of windows"):
        RingBufferDataset(100).get_loader(2, None, pack=8, sampler=OnlineSampler())
    with pytest.raises(TypeError, match="`then` must be a Sampler, found int"):
        OnlineSampler(3)  # type: ignore[arg-type]


def test_workers_end_by_themselves_when_an_iteration_is_broken_off(monkeypatch) -> None:
    killed: list[Any] = []
    terminate = multiprocessing.process.BaseProcess.terminate
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess, "terminate", lambda self: (killed.append(self), terminate(self))
    )
    others = {process.pid for process in multiprocessing.active_children()}
    ring = with_old(RingBufferDataset(10_000))
    loader = ring.get_loader(3, 2, sampler=online(), num_workers=3, seed=0)
    for n in range(12):
        add(ring, 7)
        batches = iter(loader)
        for _ in range(1 + n % 4):
            next(batches)
        # torch waits for 5 s, then kills those that wait for a batch that nobody makes any more.
        del batches
        assert not [process for process in killed if process.pid not in others]


def test_a_worker_that_starts_late_is_waited_for() -> None:
    ring, lengths = with_old(RingBufferDataset(10_000)), {}
    options: dict[str, Any] = {"worker_init_fn": _start_late, "transform": _slowly, "num_workers": 2}
    loader = ring.get_loader(3, 2, sampler=online(), include=INCLUDE, seed=0, **options)
    found: list[tuple[int, int]] = []
    for _ in range(2):  # The second time, the workers of the first have ended.
        lengths |= {add(ring, 7): 7 for _ in range(4)}
        found += [window for batch in itertools.islice(loader, 4) for window in seen(batch)]
    found += [window for batch in itertools.islice(loader, 10) for window in seen(batch)]
    assert found == new_windows(lengths, Shape(2))


def _start_late(number: int) -> None:
    time.sleep(1.0 * (number == 0))


def _slowly(batch: Any) -> Any:
    time.sleep(0.2)
    return batch
