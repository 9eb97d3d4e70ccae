"""Which array is what: by the names that the user gives, else by usual ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from buffers.interop.arrays import ArrayFile, as_flags
from buffers.interop.base import FormatError

__all__ = ["Roles", "find_roles"]

_FLAGS = ("terminated", "truncated", "done")
_USUAL = {
    "obs": ("observations", "obs", "observation"),
    "next_obs": ("next_observations", "next_obs", "next_observation"),
    "action": ("actions", "action"),
    "reward": ("rewards", "reward"),
    "terminated": ("terminals", "terminated", "terminations"),
    "truncated": ("timeouts", "truncated", "truncations"),
    "done": ("dones", "done"),
    "episode_ends": ("episode_ends",),
    "episode_starts": ("episode_starts", "is_first"),
}


@dataclass
class Roles:
    """The arrays of a source by what they are.

    Attributes:
        num_rows: N.
        trees: `role -> {name below it: array}` of "obs", "next_obs", "action", "reward", those that there are; the name
            is "" where the role is one array.
        flags: `field -> bool (N,)`.
        arrays_of_flags: `field -> array`.
        ends: As `find_bounds`.
        starts: As `find_bounds`.
        with_action: Arrays that come with the action.
        with_reward: Arrays that come with the reward.
        others: Arrays of N rows of which nothing is said.
        odd: Arrays of another number of rows.
    """

    num_rows: int
    trees: dict[str, dict[str, str]]
    flags: dict[str, np.ndarray] = field(default_factory=dict)
    arrays_of_flags: dict[str, str] = field(default_factory=dict)
    ends: np.ndarray | None = None
    starts: np.ndarray | None = None
    with_action: tuple[str, ...] = ()
    with_reward: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()


def find_roles(
    arrays: ArrayFile, given: Mapping[str, Any], with_action: Sequence[str] = (), with_reward: Sequence[str] = ()
) -> Roles:
    """The roles of the arrays of a source.

    Args:
        arrays: The source.
        given: `role -> name of an array, or of all below it`; for "obs" and "next_obs" also a mapping of such names by
            field; for bounds also their values. None for a usual name.
        with_action: Names of arrays.
        with_reward: Names of arrays.

    Raises:
        FormatError: An array is missing, has other rows, or could be two things.
    """
    finder = _Finder(arrays, given)
    found = {role: finder.tree(role) for role in ("obs", "next_obs", "action", "reward")}
    trees = {role: tree for role, tree in found.items() if tree}
    if "obs" not in trees:
        advice = f"Say which by `obs=`; it has {sorted(arrays.columns)}"
        if odd := [f"`{name}` holds {arrays.unread[name]}" for name in _USUAL["obs"] if name in arrays.unread]:
            advice = f"{odd[0]}: refused, save numbers, a row for each step. {advice}"
        raise FormatError(arrays.path, "None of its arrays has a usual name for observations", advice)
    roles = Roles(len(arrays.columns[next(iter(trees["obs"].values()))]), trees)
    for role in _FLAGS:
        name = finder.name(role)
        if name is not None:
            roles.flags[role] = as_flags(arrays.path, name, finder.column(role, name).all())
            roles.arrays_of_flags[role] = name
    roles.ends, roles.starts = finder.ends(), finder.starts(roles.num_rows)
    roles.with_action, roles.with_reward = (finder.named(names) for names in (with_action, with_reward))
    read = [*(name for tree in trees.values() for name in tree.values()), *roles.arrays_of_flags.values()]
    for name in (*read, *roles.with_action, *roles.with_reward):
        if len(arrays.columns[name]) != roles.num_rows:
            found_text = f"`{name}` has {len(arrays.columns[name])} rows, observations {roles.num_rows}"
            raise FormatError(arrays.path, found_text, "Name other arrays, or get a whole copy of it")
    if not roles.num_rows:
        raise FormatError(arrays.path, "It has no rows", "Get a whole copy of it")
    left = [name for name in arrays.columns if name not in finder.used]
    roles.others = tuple(name for name in left if len(arrays.columns[name]) == roles.num_rows)
    roles.odd = tuple(name for name in left if name not in roles.others)
    return roles


class _Finder:
    """Looks arrays up, and keeps which are used."""

    def __init__(self, arrays: ArrayFile, given: Mapping[str, Any]) -> None:
        self.arrays, self.given = arrays, given
        self.used: set[str] = set()
        # What the user names is not what it usually would be.
        self.named_by_user: set[str] = set()
        for value in given.values():
            names = [*value.values()] if isinstance(value, Mapping) else [value] if isinstance(value, str) else []
            self.named_by_user |= {leaf for name in names for leaf in self.below(name)}

    def below(self, name: str) -> list[str]:
        """The arrays that a name stands for."""
        return [leaf for leaf in self.arrays.columns if f"{leaf}/".startswith(f"{name}/")]

    def named(self, names: Sequence[str]) -> tuple[str, ...]:
        """Arrays that are named by the user."""
        if isinstance(names, str):
            raise TypeError(f"`with_action` and `with_reward` are sequences of names, found {names!r:.60}.")
        found = []
        for name in names:
            leaves = self.below(name)
            if not leaves:
                raise self.missing(name)
            found += leaves
        self.used |= {*found}
        return tuple(found)

    def name(self, role: str) -> str | None:
        """That of a role; None if there is no such array."""
        name = self.given.get(role)
        if name is None:
            usual = [n for n in _USUAL[role] if self.below(n) and not {*self.below(n)} & self.named_by_user]
            if len(usual) > 1:
                raise FormatError(self.arrays.path, f"{usual} could all be `{role}`", f"Say which by `{role}=`")
            name = usual[0] if usual else None
        elif not isinstance(name, str):
            raise TypeError(f"`{role}` must be the name of an array, found {name!r:.60}.")
        elif not self.below(name):
            raise self.missing(name)
        if name is not None:
            self.used |= {*self.below(name)}
        return name

    def missing(self, name: str) -> FormatError:
        """The error for a name that is not there."""
        known, odd = sorted(self.arrays.columns), self.arrays.unread.get(name)
        text = f"It has no array `{name}`" if odd is None else f"`{name}` is {odd}"
        return FormatError(self.arrays.path, text, f"Name one of {known}")

    def column(self, role: str, name: str) -> Any:
        """One array."""
        if name not in self.arrays.columns:
            raise FormatError(self.arrays.path, f"`{role}` is several arrays, {self.below(name)}", "Name one of them")
        return self.arrays.columns[name]

    def tree(self, role: str) -> dict[str, str]:
        """The arrays of a role by the names below it."""
        value = self.given.get(role)
        if not isinstance(value, Mapping):
            name = self.name(role)
            return {} if name is None else {leaf[len(name) + 1 :]: leaf for leaf in self.below(name)}
        found: dict[str, str] = {}
        for field_name, name in value.items():
            if not self.below(name):
                raise self.missing(name)
            found |= {f"{field_name}/{leaf[len(name) + 1 :]}".rstrip("/"): leaf for leaf in self.below(name)}
        self.used |= {*found.values()}
        return found

    def ends(self) -> np.ndarray | None:
        """Values of `episode_ends`."""
        return self._bounds("episode_ends")

    def starts(self, num_rows: int) -> np.ndarray | None:
        """Values of `episode_starts`: bool (N,), or rows."""
        values = self._bounds("episode_starts")
        if values is None:
            return None
        is_mask = values.dtype == bool or values.dtype.kind == "f" or (len(values) == num_rows and (values <= 1).all())
        return as_flags(self.arrays.path, "episode_starts", values) if is_mask else values

    def _bounds(self, role: str) -> np.ndarray | None:
        value = self.given.get(role)
        if value is None or isinstance(value, str):
            name = self.name(role)
            return None if name is None else self.column(role, name).all()
        return np.asarray(value)
