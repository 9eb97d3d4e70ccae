"""Rows are aligned on arrival: an environment's own log comes back, and nothing is made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffers import Recorder, ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.interop.alignment import rows_on_arrival, transitions_of
from tests.interop.made_up import log
from tests.tagged import flatten


def assert_same(found: Any, expected: Any) -> None:
    one, other = flatten(found), flatten(expected)
    assert list(one) == list(other)
    for name in other:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name, strict=True)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_rows_are_those_that_a_recorder_stores(num_steps: int) -> None:
    found = log(3, num_steps)
    found["truncated"][-1], found["reward"] = True, found["reward"].astype(np.float32)
    buffer = ReplayBuffer(RingBufferDataset(100), batch_size=1)
    recorder = Recorder(buffer, num_envs=None, autoreset_mode="disabled")
    recorder.reset(found["obs"][0])
    for t in range(num_steps):
        flags = bool(found["terminated"][t]), bool(found["truncated"][t])
        recorder.step(found["action"][t], found["obs"][t + 1], found["reward"][t], *flags)
    recorded = {name: rows.numpy() for name, rows in buffer.dataset.get_episode(0).items()}
    assert_same(rows_on_arrival(found.pop("obs"), found), recorded)


@given(num_steps=st.integers(1, 9), final_missing=st.sampled_from([None, False, True]), is_nested=st.booleans())
def test_transitions_come_back(num_steps: int, final_missing: bool | None, is_nested: bool) -> None:
    steps = log(2, num_steps)
    observations = steps.pop("obs")[: num_steps + (not final_missing)]
    tree = {"state": observations, "pixels": {"top": observations.astype(np.uint8)}} if is_nested else observations
    rows = rows_on_arrival(tree, steps, more={"info": np.arange(num_steps + 1)}, final_missing=final_missing)
    found = transitions_of(rows)
    assert found.num_steps == num_steps and found.final_missing == bool(final_missing)
    assert_same({name: found.steps[name] for name in steps}, steps)
    shown = {"obs": found.observations}
    kept = flatten({"obs": tree})
    for name, values in flatten(shown).items():
        np.testing.assert_array_equal(values[: len(kept[name])], kept[name], strict=True)
    assert found.steps["info"].tolist() == [*range(1, num_steps + 1)] and [*found.losses()] == []


def test_a_missing_final_observation_repeats_the_last_and_says_so() -> None:
    rows = rows_on_arrival(np.arange(3), {"action": np.arange(5, 8)}, final_missing=True)
    assert rows["obs"].tolist() == [0, 1, 2, 2] and rows["action"].tolist() == [0, 5, 6, 7]
    assert rows["final_obs_missing"].tolist() == [False, False, False, True]
    known = rows_on_arrival(np.arange(4), {"action": np.arange(5, 8)}, final_missing=False)
    assert known["obs"].tolist() == [0, 1, 2, 3] and not known["final_obs_missing"].any()


def test_an_episode_of_one_observation_has_one_row() -> None:
    rows = rows_on_arrival(np.ones((1, 2)), {"action": np.zeros((0, 3))})
    assert rows["obs"].shape == (1, 2) and rows["action"].shape == (1, 3) and rows["is_first"].tolist() == [True]


@pytest.mark.parametrize("num_rows", [2, 4])
def test_arrays_of_other_lengths_are_refused(num_rows: int) -> None:
    with pytest.raises(ValueError, match=r"`reward` has shape \(\d,\), expected 3 rows"):
        rows_on_arrival(np.zeros(4), {"action": np.zeros(3), "reward": np.zeros(num_rows)})
    with pytest.raises(ValueError, match=r"`obs/a` has shape \(3,\), expected 4 rows"):
        rows_on_arrival({"a": np.zeros(3)}, {"action": np.zeros(3)})
    with pytest.raises(ValueError, match=r"`x` has shape \(3,\), expected 4 rows"):
        rows_on_arrival(np.zeros(4), {"action": np.zeros(3)}, more={"x": np.zeros(3)})
    with pytest.raises(ValueError, match="needs at least one transition"):
        rows_on_arrival(np.zeros((0, 2)), {"action": np.zeros(0)}, final_missing=True)


def test_no_field_replaces_another() -> None:
    with pytest.raises(ValueError, match=r"\['is_first'\] would be fields twice"):
        rows_on_arrival(np.zeros(3), {"action": np.zeros(2), "is_first": np.zeros(2)})
    with pytest.raises(ValueError, match=r"\['x'\] would be fields twice"):
        rows_on_arrival(np.zeros(3), {"x": np.zeros(2)}, more={"x": np.zeros(3)})
    with pytest.raises(ValueError, match="`obs` is empty"):
        rows_on_arrival({}, {"action": np.zeros(2)})


def test_what_is_not_aligned_on_arrival_is_refused_or_said() -> None:
    with pytest.raises(ValueError, match="Formats need the field `obs`"):
        transitions_of({"state": np.zeros(3)})
    with pytest.raises(ValueError, match="A row behind row 0 has `is_first`"):
        transitions_of({"obs": np.zeros(3), "is_first": np.array([True, False, True])})
    found = transitions_of({"obs": np.zeros(3), "action": np.ones(3), "info": {"x": np.array([0, 1, 1])}})
    assert [*found.losses()] == ["action"]
