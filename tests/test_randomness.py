"""What is drawn for batch n depends on the seed, n and the attempt, and not on what was asked before."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.randomness import BatchRandom
from buffers.sampler import integers_below


class Words(np.random.Philox):
    """A bit generator that gives these words first, and then fives."""

    def __init__(self, *words: int) -> None:
        super().__init__()
        self.words = list(words)

    def random_raw(self, size):  # type: ignore[override]
        given, self.words = self.words[:size], self.words[size:]
        return np.array(given + [5] * (size - len(given)), np.uint64)


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


@pytest.mark.parametrize("high", [1, 2, 2**63])
def test_where_words_divide_evenly_the_greatest_is_as_good_as_any(high) -> None:
    rng = np.random.Generator(Words(*[2**64 - 1] * 4))
    assert integers_below(rng, high, 4).tolist() == [high - 1] * 4


@pytest.mark.parametrize("as_array", [False, True])
def test_the_first_unfair_word_is_replaced_and_the_last_fair_one_stays(as_array) -> None:
    high = 3 << 61  # 2**64 is twice that, and 2**62 words more.
    end = 2**64 - 2**64 % high
    rng = np.random.Generator(Words(end - 1, end, 5, 2**64 - 1, 2**64 - 2, 7))
    drawn = integers_below(rng, np.full(4, high) if as_array else high, 4)
    # The second word is replaced by another unfair one, which is replaced in turn.
    assert drawn.tolist() == [high - 1, 5, 5, 7]


def test_integers_are_uniform_where_a_remainder_alone_would_not_be() -> None:
    # A quarter of all words, those of the last 2/3 * high below 2**64, would fall into the lower two thirds.
    high, num = 3 << 61, 64 * 3000
    integers = integers_below(BatchRandom(0).generator(0), high, num)
    assert integers.min() >= 0 and integers.max() < high
    counts = np.bincount(integers // (1 << 61), minlength=3)
    assert (np.abs(counts - num / 3) < 5 * np.sqrt(num * 2 / 9)).all()


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
