"""Every episode that a writer has taken is in exactly one shard, whatever goes wrong in between."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.fields import Fields
from buffers.remote.window import Kept, Window
from tests.remote.simulated import Simulated, episode

FIELDS = Fields.from_episode(episode(0))
SIZE = sum(values.nbytes for values in episode(4).values())


def kept(number: int) -> Kept:
    rows = episode(number)
    return Kept(rows, len(rows["step"]), 0, None, sum(values.nbytes for values in rows.values()))


def adding(window: Window, num: int) -> Iterator[None]:
    """Put so many episodes as there is room, and stop after each moment."""
    added = 0
    while added < num:
        if window.has_room(kept(added).num_bytes):
            window.put(kept(added))
            added += 1
        window.advance(0.05)
        yield


def settle(world: Simulated, window: Window, seconds: float = 60.0) -> None:
    """Let nothing go wrong any more, until all is stored."""
    world.drop = world.double = world.delay = world.fail = 0.0
    for number in range(world.num_shards):
        world.go_on(number)
        if world.shards[number] is None:
            world.start(number)
    end = world.time + seconds
    # A shard that died with what it had stored is found out by the next question to it.
    quiet = 0.0
    while quiet < 3.0:
        assert world.time < end, window.why_full()
        window.advance(0.1)
        world.time += 0.1
        quiet = quiet + 0.1 if not window.num_unstored else 0.0


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 8)),
        st.tuples(st.just("wait"), st.integers(1, 300)),
        st.tuples(st.sampled_from(["kill", "start", "stop", "go_on", "save"]), st.integers(0, 2)),
    ),
    max_size=40,
)


@given(EVENTS, st.integers(0, 2**32), st.booleans(), st.sampled_from([30, 100, 10**6]))
@settings(max_examples=100)
def test_each_episode_is_in_exactly_one_shard(
    events: list[tuple[str, int]], seed: int, is_faulty: bool, pack_bytes: int
) -> None:
    chances: dict[str, Any] = dict.fromkeys(("drop", "double", "delay", "fail"), 0.1 if is_faulty else 0.0)
    with tempfile.TemporaryDirectory() as directory:
        world = Simulated(3, Path(directory), seed, **chances)
        window = Window(world, "writer", FIELDS, num_bytes=100 * SIZE, pack_bytes=pack_bytes)
        added = 0
        for event, value in events:
            if event == "add":
                for _ in range(value):
                    if window.has_room(kept(added).num_bytes):
                        window.put(kept(added))
                        added += 1
            elif event == "wait":
                for _ in range(value // 10 + 1):
                    world.time += 0.1
                    window.advance(0.0)
            elif event == "start" and world.shards[value] is None:
                world.start(value)
            elif event == "save" and world.shards[value] is not None:
                world.shards[value].save()  # type: ignore[union-attr]
            elif event in ("kill", "stop", "go_on"):
                getattr(world, event)(value)
            window.advance(0.02)
        settle(world, window)
        assert sorted(number for shard in world.numbers() for number in shard) == list(range(added))
        # And each shard has its own in the order in which they were added, once nothing is lost.
        for shard in world.numbers():
            assert shard == sorted(shard)
        world.close()


def test_what_is_saved_is_forgotten_and_what_is_only_stored_is_kept(tmp_path: Path) -> None:
    world = Simulated(1, tmp_path, save_every=1e9)
    window = Window(world, "writer", FIELDS)
    for number in range(10):
        window.put(kept(number))
    settle(world, window)
    assert (window.num_unstored, window.num_unsaved) == (0, 10)
    shard = world.shards[0]
    assert shard is not None
    shard.save()
    settle(world, window)
    assert (window.num_unsaved, window.num_bytes) == (0, 0)


def test_a_shard_without_saves_is_kept_nothing_for() -> None:
    world = Simulated(2)
    window = Window(world, "writer", FIELDS)
    for number in range(10):
        window.put(kept(number))
    settle(world, window)
    assert window.num_unsaved == 0
    world.kill(0)
    world.start(0)
    for number in range(10, 20):
        window.put(kept(number))
    settle(world, window)
    found = [number for shard in world.numbers() for number in shard]
    assert set(found) >= set(range(10, 20)) and len(set(found)) == len(found) < 20


def test_a_full_window_asks_for_a_save(tmp_path: Path) -> None:
    world = Simulated(2, tmp_path, save_every=1e9)
    window = Window(world, "writer", FIELDS, num_bytes=20 * SIZE)
    for _ in adding(window, 500):
        assert window.num_bytes <= 20 * SIZE and world.time < 200
    settle(world, window)
    assert sorted(number for shard in world.numbers() for number in shard) == list(range(500))


@pytest.mark.parametrize("num_bytes", [SIZE, 30 * SIZE, 70 * SIZE, 95 * SIZE, 200 * SIZE])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_large_episode_does_not_wait_until_few_small_ones_are_saved_by_the_clock(
    num_bytes: int, num_shards: int, tmp_path: Path
) -> None:
    world = Simulated(num_shards, tmp_path, save_every=1e9)
    window = Window(world, "writer", FIELDS, num_bytes=100 * SIZE)
    for _ in adding(window, 12 * num_shards):
        assert world.time < 5
    settle(world, window)
    for number in range(12 * num_shards, 12 * num_shards + 4):
        end = world.time + 5.0
        while not window.has_room(num_bytes):
            assert world.time < end, window.why_full()
            window.advance(0.05)
        window.put(kept(number)._replace(num_bytes=num_bytes))
    settle(world, window, 10.0)


def test_a_shard_that_hangs_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    world = Simulated(2, tmp_path)
    window = Window(world, "writer", FIELDS, num_bytes=20 * SIZE, deadline=10.0)
    world.stop(1)
    added, begin = 0, world.time
    while added < 300:
        if window.has_room(kept(added).num_bytes):
            window.put(kept(added))
            added += 1
        window.advance(0.05)
        assert world.time - begin < 200
    assert list(window.troubles) == [1] and "shard 1 has not answered for" in window.why_full()
    held = sum(map(len, world.numbers()))
    assert held >= 280
    world.go_on(1)
    settle(world, window)
    assert sorted(number for shard in world.numbers() for number in shard) == list(range(300))
    assert window.troubles == {}


def test_a_dead_shard_is_given_nothing_new_and_asked_seldom(tmp_path: Path) -> None:
    world = Simulated(2, tmp_path)
    window = Window(world, "writer", FIELDS)
    for number in range(200):
        if number == 20:
            world.kill(1)
        window.put(kept(number))
        window.advance(0.05)
        world.time += 0.05
    assert "shard 1 is lost" in window.troubles[1]
    assert len(world.numbers()[0]) >= 180 and sum(shard == 1 for shard, _ in world.log) < 60
    settle(world, window)
    assert sorted(number for shard in world.numbers() for number in shard) == list(range(200))


@pytest.mark.parametrize("num_shards", [2, 3])
@pytest.mark.parametrize("wait", [0.0, 0.01, 0.2])
def test_a_burst_is_spread_evenly_over_shards(num_shards: int, wait: float, tmp_path: Path) -> None:
    world = Simulated(num_shards)
    window = Window(world, "writer", FIELDS)
    for number in range(60):
        window.put(kept(number))
        window.advance(wait)
    settle(world, window)
    counts = [len(numbers) for numbers in world.numbers()]
    assert sum(counts) == 60 and max(counts) - min(counts) <= 2 + 60 // 10


def test_a_shard_that_cannot_save_leaves_the_window_to_the_others(tmp_path: Path) -> None:
    world = Simulated(2, tmp_path)
    shard = world.shards[1]
    assert shard is not None
    save = shard.dataset.save_with

    def fail(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    shard.dataset.save_with = fail  # type: ignore[method-assign]
    window = Window(world, "writer", FIELDS, num_bytes=20 * SIZE)
    for _ in adding(window, 300):
        assert world.time < 300, window.why_full()
    assert window.troubles == {1: "shard 1 says: [Errno 28] No space left on device"}
    shard.dataset.save_with = save  # type: ignore[method-assign]
    settle(world, window)
    assert sorted(number for shard in world.numbers() for number in shard) == list(range(300))


def test_a_shard_that_cannot_store_is_named_and_asked_again_seldom(tmp_path: Path) -> None:
    world = Simulated(1, tmp_path)
    shard = world.shards[0]
    assert shard is not None
    add, shard.dataset.add = shard.dataset.add, None  # type: ignore[assignment,method-assign]

    def fail(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    shard.dataset.add = fail  # type: ignore[method-assign]
    window = Window(world, "writer", FIELDS)
    for number in range(5):
        window.put(kept(number))
    for _ in range(100):
        world.time += 0.05
        window.advance(0.05)
    assert "No space left on device" in window.troubles[0]
    assert len(world.log) < 40
    shard.dataset.add = add  # type: ignore[method-assign]
    settle(world, window)
    assert world.numbers() == [[0, 1, 2, 3, 4]]


def test_an_episode_that_can_never_be_stored_is_told_of_once_and_holds_up_nothing(tmp_path: Path) -> None:
    world = Simulated(1, tmp_path, drop=0.3, seed=3)
    window = Window(world, "writer", FIELDS)
    shard = world.shards[0]
    assert shard is not None
    add = shard.dataset.add

    def pick(rows: Any, *others: Any) -> int:
        if rows["number"][0] == 2:
            raise ValueError("a bad one")
        return add(rows, *others)

    shard.dataset.add = pick  # type: ignore[method-assign]
    for number in range(5):
        window.put(kept(number))
    settle(world, window)
    assert world.numbers() == [[0, 1, 3, 4]]
    assert window.refusals == ["Shard 0 cannot store an episode: a bad one"]


@pytest.mark.parametrize("size", [1, 10**9])
def test_small_episodes_travel_together(size: int) -> None:
    world = Simulated(1)
    window = Window(world, "writer", FIELDS, pack_bytes=size)
    for number in range(200):
        window.put(kept(number))
    settle(world, window)
    num_packs = sum(method == "add" for _, method in world.log)
    assert num_packs >= 200 if size == 1 else num_packs <= 10
