"""The sum tree, and the index of priorities, where there are enough rows for several levels."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from buffers.dataset import RingBufferDataset
from buffers.late import ChangeLog
from buffers.sampler import PrioritizedSampler
from buffers.sampler.sum_tree import SumTree
from tests import tagged


@given(st.integers(0, 70_000), st.integers(0, 10**6), st.integers(0, 6))
@settings(max_examples=60)
def test_numbers_are_found_by_their_share_of_the_total(num, seed, num_changes) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 4, num).astype(np.float64)  # Sums of them are exact.
    tree = SumTree(weights.copy())
    for _ in range(num_changes):
        if rng.random() < 0.3:
            begin, end = sorted(rng.integers(0, num + 1, 2).tolist())
            tree.clear(begin, end)
            weights[begin:end] = 0
        elif num:
            numbers = rng.integers(0, num, int(rng.integers(1, num + 1)))
            new = rng.integers(0, 4, num).astype(np.float64)[numbers]  # The same for equal numbers.
            tree.set(numbers, new)
            weights[numbers] = new
    assert tree.num_leaves >= num and tree.total() == weights.sum()
    np.testing.assert_array_equal(tree.weights[:num], weights)
    u = np.concatenate([rng.random(200), [0.0, np.nextafter(1.0, 0.0)]])
    found = tree.locate(u)
    if not weights.any():
        assert found is None
        return
    assert found is not None
    np.testing.assert_array_equal(found[:-1], weights.cumsum().searchsorted(u[:-1] * weights.sum(), "right"))
    assert found[-1] >= weights.nonzero()[0][-1]


def many_rows(num_episodes: int = 3000) -> tuple[RingBufferDataset, np.ndarray]:
    """A ring of about 75,000 rows, and the priorities that they have, by step id."""
    ring, rng = RingBufferDataset(100_000), np.random.default_rng(0)
    for length in rng.integers(1, 50, num_episodes).tolist():
        ring.add_episode({"x": np.zeros(length, np.int8)})
    return ring, np.ones(ring.table.next_start)


def check(stream: Any, ring: RingBufferDataset, priorities: np.ndarray, length: int, num_batches: int = 20) -> None:
    """Windows are as likely as the sampler says, counted in 200 parts in their order."""
    starts = np.concatenate(
        [start + np.arange(max(0, num - length + 1)) for start, num, *_ in ring.table.rows.tolist()]
    )
    rows = sliding_window_view(priorities, length)[starts]
    weights = 0.5 * rows.max(1) + 0.5 * rows.mean(1)
    parts = np.cumsum(weights) / weights.sum() * 199.999
    expected = np.bincount(parts.astype(int), weights, minlength=200)
    counts = np.zeros(200)
    for _ in range(num_batches):
        index = stream.take()["index"][:, 0].numpy()
        at = starts.searchsorted(index)
        assert (starts[at] == index).all() and (weights[at] > 0).all()
        counts += np.bincount(parts[at].astype(int), minlength=200)
    is_real = expected > 0
    assert tagged.chi_square_is_plausible(counts[is_real], expected[is_real])


@pytest.mark.parametrize("length", [1, 3])
def test_draws_follow_many_changes_of_many_rows(length) -> None:
    ring, priorities = many_rows()
    sampler, rng = PrioritizedSampler(1.0, eta=0.5), np.random.default_rng(1)
    stream = ring.get_loader(1000, length, sampler=sampler, include=("index",), seed=0).stream
    check(stream, ring, priorities, length)
    # Some rows; most; more changes than the log keeps.
    for num, times in ((50, 1), (30_000, 1), (40_000, 2)):
        for _ in range(times):
            ids = rng.choice(len(priorities), num, replace=False)
            new = (10.0 ** rng.uniform(-2, 2, num)).astype(np.float32)
            new[rng.random(num) < 0.1] = 0
            assert ring.update(ids[:, None], {"priority": new[:, None]}) == 0
            priorities[ids] = new
        check(stream, ring, priorities, length)
    # All rows of a part at once, then episodes that take the place of others.
    assert ring.update([np.arange(20_000)], {"priority": np.zeros((1, 20_000), np.float32)}) == 0
    priorities[:20_000] = 0
    check(stream, ring, priorities, length)
    while ring.table.oldest_start < 30_000:
        ring.add_episode({"x": np.zeros(40, np.int8)})
    added = np.full(ring.table.next_start - len(priorities), ring.late["priority"].largest)
    check(stream, ring, np.concatenate([priorities, added]), length)


def test_two_streams_that_looked_at_different_times_draw_the_same() -> None:
    ring, _ = many_rows(500)
    options: dict[str, Any] = {"sampler": PrioritizedSampler(1.0), "include": ("index",), "seed": 0}
    often, seldom = (ring.get_loader(64, 4, **options).stream for _ in range(2))
    rng = np.random.default_rng(0)
    for n in range(60):
        batch = often.take()
        ring.update(batch["index"], {"priority": rng.random((64, 4)).astype(np.float32)})
        if n % 7 == 0:
            ring.evict_episode(0)
        ring.add_episode({"x": np.zeros(5, np.int8)})
    seldom.position = often.position
    for one, two in zip(*(itertools.islice(iter(stream), 5) for stream in (often, seldom)), strict=True):
        assert one["index"].tolist() == two["index"].tolist()


# The log of changes.


def new_log() -> ChangeLog:
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in ChangeLog.layout.items()}
    return ChangeLog(arrays["log/entries"], arrays["log/num"])


def test_a_reader_of_the_log_gets_all_or_is_told_to_start_over() -> None:
    log, rng, written = new_log(), np.random.default_rng(0), np.zeros((0, 3), np.int64)
    seen, num_lost = 0, 0
    for _ in range(120):
        new = rng.integers(0, 100, (int(rng.choice([0, 1, 7, 3000, 30_000])), 3))
        log.append(new)
        written = np.concatenate([written, new])
        if rng.random() < 0.5:
            found, end = log.since(seen)
            assert end == len(written)
            if found is None:
                num_lost += 1
            else:
                np.testing.assert_array_equal(found, written[seen:])
            seen = end
    assert 0 < num_lost < 40


def test_a_reader_that_is_lapped_while_it_reads_starts_over() -> None:
    log = new_log()
    log.append(np.zeros((100, 3), np.int64))
    take = log._entries.take

    class Entries:
        """While they are copied, the writer laps."""

        def take(self, *arguments: Any, **options: Any) -> Any:
            found = take(*arguments, **options)
            log._num[0] += 1 << 16
            return found

    log._entries = Entries()  # type: ignore[assignment]
    assert log.since(0)[0] is None
