"""The reader of flat arrays, and what it says where their meaning is not known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from buffers.interop.alignment import first_gap, rows_on_arrival
from buffers.interop.arrays import ArrayFile, in_order, note_unread, tree_of
from buffers.interop.base import Episode, FormatReader, note_absence
from buffers.interop.flat.conventions import CONVENTIONS, UnfitError, few, find_bounds, flags_of_episodes
from buffers.interop.flat.roles import Roles

__all__ = ["FlatReader"]

_RESERVED = ("obs", "action", "reward", "terminated", "truncated", "done", "is_first", "final_obs_missing")
_HOW_ENDS = "Say where episodes end: `terminated=`, `truncated=`, `done=`, `episode_ends=` or `episode_starts=`"


class FlatReader(FormatReader):
    """See `buffers.interop.flat.read`."""

    format = "flat"

    def __init__(
        self,
        arrays: ArrayFile,
        roles: Roles,
        convention: str | None,
        fields: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(arrays.path, fields, dtypes)
        self._arrays, self._roles = arrays, roles
        try:
            self.bounds = find_bounds(roles.num_rows, roles.flags, roles.ends, roles.starts)
            self.convention = self._find_convention(convention)
            self._ends = flags_of_episodes(self.convention, self.bounds, roles.flags)
        except UnfitError as error:
            raise self.damaged(f"Its arrays do not fit: {error}", _HOW_ENDS) from None
        self._kind = CONVENTIONS[self.convention]
        # Others have a place in rows that are aligned on arrival, and none that is known elsewhere.
        self._others = roles.others if self.convention == "arrival" else ()
        self._check_names()
        lengths = self.bounds.stops - self.bounds.starts + (1 - self._kind.num_extra)
        self.num_episodes, self.num_steps = len(lengths), int(lengths.sum())
        self.metadata = {"convention": self.convention}
        self._note()

    def _find_convention(self, convention: str | None) -> str:
        if "next_obs" in self._roles.trees:
            if convention not in (None, "transitions"):
                names = sorted(self._roles.trees["next_obs"].values())
                found = f"It has next observations, {names}, which only the convention 'transitions' has"
                raise self.damaged(found, "Leave `convention` out, or these arrays")
            self._check_next()
            return "transitions"
        if convention is None:
            found = f"Its {self._roles.num_rows} rows can mean several things, and nothing in it says which"
            lines = [f'\n  "{name}": {text}' for name, text in self._meanings().items()]
            raise self.damaged(found, "Say by `convention=` what a row is:" + "".join(lines))
        return convention

    def _check_next(self) -> None:
        columns, trees = self._arrays.columns, self._roles.trees
        kinds = [
            {below: (columns[name].dtype, columns[name].shape[1:]) for below, name in trees[role].items()}
            for role in ("obs", "next_obs")
        ]
        if kinds[0] != kinds[1]:
            raise self.damaged(f"Observations are {kinds[0]}, next ones {kinds[1]}", "Name others in `next_obs=`")

    def _check_names(self) -> None:
        for name in (*self._roles.with_action, *self._roles.with_reward, *self._others):
            if name.split("/")[0] in _RESERVED:
                found = f"`{name}` has the name of a field that is something else here"
                raise self.damaged(found, "Say what it is, by `obs=` and so on, or rename it")

    def _meanings(self) -> dict[str, str]:
        """What the data would be under each convention."""
        found = {}
        for name, convention in CONVENTIONS.items():
            try:
                flags_of_episodes(name, self.bounds, self._roles.flags)
            except UnfitError as error:
                found[name] = f"{convention.meaning}. It does not fit: {error}"
                continue
            bounds = self.bounds
            lengths = bounds.stops - bounds.starts - convention.num_extra
            text = (
                f"{convention.meaning}. {len(lengths)} episodes of {few(lengths)} transitions, which end with the rows"
            )
            found[name] = f"{text} {few(bounds.stops - 1)}; {self._unused(name)}"
        return found

    def _unused(self, name: str) -> str:
        """The values that belong to no transition under a convention, and whether they are zero."""
        if name == "transitions":
            return "final observations are not there, and repeat those before"
        convention, texts = CONVENTIONS[name], []
        for role, lag in (("action", convention.action_lag), ("reward", convention.reward_lag)):
            rows = self.bounds.starts if lag else self.bounds.stops - 1
            columns = [self._arrays.columns[array] for array in self._roles.trees.get(role, {}).values()]
            if columns:
                values = [column.rows(row, row + 1) for column in columns for row in rows[:4].tolist()]
                are_zero = "all zero" if not any(value.any() for value in values) else "not all zero"
                texts.append(f"the {role} of the rows {few(rows)} belongs to no transition ({are_zero})")
        return ", ".join(texts) or "nothing is left over"

    def _note(self) -> None:
        roles, add = self._roles, self.notes.add
        if "action" not in roles.trees:
            add("There are no actions.")
        note_absence(self.notes, {*roles.trees, *roles.flags})
        if "done" in roles.flags:
            add(f"`{roles.arrays_of_flags['done']}` does not say why an episode ends: it is `done`.")
        if self.convention == "transitions" and "next_obs" not in roles.trees:
            add("There are no final observations: the last one of an episode is repeated, where `final_obs_missing`.")
        if self._kind.num_extra and not (self._kind.action_lag and self._kind.reward_lag):
            values = "action" if self._kind.reward_lag else "action and reward"
            add(f"The {values} in the last row of an episode belongs to no transition, and is left out.")
        if self.bounds.is_open:
            add(
                f"The last {int(self.bounds.stops[-1] - self.bounds.starts[-1])} rows have no end: they are an episode."
            )
        for name in roles.others:
            if name not in self._others:
                add(
                    f"`{name}` is not read: name it in `obs=`, `with_action=` or `with_reward=`, by what it belongs to."
                )
        for name in roles.odd:
            add(f"`{name}` has {len(self._arrays.columns[name])} rows, others {roles.num_rows}, and is not read.")
        note_unread(self._arrays, self.notes)

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        try:
            for episode in range(number, len(self.bounds.starts)):
                yield Episode(self._rows(episode), {})
        finally:
            self.close()

    def close(self) -> None:
        """As `FormatReader.close`."""
        self._arrays.close()

    def _rows(self, episode: int) -> dict[str, Any]:
        columns, roles, kind = self._arrays.columns, self._roles, self._kind
        start, stop = int(self.bounds.starts[episode]), int(self.bounds.stops[episode])
        length = stop - start - kind.num_extra
        steps: dict[str, np.ndarray] = {}  # T values of transitions.
        kept: dict[str, np.ndarray] = {}  # T + 1 rows, as they are.
        for lag, names in (
            (kind.action_lag, {**_fields("action", roles.trees), **{name: name for name in roles.with_action}}),
            (kind.reward_lag, {**_fields("reward", roles.trees), **{name: name for name in roles.with_reward}}),
            (1, {name: name for name in self._others}),
        ):
            for field, name in names.items():
                if self.wants(field):
                    (kept if lag else steps)[field] = columns[name].rows(start, start + length + lag)
        for flag, ends in self._ends.items():
            kept[flag] = np.arange(length + 1) == length if ends[episode] else np.zeros(length + 1, bool)
        is_missing = self.convention == "transitions" and "next_obs" not in roles.trees
        observations = self._observations(start, stop, length)
        rows = rows_on_arrival(observations, steps, more=kept, final_missing=True if is_missing else None)
        obs = rows.pop("obs")
        obs = {f"obs/{below}".rstrip("/"): values for below, values in obs.items()} if isinstance(obs, dict) else {}
        return in_order(tree_of(self.path, {**obs, **rows}))

    def _observations(self, start: int, stop: int, length: int) -> Any:
        """`name below obs -> array`; one without values if none are wanted."""
        columns, trees = self._arrays.columns, self._roles.trees
        found = {}
        for below, name in trees["obs"].items():
            if not self.wants(f"obs/{below}".rstrip("/")):
                continue
            found[below] = columns[name].rows(start, stop)
            if "next_obs" in trees:
                after = columns[trees["next_obs"][below]].rows(start, stop)
                self._check_chain(trees["next_obs"][below], found[below], after, start)
                found[below] = np.concatenate([found[below], after[-1:]])
        num_rows = length + ("next_obs" in trees or self._kind.num_extra)
        return found or np.empty((num_rows, 0))

    def _check_chain(self, name: str, now: np.ndarray, after: np.ndarray, start: int) -> None:
        """Next observations are kept as the observations of the rows behind them."""
        gap = first_gap(now, after)
        if gap is None:
            return
        found = f"`{name}` of row {start + gap} is not the observation of the row behind it"
        raise self.damaged(found, "Rows must be in the order of their episodes, with an end where one ends")


def _fields(role: str, trees: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """`field -> array` of a role."""
    return {f"{role}/{below}".rstrip("/"): name for below, name in trees.get(role, {}).items()}
