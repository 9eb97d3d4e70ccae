from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.accumulator import Accumulator
from buffers.dataset.fields import Fields, Scalar
from tests import tagged

Emitted = list[tuple[int, list[int]]]


class Recording:
    """Takes episodes, and fails when told to: before it has one, or just after."""

    def __init__(self) -> None:
        self.episodes: Emitted = []
        self.failures: list[bool] = []
        self.has_taken = self.is_cut_off = False

    def __call__(self, episode: dict[str, np.ndarray]) -> None:
        if self.failures and self.failures.pop(0):
            raise OSError("no room")
        steps = episode["obs/state"][:, 2].astype(int).tolist()
        env = int(episode["obs/state"][0, 0])
        expected = tagged.flatten(tagged.rows(env, 0, np.array(steps)))
        for name, value in expected.items():
            np.testing.assert_array_equal(episode[name], value, strict=True)
        self.episodes.append((env, steps))
        self.has_taken = True
        if self.is_cut_off:
            raise KeyboardInterrupt


class Calling:
    """Takes episodes by a function."""

    def __init__(self, function: Callable[[dict[str, np.ndarray]], object]) -> None:
        self._function = function
        self.has_taken = False

    def __call__(self, episode: dict[str, np.ndarray]) -> None:
        self._function(episode)
        self.has_taken = True


class Reference:
    """The same with one list an environment."""

    def __init__(self, num_envs: int, cut_after: int | None) -> None:
        self.open: list[list[int]] = [[] for _ in range(num_envs)]
        self.cut_after = cut_after
        self.episodes: Emitted = []

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
        for env in envs:
            if is_last[env] or len(self.open[env]) == self.cut_after:
                self.close(env)


def make(num_envs: int, cut_after: int | None = None, max_rows: int = 10_000) -> tuple[Accumulator, Recording]:
    recording = Recording()
    fields = Fields.from_rows(tagged.rows(np.zeros(num_envs, int), 0, 0), 1)
    return Accumulator(fields, num_envs, max_rows, cut_after, recording), recording


def rows(num_envs: int, step: int) -> list[np.ndarray]:
    return list(tagged.flatten(tagged.rows(np.arange(num_envs), 0, step)).values())


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_n_environments_give_exactly_the_episodes_of_the_reference(data: Any) -> None:
    # Few rows are written another way than many.
    num_envs = data.draw(st.integers(1, 5) | st.integers(8, 20))
    cut_after = data.draw(st.one_of(st.none(), st.integers(1, 9)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rates = data.draw(st.tuples(*[st.sampled_from([0.0, 0.02, 0.3, 1.0])] * 3))
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


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_call_that_failed_in_the_middle_can_be_repeated(data: Any) -> None:
    num_envs = data.draw(st.integers(1, 4) | st.just(12))
    cut_after = data.draw(st.one_of(st.none(), st.integers(1, 5)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    accumulator, recording = make(num_envs, cut_after)
    reference = Reference(num_envs, cut_after)
    for step in range(60):
        is_first, is_last, mask = (rng.random(num_envs) < rate for rate in (0.2, 0.2, 0.8))
        reference.add(step, is_first, is_last, mask)
        recording.failures = (rng.random(6) < 0.4).tolist()
        while True:
            try:
                accumulator.add_rows(rows(num_envs, step), is_first, is_last, mask)
                break
            except OSError:
                pass
        recording.failures = []
        assert sorted(recording.episodes) == sorted(reference.episodes)


def test_a_call_that_failed_is_not_taken_for_another_that_follows() -> None:
    accumulator, recording = make(2)
    accumulator.add_rows(rows(2, 0))
    recording.failures = [False, True]
    with pytest.raises(OSError, match="no room"):
        accumulator.add_rows(rows(2, 1), is_last=np.array([True, True]))
    assert recording.episodes == [(0, [0, 1])]
    # Another row than that of the failed call: it is of environment 0's next episode.
    accumulator.add_rows(rows(2, 7))
    accumulator.flush()
    assert recording.episodes == [(0, [0, 1]), (0, [7]), (1, [0, 7])]


def test_a_single_row_that_could_not_be_handed_over_is_not_added() -> None:
    recording = Recording()
    fields = Fields.from_rows(tagged.rows(0, 0, 0), 0)
    accumulator = Accumulator(fields, 1, 100, None, recording)

    def add(step: int, is_last: bool) -> None:
        accumulator.add_row(list(tagged.flatten(tagged.rows(0, 0, step)).values()), False, is_last)

    add(0, False)
    recording.failures = [True]
    with pytest.raises(OSError, match="no room"):
        add(1, True)
    assert accumulator.num_open_rows == 1
    add(1, True)
    add(2, True)
    assert recording.episodes == [(0, [0, 1]), (0, [2])]


@pytest.mark.parametrize("num_envs", [1, 3, 12])
def test_an_episode_that_was_taken_when_the_call_was_cut_off_is_not_handed_over_again(num_envs: int) -> None:
    accumulator, recording = make(num_envs)
    is_last = np.ones(num_envs, bool)
    accumulator.add_rows(rows(num_envs, 0))
    recording.is_cut_off = True
    for num_taken in range(1, num_envs + 1):
        with pytest.raises(KeyboardInterrupt):
            accumulator.add_rows(rows(num_envs, 1), is_last=is_last)
        assert len(recording.episodes) == num_taken
    recording.is_cut_off = False
    accumulator.add_rows(rows(num_envs, 1), is_last=is_last)
    accumulator.add_rows(rows(num_envs, 2))
    recording.is_cut_off = True
    for _ in range(num_envs):
        with pytest.raises(KeyboardInterrupt):
            accumulator.flush()
    accumulator.flush()
    assert recording.episodes == [(env, steps) for steps in ([0, 1], [2]) for env in range(num_envs)]


def test_a_last_row_that_was_taken_when_the_call_was_cut_off_is_not_added_again() -> None:
    accumulator, recording = make(1)

    def add(step: int, is_last: bool) -> None:
        accumulator.add_row([row[0] for row in rows(1, step)], False, is_last)

    add(0, False)
    recording.is_cut_off = True
    with pytest.raises(KeyboardInterrupt):
        add(1, True)
    recording.is_cut_off = False
    add(1, True)
    for step in (2, 3):  # The same row may come again where nothing failed; so may another where something did.
        add(step, True)
        add(step, True)
    recording.is_cut_off = True
    with pytest.raises(KeyboardInterrupt):
        add(4, True)
    recording.is_cut_off = False
    add(5, False)
    add(6, True)
    assert [steps for _, steps in recording.episodes] == [[0, 1], [2], [2], [3], [3], [4], [5, 6]]


@pytest.mark.parametrize("num_envs", [1, 3])
def test_an_open_episode_that_outgrows_the_limit_is_refused_before_anything_changes(num_envs: int) -> None:
    accumulator, recording = make(num_envs, max_rows=70)
    for step in range(70):
        accumulator.add_rows(rows(num_envs, step))
    for _ in range(3):
        with pytest.raises(ValueError, match=r"reached 70 steps, the `capacity` .* `max_episode_length`"):
            accumulator.add_rows(rows(num_envs, 70))
        assert accumulator.num_open_rows == 70 * num_envs and not recording.episodes
    # Only those who bring a row count, and one that ends makes room for its own.
    first = np.arange(num_envs) == 0
    accumulator.add_rows(rows(num_envs, 70), is_first=first, mask=first)
    assert recording.episodes == [(0, list(range(70)))]
    if num_envs > 1:
        with pytest.raises(ValueError, match="reached 70 steps"):
            accumulator.add_rows(rows(num_envs, 71), is_first=first)
        assert len(recording.episodes) == 1
    accumulator.flush()
    assert sum(len(steps) for _, steps in recording.episodes) == 70 * num_envs + 1


def test_the_staging_memory_grows_with_the_longest_episode_alone() -> None:
    accumulator, _ = make(4, max_rows=1000)
    for step in range(500):
        accumulator.add_rows(rows(4, step), is_first=np.array([step % 50 == 0] * 4))
    assert accumulator._room == 64
    for step in range(100):
        accumulator.add_rows(rows(4, step), is_first=np.array([False, True, True, True]))
    assert accumulator._room == 256


def test_a_step_takes_the_same_number_of_calls_for_any_number_of_environments() -> None:
    import sys

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


def test_some_open_episodes_are_amended_and_handed_over_and_the_others_stay() -> None:
    emitted = []
    fields = Fields.from_rows({"step": np.zeros(3, int), "flag": np.zeros(3, bool)}, 1)
    taker = Calling(lambda episode: emitted.append(np.copy(episode["flag"]).tolist()))
    accumulator = Accumulator(fields, 3, 100, None, taker)
    for step in range(2):
        accumulator.add_rows([np.full(3, step), np.zeros(3, bool)], mask=np.array([True, True, False]))
    mask = np.array([True, False, True])
    accumulator.amend("flag", True, mask)
    accumulator.flush(mask)
    assert emitted == [[False, True]]
    accumulator.amend("flag", True)
    accumulator.flush()
    assert emitted == [[False, True], [False, True]]


def test_a_row_that_an_environment_does_not_bring_is_not_written_behind_the_end_of_its_room() -> None:
    accumulator, recording = make(12)
    is_full = np.arange(12) < 5
    for step in range(64):
        accumulator.add_rows(rows(12, step), mask=is_full)
    accumulator.add_rows(rows(12, 64), mask=~is_full)
    accumulator.flush()
    assert recording.episodes == [(env, list(range(64)) if env < 5 else [64]) for env in range(12)]


@pytest.mark.parametrize("num_envs", [2, 9])  # Written one by one, and all at once.
def test_a_repeated_call_is_known_by_what_it_stored_where_nothing_is_checked(num_envs: int) -> None:
    # Of another dtype, as only NO_CHECKS lets through: what is stored is float32.
    emitted: list[list[float]] = []
    failures = [1]

    def emit(episode: dict[str, np.ndarray]) -> None:
        if failures and len(emitted) == failures[0]:
            failures.clear()
            raise OSError("disk full")
        emitted.append(np.copy(episode["reward"]).tolist())

    accumulator = Accumulator(Fields(reward=Scalar()), num_envs, 100, None, Calling(emit))
    row, is_last = [np.arange(num_envs) / 10], np.ones(num_envs, np.bool_)
    with pytest.raises(OSError, match="disk full"):
        accumulator.add_rows(row, is_last=is_last)
    accumulator.add_rows(row, is_last=is_last)
    assert emitted == [[value] for value in row[0].astype(np.float32).tolist()]


def test_a_bfloat16_is_not_made_of_the_first_bytes_of_another_number() -> None:
    accumulator = Accumulator(Fields(reward=Scalar(dtype=torch.bfloat16)), 9, 100, None, Calling(len))
    with pytest.raises(ValueError, match="shape mismatch"):
        accumulator.add_rows([np.ones(9, np.float32)])
