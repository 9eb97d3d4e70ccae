"""The log by which a writer tells readers what lives: step by step, with the other side at work at every fence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import shared
from buffers.dataset.index import EpisodeIndex
from buffers.dataset.shared import EpisodeLog, SharedArrays

Rows = list[tuple[int, int, int]]


def rows_of(index: EpisodeIndex) -> Rows:
    assert index.num_steps == int(index.lengths.sum())
    return [tuple(row) for row in index.rows.tolist()]  # type: ignore[misc]


class Writer:
    """A log and what is in it, with all states that there have been."""

    def __init__(self, capacity: int = 400) -> None:
        self.memory = SharedArrays(EpisodeLog.layout(capacity))
        self.log, self.index = EpisodeLog(self.memory), EpisodeIndex()
        self.states: list[Rows] = [[]]

    def add(self, length: int) -> None:
        self.log.add(self.index.next_start, length, self.index.next_id, self.index)
        self.index.append(length)
        self.states.append(rows_of(self.index))

    def remove(self, position: int) -> None:
        if len(self.index):
            position %= len(self.index)
            _, _, episode_id = self.index.episode(position)
            self.index.remove(position)
            self.log.remove(episode_id, self.index)
            self.states.append(rows_of(self.index))

    def retire_oldest(self) -> None:
        """What a ring does instead of `remove`."""
        if len(self.index):
            start, length, _ = self.index.episode(0)
            self.log.retire(start + length)
            self.index.remove(0)
            self.states.append(rows_of(self.index))


class Reader:
    def __init__(self, writer: Writer) -> None:
        self.log, self.index = EpisodeLog(writer.memory), EpisodeIndex()

    def follow(self) -> Rows:
        before = set(self.index.ids.tolist())
        gone = self.log.follow(self.index)
        after = set(self.index.ids.tolist())
        assert set(gone) & after == set(), "what has gone does not live"
        assert before - after >= set(gone) & before
        return rows_of(self.index)


@pytest.fixture(autouse=True)
def small_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the writer changes from one half to the other all the time."""
    monkeypatch.setattr(shared, "_MIN_ROOM", 4)


def at_every_fence(patch: pytest.MonkeyPatch, function: Callable[[], None]) -> None:
    """Call a function at each fence of the other side, but not at its own."""
    is_inside, num_inside = False, 0

    def fence() -> None:
        nonlocal is_inside, num_inside
        if is_inside:
            num_inside += 1
            assert num_inside < 10_000, "one side waits for the other"
            return
        is_inside, num_inside = True, 0
        try:
            function()
        finally:
            is_inside = False

    patch.setattr(shared, "fence", fence)
    # As on a machine that needs all of them.
    patch.setattr(shared, "_WORDS_STAY_IN_ORDER", False)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 9)),
        st.tuples(st.just("remove"), st.integers(0, 50)),
        st.tuples(st.just("retire_oldest"), st.none()),
    ),
    max_size=120,
)


def perform(writer: Writer, operations: list[tuple[str, Any]]) -> None:
    for name, value in operations:
        getattr(writer, name)(*([] if value is None else [value]))


@given(OPERATIONS, st.integers(1, 40))
@settings(max_examples=100)
def test_a_follower_has_the_index_of_the_writer_whenever_it_looks(operations, every) -> None:
    writer = Writer()
    often, seldom = Reader(writer), Reader(writer)
    for n, operation in enumerate(operations):
        perform(writer, [operation])
        assert often.follow() == writer.states[-1]
        if n % every == 0:
            assert seldom.follow() == writer.states[-1]
    late = Reader(writer)
    assert late.follow() == seldom.follow() == writer.states[-1]
    if operations and len(writer.index):
        assert late.index.next_id == writer.index.next_id and late.index.next_start == writer.index.next_start


def look_while_writing(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Readers look at each moment that a writer could be killed, and see a state before or behind the change."""
    rng = np.random.default_rng(seed)
    writer = Writer()
    known, stale = Reader(writer), Reader(writer)

    def look() -> None:
        # What the writer is about to be done with is in its index already, or not yet.
        for reader in (known, Reader(writer), *([stale] if rng.random() < 0.02 else [])):
            seen = reader.follow()
            assert seen in (*writer.states[-1:], rows_of(writer.index)), "neither before nor behind the change"

    with patch.context() as inner:
        at_every_fence(inner, look)
        for _ in range(300):
            kind = rng.integers(8)
            if kind < 4:
                writer.add(int(rng.integers(1, 9)))
            else:
                writer.remove(int(rng.integers(50)) if kind == 4 else 0)
    assert Reader(writer).follow() == known.follow() == stale.follow() == writer.states[-1]


def write_while_looking(patch: pytest.MonkeyPatch, seed: int) -> None:
    """A writer changes much at each step of a reader, who sees a state that there was meanwhile."""
    rng = np.random.default_rng(seed)
    writer = Writer()
    reader = Reader(writer)

    def write() -> None:
        for _ in range(int(rng.choice([0, 0, 0, 1, 3, 30]))):
            if rng.random() < 0.55:
                writer.add(int(rng.integers(1, 9)))
            else:
                writer.remove(int(rng.integers(50)))

    for _ in range(200):
        write()
        num_before = len(writer.states)
        with patch.context() as inner:
            at_every_fence(inner, write)
            seen = reader.follow()
        assert seen in writer.states[num_before - 1 :], "a state that there never was"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("play", [look_while_writing, write_while_looking])
def test_whoever_is_interrupted_nobody_sees_a_state_that_never_was(play, seed, monkeypatch) -> None:
    play(monkeypatch, seed)


# Each line of the protocol has a mutant that leaves it out.


def last_before_row(patch: pytest.MonkeyPatch) -> None:
    def add(self: EpisodeLog, start: int, length: int, episode_id: int, index: EpisodeIndex) -> None:
        _, last, header = self._halves[self._version[0] & 1]
        if last[0] == header[shared._ROOM]:
            self._restate(index, int(index.ids.searchsorted(episode_id)) if length else len(index))
            _, last, header = self._halves[self._version[0] & 1]
        num = last[0]
        last[0] = num + 1
        shared.fence()
        self._rows_of(self._version[0])[num] = start, length, episode_id

    patch.setattr(EpisodeLog, "add", add)


def flip_before_rows(patch: pytest.MonkeyPatch) -> None:
    restate = EpisodeLog._restate

    def early(self: EpisodeLog, index: EpisodeIndex, num_live: int) -> None:
        self._version[0] += 1
        shared.fence()
        self._version[0] -= 1
        restate(self, index, num_live)

    patch.setattr(EpisodeLog, "_restate", early)


def no_look_at_the_owner(patch: pytest.MonkeyPatch) -> None:
    def trusting(self: EpisodeLog, version: int, begin: int) -> np.ndarray:
        _, last, _ = self._halves[version & 1]
        num = last[0]
        shared.fence()
        news = self._rows_of(version)[begin:num].copy()
        shared.fence()
        return news

    patch.setattr(EpisodeLog, "_rows", trusting)


def no_new_owner(patch: pytest.MonkeyPatch) -> None:
    def restate(self: EpisodeLog, index: EpisodeIndex, num_live: int) -> None:
        version = self._version[0] + 1
        _, last, header = self._halves[version & 1]
        rows = self._rows_of(version)
        rows[:num_live] = index.rows[:num_live]
        room = min(max(shared._MIN_ROOM, 2 * num_live), len(rows))
        for word, value in enumerate((room, num_live, index.next_start, index.next_id), 1):
            header[word] = value
        last[0] = num_live
        shared.fence()
        header[0] = version
        self._version[0] = version

    patch.setattr(EpisodeLog, "_restate", restate)


@pytest.mark.parametrize("mutant", [last_before_row, flip_before_rows, no_look_at_the_owner, no_new_owner])
def test_every_mutant_of_the_log_shows_a_state_that_never_was(mutant, monkeypatch) -> None:
    mutant(monkeypatch)
    for play in (look_while_writing, write_while_looking):
        for seed in range(20):
            try:
                play(monkeypatch, seed)
            except AssertionError:
                return
    pytest.fail("The mutant was not caught.")


def test_a_log_stays_as_small_as_what_lives() -> None:
    writer = Writer(capacity=100_000)
    for number in range(20_000):
        writer.log.add(writer.index.next_start, 2, writer.index.next_id, writer.index)
        writer.index.append(2)
        if number >= 100:
            writer.index.remove(0)
            writer.log.remove(number - 100, writer.index)
    touched = int((writer.memory["log/rows"] != 0).any(-1).sum())
    assert touched <= 2 * (2 * 101 + 4)
