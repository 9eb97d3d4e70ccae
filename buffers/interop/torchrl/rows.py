"""Which column becomes which field, and the copying of rows aligned on arrival."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from buffers.fields import Fields, Scalar, TensorType
from buffers.interop.alignment import FINAL_MISSING
from buffers.interop.base import FormatError, Notes
from buffers.interop.torchrl.episodes import Pair
from buffers.interop.torchrl.layout import MASK_KEY, TRAJ_KEY, Options, key_of
from buffers.interop.torchrl.memmaps import Column, Key, MemoryMapped

__all__ = ["Plan", "plan_of"]

_FLAGS = ("terminated", "truncated")
_STANDARD = {"obs", "action", "reward", *_FLAGS, "is_first", FINAL_MISSING}
_STANDARD_AFTER = {("reward",), *((flag,) for flag in _FLAGS)}
# At a row, these are of the step before it, or say only where an episode begins or where the row lies.
_ABOUT_ROWS = {("done",), *_STANDARD_AFTER, ("is_init",), ("index",)}
_ABOUT_AFTER = {(), ("done",), ("is_init",)}
# Both at a row and after its step, and no observations.
_COUNTERS = {("step_count",), ("episode_reward",)}


@dataclass(frozen=True)
class _Leaf:
    """A field: of the row itself, and after the last step (`final`), or else of the step that led to the row."""

    column: Column
    is_of_row: bool
    final: Column | None = None


@dataclass
class Plan:
    """What is read.

    Attributes:
        fields: In their order, all of them.
        pairs: The observations, each with its next observation.
        final_missing: Whether there are no next observations.
        observations: Names of the observations in the file.
    """

    leaves: dict[str, _Leaf] = field(default_factory=dict)
    fields: Fields = None  # type: ignore[assignment]  # Set at the end.
    pairs: list[Pair] = field(default_factory=list)
    final_missing: bool = False
    observations: list[str] = field(default_factory=list)

    def pairs_of(self, fields: Fields) -> list[Pair]:
        """Those of chosen fields; the smallest if no observation is among them."""
        columns = [self.leaves[name].column for name in fields if name in self.leaves]
        chosen = [pair for pair in self.pairs if pair[0] in columns]
        return chosen or sorted(self.pairs, key=lambda pair: pair[0].num_bytes)[:1]

    def copy(
        self,
        values: Callable[[Column], np.ndarray],
        episode: np.ndarray,
        start: int,
        stop: int,
        out: Mapping[str, np.ndarray],
    ) -> None:
        """Copy rows of an episode, aligned on arrival.

        Args:
            values: The rows of a column.
            episode: The flat rows of the episode, T of them.
            start: The first row, from 0.
            stop: Behind the last one, T + 1 at most.
            out: `field -> (stop - start, *shape)`.
        """
        for name, target in out.items():
            if name == "is_first":
                target[:] = np.arange(start, stop) == 0
            elif name == FINAL_MISSING:
                target[:] = np.arange(start, stop) == len(episode)
            else:
                leaf = self.leaves[name]
                # numpy cannot assign 0 to the opaque items of bfloat16.
                rows = target.view(np.int16) if target.dtype.kind == "V" else target
                (_copy_rows if leaf.is_of_row else _copy_steps)(leaf, values, episode, start, stop, rows)


def _copy_steps(
    leaf: _Leaf, values: Callable[[Column], np.ndarray], episode: np.ndarray, start: int, stop: int, rows: np.ndarray
) -> None:
    skipped = int(start == 0)  # No step led to the first row.
    rows[:skipped] = 0
    rows[skipped:] = _at(values(leaf.column), episode[start + skipped - 1 : stop - 1]).reshape(rows[skipped:].shape)


def _copy_rows(
    leaf: _Leaf, values: Callable[[Column], np.ndarray], episode: np.ndarray, start: int, stop: int, rows: np.ndarray
) -> None:
    inner = episode[start:stop]
    rows[: len(inner)] = _at(values(leaf.column), inner)
    if stop > len(episode):
        rows[len(inner) :] = _at(values(leaf.column if leaf.final is None else leaf.final), episode[-1:])


def _at(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    is_range = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())
    found = values[rows[0] : rows[-1] + 1] if is_range else values[rows]
    if found.dtype == bool:
        return found.view(np.uint8) != 0  # A byte may be anything.
    return found.view(np.int16) if found.dtype.kind == "V" else found


def plan_of(columns: MemoryMapped, options: Options, notes: Notes) -> Plan:
    """Find the fields; FormatError if no column is an observation, or one has another type after the step."""
    builder = _Builder(columns, options, notes)
    builder.add_observations()
    builder.add_standard()
    builder.add_others()
    try:
        builder.plan.fields = Fields(builder.tree)
    except ValueError as error:
        raise FormatError(columns.source, f"Its keys are no fields: {error}", "Rename one of them") from None
    return builder.plan


class _Builder:
    """Builds a plan, field after field."""

    def __init__(self, columns: MemoryMapped, options: Options, notes: Notes) -> None:
        self.columns, self.notes = columns, notes
        self.plan = Plan()
        self.tree: dict[str, Any] = {}
        own = {key_of(name) for name in (options.traj_key, options.mask_key, TRAJ_KEY, MASK_KEY) if name is not None}
        keys = columns.columns.items()
        self.after = {key[1:]: column for key, column in keys if key[0] == "next" and key[1:] not in _ABOUT_AFTER}
        self.here = {key: column for key, column in keys if key[0] != "next" and key not in _ABOUT_ROWS | own}
        self.observed = self._observed(options)

    def _observed(self, options: Options) -> list[Key]:
        if options.observations is not None:
            chosen = [key_of(name) for name in options.observations]
            missing = ["/".join(key) for key in chosen if key not in self.here]
            if missing or not chosen:
                raise ValueError(f"{self.columns.source} has no observations {missing}. It has {self._names()}.")
            return chosen
        found = [key for key in self.here if key in self.after and key not in _COUNTERS]
        if not found:
            what = f"No column is there also as a next observation. It has {self._names()}"
            advice = "Name those that are observations in `observations`; final ones are then missing"
            raise FormatError(self.columns.source, what, advice)
        return found

    def _names(self) -> list[str]:
        return ["/".join(key) for key in self.here]

    def add_observations(self) -> None:
        """`obs`, or one below it for each key."""
        self.plan.final_missing = not any(key in self.after for key in self.observed)
        for key in self.observed:
            column, final = self.here[key], None
            if not self.plan.final_missing:
                final = self._after(key)
                self.plan.pairs.append((column, final))
            self.plan.observations.append(column.name)
            self._add(("obs",) if len(self.observed) == 1 else ("obs", *key), column, True, final)

    def add_standard(self) -> None:
        """Actions, rewards, flags, and what comes from the bounds."""
        if ("action",) in self.here and ("action",) not in self.observed:
            self._add(("action",), self.here[("action",)])
        else:
            self.notes.add("There are no actions named `action`.")
        for name, what in (("reward", "rewards"), ("terminated", "`terminated`"), ("truncated", "`truncated`")):
            column = self.after.get((name,))
            if column is None:
                self.notes.add(f"There are no {what} after the steps.")
            else:
                self._add((name,), column)
        self.tree["is_first"] = Scalar((), torch.bool)
        if self.plan.final_missing:
            self.notes.add("There are no final observations.")
            self.tree[FINAL_MISSING] = Scalar((), torch.bool)

    def add_others(self) -> None:
        """Under their own names: values of rows, which are there also after the step, and values of steps."""
        rest = {key: column for key, column in self.here.items() if key not in self.observed and key != ("action",)}
        for key, column in rest.items():
            is_of_row = key in self.after
            self._add_other(key, column, is_of_row, self._after(key) if is_of_row else None)
        for key, column in self.after.items():
            if key not in self.here and key not in _STANDARD_AFTER:
                self._add_other(key, column)

    def _add_other(self, key: Key, column: Column, is_of_row: bool = False, final: Column | None = None) -> None:
        if key[0] in _STANDARD:
            self.notes.add(f"`{column.name}` has the name of another field, and is not read.")
        else:
            self._add(key, column, is_of_row, final)

    def _after(self, key: Key) -> Column:
        here, found = self.here[key], self.after.get(key)
        if found is None:
            advice = "Name in `observations` only those that have one"
            raise FormatError(self.columns.source, f"`{here.name}` has no next observation, and others have", advice)
        if (found.dtype, found.shape) != (here.dtype, here.shape):
            what = f"`{here.name}` is {here.dtype} {here.shape}, and `{found.name}` is {found.dtype} {found.shape}"
            advice = "Save both as the same type, or name other `observations`"
            raise FormatError(self.columns.source, what, advice)
        return found

    def _add(self, path: Key, column: Column, is_of_row: bool = False, final: Column | None = None) -> None:
        shape = column.shape[len(self.columns.batch) :]
        if path[0] in ("reward", *_FLAGS) and shape == (1,):
            shape = ()
        *parents, last = path
        node = self.tree
        for key in parents:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node:
            found = f"`{'/'.join(path)}` is below, or above, another field of that name"
            raise FormatError(self.columns.source, found, "Rename one of them")
        node[last] = TensorType.infer(shape, column.dtype)
        self.plan.leaves["/".join(path)] = _Leaf(column, is_of_row, final)
