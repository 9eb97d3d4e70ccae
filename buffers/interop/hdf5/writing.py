"""Writing the episodes of a dataset as robomimic or Isaac Lab would."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from buffers.dataset import EpisodeDataset
from buffers.interop.alignment import FINAL_MISSING, Transitions, arrays_in
from buffers.interop.base import library
from buffers.interop.exporting import Exported, Exporter, new_target
from buffers.interop.hdf5.demos import HINTS, SCALARS, STEPS, Hints
from buffers.interop.origin import Summary
from buffers.interop.output_file import OutputFile
from buffers.utils import integer, one_of

__all__ = ["write_demos"]

_LAYOUTS = ("robomimic", "isaaclab")
_PATHS = {field: path for path, field in STEPS.items()}
_RESERVED = (*STEPS, "next_obs", "initial_state")
_MASK = "mask/"


class _Demos(Exporter):
    """As the base, but the first row of states is written."""

    def _note(self, found: Transitions) -> None:
        first = {name: value for name, value in found.first.items() if name != "states"}
        super()._note(found._replace(first=first))


def write_demos(
    dataset: EpisodeDataset,
    path: str | os.PathLike[str],
    layout: str,
    fields: Sequence[str] | None,
    limit: int | None,
    progress: bool,
    next_obs: bool,
    compression: str | None,
    env_args: Mapping[str, Any] | None,
    format_version: int | None,
) -> Summary:
    """As `write` of the package, which says what the arguments are."""
    one_of("layout", layout, _LAYOUTS)
    if compression is not None:
        one_of("compression", compression, ["gzip"])
    if format_version is not None:
        integer("format_version", format_version, 0)
    h5py: Any = library("h5py", "hdf5")
    exporter = _Demos(dataset, "hdf5", path, fields, limit, progress)
    if "action" not in exporter.fields:
        raise ValueError(f"Demos need the field `action`, one array. The dataset has {list(exporter.fields)}.")
    with new_target(path) as work:
        with OutputFile(work) as output, h5py.File(output, "w") as file:
            _Writer(file, exporter, layout, next_obs, compression).write(env_args, format_version, output.check)
        # Only now are the counts known.
        if not exporter.summary().num_episodes:
            raise ValueError("There is no episode with a transition to write.")
    return exporter.summary()


class _Writer:
    def __init__(self, file: Any, exporter: Exporter, layout: str, next_obs: bool, compression: str | None) -> None:
        self._file, self._exporter, self._notes = file, exporter, exporter.notes
        self._is_robomimic = layout == "robomimic"
        self._has_next = next_obs and self._is_robomimic
        self._compression = compression
        self._origin = exporter.metadata if exporter.metadata.get("layout") in _LAYOUTS else {}
        self._tells_final = FINAL_MISSING in exporter.fields
        self._masks: dict[str, dict[str, bool]] = {}  # Key -> demo -> whether it is on the list.
        self._hints = Hints()
        for name in (name for name in SCALARS if name in exporter.fields and exporter.fields[name].shape == (1,)):
            self._notes.add(f"`{name}` of shape (1,) is read back as a scalar.")

    def write(
        self, env_args: Mapping[str, Any] | None, format_version: int | None, check_disk: Callable[[], None]
    ) -> None:
        data = self._file.create_group("data")
        total = 0
        for episode in self._exporter:
            name = f"demo_{episode.number}"
            self._write_demo(data.create_group(name), episode)
            self._write_info(data[name], episode)
            total += episode.transitions.num_steps
            check_disk()
        for key, members in self._masks.items():
            names = [name for name, is_member in members.items() if is_member]
            self._file.create_dataset(_MASK + key, data=np.array(names, "S"))
            if len(members) < len(data):
                self._notes.add(f"`{_MASK}{key}` is read back as False for episodes whose info does not have it.")
        data.attrs["total"] = total
        self._write_file_attributes(data, env_args, format_version)

    def _write_file_attributes(self, data: Any, env_args: Mapping[str, Any] | None, format_version: int | None) -> None:
        self._write_attributes(self._file, self._origin.get("attributes", {}))
        self._write_attributes(data, self._origin.get("data_attributes", {}))
        known = self._origin.get("env_args") if env_args is None else dict(env_args)
        if known is None:
            self._notes.add("The environment has no name: `env_args` is that of an unnamed one.")
            known = {"env_name": "", "type": 2, "env_kwargs": {}}
        data.attrs["env_args"] = known if isinstance(known, str) else json.dumps(known)
        if any(self._hints):
            data.attrs[HINTS] = json.dumps(self._hints._asdict())
        if not self._is_robomimic and (format_version is not None or self._origin.get("layout") != "isaaclab"):
            self._file.attrs["format_version"] = 1 if format_version is None else format_version

    def _write_demo(self, demo: Any, episode: Exported) -> None:
        found = episode.transitions
        demo.attrs["num_samples"] = found.num_steps
        self._write_observations(demo, found)
        steps = dict(found.steps)
        states = steps.pop("states", None)
        if states is not None:
            self._write_states(demo, states, found.first["states"])
        for name, value in steps.items():
            path = _PATHS.get(name, name)
            if name in _RESERVED or (name in _PATHS and isinstance(value, Mapping)):
                kinds = "as a dict" if name in _PATHS else "of this name"
                raise ValueError(f"Demos cannot hold the field `{name}` {kinds}. Leave it out of `fields`.")
            self._write_tree(demo, path, value)
        if self._is_robomimic and "done" not in steps:
            self._write_dones(demo, steps)

    def _write_observations(self, demo: Any, found: Transitions) -> None:
        observations = found.observations
        if self._is_robomimic:
            observations = self._flat(observations)
        for name, rows in arrays_in(observations):
            path = f"obs/{name}" if name else "obs"
            self._write_array(demo, path, rows[:-1])
            if self._has_next:
                self._write_array(demo, f"next_{path}", rows[1:])
        if self._has_next and self._tells_final:
            demo.attrs[FINAL_MISSING] = found.final_missing
        if self._has_next and found.final_missing:
            self._notes.add(
                "Where the final observation is missing, the last row of `next_obs` repeats the observation before, as "
                "robomimic needs one; the attribute `final_obs_missing` of the demo says so."
            )
        if not self._has_next and not found.final_missing:
            self._notes.add("Final observations are left out.")

    def _flat(self, observations: Any) -> dict[str, np.ndarray]:
        """Observations by names without "/", which is all that robomimic reads."""
        if not isinstance(observations, Mapping):
            self._hints = self._hints._replace(obs_is_array=True)
            return {"flat": observations}
        found: dict[str, np.ndarray] = {}
        for name, rows in arrays_in(observations):
            flat = name.replace("/", ".")
            if flat in found:
                raise ValueError(f"Two observations would be named {flat!r}, as robomimic has no nested ones.")
            if flat != name:
                self._notes.add("robomimic has no nested observations: their names are joined by `.`.")
            found[flat] = rows
        return found

    def _write_states(self, demo: Any, behind: Any, first: Any) -> None:
        """`behind` is a tree of the states behind each action, `first` one of those before the first."""
        pairs = list(zip(arrays_in(behind), arrays_in(first), strict=True))
        origin = self._origin.get("layout")
        if not self._is_robomimic and origin is None and all(_ends_twice(rows, row) for (_, rows), (_, row) in pairs):
            self._notes.add(
                "The last `states` of some episodes repeat those before: robomimic lacks them, and its reader does so."
            )
        if not self._is_robomimic and origin == "robomimic":
            self._notes.add("`states` of robomimic lack the one behind the last action, and are left out.")
            return
        if self._is_robomimic and origin != "robomimic":
            self._notes.add("The states behind the last actions are left out.")
        for (name, rows), (_, row) in pairs:
            path = f"states/{name}" if name else "states"
            before = np.concatenate([row[None], rows[:-1]])
            self._write_array(demo, path, before if self._is_robomimic else rows)
            if not self._is_robomimic and self._origin.get("has_initial_state", True):
                self._write_array(demo, path.replace("states", "initial_state", 1), row[None])

    def _write_dones(self, demo: Any, steps: Mapping[str, Any]) -> None:
        flags = [np.asarray(steps[name]) for name in ("terminated", "truncated") if name in steps]
        if not flags:
            self._notes.add("There are no `dones`; robomimic takes zeros for them.")
            return
        self._hints = self._hints._replace(dones_are_flags=True)
        self._write_array(demo, "dones", np.any(flags, axis=0).astype(np.int64))

    def _write_tree(self, demo: Any, path: str, value: Any) -> None:
        for name, rows in arrays_in(value, path):
            self._write_array(demo, name, rows)

    def _write_array(self, demo: Any, path: str, rows: np.ndarray) -> None:
        if not _is_path(path):
            raise ValueError(f"HDF5 cannot hold a field named {path!r}. Leave it out of `fields`.")
        compression = self._compression if rows.size else None
        demo.create_dataset(path, data=np.ascontiguousarray(rows), compression=compression)

    def _write_info(self, demo: Any, episode: Exported) -> None:
        info, name = dict(episode.info), f"demo_{episode.number}"
        if not str(info.pop("demo", name)).startswith("demo_"):
            self._notes.add("`demo` of infos is left out: it is the name of the demo, `demo_0` for the first.")
        for key in [key for key in info if key.startswith(_MASK)]:
            value = info.pop(key)
            mask = key.removeprefix(_MASK)
            if isinstance(value, bool) and self._can_be_mask(mask):
                self._masks.setdefault(mask, {})[name] = value
            else:
                self._notes.add(f"`{key:.60}` of infos cannot be a list of demos, and is left out.")
        self._write_attributes(demo, info)

    def _can_be_mask(self, name: str) -> bool:
        """Whether HDF5 has room for a list of demos beside the others: none can be above or below another."""
        others = [other for other in self._masks if other != name]
        return _is_path(name) and not any(
            f"{a}/".startswith(f"{b}/") for o in others for a, b in ((o, name), (name, o))
        )

    def _write_attributes(self, target: Any, attributes: Mapping[str, Any]) -> None:
        for key, value in attributes.items():
            if key in ("num_samples", FINAL_MISSING):
                self._notes.add(f"`{key}` of the info of episodes has another meaning here, and is left out.")
                continue
            try:
                target.attrs[key] = value
            except (ValueError, TypeError, OSError, RuntimeError):
                # A NUL or half a surrogate pair in a text, or an impossible name.
                self._notes.add(f"HDF5 cannot hold {key!r} as an attribute; it is left out.")


def _is_path(name: str) -> bool:
    """Whether HDF5 takes a name as the path of a dataset."""
    try:
        name.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return not any(part in ("", ".") or "\0" in part for part in name.split("/"))


def _ends_twice(rows: np.ndarray, first: np.ndarray) -> bool:
    """Whether the last row is that before it, `first` being the one before all."""
    return rows[-1].tobytes() == (rows[-2] if len(rows) > 1 else first).tobytes()
