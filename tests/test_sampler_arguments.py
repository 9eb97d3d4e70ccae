"""Samplers: their arguments and states, and whom a filter lets in."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.sampler import (
    EpisodeFilter,
    MixedSampler,
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
    with pytest.raises(KeyError, match="ok"):
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
