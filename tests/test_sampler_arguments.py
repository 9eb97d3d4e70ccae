"""Samplers: their arguments and states, and whom a filter lets in."""

from __future__ import annotations

import copy
import json
import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer, SamplesPerInsert
from buffers.dataset import RingBufferDataset
from buffers.fields import Scalar
from buffers.sampler import (
    EpisodeFilter,
    MixedSampler,
    OnlineSampler,
    PrioritizedSampler,
    RecencySampler,
    UniformSampler,
    episode_filter,
)
from tests import samplers_model as model
from tests.contract import assert_same_batch


def test_a_filter_forgets_those_that_have_left_and_gives_back_their_memory(monkeypatch) -> None:
    monkeypatch.setattr(episode_filter, "_NUM_KEPT", 8192)
    ring, asked = RingBufferDataset(50), list[int]()

    def accept(info: dict[str, Any]) -> bool:
        asked.append(info["number"])
        return info["number"] % 5 == 0

    for number in range(10):
        ring.add_episode({"x": np.array([number])}, info={"number": number})
    stream = ring.get_loader(300, 1, sampler=EpisodeFilter(UniformSampler(), accept), seed=0).stream
    memory = stream.drawer.samplers[0]._memory
    for number in range(10, 120_000):
        ring.add_episode({"x": np.array([number])}, info={"number": number})
        if number % 5000 == 0:
            found = set(stream.take()["x"].flatten().tolist())
            assert found == {n for n in range(number - 49, number + 1) if n % 5 == 0 and n >= 0}
    assert asked == list(range(120_000))  # Each once.
    assert os.fstat(memory._descriptor).st_blocks * 512 < 100_000  # Of 120 kB.


def test_an_episode_that_the_filter_cannot_judge_is_not_added() -> None:
    ring = RingBufferDataset(50)
    sampler = EpisodeFilter(UniformSampler(), lambda info: info["ok"])
    stream = ring.get_loader(64, 1, sampler=sampler, include=("episode",), seed=0).stream
    ring.add_episode({"x": np.zeros(3)}, info={"ok": True})
    with pytest.raises(RuntimeError, match=r"failed for episode \d+, whose info is {}: KeyError\('ok'\)"):
        ring.add_episode({"x": np.zeros(3)})
    assert ring.num_episodes == 1
    ring.add_episode({"x": np.zeros(3)}, info={"ok": True})
    assert set(stream.take()["episode"].tolist()) == {0, 1}


def test_a_filter_that_accepts_nothing_says_so() -> None:
    ring = RingBufferDataset(50)
    with ReplayBuffer(ring, 4, 2, sampler=EpisodeFilter(UniformSampler(), lambda info: False)) as buffer:
        buffer.add_episode({"x": np.zeros(3)})
        assert not buffer.can_sample
        with pytest.raises(RuntimeError, match="EpisodeFilter accepts none of the stored episodes"):
            buffer.sample()


ARGUMENTS: list[tuple[Any, type[Exception], str]] = [
    (lambda: PrioritizedSampler(alpha=-1), ValueError, "`alpha` must be finite, at least 0"),
    (lambda: PrioritizedSampler(alpha="a"), TypeError, "`alpha` must be a number, found str"),
    (lambda: PrioritizedSampler(eta=1.1), ValueError, "`eta` must be .* at most 1"),
    (lambda: PrioritizedSampler(beta=float("nan")), ValueError, "`beta` must be finite, at least 0, found nan"),
    (lambda: PrioritizedSampler(initial="largest"), TypeError, "`initial` must be a number, found str"),
    (lambda: RecencySampler(0), ValueError, "`half_life` must be"),
    (lambda: RecencySampler("a"), TypeError, "`half_life` must be a number"),
    (lambda: MixedSampler({}), ValueError, "needs at least one sampler, found none"),
    (lambda: MixedSampler([UniformSampler()]), TypeError, "must be a dict from samplers to shares, found list"),
    (lambda: MixedSampler({UniformSampler: 1.0}), TypeError, "must be a dict from samplers to shares, found the key"),
    (lambda: MixedSampler({UniformSampler(): 0.0}), ValueError, "must be finite, at least 0, and not all 0"),
    (lambda: MixedSampler({UniformSampler(): -1.0}), ValueError, "must be finite, at least 0, and not all 0"),
    (lambda: EpisodeFilter(3, all), TypeError, "`sampler` must be a Sampler, found int"),
    (lambda: EpisodeFilter(UniformSampler(), 3), TypeError, "`accept` must be a function of an episode's info"),
]


@pytest.mark.parametrize(("make", "error", "message"), ARGUMENTS)
def test_bad_arguments_are_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_states_go_through_json_and_others_are_refused() -> None:
    ring = RingBufferDataset(100)
    model.add(ring, 40)

    def mixed() -> MixedSampler:
        prioritized = PrioritizedSampler(1.0, beta=0.9)
        return MixedSampler({prioritized: 0.3, EpisodeFilter(RecencySampler(3.0), model.is_accepted): 0.7})

    one, other = (ring.get_loader(16, 2, sampler=mixed(), include=("weight",), seed=n) for n in range(2))
    next(iter(one))
    one.stream.sampler.shares = [0.6, 0.4]
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert_same_batch(next(iter(one)), next(iter(other)))
    assert other.stream.sampler.shares.tolist() == [0.6, 0.4]
    for samplers in ([{}], [{"beta": 1.0}], [], [{"shares": [1, 0], "samplers": [{}]}]):
        with pytest.raises(ValueError, match="The state is"):
            other.load_state_dict({**one.state_dict(), "samplers": samplers})
    plain = ring.get_loader(16, 2)
    assert "samplers" not in plain.state_dict()
    with pytest.raises(ValueError, match=r"A UniformSampler has no state, found \['beta'\]"):
        plain.load_state_dict({**plain.state_dict(), "samplers": [{"beta": 1.0}]})


def test_offsets_may_name_a_late_field_in_a_buffer_that_takes_steps() -> None:
    ring = RingBufferDataset(50)
    ring.add_late_field("latent", Scalar(), 7.0)
    buffer = ReplayBuffer(ring, 4, num_envs=1, offsets={"x": range(-1, 2), "latent": (-1, 0)}, seed=0)
    for step in range(10):
        buffer.add_step({"x": float(step)}, step == 9)
    batch = buffer.sample()
    assert batch["x"].shape == (4, 3) and batch["latent"].shape == (4, 2) and batch["latent"].max() == 7


def test_what_is_new_is_kept_for_later_where_the_rest_of_a_batch_cannot_be_drawn() -> None:
    ring = RingBufferDataset(100)
    sampler = OnlineSampler(EpisodeFilter(UniformSampler(), lambda info: bool(info)))
    buffer = ReplayBuffer(ring, 8, 4, sampler=sampler, include=("step", "episode"), seed=0)
    ring.add_episode({"x": np.zeros(7)})
    assert not buffer.can_sample
    with pytest.raises(RuntimeError, match="accepts none of the stored episodes"):
        buffer.sample()
    ring.add_episode({"x": np.zeros(4)}, info={"ok": True})
    batch = buffer.sample()
    windows = list(zip(batch["episode"].tolist(), batch["step"][:, 0].tolist(), strict=True))
    assert windows == [(0, 0), (0, 3), (1, 0)] + [(1, 0)] * 5 and buffer.stats()["num_missed_windows"] == 0


def test_a_copied_buffer_draws_by_priorities_of_its_own() -> None:
    ring = RingBufferDataset(100)
    buffer = ReplayBuffer(ring, 64, 1, sampler=PrioritizedSampler(1.0), include=("index",), seed=0)
    buffer.add_episode({"x": np.zeros(4)})
    buffer.update_priorities([0, 1, 2, 3], [0, 1, 0, 0])
    copied = copy.deepcopy(buffer)
    copied.update_priorities([0, 1, 2, 3], [0, 0, 0, 1])
    assert set(copied.sample()["index"].flatten().tolist()) == {3}
    assert set(buffer.sample()["index"].flatten().tolist()) == {1}


@pytest.mark.parametrize(("eta", "alpha"), [(0.0, 1.0), (0.1, 2.0), (0.0, 0.6)])
def test_few_proposals_are_needed_where_one_row_of_each_episode_has_all_priority(eta, alpha, monkeypatch) -> None:
    ring, num_proposals = RingBufferDataset(20_000), []
    for _ in range(20):
        ring.add_episode({"x": np.zeros(1000)})
    stream = ring.get_loader(64, 100, sampler=PrioritizedSampler(alpha, eta=eta), seed=0).stream
    ring.update(np.arange(20_000), {"priority": (np.arange(20_000) % 1000 == 0).astype(np.float32)})
    propose = PrioritizedSampler._propose

    def counted(self: Any, table: Any, index: Any, length: Any, num: int, *rest: Any) -> Any:
        num_proposals.append(num)
        return propose(self, table, index, length, num, *rest)

    monkeypatch.setattr(PrioritizedSampler, "_propose", counted)
    stream.take()
    # Only one of up to 128 windows of a piece has such a row.
    assert sum(num_proposals) < 3 * 128 * 64 and len(num_proposals) < 10


def test_priorities_may_be_bfloat16() -> None:
    buffer = ReplayBuffer(RingBufferDataset(20), 4, 2, sampler=PrioritizedSampler(), include=("index",), seed=0)
    buffer.add_episode({"x": np.zeros(9)})
    assert buffer.update_priorities(buffer.sample()["index"], torch.rand(4, 2, dtype=torch.bfloat16)) == 0


def test_a_limiter_says_that_nothing_can_be_drawn() -> None:
    buffer = ReplayBuffer(RingBufferDataset(1000), 4, 50, num_envs=1, limiter=SamplesPerInsert(1.0), seed=0)
    with pytest.warns(UserWarning, match="No batch is due, as none can be drawn: of 10 episodes"):
        for step in range(200):
            buffer.add_step({"x": 0.0}, step % 10 == 9)
            assert buffer.num_batches_due == 0


def test_a_sampler_that_is_sent_elsewhere_is_a_copy_as_of_then() -> None:
    prioritized = PrioritizedSampler(beta=0.3)
    mixed = MixedSampler({prioritized: 0.25, UniformSampler(): 0.75})
    copied = pickle.loads(pickle.dumps(mixed))
    prioritized.beta = 1.0
    assert copied.samplers[0].beta == 0.3 and copied.shares.tolist() == [0.25, 0.75]
