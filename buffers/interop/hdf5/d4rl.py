"""The layout of D4RL: arrays of all transitions, one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from buffers.interop.alignment import FINAL_MISSING
from buffers.interop.base import FormatError
from buffers.interop.hdf5.file import HDF5File, Piece, Stored
from buffers.interop.hdf5.layout import Column, Layout, listed

__all__ = ["D4RLLayout"]

_STEPS = {"actions": "action", "rewards": "reward"}
_FLAGS = ("terminals", "timeouts")
#: Of the simulator, as gym-mujoco's scripts record them before the step, and AntMaze's behind it.
_STATES = ("infos/qpos", "infos/qvel")
_OWN = ("obs", "action", "reward", "terminated", "truncated", "is_first", FINAL_MISSING)


class D4RLLayout(Layout):
    """Episodes end where `terminals` or `timeouts` say so, and after `max_episode_steps` transitions."""

    name: ClassVar[str] = "d4rl"

    def __init__(
        self,
        file: HDF5File,
        wants: Callable[[str], bool],
        max_episode_steps: int | None = None,
        states: str = "observation",
    ) -> None:
        super().__init__(file, wants)
        self._with_observation = _STATES if states == "observation" else ()
        stored = self._datasets(file)
        if "terminals" not in stored:
            advice = "D4RL's files have `observations`, `actions`, `rewards`, `terminals` and `timeouts`"
            raise file.damaged("has no `terminals`", advice)
        if not stored["actions"].shape or not stored["actions"].shape[0]:
            raise file.damaged("has no transitions: `actions` is empty", "Get a whole copy of it")
        self._num_rows = stored["actions"].shape[0]
        if "timeouts" not in stored and max_episode_steps is None:
            raise file.damaged(
                "has no `timeouts`, so that the ends of episodes that no terminal ends are not known",
                "Say after how many transitions an episode ends: `max_episode_steps=1000`, or more than the file has "
                "if only `terminals` end them",
            )
        self._columns, others = self._find_columns(file, stored)
        self._find_episodes(file, stored, max_episode_steps)
        # Flags of a whole episode are 0, but for the last.
        flags = ["terminated", "truncated"]
        observed = [path for path in stored if path.partition("/")[0] == "observations"]
        if not observed and wants("obs"):
            raise file.damaged("has no `observations`", "Choose `fields` without obs")
        self._has_final = all(f"next_{path}" in stored for path in observed)
        self.settle_types(self._columns, flags if self._has_final else [*flags, FINAL_MISSING], ["reward"])
        self._note(file, stored, others)

    def _datasets(self, file: HDF5File) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        for name, is_group in file.members("/").items():
            if name == "virtual" and is_group:
                self.notes.add("`virtual` is not read: it names the same rows again.")
            elif is_group:
                found |= {f"{name}/{below}": stored for below, stored in file.walk(name).items()}
            else:
                found[name] = file.stored(name)
        return found

    def _find_columns(self, file: HDF5File, stored: Mapping[str, Stored]) -> tuple[dict[str, Column], list[str]]:
        """Those of the fields, and the names of what is not read."""
        columns: dict[str, Column] = {}
        others = []
        for path, dataset in stored.items():
            root, _, below = path.partition("/")
            if root in ("next_observations", "metadata", *_FLAGS):
                continue
            name = _STEPS.get(path, path)
            if root == "observations":
                name = f"obs/{below}" if below else "obs"
            is_known = name != path
            if not self.wants(name):
                continue
            if self._fits(dataset) and (is_known or root not in _OWN):
                edge = self._next(file, path, dataset, stored) if root == "observations" else None
                has_arrived = root != "observations" and path not in self._with_observation
                columns[name] = Column(dataset, has_arrived, edge)
            elif is_known:
                raise self._differs(file, dataset)
            else:
                others.append(path)
        return columns, others

    def _fits(self, dataset: Stored) -> bool:
        return dataset.is_numeric and dataset.shape[:1] == (self._num_rows,)

    def _differs(self, file: HDF5File, dataset: Stored) -> FormatError:
        kind = "of numbers" if dataset.is_numeric else "of no numbers"
        found = f"`{dataset.name}` has the shape {dataset.shape}, {kind}; `actions` has {self._num_rows} rows"
        return file.damaged(found, "Every array of transitions needs as many rows. Get a whole copy of it")

    def _next(self, file: HDF5File, path: str, dataset: Stored, stored: Mapping[str, Stored]) -> Stored | None:
        found = stored.get(f"next_{path}")
        if found is not None and (found.shape, found.dtype) != (dataset.shape, dataset.dtype):
            raise file.damaged(
                f"`{found.name}` is {found.dtype} {found.shape}, `{path}` {dataset.dtype} {dataset.shape}",
                "Both need the same rows",
            )
        return found

    def _find_episodes(self, file: HDF5File, stored: Mapping[str, Stored], most: int | None) -> None:
        terminal = self._flags(file, stored["terminals"])
        timeout = self._flags(file, stored["timeouts"]) if "timeouts" in stored else np.zeros_like(terminal)
        if most is not None:
            timeout = timeout | _after(terminal | timeout, most)
        is_end = terminal | timeout
        is_end[-1] = True
        ends = np.flatnonzero(is_end)
        self._starts = np.concatenate([[0], ends[:-1] + 1])
        self.lengths = ends + 1 - self._starts
        self._last = {"terminated": terminal[ends], "truncated": timeout[ends]}
        if not (terminal | timeout)[-1]:
            self.notes.add("The last episode was cut off by the end of the file: neither terminated nor truncated.")

    def _flags(self, file: HDF5File, dataset: Stored) -> np.ndarray:
        if not self._fits(dataset) or dataset.shape[1:] not in ((), (1,)):
            raise self._differs(file, dataset)
        found = np.empty(self._num_rows, dataset.dtype)
        file.read(dataset, 0, found)
        if not ((found == 0) | (found == 1)).all():
            raise file.damaged(f"`{dataset.name}` has other values than 0 and 1", "It holds no flags")
        return found == 1

    def _note(self, file: HDF5File, stored: Mapping[str, Stored], others: list[str]) -> None:
        self.metadata["attributes"], unread = file.attributes("/")
        if unread:
            self.notes.add(f"The attributes {listed(unread)} are not read.")
        described = {path: file.text(s) for path, s in stored.items() if path.partition("/")[0] == "metadata"}
        if found := {path.partition("/")[2]: value for path, value in described.items() if value is not None}:
            self.metadata["metadata"] = found
        if arrays := [path for path, value in described.items() if value is None]:
            self.notes.add(f"{listed(arrays)}: arrays of metadata are not read.")
        if others:
            self.notes.add(f"{listed(others)}: no numbers, or not a row for each transition; not read.")
        if states := [name for name in self._with_observation if name in self._columns]:
            self.notes.add(
                f"{listed(states)}: taken to be recorded before the step, as in gym-mujoco's files, so that they "
                "belong to the observation; the last row repeats the one before. For AntMaze's, say `states='arrival'`."
            )
        if "timeouts" not in stored:
            self.notes.add("There are no `timeouts`: episodes are truncated after `max_episode_steps` transitions.")
        self.note_absence()

    def columns(self, episode: int) -> Mapping[str, Column]:
        """As `Layout.columns`."""
        return self._columns

    def _pieces(self, episode: int, column: Column) -> tuple[Piece, ...]:
        first, num = int(self._starts[episode]), int(self.lengths[episode])
        return column.pieces(first, num, edge=first + num - 1)

    def is_final_missing(self, episode: int) -> bool:
        """As `Layout.is_final_missing`."""
        return not self._has_final

    def last_value(self, episode: int, name: str) -> int:
        """As `Layout.last_value`."""
        return int(self._last[name][episode]) if name in self._last else super().last_value(episode, name)


def _after(is_end: np.ndarray, most: int) -> np.ndarray:
    """Where an episode has `most` transitions since the last end."""
    found = np.zeros_like(is_end)
    begin = 0
    for end in [*(np.flatnonzero(is_end) + 1).tolist(), len(is_end)]:
        found[begin + most - 1 : end : most] = True
        begin = end
    return found
