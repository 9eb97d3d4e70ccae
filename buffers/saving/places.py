"""Which save has the rows of which episode.

places    [(0, 40, 3), (40, 47, 5)]     episodes 0 to 39 are in the file of save 3, 40 to 46 in that of save 5
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["NOWHERE", "Places", "files_to_pack", "ids_in", "numbers_of", "places_of", "runs_of"]

Int64Array = npt.NDArray[np.int64]
#: Ascending, without overlaps: episodes with ids in [first, end) that live are in the file of the save of this number.
Places = list[tuple[int, int, int]]
NOWHERE = -1
# So many bytes of what is gone may lie beside as many as are there, and so many files, before some are packed anew.
_SPARE_BYTES, _MOST_FILES = 2**24, 256


def numbers_of(places: Places, ids: Int64Array) -> Int64Array:
    """The number of the save that has each episode `(n,)`, or NOWHERE."""
    if not places:
        return np.full(len(ids), NOWHERE)
    first, end, number = np.array(places, np.int64).T
    at = np.maximum(first.searchsorted(ids, "right") - 1, 0)
    return np.where((ids >= first[at]) & (ids < end[at]), number[at], NOWHERE)


def places_of(ids: Int64Array, numbers: Int64Array) -> Places:
    """The places of live episodes: ids `(n,)`, ascending, and the number of the save that has each."""
    if not len(ids):
        return []
    begins = np.concatenate([np.zeros(1, np.int64), (np.diff(numbers) != 0).nonzero()[0] + 1])
    ends = np.append(begins[1:], len(ids)) - 1
    return list(zip(ids[begins].tolist(), (ids[ends] + 1).tolist(), numbers[begins].tolist(), strict=True))


def runs_of(ids: Int64Array) -> Int64Array:
    """Ascending ids `(n,)` as runs without gaps, int64 `(m, 2)`: first and end."""
    begins = np.concatenate([np.zeros(min(len(ids), 1), np.int64), (np.diff(ids) != 1).nonzero()[0] + 1])
    ends = np.append(begins[1:], len(ids))[: len(begins)] - 1
    return np.stack([ids[begins], ids[ends] + 1], 1)


def ids_in(runs: Int64Array, ids: Int64Array) -> npt.NDArray[np.bool_]:
    """Which ids `(n,)` lie in one of the runs."""
    if not len(runs):
        return np.zeros(len(ids), np.bool_)
    at = np.maximum(runs[:, 0].searchsorted(ids, "right") - 1, 0)
    return (ids >= runs[at, 0]) & (ids < runs[at, 1])


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
