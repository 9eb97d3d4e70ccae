"""`capacity_bytes` where episodes come from elsewhere than `add_episode`, and what Ctrl-C leaves of it."""

from __future__ import annotations

import copy
import gc
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset

pytest.importorskip("cramjam")
LZ4 = {"x": "lz4"}


def noise(number: int, length: int = 10) -> dict[str, Any]:
    """An episode of 1,000 bytes a step, which do not become fewer."""
    rows = np.random.default_rng(number).integers(0, 256, (length, 1000), dtype=np.uint8)
    return {"x": rows, "n": np.full(length, number)}


def flat(number: int) -> dict[str, Any]:
    return {"x": np.zeros((10, 1000), np.uint8), "n": np.full(10, number)}


def numbers(dataset: EpisodeDataset) -> list[int]:
    return [int(episode["n"][0]) for episode in dataset.episodes()]


def ring_of(capacity_bytes: int, capacity: int = 1000) -> RingBufferDataset:
    return RingBufferDataset(capacity, compress=LZ4, capacity_bytes=capacity_bytes)


def test_refilling_evicts_nothing() -> None:
    small, large = ring_of(55_000), RingBufferDataset(1000)
    for number in range(20):
        large.add_episode(noise(number))
    for number in (100, 101, 102):
        small.add_episode(noise(number))
    small.extend(large, seed=0)
    assert small.refill() == 2
    assert numbers(small)[:3] == [100, 101, 102] and small.num_evicted == 0


def test_what_is_brought_back_leaves_the_newest_where_it_is() -> None:
    small = ring_of(35_000, 80)
    small.extend(RingBufferDataset(10_000), other_batch_size=8, seed=0)
    num_brought = 0
    for number in range(60):
        small.add_episode(flat(number) if number % 4 else noise(number))
        found = numbers(small)
        assert number in found and small._room is not None and small._room.num_bytes <= 35_000
        num_brought += found.index(number) < len(found) - 1
    assert num_brought > 5


def test_what_does_not_fit_beside_the_newest_evicts_nothing() -> None:
    small = ring_of(35_000, 30)
    small.extend(RingBufferDataset(10_000), other_batch_size=8, seed=0)
    small.add_episode(noise(0, 20))
    for number in range(1, 20):
        small.add_episode(noise(number, 18) if number == 10 else flat(number))
    assert len(numbers(small)) > 1


def test_an_episode_too_large_for_the_budget_goes_to_the_larger_dataset(tmp_path) -> None:
    small, large = ring_of(15_000), IndividualFileDataset(capacity=100, directory=tmp_path)
    small.extend(large, seed=0)
    small.add_episode(noise(0))
    with pytest.warns(UserWarning, match="larger than the `capacity_bytes`"):
        assert small.add_episode(noise(1, 20)) == -1
    assert numbers(small) == [0] and numbers(large) == [0, 1]


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_buffer_drops_an_episode_that_is_too_large_and_goes_on(num_envs) -> None:
    ring = ring_of(15_000)
    buffer = ReplayBuffer(ring, 4, 2, num_envs=num_envs)
    errors = []
    for step in range(61):
        rows = {"x": np.random.default_rng(step).integers(0, 256, (num_envs, 1000), dtype=np.uint8)}
        done = step in ((19, 29, 39) if num_envs == 1 else (20, 30, 40))
        try:
            buffer.add_step(rows if num_envs > 1 else {"x": rows["x"][0]}, np.full(2, done) if num_envs > 1 else done)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) == 1 and "does not fit `capacity_bytes`" in errors[0]
    assert ("The same goes for 1 more." in errors[0]) == (num_envs == 2)
    assert ring.num_episodes == 1  # The newest of those that fit.
    with pytest.raises(ValueError, match="does not fit `capacity_bytes`"):
        buffer.flush()  # 20 steps are open.
    buffer.close()


def test_a_save_loads_into_a_smaller_budget(tmp_path: Path) -> None:
    ring = RingBufferDataset(1000, compress=LZ4)
    for number, length in enumerate([10, 10, 30, 10, 10]):
        ring.add_episode(noise(number, length))
    ring.save(tmp_path)
    small = ring_of(25_000)
    with pytest.warns(UserWarning, match="2 of the 5 episodes that were saved, the newest, fit `capacity_bytes`"):
        RingBufferDataset.load(tmp_path, small)
    assert numbers(small) == [3, 4]


class CtrlC:
    """Raises KeyboardInterrupt at the n-th line that is run of the library."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if "/buffers/" not in frame.f_code.co_filename:
            return None
        self.left -= event == "line"
        if not self.left and event == "line":
            raise KeyboardInterrupt
        return self

    def interrupts(self, call: Callable[[], object]) -> bool:
        before = sys.gettrace()
        # What is raised while objects of an earlier round are collected is lost.
        gc.disable()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            gc.enable()
        return False


def test_ctrl_c_costs_no_room_and_no_save(tmp_path) -> None:
    for at in range(1, 10_000):
        ring = ring_of(35_000)
        for number in range(4):
            ring.add_episode(noise(number))
        if not CtrlC(at).interrupts(lambda ring=ring: ring.add_episode(noise(4))):  # type: ignore[misc]
            break
        ring.save(tmp_path / str(at))
        copy.deepcopy(ring)
        for number in (5, 6, 7):
            ring.add_episode(noise(number))
        assert numbers(ring) == [5, 6, 7], at
        assert ring._room is not None and ring._room.num_bytes == sum(ring._room.sizes().values())
        assert len(ring._room.sizes()) == 3
    assert at > 100


def test_ctrl_c_while_blocks_are_compressed_takes_no_row(monkeypatch) -> None:
    ring = RingBufferDataset(1000, compress=LZ4)
    buffer = ReplayBuffer(ring, 4, 2, num_envs=1)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for step in range(20):
        buffer.add_step({"x": step, "n": 0}, False)
    accumulator = buffer.writer._accumulator
    assert accumulator is not None and accumulator._early is not None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(accumulator._early, "advance", stop)
        buffer.add_step({"x": 20, "n": 0}, True)
    buffer.add_step({"x": 20, "n": 0}, True)
    assert ring.get_episode(0)["x"].tolist() == list(range(21))


def test_additions_that_fail_take_no_room_of_live_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = ring_of(60_000)
    for number in range(4):
        ring.add_episode(noise(number))
    before = ring.compressed_bytes()
    with monkeypatch.context() as patched:
        # After its rows were written.
        patched.setattr(ring.table, "append", lambda *_: 1 / 0)
        for number in range(20):
            with pytest.raises(ZeroDivisionError):
                ring.add_episode(noise(100 + number))
    for number, episode in enumerate(ring.episodes()):
        assert np.array_equal(episode["x"], noise(number)["x"])
    ring.add_episode(noise(4))
    assert numbers(ring) == [0, 1, 2, 3, 4] and ring.compressed_bytes()["x"] == before["x"] * 5 // 4


def test_bytes_are_counted_anew_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = ring_of(60_000)
    ring.add_episode(noise(0))
    room, one = ring._room, ring.compressed_bytes()["x"]
    assert room is not None

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(room, "_regions", type("Interrupted", (deque,), {"append": interrupted})(room._regions))
        for number in range(1, 4):
            with pytest.raises(KeyboardInterrupt):
                ring.add_episode(noise(number))
    ring.add_episode(noise(4))
    assert ring.compressed_bytes()["x"] == 2 * one
    counted: list[int] = []
    monkeypatch.setattr(room, "_count", lambda region, sign: counted.append(sign))
    ring.add_episode(noise(5))
    assert counted == [1], "and not otherwise"
