"""Randomness of batch n: a function of (seed, n), by a counter-based generator, for one batch or for many at once.

Philox makes words from a key, which comes from the seed, and a counter of 256 bits, which says what they are for:

    counter, lowest word first    0, 0, n, attempt     a generator for batch n, whatever a sampler asks of it
                                  k, 0, 0, -1          words for all batches, one behind the other, for integers only
                                  0, 0, n, -2          instead of words of batch n that would not be fair
"""

from __future__ import annotations

from typing import Any

import numpy as np

from buffers.dataset.cumulation import Int64Array

__all__ = ["BatchRandom", "IntegersOfBatches"]

_WORDS_PER_COUNT = 4
_OF_ALL, _INSTEAD = 2**64 - 1, 2**64 - 2
# Asking for words costs more than making them: those of some batches are made with the first.
_MAX_BATCHES, _MAX_WORDS = 32, 1 << 16


class _Counter:
    """A Philox generator of which the counter can be set: that takes 1.4 us, and a new generator 8 us."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.Philox(key=np.random.SeedSequence(seed).generate_state(2, np.uint64))
        self._state: Any = self.bits.state

    def start(self, *words: int) -> None:
        """Begin at a counter, given by its words from the lowest on."""
        self._state["state"]["counter"][:] = words
        self.bits.state = self._state


class BatchRandom:
    """Randomness of the batches of a stream.

    Args:
        seed: At least 0.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._counter = _Counter(seed)
        self._generator = np.random.Generator(self._counter.bits)
        self._integers = IntegersOfBatches(seed)

    def __reduce__(self) -> tuple[type[BatchRandom], tuple[int]]:
        return BatchRandom, (self.seed,)

    def generator(self, n: int, attempt: int = 0) -> np.random.Generator:
        """The generator for an attempt at batch n; the one for another is not to be used any more."""
        self._counter.start(0, 0, n, attempt)
        return self._generator

    def integers(self, numbers: range) -> IntegersOfBatches:
        """The generator of integers of batches, ascending; the one for others is not to be used any more."""
        self._integers.numbers = numbers
        return self._integers


class IntegersOfBatches(np.random.Generator):
    """What a sampler is given that asks its generator once, for integers: those of batches, one behind the other.

    Args:
        seed: At least 0.
    """

    def __init__(self, seed: int) -> None:
        self._counter = _Counter(seed)
        super().__init__(self._counter.bits)
        self.numbers = range(0)
        # Words of batches from `_first` on, a row of `_size` each, and the greatest of them.
        self._words = np.empty((0, 0), np.uint64)
        self._first = self._size = self._greatest = 0

    def integers(self, high: int, *, size: int) -> Int64Array:  # type: ignore[override]
        """Integers, each of [0, high) equally likely: as many of each batch, `size` together."""
        words = self._words_of(self.numbers, size // len(self.numbers))
        divisor = np.uint64(high)
        integers: Int64Array = (words % divisor).view(np.int64)
        # From the last multiple of `high` on, words would favour small integers. Hardly ever is there one.
        if self._greatest >= 2**64 - high:
            self._replace(integers, words > np.uint64(2**64 - 1 - 2**64 % high), high)
        return integers

    def _words_of(self, numbers: range, size: int) -> np.ndarray:
        """The words of batches, `size` of each."""
        begin, span = numbers.start - self._first, numbers[-1] - numbers.start + 1
        if size != self._size or not 0 <= begin <= len(self._words) - span:
            self._make_words(numbers.start, span, size)
            begin = 0
        if span == 1:
            return self._words[begin]
        return self._words[begin : begin + span : numbers.step].reshape(-1)

    def _make_words(self, first: int, num: int, size: int) -> None:
        counts = -(-size // _WORDS_PER_COUNT)
        width = counts * _WORDS_PER_COUNT
        num = max(num, min(_MAX_BATCHES, _MAX_WORDS // width))
        count = first * counts
        self._counter.start(count % 2**64, count >> 64, 0, _OF_ALL)
        self._words = self._counter.bits.random_raw(num * width).reshape(num, width)[:, :size]
        self._first, self._size, self._greatest = first, size, int(self._words.max())

    def _replace(self, integers: Int64Array, is_unfair: np.ndarray, high: int) -> None:
        """Draw some of them anew."""
        per_batch = integers.reshape(len(self.numbers), -1)
        is_unfair = is_unfair.reshape(per_batch.shape)
        for row in is_unfair.any(axis=1).nonzero()[0].tolist():
            self._counter.start(0, 0, self.numbers[row], _INSTEAD)
            per_batch[row, is_unfair[row]] = super().integers(high, size=int(is_unfair[row].sum()))
