"""What is drawn for batch n depends on the seed and on n, and not on what was asked before."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.randomness import BatchRandom

NUMBERS = st.builds(
    lambda first, num, step: range(first, first + num * step, step),
    st.one_of(st.integers(0, 100), st.integers(2**62, 2**62 + 100)),
    st.integers(1, 40),
    st.integers(1, 3),
)


def test_batch_n_is_a_function_of_the_seed_and_n() -> None:
    one, two = BatchRandom(3), BatchRandom(3)
    drawn = {n: one.generator(n).integers(2**62, size=5).tolist() for n in range(20)}
    for n in (7, 0, 19, 7):
        assert two.generator(n).integers(2**62, size=5).tolist() == drawn[n]
    assert len({tuple(values) for values in drawn.values()}) == 20
    assert BatchRandom(4).generator(0).integers(2**62, size=5).tolist() != drawn[0]
    copy = pickle.loads(pickle.dumps(one))
    assert copy.generator(7).integers(2**62, size=5).tolist() == drawn[7]


def test_the_generator_of_a_batch_does_not_depend_on_what_the_last_one_left() -> None:
    random = BatchRandom(0)
    expected = random.generator(1).integers(100, size=3, dtype=np.int32).tolist()
    random.generator(0).integers(100, size=1, dtype=np.int32)  # Half of a 64-bit word stays behind.
    assert random.generator(1).integers(100, size=3, dtype=np.int32).tolist() == expected


@given(
    st.lists(st.tuples(NUMBERS, st.integers(1, 9)), min_size=1, max_size=6), st.sampled_from([1, 10, 2**40, 3 << 61])
)
@settings(max_examples=200)
def test_integers_of_batches_are_the_same_alone_and_together_and_in_any_order(asked, high) -> None:
    random = BatchRandom(5)
    for numbers, size in asked:
        together = random.integers(numbers).integers(high, size=size * len(numbers))
        assert together.dtype == np.int64 and together.shape == (size * len(numbers),)
        for n, integers in zip(numbers, together.reshape(len(numbers), size), strict=True):
            alone = BatchRandom(5).integers(range(n, n + 1)).integers(high, size=size)
            np.testing.assert_array_equal(integers, alone)


def test_integers_of_batches_differ_between_batches_seeds_and_from_those_of_generators() -> None:
    drawn = BatchRandom(1).integers(range(300)).integers(2**62, size=300 * 7).tolist()
    drawn += BatchRandom(2).integers(range(300)).integers(2**62, size=300 * 7).tolist()
    random = BatchRandom(1)
    for n in range(300):
        drawn += (random.generator(n).bit_generator.random_raw(2000 if n == 0 else 7) % 2**62).tolist()
    assert len(set(drawn)) == len(drawn)


def test_batches_differ_even_where_the_lowest_word_of_the_counter_has_overflowed() -> None:
    # 16 words are 4 counts, so batch 2**62 begins at 2**64.
    first, far = (BatchRandom(1).integers(range(n, n + 1)).integers(2**62, size=16) for n in (0, 2**62))
    assert not set(first.tolist()) & set(far.tolist())


@pytest.mark.parametrize("high", [1, 2, 2**63])
def test_where_words_divide_evenly_the_greatest_is_as_good_as_any(high) -> None:
    generator = BatchRandom(0).integers(range(1))
    generator.integers(high, size=4)
    generator._words[:], generator._greatest = 2**64 - 1, 2**64 - 1
    assert generator.integers(high, size=4).tolist() == [high - 1] * 4


def test_the_first_word_that_would_not_be_fair_is_replaced_and_the_last_that_is_stays() -> None:
    high = 3 << 61  # 2**64 is twice that, and 2**62 words more.
    generator = BatchRandom(0).integers(range(1))
    generator.integers(high, size=4)
    end = 2**64 - 2**64 % high
    generator._words[0], generator._greatest = [end - 1, end, 5, 2**64 - 1], 2**64 - 1
    drawn = generator.integers(high, size=4)
    assert drawn[0] == high - 1 and drawn[2] == 5
    assert drawn[1] != 0 and drawn[3] != (2**64 - 1) % high


def test_integers_are_uniform_where_a_remainder_alone_would_not_be() -> None:
    # A quarter of all words, those of the last 2/3 * high below 2**64, would fall into the lower two thirds.
    high, num = 3 << 61, 64 * 3000
    integers = BatchRandom(0).integers(range(64)).integers(high, size=num)
    assert integers.min() >= 0 and integers.max() < high
    counts = np.bincount(integers // (1 << 61), minlength=3)
    assert (np.abs(counts - num / 3) < 5 * np.sqrt(num * 2 / 9)).all()


@given(st.integers(1, 50), st.integers(0, 1000))
@settings(max_examples=50)
def test_small_integers_are_all_drawn_alike(high, seed) -> None:
    num = 400 * high
    counts = np.bincount(BatchRandom(seed).integers(range(8)).integers(high, size=8 * num), minlength=high)
    assert len(counts) == high
    assert (np.abs(counts - 3200) < 6 * np.sqrt(3200)).all()


def test_what_is_drawn_together_is_not_drawn_twice_by_a_repeated_question() -> None:
    random = BatchRandom(0)
    first = random.integers(range(10)).integers(100, size=40).copy()
    changed = random.integers(range(10)).integers(100, size=40)
    changed[:] = -1
    np.testing.assert_array_equal(random.integers(range(10)).integers(100, size=40), first)
