"""Accumulator: limits and memory. That it splits rows rightly is shown in test_writer.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers import accumulator as accumulator_module
from buffers.accumulator import Accumulator
from buffers.dataset import RingBufferDataset
from buffers.dataset.fields import Fields, Scalar, Vector
from tests import tagged
from tests.logged_game import stored


def make(num_envs: int, max_rows: int = 10_000) -> tuple[Accumulator, RingBufferDataset]:
    ring, fields = RingBufferDataset(10_000), Fields.from_rows(tagged.rows(np.zeros(num_envs, int), 0, 0), 1)
    ring.settle_fields(fields)
    return Accumulator(fields, num_envs, max_rows, None, 0, lambda env, episode, cut: ring.add(episode)), ring


def rows(num_envs: int, step: int) -> list[np.ndarray]:
    return list(tagged.flatten(tagged.rows(np.arange(num_envs), 0, step)).values())


@pytest.mark.parametrize("num_envs", [1, 3])
def test_an_episode_that_outgrows_the_limit_is_refused(num_envs: int) -> None:
    accumulator, ring = make(num_envs, max_rows=70)
    for step in range(70):
        accumulator.add_rows(rows(num_envs, step))
    for _ in range(3):
        with pytest.raises(ValueError, match=r"reached 70 steps, the `capacity` .* `max_episode_length`"):
            accumulator.add_rows(rows(num_envs, 70))
        assert accumulator.num_open_rows == 70 * num_envs and ring.is_empty
    # Only environments that bring a row count, and one that ends makes room for its own.
    first = np.arange(num_envs) == 0
    accumulator.add_rows(rows(num_envs, 70), is_first=first, mask=first)
    assert stored(ring) == [(0, 0, list(range(70)))]
    if num_envs > 1:
        with pytest.raises(ValueError, match="reached 70 steps"):
            accumulator.add_rows(rows(num_envs, 71), is_first=first)
        assert ring.num_episodes == 1
    accumulator.flush()
    assert ring.num_timesteps == 70 * num_envs + 1


def bytes_in_use(accumulator: Accumulator) -> int:
    """Memory that the kernel has given to the records, in bytes."""
    address = accumulator._rows.ctypes.data
    for text in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(part, 16) for part in text.split(" ")[0].split("-"))
        if begin <= address < end:
            return int(re.search(r"^Rss: +(\d+) kB", text, re.MULTILINE)[1]) * 1024  # type: ignore[index]
    raise AssertionError("not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")
def test_one_long_episode_takes_its_own_memory_and_gives_it_back() -> None:
    num_envs, record, lengths = 64, 4096, []
    fields = Fields(x=Vector(record, dtype=torch.uint8))
    accumulator = Accumulator(
        fields, num_envs, 10**6, None, 0, lambda env, episode, cut: lengths.append((env, len(episode["x"])))
    )
    row, first = [np.ones((num_envs, record), np.uint8)], np.arange(num_envs) == 0
    # Huge pages may reach over the ends of what is used.
    most_short = num_envs * 64 * record + 2 * 2**21
    for _ in range(20_000):
        accumulator.add_rows(row, mask=first)
    assert accumulator.num_open_rows == 20_000
    assert bytes_in_use(accumulator) < 20_000 * record + most_short
    accumulator.add_rows(row, is_first=first)
    assert lengths == [(0, 20_000)] and bytes_in_use(accumulator) <= most_short
    # Where all are long, one after the other, their memory stays, and is used again.
    for _ in range(3):
        for _ in range(500):
            accumulator.add_rows(row, mask=first)
        accumulator.flush()
    assert 500 * record <= bytes_in_use(accumulator) <= most_short + 2 * 500 * record


@pytest.mark.parametrize("max_rows", [64, 1000])
def test_a_row_that_is_not_brought_is_written_nowhere_else(max_rows: int) -> None:
    # With 64 rows, five environments fill their room; behind it lie the rows of their neighbours.
    accumulator, ring = make(12, max_rows=max_rows)
    is_full = np.arange(12) < 5
    for step in range(64):
        accumulator.add_rows(rows(12, step), mask=is_full)
    accumulator.add_rows(rows(12, 64), mask=~is_full)
    accumulator.flush()
    assert stored(ring) == [(env, 0, list(range(64)) if env < 5 else [64]) for env in range(12)]


def test_a_bfloat16_is_not_made_of_another_numbers_first_bytes() -> None:
    accumulator = Accumulator(Fields(reward=Scalar(dtype=torch.bfloat16)), 9, 100, None, 0, print)
    with pytest.raises(ValueError, match="broadcast"):
        accumulator.add_rows([np.ones(9, np.float32)])


@pytest.mark.parametrize("error", [OSError, MemoryError])
def test_fewer_addresses_than_the_capacity_refuse_longer_episodes(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def reserved(num_bytes: int) -> Any:
        if num_bytes > 3 * 512 * record:
            raise error
        rows = np.empty(num_bytes, np.uint8)
        return rows, rows

    record = accumulator_module._record_of(Fields.from_rows(tagged.rows(np.zeros(3, int), 0, 0), 1), {}).itemsize
    monkeypatch.setattr(accumulator_module, "_reserved", reserved)
    accumulator, ring = make(3)
    for step in range(255):
        accumulator.add_rows(rows(3, step))
    with pytest.raises(ValueError, match="reached 255 steps, for which there are addresses, and cannot take another"):
        accumulator.add_rows(rows(3, 255))
    accumulator.flush()
    assert stored(ring) == [(env, 0, list(range(255))) for env in range(3)]


@pytest.mark.parametrize("num_envs", [2, 3, 70])
@pytest.mark.parametrize("together", [True, False])
def test_long_and_short_episodes_in_turn_never_mix(num_envs: int, together: bool) -> None:
    rng, kept = np.random.default_rng(num_envs), []
    fields = Fields.from_rows({"key": np.zeros((num_envs, 3), np.int64)}, 1)
    accumulator = Accumulator(
        fields, num_envs, 10_000, None, 0, lambda env, episode, cut: kept.append(episode["key"].copy())
    )
    number, step = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)
    lengths = np.full(num_envs, 100)
    for _ in range(3000):
        is_last = step == lengths - 1
        accumulator.add_rows([np.stack([np.arange(num_envs), number, step], 1)], is_last=is_last)
        number, step = number + is_last, np.where(is_last, 0, step + 1)
        drawn = rng.choice([5, 28, 30, 70, 80, 100, 150, 300], num_envs)
        lengths = np.where(is_last, drawn[0] if together else drawn, lengths)
    assert len(kept) > 20
    for key in kept:
        np.testing.assert_array_equal(
            key, np.stack([np.full(len(key), key[0, 0]), np.full(len(key), key[0, 1]), np.arange(len(key))], 1)
        )


def test_an_episode_that_terminated_is_not_truncated_after_ctrl_c() -> None:
    kept: list[tuple[list[bool], list[bool]]] = []

    def emit(env: int, episode: dict[str, np.ndarray], cut: int) -> None:
        kept.append((episode["terminated"].tolist(), episode["truncated"].tolist()))
        if len(kept) == 1:
            raise KeyboardInterrupt

    row = {"terminated": np.zeros(3, bool), "truncated": np.zeros(3, bool)}
    accumulator = Accumulator(Fields.from_rows(row, 1), 3, 100, None, 0, emit)
    ends = np.array([True, True, False])
    with pytest.raises(KeyboardInterrupt):
        accumulator.add_rows([ends, np.zeros(3, bool)], is_last=ends)
    accumulator.flush(truncate=True)
    assert kept == [([True], [False]), ([True], [False]), ([False], [True])]
