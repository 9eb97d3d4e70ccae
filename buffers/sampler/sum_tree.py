"""SumTree: draws numbers with probability proportional to weights that change."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from buffers.table import Int64Array

__all__ = ["Float64Array", "SumTree"]

Float64Array = npt.NDArray[np.float64]
_FAN_OUT = 32
# The highest level has up to so many nodes, which are summed up in each draw.
_MAX_TOP = 4096


class SumTree:
    """Weights `(n,)`, and above them levels of sums of 32 each, up to a short one.

    Sums are made anew of what is below, never by differences, so rounding errors do not grow, and two trees of the same
    weights draw the same.
    """

    def __init__(self, weights: Float64Array) -> None:
        self._levels: list[Float64Array] = []
        level = weights
        while True:
            padded = np.zeros(-(-max(1, len(level)) // _FAN_OUT) * _FAN_OUT)
            padded[: len(level)] = level
            self._levels.append(padded)
            if len(padded) <= _MAX_TOP:
                break
            level = np.add.reduce(padded.reshape(-1, _FAN_OUT), 1)
        self.num_leaves = len(self._levels[0])

    @property
    def weights(self) -> Float64Array:
        """The weights, and zeros behind them; do not write to them."""
        return self._levels[0]

    def total(self) -> float:
        """The sum of all weights."""
        return float(np.add.reduce(self._levels[-1]))

    def set(self, numbers: Int64Array, weights: Float64Array) -> None:
        """Change the weights of `numbers` `(n,)`."""
        self._levels[0][numbers] = weights
        for below, above in zip(self._levels, self._levels[1:], strict=False):
            if len(numbers) > len(below) // _FAN_OUT:
                numbers = np.arange(0, len(below), _FAN_OUT)
            numbers = numbers // _FAN_OUT
            above[numbers] = np.add.reduce(below.reshape(-1, _FAN_OUT).take(numbers, axis=0), 1)

    def clear(self, begin: int, end: int) -> None:
        """Set the weights [begin, end) to 0."""
        self._levels[0][begin:end] = 0.0
        for below, above in zip(self._levels, self._levels[1:], strict=False):
            begin, end = begin // _FAN_OUT, -(-end // _FAN_OUT)
            above[begin:end] = np.add.reduce(below.reshape(-1, _FAN_OUT)[begin:end], 1)

    def locate(self, u: Float64Array) -> Int64Array | None:
        """For `(k,)` in [0, 1): the number whose share of the total each lies in; None if the total is 0.

        By rounding, about one in 10**15 is another, which may have weight 0.
        """
        top = self._levels[-1]
        totals = np.add.accumulate(top)
        if totals[-1] <= 0:
            return None
        rest = u * totals[-1]
        number = totals.searchsorted(rest, "right")
        rest -= (totals - top).take(number, mode="clip")
        for level in self._levels[-2::-1]:
            children = level.reshape(-1, _FAN_OUT).take(number, axis=0, mode="clip")
            ends = torch.cumsum(torch.from_numpy(children), 1).numpy()
            # The first whose end is behind it.
            child = (ends <= rest[:, None]).argmin(1)
            number = number * _FAN_OUT + child
            if level is not self._levels[0]:
                at = np.arange(0, children.size, _FAN_OUT) + child
                rest -= ends.ravel().take(at) - children.ravel().take(at)
        return number
