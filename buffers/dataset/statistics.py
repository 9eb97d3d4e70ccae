"""Mean, deviation and range of what a dataset holds, in one pass and in bounded memory, taken up where it ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from buffers.table import Selection, context_of
from buffers.utils import ThreadLock, tqdm_class

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource, Rows

__all__ = ["FieldStatistics", "RunningStatistics", "statistics_of"]

_NUMBERS_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class FieldStatistics:
    """Of a field over all rows, element by element: tensors `(*shape)` on the CPU, NaN where all values are NaN.

    Values that are infinite, or whose squares are, make mean and deviation of their element NaN.
    """

    count: torch.Tensor  # int64, values that are not NaN.
    mean: torch.Tensor  # float64, as the others.
    std: torch.Tensor  # Of the population: the root of the mean squared deviation.
    min: torch.Tensor
    max: torch.Tensor


class _Moments(NamedTuple):
    """Of values along an axis; `squares` is the sum of squared deviations from the mean."""

    num: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    min: np.ndarray
    max: np.ndarray


class RunningStatistics:
    """What has been counted of a dataset that is no mixture."""

    def __init__(self) -> None:
        # The moments of some episodes, the first so many of these. Replaced at once, so that no error counts one twice.
        self._state: tuple[dict[str, _Moments], int] = {}, 0
        self._counted: list[int] = []
        self._lock = ThreadLock()

    def __reduce__(self) -> tuple[type[RunningStatistics], tuple[()]]:
        return RunningStatistics, ()

    def update(self, source: EpisodeSource, progress: bool) -> dict[str, _Moments] | None:
        """Count the live episodes that are not counted yet, or all if one that was has left; None if there is none."""
        with self._lock:
            source.can_draw(None, Selection())  # So the table shows what other processes have added.
            cuts = {episode_id: cut for _, _, episode_id, cut in source.table.rows.tolist()}
            del self._counted[self._state[1] :]
            if not cuts.keys() >= {*self._counted}:
                self._state, self._counted = ({}, 0), []
            new = sorted(cuts.keys() - {*self._counted})
            for episode_id in _with_bar(new) if progress else new:
                rows = source.rows_of_id(episode_id)
                if rows is not None:
                    # The rows before are those of the piece before it.
                    self._counted.append(episode_id)
                    self._state = self._added(rows, context_of(cuts[episode_id])), len(self._counted)
            return self._state[0] if self._counted else None

    def _added(self, rows: Rows, first: int) -> dict[str, _Moments]:
        moments = dict(self._state[0])
        for name, tensor in rows.items():
            if not tensor.is_complex():
                size = max(1, _NUMBERS_AT_A_TIME // max(1, tensor[0].numel()))
                parts = [_moments(part.cpu().double().numpy()) for part in tensor[first:].split(size)]
                moments[name] = reduce(_merged, parts if name not in moments else [moments[name], *parts])
        return moments


def statistics_of(source: EpisodeSource, progress: bool) -> dict[str, FieldStatistics]:
    """The statistics of all datasets that hold the episodes of a source; see `EpisodeSource.statistics`."""
    updated = [leaf.running_statistics.update(leaf, progress) for leaf in source.leaves]
    counted = [moments for moments in updated if moments is not None]
    if not counted:
        raise RuntimeError("The dataset is empty, so it has no statistics. Add a complete episode first.")
    source.check_drawable()
    # A reader may know its fields only now. Complex ones have no moments.
    numbers = [name for name in source.fields or () if name in counted[0]]
    return {name: _finished(reduce(_merged, [moments[name] for moments in counted])) for name in numbers}


# Infinite values give NaN.
@np.errstate(over="ignore", invalid="ignore")
def _moments(values: np.ndarray) -> _Moments:
    """Of float64 `(n, *shape)`, along the first axis."""
    is_number = ~np.isnan(values)
    num = is_number.sum(0)
    divisor = np.maximum(num, 1)
    mean = np.where(is_number, values, 0).sum(0) / divisor
    deviations = np.where(is_number, values - mean, 0)
    # What rounding has left out of the mean of large numbers.
    rest = deviations.sum(0) / divisor
    squares = np.maximum((deviations**2).sum(0) - num * rest**2, 0)
    low, high = np.fmin.reduce(values, 0, initial=np.inf), np.fmax.reduce(values, 0, initial=-np.inf)
    return _Moments(num, mean + rest, squares, low, high)


@np.errstate(over="ignore", invalid="ignore")
def _merged(one: _Moments, other: _Moments) -> _Moments:
    """Of the values of both: Chan, Golub and LeVeque, "Updating formulae ... for computing sample variances", 1979."""
    num, delta = one.num + other.num, other.mean - one.mean
    share = other.num / np.maximum(num, 1)
    squares = one.squares + other.squares + delta**2 * one.num * share
    low, high = np.minimum(one.min, other.min), np.maximum(one.max, other.max)
    return _Moments(num, one.mean + delta * share, squares, low, high)


@np.errstate(divide="ignore", invalid="ignore")
def _finished(moments: _Moments) -> FieldStatistics:
    num, mean, squares, low, high = moments
    values = [np.where(num, found, np.nan) for found in (mean, np.sqrt(squares / num), low, high)]
    # Copies, which the caller may change.
    return FieldStatistics(*(torch.tensor(value, device="cpu") for value in (num, *values)))


def _with_bar(episodes: list[int]) -> Iterable[int]:
    return tqdm_class()(episodes, desc="statistics", unit="episode")
