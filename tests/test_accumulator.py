from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.accumulator import Accumulator
from buffers.dataset.fields import Fields, Scalar
from tests import tagged


class Recording:
    """Takes episodes, and checks them: `episodes` has (environment, steps) of each."""

    def __init__(self) -> None:
        self.episodes: list[tuple[int, list[int]]] = []

    def __call__(self, episode: dict[str, np.ndarray]) -> None:
        env, steps = int(episode["obs/state"][0, 0]), episode["obs/state"][:, 2].astype(int)
        for name, value in tagged.flatten(tagged.rows(env, 0, steps)).items():
            np.testing.assert_array_equal(episode[name], value, strict=True)
        self.episodes.append((env, steps.tolist()))


class Reference:
    """The same with one list an environment."""

    def __init__(self, num_envs: int, cut_after: int | None) -> None:
        self.open: list[list[int]] = [[] for _ in range(num_envs)]
        self.cut_after = cut_after
        self.episodes: list[tuple[int, list[int]]] = []

    def close(self, env: int) -> None:
        if self.open[env]:
            self.episodes.append((env, self.open[env]))
            self.open[env] = []

    def add(self, step: int, is_first: np.ndarray, is_last: np.ndarray, mask: np.ndarray) -> None:
        envs = np.flatnonzero(mask).tolist()
        for env in envs:
            if is_first[env]:
                self.close(env)
        for env in envs:
            self.open[env].append(step)
        for ends in (lambda env: is_last[env], lambda env: len(self.open[env]) == self.cut_after):
            for env in envs:
                if ends(env):
                    self.close(env)


def make(num_envs: int, cut_after: int | None = None, max_rows: int = 10_000) -> tuple[Accumulator, Recording]:
    recording = Recording()
    fields = Fields.from_rows(tagged.rows(np.zeros(num_envs, int), 0, 0), 1)
    return Accumulator(fields, num_envs, max_rows, cut_after, recording), recording


def rows(num_envs: int, step: int) -> list[np.ndarray]:
    return list(tagged.flatten(tagged.rows(np.arange(num_envs), 0, step)).values())


@pytest.mark.parametrize("many", [1, 64])  # Written as whole records, and field by field.
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_n_environments_give_the_episodes_of_the_reference(many: int, data: Any) -> None:
    # Few rows are written another way than many.
    num_envs = data.draw(st.integers(1, 5) | st.integers(8, 20))
    cut_after = data.draw(st.one_of(st.none(), st.integers(1, 9)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rates = data.draw(st.tuples(*[st.sampled_from([0.0, 0.02, 0.3, 1.0])] * 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("buffers.accumulator._MANY", many)
        accumulator, recording = make(num_envs, cut_after)
    reference = Reference(num_envs, cut_after)
    for step in range(data.draw(st.integers(0, 200))):
        is_first, is_last, not_mask = (rng.random(num_envs) < rate for rate in rates)
        reference.add(step, is_first, is_last, ~not_mask)
        accumulator.add_rows(
            rows(num_envs, step),
            is_first if is_first.any() else None,
            is_last if is_last.any() else None,
            ~not_mask if not_mask.any() else None,
        )
        assert recording.episodes == reference.episodes
        assert accumulator.num_open_rows == sum(map(len, reference.open))
        if rng.random() < 0.01:
            accumulator.flush()
            for env in range(num_envs):
                reference.close(env)
    accumulator.flush()
    for env in range(num_envs):
        reference.close(env)
    assert recording.episodes == reference.episodes


@pytest.mark.parametrize("num_envs", [1, 3])
def test_an_episode_that_outgrows_the_limit_is_refused(num_envs: int) -> None:
    accumulator, recording = make(num_envs, max_rows=70)
    for step in range(70):
        accumulator.add_rows(rows(num_envs, step))
    for _ in range(3):
        with pytest.raises(ValueError, match=r"reached 70 steps, the `capacity` .* `max_episode_length`"):
            accumulator.add_rows(rows(num_envs, 70))
        assert accumulator.num_open_rows == 70 * num_envs and not recording.episodes
    # Only environments that bring a row count, and one that ends makes room for its own.
    first = np.arange(num_envs) == 0
    accumulator.add_rows(rows(num_envs, 70), is_first=first, mask=first)
    assert recording.episodes == [(0, list(range(70)))]
    if num_envs > 1:
        with pytest.raises(ValueError, match="reached 70 steps"):
            accumulator.add_rows(rows(num_envs, 71), is_first=first)
        assert len(recording.episodes) == 1
    accumulator.flush()
    assert sum(len(steps) for _, steps in recording.episodes) == 70 * num_envs + 1


def test_memory_grows_with_the_longest_open_episode_alone() -> None:
    accumulator, _ = make(4, max_rows=1000)
    for step in range(500):
        accumulator.add_rows(rows(4, step), is_first=np.array([step % 50 == 0] * 4))
    assert accumulator._room == 64
    for step in range(100):
        accumulator.add_rows(rows(4, step), is_first=np.array([False, True, True, True]))
    assert accumulator._room == 256


def test_a_step_takes_equally_many_calls_for_any_number_of_environments() -> None:
    def count(num_envs: int) -> int:
        accumulator, _ = make(num_envs)
        row, done = rows(num_envs, 0), np.zeros(num_envs, bool)
        accumulator.add_rows(row, done)
        calls = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(profile)
        accumulator.add_rows(row, done)
        sys.setprofile(None)
        return calls

    assert count(1) == count(256)


def test_last_rows_of_some_open_episodes_can_be_amended() -> None:
    emitted = []
    fields = Fields.from_rows({"step": np.zeros(3, int), "flag": np.zeros(3, bool)}, 1)
    accumulator = Accumulator(fields, 3, 100, None, lambda episode: emitted.append(episode["flag"].tolist()))
    for step in range(2):
        accumulator.add_rows([np.full(3, step), np.zeros(3, bool)], mask=np.array([True, True, False]))
    mask = np.array([True, False, True])
    accumulator.amend("flag", True, mask)
    accumulator.flush(mask)
    assert emitted == [[False, True]]
    accumulator.amend("flag", True)
    accumulator.flush()
    assert emitted == [[False, True], [False, True]]


def test_a_row_that_is_not_brought_is_written_nowhere_else() -> None:
    # With 64 rows, five environments fill their room; behind it lie the rows of their neighbours.
    accumulator, recording = make(12)
    is_full = np.arange(12) < 5
    for step in range(64):
        accumulator.add_rows(rows(12, step), mask=is_full)
    accumulator.add_rows(rows(12, 64), mask=~is_full)
    accumulator.flush()
    assert recording.episodes == [(env, list(range(64)) if env < 5 else [64]) for env in range(12)]


def test_a_bfloat16_is_not_made_of_another_numbers_first_bytes() -> None:
    accumulator = Accumulator(Fields(reward=Scalar(dtype=torch.bfloat16)), 9, 100, None, len)
    with pytest.raises(ValueError, match="broadcast"):
        accumulator.add_rows([np.ones(9, np.float32)])
