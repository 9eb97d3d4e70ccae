"""From T transitions to T + 1 rows aligned on arrival, and back.

A row has an observation and all that led to it, as a `Recorder` stores it:

    row                  0     1     2    ...   T
    obs                  o0    o1    o2         oT
    action               0     a0    a1         aT-1     taken at the observation of the row before
    reward               0     r1    r2         rT       received on arriving
    terminated           -     -     -          x        either, or both
    truncated            -     -     -          x
    is_first             x     -     -          -
    final_obs_missing    -     -     -          x        oT is not known, and repeats oT-1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from buffers.conversion import as_array
from buffers.fields import nested

__all__ = [
    "FINAL_MISSING",
    "MARKS",
    "Transitions",
    "arrays_in",
    "first_gap",
    "mapped",
    "rows_on_arrival",
    "transitions_of",
    "unflattened",
]

FINAL_MISSING = "final_obs_missing"
#: Fields that say what a row is.
MARKS = ("is_first", FINAL_MISSING)


def mapped(tree: Any, function: Any, path: str = "") -> Any:
    """A tree of dicts with `function(name, leaf)` in place of each leaf; names are joined by "/"."""
    if not isinstance(tree, Mapping):
        return function(path, tree)
    return {key: mapped(value, function, f"{path}/{key}" if path else key) for key, value in tree.items()}


def arrays_in(tree: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of each leaf of a tree of dicts."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from arrays_in(value, f"{path}/{key}" if path else key)
    else:
        yield path, as_array(path, tree)


def unflattened(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts for names joined by "/"."""
    return nested((name.split("/"), leaf) for name, leaf in leaves.items())


def rows_on_arrival(
    observations: Any,
    steps: Mapping[str, Any],
    *,
    more: Mapping[str, Any] | None = None,
    final_missing: bool | None = None,
) -> dict[str, Any]:
    """The rows of an episode of T transitions, `field -> (T + 1, *shape)`.

    Args:
        observations: A tree of `(T + 1, *shape)`; of `(T, *shape)` if the final one is missing, T at least 1.
        steps: `name -> tree of (T, *shape)` of what belongs to transitions: "action", "reward", "terminated",
            "truncated", and others. Row 0 gets zeros.
        more: `name -> tree of (T + 1, *shape)`: fields that have a value for each row.
        final_missing: Whether the final observation is missing. The field `final_obs_missing` says so; None leaves it
            out, for formats that always have it.

    Raises:
        ValueError: Arrays of other lengths; names the field.
    """
    leaves = [*arrays_in(steps)]
    observed_leaves = [*arrays_in(observations, "obs")]
    if not observed_leaves:
        raise ValueError("`obs` is empty: an episode needs observations.")
    if twice := {"obs", *MARKS} & {*steps, *(more or {})} | {*steps} & {*(more or {})}:
        raise ValueError(f"{sorted(twice)} would be fields twice. Name what belongs to transitions otherwise.")
    num_steps = len(leaves[0][1]) if leaves else len(observed_leaves[0][1]) - (not final_missing)
    expected = num_steps + (not final_missing)

    def observed(name: str, value: Any) -> np.ndarray:
        array = as_array(name, value)
        _check_length(name, array, expected)
        return np.concatenate([array, array[-1:]]) if final_missing else array

    def arrived(name: str, value: Any) -> np.ndarray:
        array = as_array(name, value)
        _check_length(name, array, num_steps)
        rows = np.empty((num_steps + 1, *array.shape[1:]), array.dtype)
        rows[:1], rows[1:] = 0, array
        return rows

    def kept(name: str, value: Any) -> np.ndarray:
        _check_length(name, as_array(name, value), num_steps + 1)
        return value

    if final_missing and not num_steps:
        raise ValueError("`obs` has no row: an episode without its final observation needs at least one transition.")
    flags = {"is_first": np.arange(num_steps + 1) == 0}
    if final_missing is not None:
        flags[FINAL_MISSING] = np.arange(num_steps + 1) == (num_steps if final_missing else -1)
    known = [name for name in ("action", "reward", "terminated", "truncated") if name in steps]
    others = [name for name in steps if name not in known]
    return {
        "obs": mapped(observations, observed, "obs"),
        **{name: mapped(steps[name], arrived, name) for name in known},
        **flags,
        **{name: mapped(steps[name], arrived, name) for name in others},
        **{name: mapped(value, kept, name) for name, value in (more or {}).items()},
    }


def _check_length(name: str, array: np.ndarray, expected: int) -> None:
    if array.ndim == 0 or len(array) != expected:
        raise ValueError(f"`{name}` has shape {array.shape}, expected {expected} rows")


def first_gap(observations: np.ndarray, following: np.ndarray) -> int | None:
    """The first transition whose next observation is not the observation of the one behind it; None if all are.

    Args:
        observations: Of the transitions of an episode, `(T, *shape)`.
        following: Their next observations, `(T, *shape)`; NaN equals itself.
    """
    now, after = observations[1:], following[:-1]
    if np.array_equal(now, after, equal_nan=now.dtype.kind in "fc"):
        return None
    is_equal = (now == after) | ((now != now) & (after != after))
    return int(np.argmin(is_equal.reshape(len(now), -1).all(1)))


class Transitions(NamedTuple):
    """An episode as most formats have it."""

    observations: Any  # Tree of (T + 1, *shape).
    steps: dict[str, Any]  # name -> tree of (T, *shape): everything that is not an observation.
    first: dict[str, Any]  # name -> tree of (*shape): row 0 of the same, which is zero in what a Recorder records.
    final_missing: bool

    @property
    def num_steps(self) -> int:
        """T."""
        return len(next(arrays_in(self.observations))[1]) - 1

    def losses(self) -> Iterator[str]:
        """Names of the fields whose row 0 is not zero, so that a format with T values loses it."""
        for name, value in arrays_in(self.first):
            if np.any(value):
                yield name


def transitions_of(rows: Mapping[str, Any]) -> Transitions:
    """The transitions of an episode whose rows are aligned on arrival.

    Args:
        rows: `field -> (L, *shape)`, which may be nested, with the field `obs`.

    Raises:
        ValueError: There is no field `obs`, or an episode goes on behind a row that is marked as first.
    """
    if "obs" not in rows:
        raise ValueError(
            f"Formats need the field `obs`, and `action`, aligned on arrival as a Recorder stores them. Found "
            f"{list(rows)}."
        )
    arrays = mapped(rows, as_array)
    if np.any(arrays.get("is_first", np.zeros(1))[1:]):
        raise ValueError("A row behind row 0 has `is_first`. Export episodes, each of which begins with its first row.")
    steps = {name: value for name, value in arrays.items() if name != "obs" and name not in MARKS}
    return Transitions(
        arrays["obs"],
        mapped(steps, lambda _, value: value[1:]),
        mapped(steps, lambda _, value: value[0]),
        bool(np.any(arrays.get(FINAL_MISSING, False))),
    )
