"""What a batch and a step cost is the same however much is stored. Costs are counts, as seconds depend on the machine.

Python's part is counted in calls, what numpy and torch do in the bytes that they allocate: a pass over all stored
episodes or steps shows in one of them.
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
from buffers.dataset import EpisodeDataset, RingBufferDataset
from buffers.sampler import UniformEpisodeSampler
from buffers.transforms import to_transitions

# A small batch, so that its memory hides nothing that was allocated for a moment before it was made.
BATCH_SIZE, LENGTH = 8, 2
NUM_CALLS = 32
FEW, MANY = 10, 10_000


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

    @property
    def made_bytes(self) -> int:
        """Of a call, in its result or on the way to it."""
        return (self.tensor_bytes + self.kept_bytes) // NUM_CALLS


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.num += 1
        # What is written into memory that is there already makes none.
        if isinstance(found, torch.Tensor) and not func.is_view and "out" not in (kwargs or {}):
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


def batches(
    dataset: EpisodeDataset, batch_size: int = BATCH_SIZE, length: int = LENGTH, **options: Any
) -> Callable[[], Any]:
    return ReplayBuffer(dataset, batch_size, length, seed=0, **options).sample


def adding_before(dataset: EpisodeDataset, sample: Callable[[], Any]) -> Callable[[], Any]:
    """A batch after an episode that was just added, so that nothing can be kept from the batch before."""
    episode = rows(8)

    def function() -> Any:
        dataset.add_episode(episode)
        return sample()

    return function


def assert_same(few: Costs, many: Costs) -> None:
    """Many stored episodes cost what few do."""
    assert many.operators == few.operators
    assert many.calls <= 1.05 * few.calls
    # A pass over all episodes makes a byte of each at least, of which a part may go where the batch is put later.
    assert many.tensor_bytes - few.tensor_bytes < MANY / 2
    assert many.kept_bytes - few.kept_bytes < MANY / 2
    assert many.spare_bytes - few.spare_bytes < MANY / 2


DRAWING: dict[str, Callable[[EpisodeDataset], Callable[[], Any]]] = {
    "sequences": batches,
    "episodes first": lambda ring: batches(ring, sampler=UniformEpisodeSampler()),
    "transitions": lambda ring: batches(ring, transform=to_transitions),
    "included": lambda ring: batches(ring, include=("index", "step", "is_first", "weight")),
    "after an addition": lambda ring: adding_before(ring, batches(ring)),
}


@pytest.mark.parametrize("way", DRAWING)
def test_a_batch_costs_the_same_for_ten_and_ten_thousand_episodes(way) -> None:
    few, many = (costs(DRAWING[way](ring_of(num_episodes))) for num_episodes in (FEW, MANY))
    assert_same(few, many)


def test_a_large_batch_takes_the_memory_of_its_data(threads) -> None:
    num_bytes = 256 * 64 * STEP_BYTES
    found = costs(batches(ring_of(200, 64), 256, 64))
    assert num_bytes <= found.made_bytes <= 1.05 * num_bytes, "each row is copied once"
    assert found.spare_bytes <= num_bytes / 2, "what is needed for a moment is no copy of a large field"


def test_a_small_batch_takes_little_more_memory_than_its_data() -> None:
    ring, num_bytes = ring_of(100), 32 * 4 * STEP_BYTES
    sample = batches(ring, 32, 4)
    for once in (sample, adding_before(ring, sample)):
        assert num_bytes <= costs(once).made_bytes <= 1.25 * num_bytes


def test_a_step_calls_as_many_functions_for_256_environments_as_for_16() -> None:
    found = {}
    for num_envs in (16, 256):
        buffer = ReplayBuffer(RingBufferDataset(100_000), BATCH_SIZE, num_envs=num_envs)
        row, done = rows(num_envs), np.zeros(num_envs, np.bool_)
        found[num_envs] = costs(lambda: buffer.add_step(row, done))  # noqa: B023
    assert found[256].operators == found[16].operators
    assert found[256].calls <= 1.05 * found[16].calls
    assert found[256].spare_bytes <= 256 * STEP_BYTES / 2, "no copy of the rows"


def test_adding_an_episode_costs_the_same_for_ten_and_ten_thousand_stored() -> None:
    few, many = (ring_of(num_episodes) for num_episodes in (FEW, MANY))
    episode = rows(8)
    assert_same(costs(lambda: few.add_episode(episode)), costs(lambda: many.add_episode(episode)))
