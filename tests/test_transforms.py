"""Transitions and n-step returns, against loops that spell them out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import Recorder, ReplayBuffer
from buffers.transforms import n_step_returns, to_transitions
from tests.logged_game import Games, make_buffer, play

N = 3


def recorded_games(buffer: ReplayBuffer) -> Games:
    games = Games(N, "next_step")
    play(games, Recorder(buffer, N, "next_step"), returns=lambda games, call: {"extras": {"value": call["reward"] * 2}})
    return games


def logged_transitions(games: Games) -> dict[tuple[float, ...], tuple[Any, ...]]:
    """From what identifies a transition (environment, episode, step of its first observation) to all of it."""
    transitions = {}
    for log in games.logs:
        for episode in log:
            for t, action in enumerate(episode["action"]):
                key = tuple(episode["obs"][t].tolist())
                flags = bool(episode["terminated"][t]), bool(episode["truncated"][t])
                next_obs = tuple(episode["obs"][t + 1].tolist())
                transitions[key] = (tuple(action.tolist()), episode["reward"][t], *flags, next_obs, t == 0)
    return transitions


def transitions_in(batch: dict[str, Any]) -> list[tuple[tuple[float, ...], tuple[Any, ...]]]:
    """The same, of what was drawn."""
    found = []
    for index in np.ndindex(*batch["terminated"].shape):
        names = ("action", "reward", "terminated", "truncated", "next_obs", "is_first")
        values = [batch[name][index].tolist() for name in ("obs", *names)]
        values = [tuple(value) if isinstance(value, list) else value for value in values]
        assert batch["value"][index] == 2 * batch["reward"][index]
        found.append((values[0], tuple(values[1:])))
    return found


@pytest.mark.parametrize("num_transitions", [1, 3])
def test_transitions_that_a_loader_draws_are_those_of_the_log(num_transitions: int) -> None:
    buffer = make_buffer()
    logged = logged_transitions(recorded_games(buffer))
    drawing = ReplayBuffer(buffer.dataset, 2000, num_transitions + 1, transform=to_transitions, seed=0)
    found = dict(transitions_in(drawing.sample()))
    assert found.items() <= logged.items()
    assert num_transitions > 1 or found == logged, "and all of them"


def test_index_and_step_are_of_the_row_before_and_other_included_names_on_arrival() -> None:
    buffer = make_buffer()
    recorded_games(buffer)
    include = ("index", "episode", "step", "is_last", "mask", "weight")
    batch = ReplayBuffer(buffer.dataset, 16, 3, include=include, seed=0).sample()
    found = to_transitions(batch)
    for name in ("is_last", "mask", "value"):
        assert torch.equal(found[name], batch[name][:, 1:])
    for name in ("index", "step"):
        assert torch.equal(found[name], batch[name][:, :2])
    assert found["episode"] is batch["episode"] and found["weight"] is batch["weight"]
    assert torch.equal(found["is_first"], batch["is_first"][:, :2])


def test_nested_fields_are_split_and_share_their_memory() -> None:
    image, state = torch.arange(24).reshape(2, 3, 4), torch.arange(6.0).reshape(2, 3)
    reward, no = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool)
    obs = {"image": image, "deep": {"state": state}}
    rows = {"obs": obs, "action": {"0": state}, "reward": reward, "terminated": no, "truncated": no}
    found = to_transitions(rows)
    assert torch.equal(found["obs"]["deep"]["state"], state[:, :2])
    assert torch.equal(found["next_obs"]["image"], image[:, 1:])
    assert found["next_obs"]["image"].untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
    assert found["action"]["0"].shape == (2, 2)
    with_returns = n_step_returns(found, 2, 0.9)
    assert torch.equal(with_returns["bootstrap_obs"]["image"][:, 0], image[:, 2])
    assert with_returns["return"].dtype == torch.float64


def returns_by_loop(
    reward: list[float], terminated: list[bool], truncated: list[bool], real: list[bool], n: int, gamma: float
) -> list[tuple[float, float, int]]:
    """(return, discount, last transition) for each start."""
    found = []
    for start in range(len(reward)):
        total, discount, t = 0.0, 1.0, start
        if not real[start]:
            found.append((0.0, 0.0, start))
            continue
        while True:
            total, discount = total + discount * reward[t], discount * gamma
            is_end = t + 1 == len(reward) or not real[t + 1]
            if terminated[t] or truncated[t] or t + 1 - start == n or is_end:
                break
            t += 1
        found.append((total, 0.0 if terminated[t] else discount, t))
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data(), length=st.integers(1, 7), n=st.integers(1, 9), gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_n_step_returns_are_those_of_a_loop(data: st.DataObject, length: int, n: int, gamma: float) -> None:
    def column(values: st.SearchStrategy[Any]) -> list[list[Any]]:
        return data.draw(st.lists(st.lists(values, min_size=length, max_size=length), min_size=2, max_size=2))

    reward, terminated, truncated = column(st.integers(-3, 3)), column(st.booleans()), column(st.booleans())
    num_real = data.draw(st.none() | st.lists(st.integers(1, length), min_size=2, max_size=2))
    batch = {
        "reward": torch.tensor(reward, dtype=data.draw(st.sampled_from([torch.float32, torch.int64]))),
        "terminated": torch.tensor(terminated),
        "truncated": torch.tensor(truncated),
        "next_obs": torch.arange(2 * length).reshape(2, length, 1),
    }
    real = [[num_real is None or t < num_real[b] for t in range(length)] for b in range(2)]
    if num_real is not None:
        batch["mask"] = torch.tensor(real)
    found = n_step_returns(batch, n, gamma)
    for b in range(2):
        expected = returns_by_loop(reward[b], terminated[b], truncated[b], real[b], n, gamma)
        single = n_step_returns({name: value[b] for name, value in batch.items()}, n, gamma)
        for of_b in ({name: found[name][b] for name in ("return", "discount", "bootstrap_obs")}, single):
            np.testing.assert_allclose(of_b["return"], [item[0] for item in expected], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(of_b["discount"], [item[1] for item in expected], rtol=1e-5)
            np.testing.assert_array_equal(of_b["bootstrap_obs"][:, 0], [b * length + item[2] for item in expected])


_NO = torch.zeros(2, 3, dtype=torch.bool)
_ROWS = {"obs": _NO, "action": _NO, "reward": torch.zeros(2, 3), "terminated": _NO, "truncated": _NO}


@pytest.mark.parametrize(
    ("changes", "n", "gamma", "message"),
    [
        ({"obs": _NO, "terminated": _NO[:, :1]}, 0, 0, "found sequences of 1. Draw with `sequence_length=2`"),
        ({"truncated": None}, 0, 0, r"The batch has no \['truncated'\]"),
        ({"next_obs": _NO}, 0, 0, r"already has \['next_obs'\]"),
        ({}, 1, 0.9, "call `to_transitions` first"),
        ({}, 0, 0.9, "`n` must be at least 1 and `gamma` from 0 to 1, found 0 and 0.9"),
        ({}, 1, 1.5, "found 1 and 1.5"),
        (
            {"next_obs": _NO, "reward": torch.zeros(2, 3, 3)},
            1,
            0.9,
            r"`reward` has shape \(2, 3, 3\), expected \(2, 3\)",
        ),
        ({"next_obs": _NO, "discount": _NO}, 1, 0.9, r"already has \['discount'\]"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes: dict[str, Any], n: int, gamma: float, message: str) -> None:
    batch = {name: value for name, value in {**_ROWS, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        n_step_returns(batch, n, gamma) if gamma else to_transitions(batch)


def test_names_of_what_is_included_are_left_alone_unless_they_are_rows() -> None:
    found = to_transitions({**_ROWS, "weight": torch.arange(6.0).view(2, 3), "source": torch.arange(2)})
    assert found["weight"].tolist() == [[1.0, 2.0], [4.0, 5.0]] and found["source"].tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        to_transitions({**_ROWS, "extra": torch.zeros(2, 1)})
