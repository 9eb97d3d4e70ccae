"""How an episode was cut out of a longer stream, by `max_episode_length`: a code, 0 for a whole episode.

A stream of 8 rows in pieces of 4 that overlap by 1. Windows of at least one row that is no context exist once:

    stream     0 1 2 3 4 5 6 7           context   code
    piece 0    0 1 2 3                   0         GOES_ON
    piece 1          3 4 5 6             1         1 << 2 | CONTINUES | GOES_ON
    piece 2                6 7           1         1 << 2 | CONTINUES
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["CONTINUES", "GOES_ON", "context_of", "continuing"]

GOES_ON = 1  # There is a piece behind it, so its last row is no last step.
CONTINUES = 2  # There is a piece before it, so its first row is no first step.

Codes = TypeVar("Codes", int, npt.NDArray[np.int64])


def continuing(context: int) -> int:
    """The code of a piece that begins with so many rows of the piece before it."""
    return context << 2 | CONTINUES


def context_of(cut: Codes) -> Codes:
    """The rows at its beginning that the piece before it ends with, of one code or of many."""
    return cut >> 2
