"""The layouts of robomimic and of Isaac Lab: a group `data/demo_N` for each episode."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from buffers.dataset.episode_info import EpisodeInfo, checked_info
from buffers.disk import as_damage, parse_json
from buffers.interop.alignment import FINAL_MISSING
from buffers.interop.hdf5.file import HDF5File, Piece, Stored
from buffers.interop.hdf5.layout import Column, Layout, listed

__all__ = ["DemoLayout", "HINTS", "Hints", "IsaacLabLayout", "RobomimicLayout", "SCALARS", "STEPS", "numbered_demos"]

_DEMO = re.compile(r"demo_(\d{1,18})", re.ASCII)
#: Names in a demo, and those of the fields.
STEPS = {"actions": "action", "rewards": "reward", "dones": "done"}
#: Fields that are scalars, although files may have them as (T, 1).
SCALARS = ("reward", "done", "terminated", "truncated")
_KNOWN = ("obs", "states", "action", *SCALARS)
_OWN = (*STEPS.values(), "is_first", FINAL_MISSING)
_INT64 = range(-(2**63), 2**63)
#: An attribute of `data` that `write` leaves, JSON of `Hints`.
HINTS = "buffers"


class Hints(NamedTuple):
    """What our own `write` had to change, so that reading gives the same fields back."""

    obs_is_array: bool = False  # `obs/flat` is the field `obs`.
    dones_are_flags: bool = False  # `dones` is terminated or truncated, and no field of its own.


class _Demo(NamedTuple):
    name: str
    num: int  # T.
    columns: dict[str, Column]
    lacks_final: bool
    info: EpisodeInfo


def numbered_demos(file: HDF5File) -> tuple[list[str], list[str]]:
    """The names of the demos in the order of their numbers, and what else is in `data`."""
    numbers: dict[int, str] = {}
    others = []
    for name, is_group in file.members("data").items():
        match = _DEMO.fullmatch(name)
        if match is None or not is_group:
            others.append(f"data/{name}")
        elif int(match[1]) in numbers:
            raise file.damaged(f"has the demos {numbers[int(match[1])]} and {name}, of one number", "Rename one")
        else:
            numbers[int(match[1])] = name
    return [numbers[number] for number in sorted(numbers)], others


class DemoLayout(Layout):
    """What both have in common.

    Args:
        file: As `Layout`.
        wants: As `Layout`.
        mask: The name of a list of demos in the group `mask`; None for all.
    """

    def __init__(self, file: HDF5File, wants: Callable[[str], bool], mask: str | None = None) -> None:
        super().__init__(file, wants)
        #: Whether the file says of its demos that final observations may be missing.
        self._has_final_flag = False
        self._unread: dict[str, None] = {}
        self.metadata["attributes"] = self._attributes(file, "/")
        total = self._read_file_attributes(file)
        names, others = numbered_demos(file)
        if others:
            self.notes.add(f"{listed(others)}: no demos, and not read.")
        self._masks = self._read_masks(file, names)
        if mask is not None and mask not in self._masks:
            raise ValueError(f"{file.path} has no mask {mask!r}. It has {list(self._masks)}.")
        chosen = names if mask is None else [name for name in names if name in self._masks[mask]]
        demos = [demo for demo in (self._read_demo(file, name) for name in chosen) if demo is not None]
        if not demos:
            raise file.damaged("has no demos with actions", "Get a whole copy of it, or another `mask`")
        self.lengths = np.array([demo.num for demo in demos], np.int64)
        if chosen is names and total not in (None, int(self.lengths.sum())):
            self.notes.add(f"`total` of `data` says {total} transitions; the demos have {self.lengths.sum()}.")
        self._settle(file, demos)

    @abstractmethod
    def _states(self, demo: Mapping[str, Stored], path: str) -> Column:
        """The column of the simulator's states."""

    def _attributes(self, file: HDF5File, name: str) -> dict[str, Any]:
        found, others = file.attributes(name)
        if others:
            self.notes.add(f"The attributes {listed(others)} are not read.")
        return found

    def _read_file_attributes(self, file: HDF5File) -> Any:
        """Sets `metadata` and `_hints`, and returns the declared number of transitions."""
        found = self._attributes(file, "data")
        hints, environment = _parsed(found.pop(HINTS, None)), found.pop("env_args", None)
        hints = hints if isinstance(hints, dict) else {}
        self._hints = Hints(*(hints.get(name) is True for name in Hints()._asdict()))
        if environment is not None:
            parsed = _parsed(environment)
            self.metadata["env_args"] = environment if parsed is None else parsed
        total = found.pop("total", None)
        self.metadata["data_attributes"] = found
        return total

    def _read_masks(self, file: HDF5File, names: list[str]) -> dict[str, set[str]]:
        masks = {}
        if file.members("/").get("mask", False):
            masks = {key: set(file.texts(stored)) for key, stored in file.walk("mask").items()}
        for key, members in masks.items():
            if unknown := sorted(members.difference(names)):
                raise file.damaged(f"`mask/{key}` names {listed(unknown)}, which are not there")
        return masks

    def _read_demo(self, file: HDF5File, name: str) -> _Demo | None:
        """None for a demo without an action: Isaac Lab writes one for a reset that follows a reset."""
        stored, attributes = file.walk(f"data/{name}"), self._attributes(file, f"data/{name}")
        actions, declared = stored.get("actions"), attributes.pop("num_samples", None)
        num = 0 if actions is None else (*actions.shape, -1)[0]
        if num < 0 or (actions is None and declared != 0):
            raise file.damaged(f"`data/{name}` has no array `actions`", "Each demo needs one")
        if declared is not None and declared != num:
            found = f"`data/{name}` has {num} rows of `actions`; its `num_samples` says {declared}"
            raise file.damaged(found, "The demo was not written to its end. Get a whole copy of it")
        if not num:
            self.notes.add("Demos without an action are left out.")
            return None
        told = attributes.pop(FINAL_MISSING, None)
        self._has_final_flag |= told is not None
        observed = [path for path in stored if path.partition("/")[0] == "obs"]
        if not observed and self.wants("obs"):
            advice = "robomimic's `dataset_states_to_obs.py` makes them from states. Or choose `fields` without obs"
            raise file.damaged(f"`data/{name}` has no observations (`obs`)", advice)
        lacks_final = told is True or any(f"next_{path}" not in stored for path in observed)
        return _Demo(name, num, self._columns_of(file, stored, num), lacks_final, self._info(name, attributes))

    def _columns_of(self, file: HDF5File, demo: Mapping[str, Stored], num: int) -> dict[str, Column]:
        found: dict[str, Column] = {}
        for path, stored in demo.items():
            field, root = self._field(path), path.partition("/")[0]
            if field is None or not self.wants(field):
                continue
            is_known = path in STEPS or root in _KNOWN
            if not stored.is_numeric or stored.shape[:1] != (num,) or (not is_known and root in _OWN):
                if is_known and root not in _OWN:
                    kind = "" if stored.is_numeric else " of no numbers"
                    raise file.damaged(f"`{stored.name}` has the shape {stored.shape}{kind}, beside {num} actions")
                self._unread[path] = None
            elif root == "obs":
                found[field] = Column(stored, False, self._next(file, demo, path))
            else:
                found[field] = self._states(demo, path) if root == "states" else Column(stored, True)
        return found

    def _field(self, path: str) -> str | None:
        """The field of a dataset; None for what belongs to another."""
        if path.partition("/")[0] in ("next_obs", "initial_state"):
            return None
        if path == "dones" and self._hints.dones_are_flags:
            return None
        return "obs" if path == "obs/flat" and self._hints.obs_is_array else STEPS.get(path, path)

    def _next(self, file: HDF5File, demo: Mapping[str, Stored], path: str) -> Stored | None:
        found = demo.get(f"next_{path}")
        if found is not None and (found.shape, found.dtype) != (demo[path].shape, demo[path].dtype):
            kinds = f"{found.dtype} {found.shape}, `{path}` is {demo[path].dtype} {demo[path].shape}"
            raise file.damaged(f"`{found.name}` is {kinds}", "Both need the same rows")
        return found

    def _info(self, name: str, attributes: dict[str, Any]) -> EpisodeInfo:
        masks = {f"mask/{key}": name in members for key, members in self._masks.items()}
        found = {**attributes, "demo": name, **masks}
        for key in [key for key, value in found.items() if isinstance(value, int) and value not in _INT64]:
            found[key] = str(found[key])
            self.notes.add(f"The attribute `{key}` of demos is beyond int64 in some, and is text there.")
        # The largest leave first: robomimic's `model_file`, the XML of a scene, for example.
        for key in sorted(found, key=lambda key: len(str(found[key])), reverse=True):
            try:
                return checked_info(found)
            except ValueError:
                del found[key]
                self.notes.add(f"The attribute `{key}` of demos does not fit the info of an episode, and is left out.")
        return {}

    def _settle(self, file: HDF5File, demos: list[_Demo]) -> None:
        kept = self._common(file, demos)
        self._columns = [{name: demo.columns[name] for name in kept} for demo in demos]
        self._lacks_final = [demo.lacks_final for demo in demos]
        self.infos = {number: demo.info for number, demo in enumerate(demos) if demo.info}
        flags = [FINAL_MISSING] if any(self._lacks_final) or self._has_final_flag else []
        self.settle_types(self._columns[0], flags, SCALARS)
        if self._unread:
            self.notes.add(f"{listed(self._unread)}: no numbers, or not a row for each action; not read.")
        if "done" in self.types:
            self.notes.add(
                "`dones` is 1 where the task has succeeded, or where the recording ends. It is kept as the field "
                "`done`, and is neither terminated nor truncated."
            )
        self.note_absence()

    def _common(self, file: HDF5File, demos: list[_Demo]) -> list[str]:
        """The fields of all demos; FormatError where they differ in what the layout knows."""
        kept = dict.fromkeys(name for demo in demos for name in demo.columns)
        for name in list(kept):
            expected = _kind(demos[0].columns.get(name))
            for demo in demos:
                kind = _kind(demo.columns.get(name))
                if kind == expected:
                    continue
                if name.partition("/")[0] in _KNOWN:
                    found = f"`{name}` is {expected} in {demos[0].name}, and {kind} in {demo.name}"
                    advice = "All demos need the same fields: choose others with `fields`, or demos with `mask`"
                    raise file.damaged(found, advice)
                del kept[name]
                self._unread[name] = None
                break
        return list(kept)

    def columns(self, episode: int) -> Mapping[str, Column]:
        """As `Layout.columns`."""
        return self._columns[episode]

    def _pieces(self, episode: int, column: Column) -> tuple[Piece, ...]:
        edge = 0 if column.edge is None else column.edge.shape[0] - 1
        return column.pieces(0, int(self.lengths[episode]), edge)

    def is_final_missing(self, episode: int) -> bool:
        """As `Layout.is_final_missing`."""
        return self._lacks_final[episode]


class RobomimicLayout(DemoLayout):
    """States are those before the action, and the one behind the last action is not there."""

    name: ClassVar[str] = "robomimic"

    def _states(self, demo: Mapping[str, Stored], path: str) -> Column:
        self.notes.add("`states` has no final row: the last one repeats the one before.")
        return Column(demo[path], False)


class IsaacLabLayout(DemoLayout):
    """States are those behind the action; the first is `initial_state`."""

    name: ClassVar[str] = "isaaclab"

    def _states(self, demo: Mapping[str, Stored], path: str) -> Column:
        body, edge = demo[path], demo.get(path.replace("states", "initial_state", 1))
        if edge is None or not edge.shape[:1] > (0,) or (edge.shape[1:], edge.dtype) != (body.shape[1:], body.dtype):
            self.metadata["has_initial_state"] = False
            self.notes.add("States without an `initial_state` of the same shape are zero in first rows.")
            edge = None
        return Column(body, True, edge)


def _kind(column: Column | None) -> str:
    return "missing" if column is None else f"{column.body.dtype} {column.shape}"


def _parsed(text: Any) -> Any:
    """What a text is as JSON; None if it is none."""
    if not isinstance(text, str):
        return None
    try:
        with as_damage():
            return parse_json(text)
    except ValueError:
        return None
