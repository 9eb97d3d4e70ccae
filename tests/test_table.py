"""The table of episodes against plain lists of windows."""

from __future__ import annotations

import copy
import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.table import EpisodeTable

# append a length, remove the episode at a position (modulo the number that live), extend by many, retire some
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.just("remove"), st.integers(0, 5)),
        st.tuples(st.just("extend"), st.integers(0, 90)),
        st.tuples(st.just("retire"), st.integers(0, 3)),
        st.tuples(st.sampled_from(["copy", "pickle", "show"]), st.none()),
    ),
    max_size=300,
)


def shown(table: EpisodeTable) -> EpisodeTable:
    """Another, which shows what there was."""
    other = EpisodeTable()
    other.show(table)
    return other


COPIED = {"copy": copy.deepcopy, "pickle": lambda table: pickle.loads(pickle.dumps(table)), "show": shown}


def window_list(live: list[tuple[int, int, int]], length: int) -> list[tuple[int, int, int, int]]:
    """(start, step, id, rows) of every window: the reference."""
    return [(start + s, s, i, rows) for start, rows, i in live for s in range(rows - length + 1)]


def drawn_list(table: EpisodeTable, length: int, num: int) -> list[tuple[int, ...]]:
    counted = table.count_windows(length)
    assert counted.num == num
    found = table.windows_of(counted, np.arange(num), length)
    return list(zip(*(v.tolist() for v in (found.start, found.step, found.episode, found.episode_length)), strict=True))


def with_no_cuts(episodes: list[tuple[int, int, int]]) -> np.ndarray:
    """The rows of a table, int64 `(n, 4)`."""
    return np.pad(np.array(episodes, np.int64).reshape(-1, 3), ((0, 0), (0, 1)))


@given(OPERATIONS, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_integers_map_to_windows_one_to_one(operations, lengths, every) -> None:
    table, live, start, number = EpisodeTable(), [], 0, 0
    original, before = EpisodeTable(), []
    for i, (operation, value) in enumerate(operations):
        if operation == "append":
            assert table.append(value) == number
            live.append((start, value, number))
            start, number = start + value, number + 1
        elif operation == "extend":  # By episodes of 1 to 3 rows, with gaps in ids and steps.
            rows = [(start + 5 * k, 1 + k % 3, number + 2 * k) for k in range(value)]
            table.extend(with_no_cuts(rows))
            live += rows
            if rows:
                start, number = rows[-1][0] + rows[-1][1], rows[-1][2] + 1
        elif operation == "retire" and live:
            tail = live[min(value, len(live) - 1)][0]
            table.retire(tail)
            live = [episode for episode in live if episode[0] >= tail]
        elif operation in COPIED:
            other, before = COPIED[operation](table), live.copy()
            original, table = (other, table) if operation == "show" else (table, other)
        elif live:
            position = value % len(live)
            table.remove(position)
            live.pop(position)
        if i % every == 0:  # Otherwise the cumulated counts fall behind and have more to catch up with.
            for length in lengths:
                expected = window_list(live, length)
                if expected:
                    assert drawn_list(table, length, len(expected)) == expected
    assert original.rows[:, :3].tolist() == list(map(list, before)), "what was copied or shown stays as it was"
    if before:
        assert drawn_list(original, 1, len(window_list(before, 1))) == window_list(before, 1)
    assert len(table) == len(live)
    assert list(zip(table.starts.tolist(), table.lengths.tolist(), table.ids.tolist(), strict=True)) == live
    assert table.num_steps == sum(rows for _, rows, _ in live)
    for position, (_, _, episode_id) in enumerate(live):
        assert table.position(episode_id) == position
    assert table.position(number) is None and table.position(-1) is None


def test_an_ever_changing_length_leaves_a_bounded_number_of_arrays() -> None:
    table = EpisodeTable()
    table.append(200)
    for length in range(1, 100):
        table.count_windows(length)
    assert len(table._cumulations) <= 8
    assert table.count_windows(1).num == 200


@given(st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(0, 40)), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_inserted_episodes_are_drawn_like_appended_ones(first, second, length, removed) -> None:
    table = EpisodeTable()
    live: list[tuple[int, int, int]] = []
    for numbers in (sorted(first), sorted(second - first)):
        if numbers:
            episodes = [(10 * number, 1 + number % 7, number) for number in numbers]
            table.extend(with_no_cuts(episodes))
            live = sorted([*live, *episodes])
            table.count_windows(length)
        for _ in range(min(removed, len(live) - 1)):
            table.remove(0)
            live.pop(0)
    assert table.num_steps == sum(rows for _, rows, _ in live)
    assert (table.next_id, table.next_start) == (live[-1][2] + 1, live[-1][0] + live[-1][1])
    expected = window_list(live, length)
    if expected:
        assert drawn_list(table, length, len(expected)) == expected
    assert table.append(3) == live[-1][2] + 1


def test_windows_among_very_unequal_episodes_are_found() -> None:
    rng = np.random.default_rng(0)
    table = EpisodeTable()
    live = []
    for number in range(3000):  # Long ones among runs of short ones: many episodes in one bucket of the guide.
        length = 4000 if number % 1000 == 0 else int(rng.integers(1, 4))
        live.append((table.next_start, length, number))
        table.append(length)
        if number > 1500:
            table.remove(0)
            live.pop(0)
        if number % 100 == 0:
            windows = table.count_windows(2)
            r = rng.integers(windows.num, size=500)
            drawn = table.windows_of(windows, r, 2)
            expected = window_list(live, 2)
            assert [expected[i][:3] for i in r] == list(
                zip(drawn.start.tolist(), drawn.step.tolist(), drawn.episode.tolist(), strict=True)
            )
