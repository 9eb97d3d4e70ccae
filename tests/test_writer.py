"""EpisodeWriter over a sink that fails: nothing is lost, doubled, or merged over a boundary."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import Recorder, ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.writer import EpisodeWriter
from tests import tagged
from tests.logged_game import FlakyRing, Games, assert_recorded, play, recorded, stored


def first_of(tree: Any) -> Any:
    return {name: first_of(value) for name, value in tree.items()} if isinstance(tree, dict) else tree[0]


class Reference:
    """A list of rows an environment, and the episodes in the order in which they end."""

    def __init__(self, num_envs: int, cut_after: int | None, overlap: int) -> None:
        self.open: list[list[int]] = [[] for _ in range(num_envs)]
        self.number, self.step = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.cut_after, self.overlap = cut_after, overlap
        self.cut = [0] * num_envs
        self.episodes: list[tuple[int, int, list[int]]] = []
        self.cuts: list[int] = []

    def close(self, env: int, goes_on: bool = False) -> None:
        if self.open[env]:
            self.episodes.append((env, int(self.number[env]), self.open[env]))
            self.cuts.append(self.cut[env] | goes_on)
        self.open[env] = self.open[env][-self.overlap :] if goes_on and self.overlap else []
        self.cut[env] = 4 * len(self.open[env]) + 2 if goes_on else 0
        if not goes_on:
            self.number[env], self.step[env] = self.number[env] + 1, 0

    def add(self, is_first: np.ndarray, is_last: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        """Take a row of each environment under the mask, and return them."""
        envs = np.flatnonzero(mask).tolist()
        for env in envs:
            if len(self.open[env]) == self.cut_after and not is_first[env]:
                self.close(env, goes_on=True)
        for env in envs:
            if is_first[env]:
                self.close(env)
        rows = tagged.rows(np.arange(len(mask)), self.number, self.step)
        for env in envs:
            self.open[env].append(int(self.step[env]))
            self.step[env] += 1
        for env in envs:
            if is_last[env]:
                self.close(env)
        return rows


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_failing_sink_gets_the_episodes_of_the_reference(data: Any) -> None:
    num_envs = data.draw(st.integers(1, 4) | st.sampled_from([8, 70]))
    is_single = num_envs == 1 and data.draw(st.booleans())
    cut_after = data.draw(st.one_of(st.none(), st.integers(1, 7) | st.sampled_from([63, 65])))
    overlap = data.draw(st.integers(0, cut_after - 1)) if cut_after else 0
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ring = FlakyRing(20_000, rng, data.draw(st.sampled_from([0.0, 0.3, 0.9])))
    told: list[int] = []
    writer = EpisodeWriter(
        ring, num_envs, cut_after, overlap, on_stored=lambda env, episode, cut: told.append(len(episode["reward"]))
    )
    reference = Reference(num_envs, cut_after, overlap)
    rates = data.draw(st.tuples(*[st.sampled_from([0.0, 0.1, 0.5])] * 3))
    for _ in range(data.draw(st.integers(1, 20) | st.just(20 if num_envs > 8 else 70))):
        is_first, is_last, not_mask = (rng.random(num_envs) < rate for rate in rates)
        rows, flags = reference.add(is_first, is_last, ~not_mask), (is_first, is_last, ~not_mask)
        if is_single:
            rows, flags = first_of(rows), tuple(bool(flag[0]) for flag in flags)
        num_failed = ring.num_failed
        # The mask of one environment is what says that its rows have an axis.
        defaults = (0, 0, 1 if num_envs > 1 else -1)
        flags = [None if np.all(flag == default) else flag for flag, default in zip(flags, defaults, strict=True)]
        try:
            writer.add(rows, is_first=flags[0], is_last=flags[1], mask=flags[2])
        except OSError:
            assert ring.num_failed > num_failed
        else:
            assert ring.num_failed == num_failed and ring.num_episodes == len(reference.episodes)
        assert writer.num_open_rows == sum(map(len, reference.open))
    for env in range(num_envs):
        reference.close(env)
    with contextlib.suppress(OSError):
        writer.close()
    assert writer.num_open_rows == 0 and writer.is_closed == (ring.num_episodes == len(reference.episodes))
    ring.rate = 0.0
    writer.close()
    assert stored(ring) == reference.episodes and told == ring.episode_lengths
    assert ring.table.rows[:, 3].tolist() == reference.cuts


@pytest.mark.parametrize("ends_by", ["add_step", "is_last"])
def test_an_equal_row_after_a_failure_is_a_row_of_its_own(ends_by: str) -> None:
    ring = FlakyRing(100, fails_at={1})
    writer = EpisodeWriter(ring, num_envs=2)
    row, both = {"x": np.zeros(2, np.float32)}, np.ones(2, bool)
    add = writer.add_step if ends_by == "add_step" else lambda row, ends: writer.add(row, is_last=ends)
    add(row, ~both)
    with pytest.raises(OSError, match="disk full"):
        add(row, both)
    assert ring.num_episodes == 1
    add(row, ~both)
    assert ring.num_episodes == 2, "tried again before the row was taken"
    add(row, both)
    writer.flush()
    assert ring.episode_lengths == ([1, 1, 2, 2, 1, 1] if ends_by == "add_step" else [2, 2, 2, 2])


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("has_waited", [False, True])
def test_an_episode_that_ctrl_c_cuts_off_comes_once_at_most(is_stored: bool, has_waited: bool) -> None:
    class CutOff(FlakyRing):
        def add(self, episode: dict[str, np.ndarray], cut: int = 0, info: Any = None) -> int:
            is_cut = self.num_calls == 1 + has_waited
            if is_cut and not is_stored:
                self.num_calls += 1
                raise KeyboardInterrupt
            added = super().add(episode, cut, info)
            if is_cut:
                raise KeyboardInterrupt
            return added

    ring = CutOff(100, fails_at={1} if has_waited else ())
    writer = EpisodeWriter(ring, num_envs=2)
    is_last = np.ones(2, bool)
    if has_waited:
        with pytest.raises(OSError, match="disk full"):
            writer.add(tagged.rows(np.arange(2), 0, 0), is_last=is_last)
    with pytest.raises(KeyboardInterrupt):
        writer.flush() if has_waited else writer.add(tagged.rows(np.arange(2), 0, 0), is_last=is_last)
    writer.truncate(np.ones(2, bool))
    for number in (1, 2):
        writer.add(tagged.rows(np.arange(2), number, 0), is_last=is_last)
    expected = [(0, 0, [0]), *[(1, 0, [0])] * is_stored]
    assert stored(ring) == expected + [(env, number, [0]) for number in (1, 2) for env in (0, 1)]


def test_bad_rows_change_nothing_while_an_episode_waits() -> None:
    ring = FlakyRing(6, fails_at={0, 1})
    writer = EpisodeWriter(ring, num_envs=1)
    with pytest.raises(OSError, match="disk full"):
        writer.add_step(tagged.rows(0, 0, 0), True)
    with pytest.raises(ValueError, match="unexpected"):
        writer.add_step({"y": 1.0}, True)
    assert ring.num_calls == 1 and writer.num_open_rows == 0
    with pytest.raises(OSError, match="disk full"):
        writer.add_step(tagged.rows(0, 1, 0), False)
    for step in range(1, 6):
        writer.add_step(tagged.rows(0, 1, step), False)
    with pytest.raises(ValueError, match="reached 6 steps"):
        writer.add_step(tagged.rows(0, 1, 6), False)
    writer.flush()
    assert stored(ring) == [(0, 1, list(range(6)))], "the older episode had to leave"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros(2)}, "`x` has dtype float64"),
        ({"x": np.zeros((2, 1), np.float32)}, r"`x` .* shape \(2, 1\)"),
        ({"z": np.zeros(2)}, r"unexpected \['z'\]"),
    ],
)
def test_flat_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    writer = EpisodeWriter(RingBufferDataset(10))
    row, flags = {"x": np.zeros(2, np.float32), "y": np.zeros((2, 3))}, np.zeros(2, bool)
    writer.add_step(row, flags)
    with pytest.raises(ValueError, match=message):
        writer.add_step({**row, **changes}, flags)
    assert writer.num_open_rows == 2


def test_a_closed_writer_takes_nothing() -> None:
    writer = EpisodeWriter(RingBufferDataset(10), num_envs=1)
    assert (writer.fields, writer.num_envs) == (None, 1)
    recorder = Recorder(writer, None, "disabled")
    recorder.reset(0.0)
    recorder.step(1, 0.5, 1.0, False, False)
    writer.close()
    writer.close()
    adds = (lambda: writer.add_step({"x": 1.0}, False), lambda: recorder.step(1, 0.5, 1.0, False, False))
    for use in (writer.flush, lambda: recorder.reset(0.0), *adds):
        with pytest.raises(RuntimeError, match=r"The writer is closed\."):
            use()
    assert writer.sink.episode_lengths == [2]


def test_a_recorders_step_raises_what_the_sink_raised() -> None:
    ring = FlakyRing(100, fails_at={0, 1})
    recorder = Recorder(ReplayBuffer(ring, 4), None, "disabled")
    recorder.reset(0.0)
    with pytest.raises(OSError, match="disk full"):
        recorder.step(1, 0.5, 1.0, True, False)
    with pytest.raises(OSError, match="disk full"):
        recorder.reset(0.0)
    recorder.step(1, 0.5, 1.0, True, False)
    assert ring.episode_lengths == [2, 2]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["next_step", "same_step", "disabled"]), st.integers(1, 5), st.integers(0, 2**32), st.booleans())
def test_recorders_steps_are_taken_whole_when_the_sink_fails(mode: str, num_envs: int, seed: int, front: bool) -> None:
    ring = FlakyRing(20_000, np.random.default_rng(seed), 0.4)
    buffer = ReplayBuffer(ring, 4, seed=0) if front else EpisodeWriter(ring)
    recorder = Recorder(buffer, num_envs, mode)
    games = Games(num_envs, mode)
    some = np.arange(num_envs) % 2 == 0
    play(games, recorder, 30, {7: None, 8: some, 20: ~some}, ignored=OSError)
    ring.rate = 0.0
    recorder.reset(games.reset())
    assert_recorded(recorded(ring), games.logs)


def test_a_source_that_takes_no_episodes_can_be_drawn_from() -> None:
    ring = RingBufferDataset(20)
    ring.add_episode(tagged.episode(5, 0))
    with ReplayBuffer(MixtureDataset([ring], [1.0]), 4, 2) as buffer:
        assert len(tagged.origins(buffer.sample())) == 4 and buffer.num_episodes == 1
        assert buffer.fields == ring.fields and buffer.stats()["num_timesteps"] == 5
        buffer.flush()
        message = "A MixtureDataset holds no episodes of its own: add to one of its members, or evict from it."
        uses = (
            lambda: buffer.add_step(tagged.rows(0, 0, 0), False),
            lambda: buffer.add(tagged.rows(0, 0, 0)),
            lambda: buffer.add_episode(tagged.episode(2, 0)),
            lambda: Recorder(buffer, 1, "disabled"),
        )
        for use in uses:
            with pytest.raises(RuntimeError, match=message):
                use()
