"""Randomness of batch n: a function of (seed, n, attempt), by the counter-based generator Philox.

Its key comes from the seed. Its counter of 256 bits, lowest word first, starts at 0, 0, n, attempt.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BatchRandom"]


class BatchRandom:
    """The generators for the batches of a stream, from a seed of at least 0."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self._bits = np.random.Philox(key=key)
        self._generator = np.random.Generator(self._bits)
        self._state: Any = {**self._bits.state, "state": {"key": key.tolist()}}

    def __reduce__(self) -> tuple[type[BatchRandom], tuple[int]]:
        return BatchRandom, (self.seed,)

    def generator(self, n: int, attempt: int = 0) -> np.random.Generator:
        """The generator for an attempt at batch n. Invalidates the generator returned before."""
        # Setting the counter is faster than making a generator.
        self._state["state"]["counter"] = (0, 0, n, attempt)
        self._bits.state = self._state
        return self._generator
