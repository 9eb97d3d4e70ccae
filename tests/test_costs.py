"""What a batch and a step cost, in counts instead of seconds, and that it is the same however much is stored.

The bounds are the figures themselves: who makes a path longer changes one here, and says why.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset, shared
from buffers.transforms import to_transitions

BATCH_SIZE, LENGTH = 32, 4
NUM_FIELDS = 5
# So many batches are drawn at a time while nothing changes.
NUM_CALLS = 32
# What an added episode calls on machines that need fences between single words.
FENCES = 0 if shared._WORDS_STAY_IN_ORDER else 10


def rows(*leading: int) -> dict[str, Any]:
    """24 + 6 floats, a reward and two flags: 126 bytes a step."""
    return {
        "obs": np.zeros((*leading, 24), np.float32),
        "action": np.zeros((*leading, 6), np.float32),
        "reward": np.zeros(leading, np.float32),
        "terminated": np.zeros(leading, np.bool_),
        "truncated": np.zeros(leading, np.bool_),
    }


STEP_BYTES = 126


@dataclass(frozen=True)
class Costs:
    """Of 32 calls.

    Attributes:
        operators: Of torch.
        calls: Functions called, of Python and C.
        tensor_bytes: Of the tensors that the operators made.
        kept_bytes: Of Python and numpy, that their results hold.
        spare_bytes: Of Python and numpy, that were allocated at a time beyond what was before and the results.
    """

    operators: int
    calls: int
    tensor_bytes: int
    kept_bytes: int
    spare_bytes: int


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.num += 1
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.num_bytes += found.nbytes
        return found


def costs(once: Callable[[], object]) -> Costs:
    """Counted in calls of their own, after some that fill caches, with nobody else's finalizers in between."""
    gc.collect()
    gc.disable()
    try:
        return _costs(once)
    finally:
        gc.enable()


def _costs(once: Callable[[], object]) -> Costs:

    def function() -> None:
        for _ in range(NUM_CALLS):
            once()

    for _ in range(3):
        function()
    with _Counting() as counting:
        function()
    num_calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    results: list[object] = [None] * NUM_CALLS
    tracemalloc.start()
    try:
        for i in range(NUM_CALLS):
            results[i] = once()
        held, peak = tracemalloc.get_traced_memory()
        results.clear()
        kept = held - tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return Costs(counting.num, num_calls, counting.num_bytes, kept, peak - kept)


def ring_of(num_episodes: int, length: int = 8) -> RingBufferDataset:
    ring = RingBufferDataset(num_episodes * length)
    episode = rows(length)
    for _ in range(num_episodes):
        ring.add_episode(episode)
    return ring


def batches(dataset: EpisodeDataset, **options: Any) -> Callable[[], Any]:
    return ReplayBuffer(dataset, BATCH_SIZE, LENGTH, seed=0, **options).sample


def adding_before(dataset: EpisodeDataset, sample: Callable[[], Any]) -> Callable[[], Any]:
    """A batch after an episode that was just added, so that nothing can be kept from the batch before."""
    episode = rows(8)

    def function() -> Any:
        dataset.add_episode(episode)
        return sample()

    return function


@pytest.mark.parametrize("num_episodes", [10, 10_000])
def test_small_batches_are_drawn_together_while_nothing_changes(num_episodes, threads) -> None:
    found = costs(batches(ring_of(num_episodes)))
    assert found.operators == NUM_CALLS * NUM_FIELDS, "an array of each field as a tensor"
    assert found.tensor_bytes == 0, "each row is copied once, by numpy"
    assert found.calls <= 31 * NUM_CALLS
    assert found.kept_bytes <= NUM_CALLS * (BATCH_SIZE * LENGTH * STEP_BYTES + 2100), "and what tensors are"
    # Python keeps a dict for the next one when a batch is given up, so it counts here.
    assert found.spare_bytes <= 86_000, "the words and the windows of 32 batches"


@pytest.mark.parametrize("num_episodes", [10, 2000])
def test_a_large_batch_is_one_gather_a_field_into_memory_of_its_size(num_episodes, threads) -> None:
    batch_size, length = 2048, 8
    found = costs(ReplayBuffer(ring_of(num_episodes), batch_size, length, seed=0).sample)
    by_torch, by_numpy = NUM_CALLS * batch_size * length * STEP_BYTES, 0
    if threads == 1:
        by_torch, by_numpy = by_numpy, by_torch
    # Places as a tensor, and a gather; or an array as a tensor.
    assert found.operators == NUM_CALLS * (NUM_FIELDS if threads == 1 else NUM_FIELDS + 1)
    assert found.tensor_bytes == by_torch
    assert found.kept_bytes <= by_numpy + NUM_CALLS * 2100
    assert found.calls <= 35.5 * NUM_CALLS


@pytest.mark.parametrize("num_episodes", [10, 10_000])
def test_an_episode_added_before_each_batch_adds_what_adding_takes_and_a_draw(num_episodes, threads) -> None:
    ring = ring_of(num_episodes)
    found = costs(adding_before(ring, batches(ring)))
    assert found.operators == NUM_CALLS * NUM_FIELDS
    assert found.tensor_bytes == 0
    assert found.calls <= (101.5 + FENCES) * NUM_CALLS
    assert found.kept_bytes <= NUM_CALLS * (BATCH_SIZE * LENGTH * STEP_BYTES + 2100)
    assert found.spare_bytes <= 21_500, "a draw, and the words of 32"


def test_transitions_and_included_columns_cost_a_few_operators_more() -> None:
    transitions = ReplayBuffer(ring_of(100), BATCH_SIZE, 2, transform=to_transitions, seed=0).sample
    assert costs(transitions).operators <= NUM_CALLS * 11
    included = costs(batches(ring_of(100), include=("index", "step", "is_first", "weight")))
    assert included.operators <= NUM_CALLS * 10 + 11


@pytest.mark.parametrize(("num_envs", "calls"), [(1, 20), (16, 29), (256, 29)])
def test_a_step_calls_as_many_functions_for_256_environments_as_for_16(num_envs, calls) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100_000), BATCH_SIZE, num_envs=num_envs)
    row = rows() if num_envs == 1 else rows(num_envs)
    done = False if num_envs == 1 else np.zeros(num_envs, np.bool_)
    found = costs(lambda: buffer.add_step(row, done))
    assert found.operators == 0, "numpy rows go in without torch"
    assert found.calls <= calls * NUM_CALLS
    assert found.spare_bytes <= 600 + 10 * num_envs, "places, and no copy of the rows"


@pytest.mark.parametrize("num_episodes", [10, 1000])
def test_adding_an_episode_costs_the_same_whatever_is_stored(num_episodes) -> None:
    ring, episode = ring_of(num_episodes), rows(8)
    found = costs(lambda: ring.add_episode(episode))
    assert found.operators == 0
    assert found.calls <= (44.5 + FENCES) * NUM_CALLS
    assert found.spare_bytes <= 3000


@pytest.mark.parametrize("num_episodes", [10, 1000])
def test_a_window_of_files_is_read_by_few_calls_whatever_is_stored(num_episodes, tmp_path, monkeypatch) -> None:
    from buffers.dataset import window_reader

    files = IndividualFileDataset(8000, directory=tmp_path, durability="rename")
    for _ in range(num_episodes):
        files.add_episode(rows(8))
    sample, num_reads, preadv = batches(files), 0, window_reader._preadv

    def count(*arguments: Any) -> int:
        nonlocal num_reads
        num_reads += 1
        return preadv(*arguments)

    monkeypatch.setattr(window_reader, "_preadv", count)
    for _ in range(2 * NUM_CALLS):
        sample()
    # Between as many as there are windows and as many as there are ranges; some batches have been drawn ahead.
    assert NUM_CALLS * BATCH_SIZE <= num_reads <= 4 * NUM_CALLS * BATCH_SIZE * NUM_FIELDS
