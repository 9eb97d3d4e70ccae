"""Which save has the rows of which episode.

places    [(0, 40, 3), (40, 47, 5)]     episodes 0 to 39 are in the file of save 3, 40 to 46 in that of save 5
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from buffers.table import Int64Array

__all__ = ["NOWHERE", "Places", "files_to_pack", "ids_in", "numbers_of", "places_of", "runs_of"]

#: Ascending, without overlaps: episodes with ids in [first, end) that live are in the file of the save of this number.
Places = list[tuple[int, int, int]]
NOWHERE = -1
# So many bytes of what is gone may lie beside as many as are there, and so many files, before some are packed anew.
_SPARE_BYTES, _MOST_FILES = 2**24, 256


def numbers_of(places: Places, ids: Int64Array) -> Int64Array:
    """The number of the save that has each episode `(n,)`, or NOWHERE."""
    found = np.array([*places, (0, 0, NOWHERE)], np.int64)
    return found[_index_in(found[:-1, :2], ids), 2]


def places_of(ids: Int64Array, numbers: Int64Array) -> Places:
    """The places of live episodes: ids `(n,)`, ascending, and the number of the save that has each."""
    return [(first, end, number) for first, end, number in _runs(ids, numbers).tolist()]


def runs_of(ids: Int64Array) -> Int64Array:
    """Ascending ids `(n,)` as runs without gaps, int64 `(m, 2)`: first and end."""
    return _runs(ids, ids - np.arange(len(ids)))[:, :2]


def ids_in(runs: Int64Array, ids: Int64Array) -> npt.NDArray[np.bool_]:
    """Which ids `(n,)` lie in one of the runs `(m, 2)`."""
    return _index_in(runs, ids) >= 0


def _index_in(spans: Int64Array, ids: Int64Array) -> Int64Array:
    """The number of the span [first, end), of ascending ones `(m, 2)`, that has each id `(n,)`, or -1."""
    at = spans[:, 0].searchsorted(ids, "right") - 1
    return np.where((at >= 0) & (ids < np.append(spans[:, 1], 0)[at]), at, -1)


def _runs(ids: Int64Array, values: Int64Array) -> Int64Array:
    """Runs of equal values `(n,)`, int64 `(m, 3)`: the first of their ids, which ascend, the last plus 1, the value."""
    is_first = np.diff(values, prepend=values[:1] - 1) != 0
    is_last = np.diff(values, append=values[-1:] + 1) != 0
    return np.stack([ids[is_first], ids[is_last] + 1, values[is_first]], 1)


def files_to_pack(file_bytes: Mapping[int, int], live_bytes: Mapping[int, int]) -> set[int]:
    """The saves whose live rows are to be written anew: those that stay shall have not much more, and be not many."""
    dead = {number: size - live_bytes.get(number, 0) for number, size in file_bytes.items()}
    chosen: set[int] = set()
    while sum(dead.values()) > sum(live_bytes.values()) + _SPARE_BYTES:
        most = max(dead, key=lambda number: dead[number])
        del dead[most]
        chosen.add(most)
    if len(dead) >= _MOST_FILES:
        # Half of them, the smallest, so that it is not to be done again soon.
        chosen |= set(sorted(dead, key=lambda number: live_bytes.get(number, 0))[: len(dead) // 2])
    return chosen
