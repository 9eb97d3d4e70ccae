"""Writers and learners that are interrupted, have no turn for long, or cannot send: nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest

from buffers.remote import RemoteLoader, RemoteWriter
from buffers.remote.transport import ShardLostError
from buffers.writer import EpisodeWriter
from tests.remote.simulated import Simulated, episode
from tests.remote.test_loader import filled, shards_of
from tests.remote.test_writer import FIELDS, Prompt, handle, made


def once(method: Any, number: int, error: BaseException) -> Any:
    """A method whose call of this number, from 1, raises instead."""
    counted = iter(range(1, 1_000_000))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(counted) == number:
            raise error
        return method(*arguments, **options)

    return call


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError(), ShardLostError("it died")])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_episode_that_cannot_be_sent_at_once_is_stored_once(number: int, error: Exception) -> None:
    world = Simulated(1)
    sink = made(world)
    sink.settle_fields(FIELDS)
    writer = EpisodeWriter(sink, num_envs=1)
    world.submit = once(world.submit, number, error)  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for n in range(5):
            rows = episode(n)
            for step, is_last in enumerate(rows["last"]):
                writer.add_step({name: values[step] for name, values in rows.items()}, bool(is_last))
    sink.wait(30.0, until_saved=False)
    assert world.numbers() == [[0, 1, 2, 3, 4]]


def test_episodes_for_whose_pack_there_is_no_memory_are_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Simulated(1)
    sink = made(world)
    sink.settle_fields(FIELDS)
    world.stop(0)
    for number in range(5):
        sink.add(episode(number))
    world.go_on(0)
    monkeypatch.setattr(np, "concatenate", once(np.concatenate, 1, MemoryError()))
    for _ in range(3):
        sink.step()
    assert "MemoryError" in sink.troubles[0]
    sink.wait(10.0, until_saved=False)
    assert world.numbers() == [[0, 1, 2, 3, 4]]


def test_a_batch_whose_call_cannot_be_sent_is_asked_for_again() -> None:
    world, shards = filled(50, 50)
    expected = [next(RemoteLoader(shards, 8, 4, seed=1))["row"]]
    loader = RemoteLoader(shards, 8, 4, seed=1)
    world.submit = once(world.submit, 1, MemoryError())  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="is lost .it could not be asked: MemoryError"):
        found = [next(loader)["row"] for _ in range(8)]
    assert loader.position == 8 and (found[0] == expected[0]).all()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_batch_that_ctrl_c_has_kept_from_being_fetched_comes_next(number: int) -> None:
    world, shards = filled(50, 50)
    whole = RemoteLoader(shards, 8, 4, seed=1)
    expected = [next(whole)["row"] for _ in range(6)]
    loader = RemoteLoader(shards, 8, 4, seed=1)
    world.result = once(world.result, number, KeyboardInterrupt())  # type: ignore[method-assign]
    found: list[Any] = []
    num_interrupts = 0
    while len(found) < 6:
        try:
            found.append(next(loader)["row"])
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts == 1
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("line", range(1, 120, 3))
def test_ctrl_c_in_the_window_takes_no_episode_that_was_acknowledged(line: int) -> None:
    world = Simulated(2)
    sink = made(world)
    sink.settle_fields(FIELDS)
    world.stop(0)
    world.stop(1)
    for number in range(8):
        sink.add(episode(number))
    world.go_on(0)
    world.go_on(1)
    world.time += 1.0
    left = line

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line" and frame.f_code.co_name in ("put", "send", "_deal", "_send_again")
        if not left:
            left = -1
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    with contextlib.suppress(KeyboardInterrupt):
        sink.add(episode(8))
    sys.settrace(None)
    sink.add(episode(9))
    sink.wait(30.0, until_saved=False)
    found = sorted(n for shard in world.numbers() for n in shard if n != 8)
    assert found == [0, 1, 2, 3, 4, 5, 6, 7, 9]


class FarAway(Simulated):
    """Answers come from another machine, only while somebody waits for them."""

    here: set[Any] = set()

    def done(self, calls: Collection[Any], seconds: float) -> set[Any]:
        found = super().done(calls, seconds)
        if seconds:
            self.here = self.here | found
        return found & self.here


def test_a_shard_far_away_is_not_blamed_for_a_learner_that_was_busy() -> None:
    near, shards = filled(50, 50)
    options: dict[str, Any] = {"seed": 1, "include": ("source",)}
    whole = RemoteLoader(shards, 8, 4, **options)
    expected = [next(whole) for _ in range(6)]
    far = FarAway(2)
    far.shards = near.shards
    loader = RemoteLoader(shards_of(far), 8, 4, **options)
    for batch in expected:
        found = next(loader)
        assert (found["source"] == batch["source"]).all() and (found["row"] == batch["row"]).all()
        far.time += 30.0


def test_a_shard_that_hangs_while_a_learner_is_busy_is_named_soon() -> None:
    world, shards = filled(50, 50)
    loader = RemoteLoader(shards, 8, 4, include=("source",))
    next(loader)
    world.stop(1)
    world.time += 30.0
    begin = world.time
    with pytest.warns(RuntimeWarning, match="Shard 1 has not answered"):
        assert [int(next(loader)["source"][0]) for _ in range(6)][2:] == [0] * 4
    assert world.time - begin < 25.0


def test_a_writer_that_had_no_turn_for_long_blames_no_shard() -> None:
    world = Simulated(1)
    sink = made(world)
    sink.settle_fields(FIELDS)
    sink._has_thread = True  # One that does not run.
    sink.add(episode(0))
    world.time += 60.0
    sink.add(episode(1))
    sink._has_thread = False
    sink.wait(10.0, until_saved=False)
    assert world.numbers() == [[0, 1]]


def test_an_episode_of_another_thread_is_stored_or_refused_when_the_writer_closes() -> None:
    world = Prompt(2)
    writer = RemoteWriter(handle(world), num_envs=1, window_bytes=400, pack_bytes=100)
    added: list[int] = []

    def add() -> None:
        with pytest.raises(RuntimeError, match="The writer is closed"):
            for number in range(1_000_000):
                writer.add_episode(episode(number))
                added.append(number)

    thread = threading.Thread(target=add)
    thread.start()
    while len(added) < 50:
        time.sleep(0.001)
    writer.close()
    thread.join()
    assert sorted(n for shard in world.numbers() for n in shard) == added


def test_an_episode_that_comes_while_a_writer_closes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Prompt(1)
    writer = RemoteWriter(handle(world), num_envs=1)
    writer.add_episode(episode(0))
    flush = EpisodeWriter.flush

    def flush_late(self: EpisodeWriter) -> None:
        flush(self)
        # The shard cannot be asked just now, so its thread would have to do it.
        world.submit = once(world.submit, 1, ShardLostError("it failed"))  # type: ignore[method-assign]
        writer.sink.add(episode(1))

    monkeypatch.setattr(writer, "flush", lambda: flush_late(writer))
    writer.close()
    assert world.numbers() == [[0, 1]]
