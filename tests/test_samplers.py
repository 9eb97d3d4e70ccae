"""What samplers draw, against a model that lists every window with its probability."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.fields import Scalar
from buffers.sampler import (
    MixedSampler,
    PrioritizedSampler,
    UniformSampler,
)
from tests import samplers_model as model
from tests.samplers_model import KINDS, Model, Shape, check_draws, random_priorities, stored

SPECS: dict[str, model.Spec] = {
    "uniform": "uniform",
    "episodes": "episodes",
    "recency": ("recency", 25.0),
    "prioritized": ("prioritized", 0.6, 0.9),
    "alpha 0": ("prioritized", 0.0, 0.9),
    "alpha 1, mean": ("prioritized", 1.0, 0.0),
    "largest alone": ("prioritized", 0.6, 1.0),
    "alpha 1": ("prioritized", 1.0, 0.9),
    "half and half": ("mixed", ("prioritized", 1.0, 0.5), 0.5, "uniform", 0.5),
    "three": ("mixed", ("recency", 7.0), 1.0, "episodes", 2.0, ("prioritized", 0.6, 0.9), 1.0),
}
SPECS |= {f"filtered {name}": ("filter", spec) for name, spec in SPECS.items()}
SPECS["mixed and filtered"] = ("mixed", ("filter", ("prioritized", 0.6, 0.9)), 0.4, "uniform", 0.6)
SHAPES = {
    "T = 1": Shape(),
    "T = 2": Shape(2),
    "T = 16": Shape(16),
    "padded": Shape(5, 4, 3),
    "padded before": Shape(16, before=15),
    "episodes": Shape(None),
    "offsets": Shape(offsets=True),
}


def priorities_of(source: Any) -> Any:
    if isinstance(source, MixtureDataset):
        return [random_priorities(member, n) for n, member in enumerate(source.datasets)]
    return random_priorities(source)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_and_weights_are_those_of_the_definition(spec, shape, tmp_path) -> None:
    # Kinds take turns, so that each meets most samplers and shapes.
    kind = KINDS[(list(SPECS).index(spec) + list(SHAPES).index(shape)) % len(KINDS)]
    with stored(kind, tmp_path) as source:
        check_draws(source, SPECS[spec], SHAPES[shape], priorities_of(source))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["prioritized", "filtered prioritized", "half and half"])
def test_every_store_is_drawn_from_alike(kind, spec, tmp_path) -> None:
    with stored(kind, tmp_path) as source:
        check_draws(source, SPECS[spec], Shape(3, 1, 2), priorities_of(source))


@pytest.mark.parametrize("capacity", [6, 7, 8, 9])
@pytest.mark.parametrize("shape", [Shape(5), Shape(4), Shape(16, 15, 15), Shape(None)])
def test_windows_may_be_about_as_long_as_the_dataset(capacity, shape) -> None:
    ring = RingBufferDataset(capacity)
    for length in (2, 6):
        model.add(ring, length)
    check_draws(ring, ("prioritized", 1.0, 0.5), shape, random_priorities(ring, zeros=0), num=4000)


def test_pieces_of_a_stream_are_drawn_with_their_overlap_once() -> None:
    ring = RingBufferDataset(1000)
    with ReplayBuffer(ring, 4, 3, max_episode_length=7, overlap=2, sampler=PrioritizedSampler(1.0, eta=0.5)) as buffer:
        for step in range(40):
            buffer.add_step({"x": step}, done=step == 39)
    loader = ring.get_loader(
        400, 3, sampler=PrioritizedSampler(1.0, eta=0.5), include=("index",), seed=0, pad_after=2, pad_before=1
    )
    starts, lengths = ring.table.starts.tolist(), ring.table.lengths.tolist()
    rng = np.random.default_rng(0)
    by_step = rng.uniform(0.1, 5, 40).astype(np.float32)  # Rows that two pieces have get the same.
    step_of = dict.fromkeys(range(-1, ring.table.next_start), -1)
    step = 0
    for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        step -= 2 * (n > 0)
        for t in range(length):
            step_of[start + t], step = step, step + 1
    ids = [id for id in step_of if id >= 0]
    assert ring.update(ids, {"priority": by_step[[step_of[id] for id in ids]]}) == 0
    weights = {
        first: model.priority(by_step[max(first, 0) : min(first + 3, 40)].astype(np.float64), 1.0, 0.5)
        for first in range(-1, 40)
        if first <= 39
    }
    counts: Counter[tuple[int, int, int]] = Counter()
    for batch in itertools.islice(loader, 30):
        for row in batch["index"].tolist():
            t = next(t for t, id in enumerate(row) if id >= 0)
            counts[0, 0, step_of[row[t]] - t] += 1
    total = sum(weights.values())
    model.assert_plausible(counts, {(0, 0, first): weight / total for first, weight in weights.items()})


# Episodes come and go, and priorities change, between draws.

ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 40)),
    st.tuples(st.just("evict"), st.integers(0, 100)),
    st.tuples(st.just("update"), st.integers(0, 10**6)),
    st.tuples(st.just("draw"), st.just(0)),
)


@given(
    st.sampled_from(["ring", "list", "list, any evicted"]),
    st.sampled_from(["prioritized", "alpha 1", "filtered alpha 1", "half and half", "mixed and filtered", "recency"]),
    st.sampled_from(list(SHAPES)),
    st.lists(ACTIONS, min_size=5, max_size=60),
)
@settings(max_examples=250)
def test_the_draws_follow_what_is_stored(kind, spec, shape, actions) -> None:
    sampler, asked = model.build(SPECS[spec]), SHAPES[shape]
    with stored(kind, None, [5, 30], 60) as dataset:  # type: ignore[arg-type]
        follower = _Follower(dataset)
        stream = dataset.get_loader(24, sampler=sampler, include=model.EVERYTHING, seed=1, **asked.options).stream
        for action, number in [*actions, ("draw", 0)]:
            follower.act(action, number)
            if action == "draw":
                draw(stream, dataset, follower.priorities, SPECS[spec], asked, sampler.beta)
        expected = Model.of(dataset, asked, follower.priorities).distribution(SPECS[spec])
        if not follower.can_be_drawn(SPECS[spec], asked):
            return
        wide = dataset.get_loader(3000, sampler=sampler, include=("episode", "step"), seed=2, **asked.options)
        counts = Counter(model.places(next(iter(wide))))
        model.assert_plausible(counts, {(0, *window): probability for window, probability in expected.items()})


class _Follower:
    """Changes a dataset, and keeps what priorities its rows must have."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.priorities = dataset, dict[int, float]()
        self.largest = 1.0

    def act(self, action: str, number: int) -> None:
        dataset, table = self.dataset, self.dataset.table
        if action == "add":
            model.add(dataset, number)
            start, length, *_ = table.rows[-1].tolist()
            self.priorities |= dict.fromkeys(range(start, start + length), self.largest)
        elif action == "evict" and dataset.num_episodes:
            is_ring = isinstance(dataset, RingBufferDataset)  # It can only evict its oldest.
            dataset.evict_episode(0 if is_ring else number % dataset.num_episodes)
        elif action == "update" and dataset.num_episodes and dataset.late:
            rng = np.random.default_rng(number)
            live = np.concatenate([start + np.arange(length) for start, length, *_ in table.rows.tolist()])
            ids = rng.choice(live, min(len(live), int(rng.integers(1, 20))), replace=False)
            values = (10.0 ** rng.uniform(-3, 3, len(ids))).astype(np.float32)
            values[rng.random(len(ids)) < 0.2] = 0
            assert dataset.update(ids, {"priority": values}) == 0
            self.priorities |= dict(zip(ids.tolist(), values.astype(np.float64).tolist(), strict=True))
            self.largest = max(self.largest, float(values.max()))

    def can_be_drawn(self, spec: model.Spec, shape: Shape) -> bool:
        found = Model.of(self.dataset, shape, self.priorities)
        if isinstance(spec, tuple) and spec[0] == "mixed":
            return all(found.distribution(part) for part in spec[1::2])
        return bool(found.distribution(spec))


def draw(stream: Any, dataset: Any, priorities: dict[int, float], spec: model.Spec, shape: Shape, beta: Any) -> None:
    found = Model.of(dataset, shape, priorities)
    try:
        batch = stream.take()
    except RuntimeError as error:
        parts = spec[1::2] if isinstance(spec, tuple) and spec[0] == "mixed" else [spec]
        assert any(not found.distribution(part) for part in parts), error
        return
    expected = {(0, *window): probability for window, probability in found.distribution(spec).items()}
    model.check_batch(batch, expected, beta, found.num_windows)


# Weights.


def test_weights_of_half_and_half_are_those_of_both_together() -> None:
    ring = RingBufferDataset(100)
    for _ in range(2):
        model.add(ring, 2)
    sampler = MixedSampler({PrioritizedSampler(1.0, beta=1.0, eta=0.9): 0.5, UniformSampler(): 0.5})
    loader = ring.get_loader(512, 1, sampler=sampler, include=("index", "weight"), seed=0)
    ring.update([0, 1, 2, 3], {"priority": [1.0, 0.0, 3.0, 4.0]})
    batch = next(iter(loader))
    # N P: half of 4 * (1, 0, 3, 4) / 8, and half of 1.
    densities = np.array([0.75, 0.5, 1.25, 1.5])
    np.testing.assert_allclose(batch["weight"].numpy(), (0.5 / densities)[batch["index"][:, 0].numpy()], rtol=1e-5)


def test_weights_of_a_mixture_count_the_windows_of_all_members() -> None:
    members = [RingBufferDataset(100), RingBufferDataset(100)]
    model.add(members[0], 2)
    model.add(members[1], 8)
    mixture = MixtureDataset(members, [0.5, 0.5])
    sampler = PrioritizedSampler(1.0, beta=1.0)
    include = ("index", "source", "weight")
    batch = next(iter(mixture.get_loader(512, 1, sampler=sampler, include=include, seed=0)))
    # Of 10 windows, those of member 0 have a probability of 1/4 each, those of member 1 of 1/16.
    expected = np.where(batch["source"].numpy() == 0, 0.25, 1.0)
    np.testing.assert_allclose(batch["weight"].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("spec", ["uniform", "episodes", "recency"])
def test_without_priorities_all_weights_are_1(spec, tmp_path) -> None:
    with stored("mixture", tmp_path) as source:
        batch = next(iter(source.get_loader(64, 2, sampler=model.build(SPECS[spec]), include=("weight",), seed=0)))
        assert (batch["weight"] == 1).all()


# New rows.


def test_new_rows_have_the_largest_priority_so_far() -> None:
    ring = RingBufferDataset(10)
    sampler = PrioritizedSampler(1.0)
    stream = ring.get_loader(4, 1, sampler=sampler).stream
    field = ring.late["priority"]
    model.add(ring, 4)
    assert field.windows(ring.table.starts, 4).tolist() == [[1.0] * 4]
    ring.update([1], {"priority": [7.0]})
    ring.update([1], {"priority": [0.5]})  # The largest so far, not the largest that is stored.
    model.add(ring, 5)
    assert field.windows(ring.table.starts[1:], 5).tolist() == [[7.0] * 5]
    model.add(ring, 9)  # In the place of both.
    assert field.windows(ring.table.starts, 9).tolist() == [[7.0] * 9]
    assert len(stream.take()["x"]) == 4


def test_new_rows_have_the_initial_priority_that_was_asked_for() -> None:
    ring = RingBufferDataset(10)
    ring.get_loader(4, 1, sampler=PrioritizedSampler(initial=0.25))
    model.add(ring, 4)
    ring.update([1], {"priority": [7.0]})
    model.add(ring, 3)
    assert ring.late["priority"].windows(ring.table.starts, 3).tolist() == [[0.25, 7.0, 0.25], [0.25] * 3]


@pytest.mark.parametrize("shape", SHAPES)
def test_priorities_of_zero_alone_are_an_error_that_says_so(shape) -> None:
    ring = RingBufferDataset(100)
    model.add(ring, 20)
    stream = ring.get_loader(4, sampler=PrioritizedSampler(), **SHAPES[shape].options).stream
    ring.update(np.arange(20), {"priority": np.zeros(20, np.float32)})
    with pytest.raises(RuntimeError, match="All priorities are 0, so no window can be drawn"):
        stream.take()
    ring.update([7], {"priority": [2.0]})
    stream.take()


@pytest.mark.parametrize("length", [1, 4, None])
def test_the_largest_priority_is_one_like_any_other(length) -> None:
    ring = RingBufferDataset(100)
    model.add(ring, 20)
    largest = dict.fromkeys(range(20), float(np.float32(1.7e38)))
    check_draws(ring, ("prioritized", 1.0, 0.5), Shape(length), largest, num=4000)
    with pytest.raises(ValueError, match="must be finite, not negative and at most 1.7e"):
        ring.update([3], {"priority": [3e38]})


@pytest.mark.parametrize("default", [-1.0, float("nan"), float("inf"), 3e38])
def test_a_default_that_is_no_priority_is_refused(default) -> None:
    ring = RingBufferDataset(100)
    with pytest.raises(ValueError, match="must be finite, at least 0 and at most 1.7"):
        ring.add_late_field("priority", Scalar(), default)
    with pytest.raises(ValueError, match="must be finite, at least 0 and at most 1.7"):
        PrioritizedSampler(initial=default)
    ring.add_late_field("priority", Scalar(), 0.5)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 3), slice(0, 4)])
@pytest.mark.parametrize("is_mixture", [False, True])
def test_weights_stay_finite_while_priorities_become_0(rows, is_mixture) -> None:
    ring, other = RingBufferDataset(100), RingBufferDataset(100)
    for _ in range(4):
        model.add(ring, 1)
        model.add(other, 1)

    class Meddler(UniformSampler):
        """The trainer, which sets priorities between a draw and the question how likely it was."""

        def density(self, table: Any, windows: Any) -> np.ndarray:
            ids = np.arange(4)[rows]
            ring.update(ids, {"priority": np.zeros(len(ids), np.float32)})
            return np.zeros(len(windows))

    sampler = MixedSampler({Meddler(): 0.1, PrioritizedSampler(1.0, beta=0.5): 0.9})
    source: Any = MixtureDataset([ring, other], [1, 1]) if is_mixture else ring
    stream = source.get_loader(64, 1, sampler=sampler, include=("weight",), seed=0).stream
    weights = stream.take()["weight"]
    assert torch.isfinite(weights).all() and weights.max() == 1 and weights.min() > 0
