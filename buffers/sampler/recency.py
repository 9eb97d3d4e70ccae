"""RecencySampler: the newer a window, the likelier."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from buffers.sampler.base import Sampler
from buffers.table import EpisodeTable, Int64Array, Windows
from buffers.utils import number

__all__ = ["RecencySampler"]


class RecencySampler(Sampler):
    """A window is half as likely as one that is `half_life` windows newer.

    The newest has age 0. With N windows and q = 2 ** (-1 / half_life), one of age a has probability
    q ** a * (1 - q) / (1 - q ** N), which is drawn in closed form. Whole episodes (T = None) are counted instead.

        >>> table = EpisodeTable()
        >>> for length in (3, 3, 3):
        ...     episode_id = table.append(length)
        >>> windows = RecencySampler(half_life=3).draw(table, 100_000, 1, np.random.default_rng(0))
        >>> (np.bincount(windows.episode) / 100_000).round(2)
        array([0.14, 0.29, 0.57])

    Args:
        half_life: In windows; more than 0.

    Raises:
        TypeError: `half_life` is no number.
        ValueError: It is out of its range.
    """

    def __init__(self, half_life: float) -> None:
        self.half_life = number("half_life", half_life, np.finfo(np.float64).tiny)

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """`Sampler.draw`: an age a window, by the inverse of its distribution."""
        num = table.num_to_draw(length)
        if num == 0:
            raise RuntimeError(table.no_window_message(length))
        rate = math.log(2) / self.half_life
        age = np.minimum(-np.log1p(rng.random(num_windows) * math.expm1(-num * rate)) / rate, num - 1).astype(np.int64)
        windows = table.windows_at(num - 1 - age, length)
        if table.context.has_weights:
            windows.density = self._density(num, age)
        return windows

    def density(self, table: EpisodeTable, windows: Windows) -> npt.NDArray[np.float64]:
        """As `Sampler.density`."""
        length = None if table.context.is_whole else windows.length
        num = table.num_to_draw(length)
        return self._density(num, num - 1 - table.places_of(windows, length))

    def _density(self, num: int, age: Int64Array) -> npt.NDArray[np.float64]:
        rate = math.log(2) / self.half_life
        return np.exp(-rate * age) * (num * math.expm1(-rate) / math.expm1(-num * rate))
