"""The table by which a writer tells readers what lives: with the other side at work at every fence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.sharing import PublishedTable, SharedArrays, published_table
from buffers.table import EpisodeTable
from tests import reading

Rows = list[tuple[int, int, int, int]]
# Small, so that the tail moves all the time.
SIZE = 14


def rows_of(table: EpisodeTable) -> Rows:
    assert table.num_steps == int(table.lengths.sum())
    return [tuple(row) for row in table.rows.tolist()]  # type: ignore[misc]


class Writer:
    """A published table and what is in it, with all states that there have been."""

    def __init__(self, size: int = SIZE) -> None:
        self.size, self.memory = size, SharedArrays(PublishedTable.layout(size))
        self.published, self.table = PublishedTable(self.memory), EpisodeTable()
        self.states: list[Rows] = [[]]

    def add(self, length: int) -> None:
        if len(self.table) >= self.size // 2 - 1:
            self.remove(0)
        self.table.append(length, cut=length % 4)
        self.published.add(self.table.rows[-1].tolist(), self.table)
        self.states.append(rows_of(self.table))

    def remove(self, position: int) -> None:
        if len(self.table):
            position %= len(self.table)
            episode_id = self.table.episode(position)[2]
            self.table.remove(position)
            self.published.remove(episode_id, self.table)
            self.states.append(rows_of(self.table))

    def retire_oldest(self) -> None:
        """What a ring does instead of `remove`."""
        if len(self.table):
            start, length, *_ = self.table.episode(0)
            self.published.retire(start + length)
            self.table.remove(0)
            self.states.append(rows_of(self.table))


class Reader:
    def __init__(self, writer: Writer) -> None:
        self.published, self.table = PublishedTable(writer.memory), EpisodeTable()

    def follow(self) -> Rows:
        before = set(self.table.ids.tolist())
        gone = self.published.follow(self.table)
        after = set(self.table.ids.tolist())
        assert set(gone) & after == set(), "what has gone does not live"
        assert before - after >= set(gone) & before
        return rows_of(self.table)


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

    patch.setattr(published_table, "fence", fence)
    patch.setattr(published_table, "store_fence", fence)  # As on a machine that needs all of them.


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
def test_a_follower_has_the_writers_table_whenever_it_looks(operations, every) -> None:
    writer = Writer()
    often, seldom = Reader(writer), Reader(writer)
    for n, operation in enumerate(operations):
        perform(writer, [operation])
        assert often.follow() == writer.states[-1]
        if n % every == 0:
            assert seldom.follow() == writer.states[-1]
    late = Reader(writer)
    assert late.follow() == seldom.follow() == writer.states[-1]
    if operations and len(writer.table) and writer.table.ids[-1] == writer.table.next_id - 1:
        assert late.table.next_id == writer.table.next_id and late.table.next_start == writer.table.next_start


def look_while_writing(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Readers look at each moment that a writer could be killed, and see a state before or behind the change."""
    rng = np.random.default_rng(seed)
    writer = Writer()
    known, stale = Reader(writer), Reader(writer)

    def look() -> None:
        # What the writer is about to tell is in its own table already.
        for reader in (known, Reader(writer), *([stale] if rng.random() < 0.02 else [])):
            seen = reader.follow()
            assert seen in (*writer.states[-1:], rows_of(writer.table)), "neither before nor behind the change"

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
    """A writer changes much at each step of a reader, which sees a state that there was meanwhile."""
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("play", [look_while_writing, write_while_looking])
def test_no_reader_sees_a_state_that_never_was(play, seed, monkeypatch) -> None:
    play(monkeypatch, seed)


# Each line of the protocol has a mutant that leaves it out.


def head_before_row(patch: pytest.MonkeyPatch) -> None:
    def append(self: PublishedTable, *row: int) -> None:
        head = self._head[0]
        self._head[0] = head + 1
        published_table.store_fence()
        self._rows[head % self._size] = row

    patch.setattr(PublishedTable, "_append", append)


def tail_before_the_moved_row(patch: pytest.MonkeyPatch) -> None:
    def move(self: PublishedTable, table: EpisodeTable) -> None:
        for _ in range(self._size):
            row = self._rows[self._tail[0] % self._size].tolist()
            self._tail[0] += 1
            published_table.fence()
            if not (row[1] > 0 and table.position(row[2]) is not None):
                return
            self._append(*row)

    patch.setattr(PublishedTable, "_move_tail", move)


def live_rows_dropped(patch: pytest.MonkeyPatch) -> None:
    def move(self: PublishedTable, table: EpisodeTable) -> None:
        self._tail[0] += 1

    patch.setattr(PublishedTable, "_move_tail", move)


def no_second_look_at_the_tail(patch: pytest.MonkeyPatch) -> None:
    def copied(self: PublishedTable, begin: int, end: int) -> np.ndarray:
        published_table.fence()
        rows = self._rows.take(np.arange(begin, end) % self._size, axis=0)
        published_table.fence()
        return rows

    patch.setattr(PublishedTable, "_copied", copied)


def no_second_read_after_the_tail_has_moved(patch: pytest.MonkeyPatch) -> None:
    def read_all(self: PublishedTable, table: EpisodeTable) -> list[int]:
        tail, head = self._tail[0], self._head[0]
        published_table.fence()
        table.replace(np.empty((0, 4), np.int64))
        rows = self._rows.take(np.arange(tail, head) % self._size, axis=0)
        came = rows[np.unique(rows[:, 2], return_index=True)[1]]
        table.replace(came[(came[:, 1] > 0) & ~np.isin(came[:, 2], rows[rows[:, 1] == 0, 2])])
        self._num_read = head
        return []

    patch.setattr(PublishedTable, "_read_all", read_all)


@pytest.mark.parametrize(
    "mutant",
    [
        head_before_row,
        tail_before_the_moved_row,
        live_rows_dropped,
        no_second_look_at_the_tail,
        no_second_read_after_the_tail_has_moved,
    ],
)
def test_every_mutant_shows_a_state_that_never_was(mutant, monkeypatch) -> None:
    mutant(monkeypatch)
    for play in (look_while_writing, write_while_looking):
        for seed in range(8):
            try:
                play(monkeypatch, seed)
            except AssertionError:
                return
    pytest.fail("The mutant was not caught.")


def test_too_many_live_episodes_are_an_error() -> None:
    published, table = PublishedTable(SharedArrays(PublishedTable.layout(6))), EpisodeTable()
    with pytest.raises(RuntimeError, match="can be shown 4 live episodes"):
        for _ in range(6):
            published.add((table.next_start, 1, table.append(1), 0), table)


def test_a_reader_is_told_of_what_is_coming() -> None:
    writer = Writer()
    writer.add(3)
    reader = Reader(writer)
    assert reader.published.has_news
    reader.follow()
    assert not reader.published.has_news
    writer.published.announce()
    assert reader.published.has_news
    writer.retire_oldest()
    assert reader.follow() == [] and reader.published.has_news
    writer.add(4)
    assert reader.published.has_news
    assert reader.follow() == writer.states[-1] and not reader.published.has_news


def test_readers_know_that_the_writer_has_ended() -> None:
    memory = SharedArrays(PublishedTable.layout(10))
    reader = PublishedTable(reading.reader_of(memory))
    assert not reader.has_ended
    PublishedTable(memory).end()
    assert reader.has_ended
