"""Numbers that one process changes while others draw with them: weights of a mixture, exponents of a sampler."""

from __future__ import annotations

import copyreg
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import numpy.typing as npt

from buffers.sharing.arrays import SharedArrays
from buffers.sharing.published_table import fence
from buffers.table import Int64Array

__all__ = ["Float64Array", "SharedNumbers", "SharedWeights", "shares"]

Float64Array = npt.NDArray[np.float64]
# Shares this close to a whole number, relative to the batch, differ from it by rounding errors only.
_TOLERANCE = 1e-9
_RESOLUTION = 1 << 32
_EPSILON = float(np.finfo(np.float64).eps)


class SharedNumbers:
    """A few float64 that one process sets and all see, always together.

    A change is written to the one of two places that is not in use; storing `version` then switches places.
    """

    def __init__(self, num: int) -> None:
        int64, float64 = np.dtype(np.int64), np.dtype(np.float64)
        self._memory = SharedArrays({"version": ((1,), int64), "numbers": ((2, num), float64)})

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            # Sent to somebody who cannot see the memory, such as an actor of Ray: a copy, as of now.
            return _copied, (type(self), self.get())
        return copyreg.__newobj__, (type(self),), self.__dict__  # type: ignore[attr-defined]

    def get(self) -> Float64Array:
        """The numbers, `(num,)`, as a copy that cannot be written to."""
        version, numbers = self._memory["version"], self._memory["numbers"]
        while True:
            before = int(version[0])
            fence()
            found = numbers[before % 2].copy()
            fence()
            if int(version[0]) == before:
                found.flags.writeable = False  # Setting them there would change nothing.
                return found

    def set(self, numbers: Any) -> None:
        """Set all of them."""
        version = int(self._memory["version"][0])
        self._memory["numbers"][(version + 1) % 2] = numbers
        fence()
        self._memory["version"][0] = version + 1


def _copied(kind: type[SharedNumbers], numbers: Float64Array) -> SharedNumbers:
    copied = kind(len(numbers))
    SharedNumbers.set(copied, numbers)
    return copied


class SharedWeights(SharedNumbers):
    """Numbers that sum to 1."""

    def set(self, numbers: Any) -> None:
        """Set weights, which are divided by their sum; TypeError or ValueError if they are not valid."""
        super().set(_checked(numbers, self._memory["numbers"].shape[1]))


def _checked(weights: Any, num: int) -> Float64Array:
    try:
        found = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"`weights` must be numbers, found {weights!r:.80}.") from None
    if found.shape != (num,):
        raise ValueError(f"`weights` must be {num} numbers, one a member, found shape {found.shape}.")
    if not (np.isfinite(found) & (found >= 0)).all() or not found.any():
        raise ValueError(f"`weights` must be finite, at least 0, and not all 0, found {found.tolist()}.")
    if found.max() <= 1 and abs(float(found.sum()) - 1) <= num * _EPSILON:
        return found.copy()  # As `get` has returned them: they stay the same to the last bit.
    found = found / found.max()  # The sum of large ones might overflow.
    return found / found.sum()


def shares(weights: Float64Array, num: int, rng: np.random.Generator) -> Int64Array:
    """Split `num` by weights of sum 1: each part, and each run of parts, is its share rounded up or down at random.

    On average each is exact. The teeth of a comb, whose beginning is drawn, are counted between running totals:

        weights 0.25 0.25 0.5, num 3       shares  0.75  0.75  1.5
        totals   0    0.75    1.5     3            begins at 0.1: teeth 0.1 | 1.1 | 2.1     1 1 1
                 |-----|-------|------|            begins at 0.6: teeth 0.6 | - | 1.6 2.6   1 0 2
    """
    begin = rng.integers(_RESOLUTION) / _RESOLUTION
    totals = np.cumsum(weights) * num
    whole = np.rint(totals)
    totals = np.where(np.abs(totals - whole) <= _TOLERANCE * num, whole, totals)
    totals[-1] = num
    ends = np.ceil(totals - begin).astype(np.int64)
    ends[1:] -= ends[:-1].copy()
    return ends
