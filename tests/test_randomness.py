"""What is drawn for batch n depends on the seed, n and the attempt, and not on what was asked before."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.loading.randomness import BatchRandom
from buffers.sampler import integers_below


def test_batch_n_is_a_function_of_the_seed_and_n() -> None:
    one, two = BatchRandom(3), BatchRandom(3)
    drawn = {n: one.generator(n).integers(2**62, size=5).tolist() for n in range(20)}
    for n in (7, 0, 19, 7):
        assert two.generator(n).integers(2**62, size=5).tolist() == drawn[n]
    assert len({tuple(values) for values in drawn.values()}) == 20
    assert BatchRandom(4).generator(0).integers(2**62, size=5).tolist() != drawn[0]
    copy = pickle.loads(pickle.dumps(one))
    assert copy.generator(7).integers(2**62, size=5).tolist() == drawn[7]


def test_a_generator_does_not_depend_on_what_the_last_one_left() -> None:
    random = BatchRandom(0)
    expected = random.generator(1).integers(100, size=3, dtype=np.int32).tolist()
    random.generator(0).integers(100, size=1, dtype=np.int32)  # Half of a 64-bit word stays behind.
    assert random.generator(1).integers(100, size=3, dtype=np.int32).tolist() == expected


def test_batches_and_attempts_share_no_words() -> None:
    random, drawn = BatchRandom(1), []
    for n in (*range(50), 2**62, 2**63 - 1):
        for attempt in range(3):
            drawn += random.generator(n, attempt).bit_generator.random_raw(200).tolist()
    assert len(set(drawn)) == len(drawn)


@given(st.integers(1, 50), st.integers(0, 1000))
@settings(max_examples=50)
def test_small_integers_are_all_drawn_alike(high, seed) -> None:
    for bound in (high, np.full(3200 * high, high)):
        counts = np.bincount(integers_below(BatchRandom(seed).generator(0), bound, 3200 * high), minlength=high)
        assert len(counts) == high
        assert (np.abs(counts - 3200) < 6 * np.sqrt(3200)).all()


def test_each_integer_has_a_bound_of_its_own() -> None:
    high = np.arange(1, 2001)
    integers = integers_below(BatchRandom(0).generator(0), high, 2000)
    assert (integers >= 0).all() and (integers < high).all()
    assert abs((integers / high).mean() - 0.5) < 0.05
