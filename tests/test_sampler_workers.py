"""Samplers in worker processes: the same batches, and news of what the trainer sets, in time."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.sampler import EpisodeFilter, MixedSampler, PrioritizedSampler, RecencySampler, UniformSampler
from tests import samplers_model as model
from tests.contract import assert_same_batch
from tests.samplers_model import Shape, random_priorities, stored

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process .* multi-threaded")

SPECS = {
    "prioritized": ("prioritized", 0.6, 0.9),
    "half and half": ("mixed", ("prioritized", 1.0, 0.5), 0.5, "uniform", 0.5),
    "filtered": ("filter", ("prioritized", 0.6, 0.9)),
    "recency": ("recency", 20.0),
    "mixed and filtered": ("mixed", ("filter", "episodes"), 0.3, ("prioritized", 0.6, 0.9), 0.7),
}
KINDS = ["ring", "files, any evicted", "mixture", "ring", "mixture"]


@pytest.mark.parametrize("spec", SPECS)
def test_the_number_of_workers_changes_nothing(spec, tmp_path) -> None:
    kind = KINDS[list(SPECS).index(spec)]
    with stored(kind, tmp_path) as source:
        include = (*model.EVERYTHING, "source") if kind == "mixture" else model.EVERYTHING
        options: dict[str, Any] = {"include": include, "seed": 5, **Shape(5, 4, 3).options}
        loaders = [
            source.get_loader(16, sampler=model.build(SPECS[spec]), num_workers=num_workers, **options)
            for num_workers in range(4)
        ]
        members = source.datasets if kind == "mixture" else [source]
        given = [random_priorities(member, n) for n, member in enumerate(members)]
        model.write(source, given if kind == "mixture" else given[0])
        reference = list(itertools.islice(loaders[0], 11))
        for loader in loaders[1:]:
            found = [*itertools.islice(loader, 5), *itertools.islice(loader, 6)]
            for one, two in zip(reference, found, strict=True):
                assert_same_batch(one, two)


def two_rows() -> RingBufferDataset:
    """One row of each of two episodes, with equal priorities."""
    ring = RingBufferDataset(10)
    for number in range(2):
        ring.add_episode({"x": np.full(1, number)})
    return ring


def after(batches: Any, num: int) -> Any:
    """The first batch that must know what was set before: all but `num` that were made already."""
    time.sleep(0.1)  # Let the workers make what they may.
    return list(itertools.islice(batches, num + 1))[-1]


@pytest.mark.parametrize(
    ("method", "num_workers", "prefetch_factor"), [("fork", 2, 2), ("fork", 1, 3), ("spawn", 1, 2)]
)
def test_priorities_reach_running_workers(method, num_workers, prefetch_factor) -> None:
    num = num_workers * prefetch_factor
    options: dict[str, Any] = {"prefetch_factor": prefetch_factor, "multiprocessing_context": method}
    sampler = MixedSampler({PrioritizedSampler(1.0, beta=1.0): 0.5, EpisodeFilter(PrioritizedSampler(1.0), all): 0.5})
    with ReplayBuffer(
        two_rows(), 32, num_workers=num_workers, sampler=sampler, include=("index", "weight"), seed=0, **options
    ) as buffer:
        assert set(buffer.sample()["index"].flatten().tolist()) == {0, 1}
        for row in (0, 1, 0):
            assert buffer.update_priorities([[row], [1 - row]], [1.0, 0.0]) == 0
            batch = after(iter(buffer), num)
            assert set(batch["index"].flatten().tolist()) == {row}
        buffer.update_priorities([[0], [1]], [1.0, 3.0])
        batch = after(iter(buffer), num)
        expected = torch.where(batch["index"][:, 0] == 0, 1.0, 1 / 3)
        torch.testing.assert_close(batch["weight"], expected)
        # A new row has the largest priority so far, which is 3.
        buffer.dataset.evict_episode(0)
        buffer.add_episode({"x": np.full(1, 2)})
        buffer.update_priorities([[1]], [0.0])
        assert set(after(iter(buffer), num)["x"].flatten().tolist()) == {2}


@pytest.mark.parametrize(("method", "num_workers", "prefetch_factor"), [("fork", 2, 2), ("forkserver", 1, 2)])
def test_beta_and_shares_reach_running_workers(method, num_workers, prefetch_factor) -> None:
    num = num_workers * prefetch_factor
    ring = two_rows()
    first, second = PrioritizedSampler(1.0, beta=0.0), UniformSampler()
    sampler = MixedSampler({first: 0.5, second: 0.5})
    options: dict[str, Any] = {"prefetch_factor": prefetch_factor, "multiprocessing_context": method}
    loader = ring.get_loader(
        64, 1, num_workers=num_workers, sampler=sampler, include=("index", "weight"), seed=0, **options
    )
    ring.update([0, 1], {"priority": [0.0, 1.0]})
    batches = iter(loader)
    assert (next(batches)["weight"] == 1).all()
    first.beta = 1.0
    batch = after(batches, num)
    torch.testing.assert_close(batch["weight"], torch.where(batch["index"][:, 0] == 0, 1.0, 1 / 3))
    sampler.shares = [1.0, 0.0]
    batch = after(batches, num)
    assert (batch["index"] == 1).all() and (batch["weight"] == 1).all()
    sampler.shares = [0.25, 0.75]
    first.beta = 0.5
    batch = after(batches, num)
    assert (batch["index"][:16] == 1).all() and (batch["index"][16:] == 0).any()
    expected = torch.where(batch["index"][:, 0] == 0, 1.0, (0.375 / 0.625) ** 0.5)
    torch.testing.assert_close(batch["weight"], expected)


def test_weights_of_a_mixture_reach_workers_with_its_shares() -> None:
    mixture = MixtureDataset([two_rows(), two_rows()], [0.5, 0.5])
    loader = mixture.get_loader(
        64, 1, num_workers=2, sampler=PrioritizedSampler(1.0, beta=1.0), include=("source", "weight"), seed=0
    )
    batches = iter(loader)
    assert (next(batches)["weight"] == 1).all()
    mixture.weights = [0.25, 0.75]
    batch = after(batches, 4)
    torch.testing.assert_close(batch["weight"], torch.where(batch["source"] == 0, 1.0, 1 / 3))


def test_workers_follow_a_ring_that_laps_while_priorities_change() -> None:
    ring = RingBufferDataset(60)
    model.add(ring, 20)
    rng = np.random.default_rng(0)
    sampler = EpisodeFilter(PrioritizedSampler(1.0), model.is_accepted)
    with ReplayBuffer(ring, 16, 3, num_workers=2, sampler=sampler, include=("index", "episode"), seed=0) as buffer:
        for n in range(150):
            batch = buffer.sample()
            assert (batch["episode"] % 3 != 1).all()
            assert (batch["index"].diff(dim=1) == 1).all() and (batch["x"].diff(dim=1) == 1).all()
            gone = buffer.update_priorities(batch["index"], 10.0 ** rng.uniform(-3, 3, 16).astype(np.float32))
            assert 0 <= gone <= 48
            if n % 2:
                model.add(ring, int(rng.integers(3, 20)))
        assert ring.num_evicted > 20


def test_recency_counts_what_is_new_in_workers() -> None:
    ring = RingBufferDataset(1000)
    ring.add_episode({"x": np.zeros(100)})
    batches = iter(ring.get_loader(64, 1, num_workers=1, sampler=RecencySampler(half_life=2.0), seed=0))
    assert (next(batches)["x"] == 0).all()
    ring.add_episode({"x": np.ones(100)})
    assert after(batches, 2)["x"].mean() > 0.99


def test_an_all_zero_priority_in_workers_is_an_error_that_passes() -> None:
    ring = two_rows()
    batches = iter(ring.get_loader(8, 1, num_workers=2, sampler=PrioritizedSampler(), seed=0))
    next(batches)
    ring.update([0, 1], {"priority": [0.0, 0.0]})
    with pytest.raises(RuntimeError, match="All priorities are 0"):
        after(batches, 4)
    ring.update([0], {"priority": [1.0]})
    for _ in range(6):
        try:
            batch = next(batches)
        except RuntimeError as error:
            assert "All priorities are 0" in str(error)
    assert (batch["x"] == 0).all()
