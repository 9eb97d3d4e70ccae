"""What a row of a flat array can mean, and where episodes then lie.

An episode of T transitions, whose first row is row 0 here; o is an observation, a(t) the action taken at o(t), r(t + 1)
the reward for it, which comes with o(t + 1):

                   rows     row t holds               the row with the flag
    transitions    T        o(t), a(t), r(t + 1)      T - 1, that of the last action
    extra_row      T + 1    o(t), a(t), r(t + 1)      T, which is only an observation
    arrival        T + 1    o(t), a(t - 1), r(t)      T
    next_action    T + 1    o(t), a(t), r(t)          T
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["Bounds", "CONVENTIONS", "Convention", "UnfitError", "few", "find_bounds", "flags_of_episodes"]


class Convention(NamedTuple):
    """A row of the table."""

    num_extra: int  # Rows of an episode besides its transitions.
    action_lag: int  # a(t) is in row t + lag.
    reward_lag: int  # r(t + 1) is in row t + lag.
    meaning: str


CONVENTIONS = {
    "transitions": Convention(0, 0, 0, "a row has an observation, the action taken at it, and the reward for that"),
    "extra_row": Convention(1, 0, 0, "as before, but an episode's last row is only an observation"),
    "arrival": Convention(1, 1, 1, "a row has an observation, and the action and reward that led to it"),
    "next_action": Convention(1, 0, 1, "a row has an observation, the reward that came with it, and the next action"),
}


class UnfitError(ValueError):
    """Arrays that a convention excludes; the text says what was found."""


class Bounds(NamedTuple):
    """Rows [start, stop) of each episode."""

    starts: np.ndarray  # int64 (E,)
    stops: np.ndarray
    is_open: bool  # Whether the last one has no end: it is a recording that was cut.
    by_flags: bool  # Whether flags say where they end, and not arrays of bounds.


def find_bounds(
    num_rows: int, flags: Mapping[str, np.ndarray], ends: np.ndarray | None, starts: np.ndarray | None
) -> Bounds:
    """From bounds where they are given, else from flags.

    Args:
        num_rows: N.
        flags: `name -> bool (N,)`, each set on the last rows of episodes.
        ends: For each episode, the number of rows up to its end; or None.
        starts: The first row of each, or bool (N,), set there; or None.

    Raises:
        UnfitError: They contradict each other, or say nothing.
    """
    found = None
    if ends is not None:
        found = _increasing("episode_ends", ends, num_rows)
        if found[-1] != num_rows or found[0] == 0:
            raise UnfitError(
                f"`episode_ends` are counts of rows up to the end of an episode, {num_rows} for the last; "
                f"found {few(found)} with {found[-1]} for the last"
            )
    if starts is not None:
        rows = np.flatnonzero(starts) if starts.dtype == bool else _increasing("episode_starts", starts, num_rows)
        if not len(rows) or rows[0] != 0 or rows[-1] >= num_rows:
            raise UnfitError(f"`episode_starts` are the first rows of episodes, of {num_rows} rows, found {few(rows)}")
        stops = np.append(rows[1:], num_rows)
        if found is not None and not np.array_equal(found, stops):
            raise UnfitError(f"`episode_starts` {few(rows)} do not fit `episode_ends` {few(found)}")
        found = stops
    if found is not None:
        return Bounds(np.append(0, found[:-1]), found, False, False)
    if not flags:
        raise UnfitError("no array says where episodes end")
    stops = np.flatnonzero(np.logical_or.reduce([*flags.values()])) + 1
    is_open = not len(stops) or bool(stops[-1] < num_rows)
    stops = np.append(stops, num_rows) if is_open else stops
    return Bounds(np.append(0, stops[:-1]), stops, is_open, True)


def _increasing(name: str, values: np.ndarray, num_rows: int) -> np.ndarray:
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu":
        raise UnfitError(f"`{name}` are {values.dtype} {values.shape}, expected integers, one for each episode")
    found = values.astype(np.int64)
    if (np.diff(found) <= 0).any() or found[0] < 0 or found[-1] > num_rows:
        raise UnfitError(f"`{name}` must ascend, within {num_rows} rows, found {few(found)}")
    return found


def flags_of_episodes(name: str, bounds: Bounds, flags: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`flag -> bool (E,)`: those with which the episodes end under the convention of this name.

    Raises:
        UnfitError: An episode without a transition; a flag within an episode.
    """
    convention = CONVENTIONS[name]
    lengths = bounds.stops - bounds.starts - convention.num_extra
    closed = lengths[:-1] if bounds.is_open else lengths
    if bounds.by_flags and (closed < 1).any():
        first = int(bounds.starts[np.flatnonzero(closed < 1)[0]])
        raise UnfitError(f"row {first} is an episode by itself, without a transition")
    last = bounds.stops - 1
    # A flag lies with the last action, or marks the last row. Either will do where something else says the bounds.
    before = np.maximum(last - 1, bounds.starts) if name == "extra_row" and not bounds.by_flags else last
    may_be_set = np.zeros(int(bounds.stops[-1]), bool)
    may_be_set[last] = may_be_set[before] = True
    for flag, values in flags.items():
        if (values & ~may_be_set).any():
            raise UnfitError(f"`{flag}` is set in row {int(np.argmax(values & ~may_be_set))}, within an episode")
    return {flag: values[last] | values[before] for flag, values in flags.items()}


def few(values: np.ndarray) -> str:
    """The first of them, as text."""
    return ", ".join(map(str, values[:4].tolist())) + (", ..." if len(values) > 4 else "")
