"""Features of a LeRobot dataset, and the fields that they become.

    observation.state           obs/state
    observation.images.top      obs/images/top
    action                      action
    next.reward                 reward        also next.done, next.success, next.truncated, next.terminated
    anything else               its own name

LeRobot has no scalars: a number is a feature of shape (1,). Those named `next.` become scalars, others stay as they
are. Where `write` has another field or shape to remember, a feature has the key "buffers", which LeRobot keeps and
ignores: {"path": ["obs", "a", "b"], "shape": []}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from buffers.conversion import TO_TORCH
from buffers.interop.base import FormatError

__all__ = [
    "Feature",
    "INDEXES",
    "MARK",
    "NEXT",
    "default_paths",
    "is_channel_first",
    "is_next_scalar",
    "parse_features",
]

#: What LeRobot adds to each frame by itself.
INDEXES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
NEXT = ("reward", "done", "success", "truncated", "terminated")
MARK = "buffers"
_OBS = "observation"
#: Names of fields that readers make.
_FLAGS = ("is_first", "final_obs_missing")
_NUMBERS = {str(dtype): dtype for dtype in TO_TORCH if dtype.kind in "biuf"}
_MOST_AXES, _MOST_LEVELS, _MOST_VALUES = 8, 20, 2**40


@dataclass(frozen=True)
class Feature:
    """A feature that can be read."""

    name: str
    path: tuple[str, ...]  # Of the field.
    kind: str  # "numbers", "image", "video", or "times" of video that is not decoded.
    declared: tuple[int, ...]  # The shape in info.json.
    shape: tuple[int, ...]  # That of the field.
    dtype: np.dtype  # uint8 for images, until one of them has been looked at.
    is_channel_first: bool = False
    is_depth: bool = False

    @property
    def field(self) -> str:
        """The name of the field."""
        return "/".join(self.path)

    @property
    def is_observation(self) -> bool:
        """Whether it belongs to a time, not to the transition that begins there."""
        return self.path[0] == "obs"

    @property
    def nbytes(self) -> int:
        """Of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_features(path: str, described: Any) -> tuple[list[Feature], dict[str, str], set[str]]:
    """The features of info.json that can be read, `name -> what it is` of others, and those that follow from them."""
    if not isinstance(described, dict) or not all(isinstance(value, dict) for value in described.values()):
        raise FormatError(path, f"has the features {described!r:.60}", "They are a dict of dicts")
    paths = default_paths(name for name in described if name not in INDEXES)
    found: list[Feature] = []
    unread: dict[str, str] = {}
    derived, names = set(), set()
    for name, value in described.items():
        if name in INDEXES:
            continue
        kind = value.get("dtype")
        if kind not in (*_NUMBERS, "image", "video"):
            unread[name] = "text" if kind == "string" else f"of the type {kind!r:.40}"
            continue
        mark = value.get(MARK, {})
        if not isinstance(mark, dict):
            raise FormatError(path, f"has {mark!r:.60} at the feature `{name}`", f"Remove its key `{MARK}`")
        if mark.get("is_derived") is True:
            derived.add(name)
            continue
        feature = _parse(path, name, value, paths[name], mark)
        if feature.field in names:
            raise FormatError(path, f"has two features for the field `{feature.field}`", "Rename one")
        names.add(feature.field)
        found.append(feature)
    _check_levels(path, found)
    return found, unread, derived


def _parse(path: str, name: str, value: dict[str, Any], default: tuple[str, ...], mark: dict[str, Any]) -> Feature:
    shape: Any = value.get("shape")
    kind = value["dtype"]
    if not _is_shape(shape):
        raise FormatError(path, f"has the feature `{name}` of shape {shape!r:.60}", "Get a whole copy of it")
    place = mark.get("path", default)
    if not _is_place(place):
        raise FormatError(path, f"has the feature `{name}` for the field {place!r:.60}", f"Remove its key `{MARK}`")
    declared, place, is_image = tuple(shape), tuple(place), kind in ("image", "video")
    if is_image and len(declared) != 3:
        raise FormatError(path, f"has the images `{name}` of shape {declared}", "They have height, width and channels")
    kept = mark.get("shape", [] if is_next_scalar(name, place, declared) else shape)
    if kept != shape and (kept, declared) != ([], (1,)):
        found = f"has the feature `{name}` for a field of shape {kept!r:.60}"
        raise FormatError(path, found, f"Remove its key `{MARK}`")
    return Feature(
        name,
        place,
        kind if is_image else "numbers",
        declared,
        tuple(kept),
        np.dtype(np.uint8) if is_image else _NUMBERS[kind],
        is_image and is_channel_first(declared, value.get("names")),
        is_image and _is_depth(value),
    )


def is_next_scalar(name: str, path: tuple[str, ...], declared: tuple[int, ...]) -> bool:
    """Whether a feature is a number of a transition, which becomes a scalar where the source says no other."""
    return declared == (1,) and path == (name.removeprefix("next."),) and path[0] in NEXT


def _is_shape(shape: Any) -> bool:
    is_list = isinstance(shape, list) and 0 < len(shape) <= _MOST_AXES
    return is_list and all(type(size) is int and size > 0 for size in shape) and math.prod(shape) < _MOST_VALUES


def _is_place(place: Any) -> bool:
    is_list = isinstance(place, (list, tuple)) and 0 < len(place) <= _MOST_LEVELS
    return is_list and all(isinstance(key, str) and key for key in place) and place[0] not in _FLAGS


def _is_depth(value: Mapping[str, Any]) -> bool:
    infos = [value.get("info"), value.get("video_info")]
    keys = ("is_depth_map", "video.is_depth_map")
    return any(info.get(key) is True for info in infos if isinstance(info, dict) for key in keys)


def is_channel_first(shape: tuple[int, ...], names: Any) -> bool:
    """Whether an image of this shape is (C, H, W): by the names of its axes, else by the size of the first and last."""
    if isinstance(names, (list, tuple)) and len(names) == 3 and all(isinstance(name, str) for name in names):
        where = [axis for axis, name in enumerate(names) if name.startswith("channel")]
        if len(where) == 1 and where[0] != 1:
            return where[0] == 0
    return shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4)


def default_paths(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """`name -> path of the field`, where the source says no other."""
    known = [*names]
    observed = [name for name in known if name == _OBS or name.startswith(f"{_OBS}.")]
    split = {name: ("obs", *name.split(".")[1:]) for name in observed}
    if _collide([*split.values()]):
        # `observation.state` beside `observation.state.left`: a field cannot have fields below it.
        split = {name: ("obs", *filter(None, [name.partition(".")[2]])) for name in observed}
    return {name: split.get(name) or (_other(name, known),) for name in known}


def _other(name: str, known: list[str]) -> str:
    short = name.removeprefix("next.")
    if short in NEXT and short != name and short not in known:
        return short
    return f"frame.{name}" if name in ("obs", *_FLAGS) else name


def _collide(paths: list[tuple[str, ...]]) -> bool:
    taken = {*paths}
    return any("" in path for path in paths) or any(
        path[:length] in taken for path in paths for length in range(1, len(path))
    )


def _check_levels(path: str, features: list[Feature]) -> None:
    taken = {feature.path for feature in features}
    for feature in features:
        if any(feature.path[:length] in taken for length in range(1, len(feature.path))):
            raise FormatError(path, f"has a field above the one of `{feature.name}`", "Rename one of them")
