"""Which feature each field of a dataset becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from buffers.fields import ColorImage, Fields, TensorType
from buffers.interop.alignment import Transitions
from buffers.interop.base import Notes
from buffers.interop.lerobot.features import INDEXES, MARK, NEXT, default_paths, is_channel_first, is_next_scalar

__all__ = ["Planned", "planned"]

_HWC, _CHW = ["height", "width", "channels"], ["channels", "height", "width"]
_OF_ROWS = ("is_first", "final_obs_missing")
_MOST_AXES = 5
_DONE = "next.done"


@dataclass(frozen=True)
class Planned:
    """A feature that is written."""

    name: str
    path: tuple[str, ...]  # Of the field; () for `next.done`, which follows from the flags.
    kind: str  # "numbers", "image" or "video".
    shape: tuple[int, ...]  # Of the field.
    dtype: np.dtype
    is_channel_first: bool = False
    mark: Mapping[str, Any] | None = None  # What `read` has to know besides its name.
    known: Mapping[str, Any] = field(default_factory=dict)  # The feature as it was imported, if it was.

    @property
    def is_depth(self) -> bool:
        """Whether it is an image of depths, not of colors."""
        return self.kind == "image" and self.dtype == np.uint16

    @property
    def declared(self) -> tuple[int, ...]:
        """The shape in info.json. LeRobot has no scalars."""
        return self.shape or (1,)

    def described(self) -> dict[str, Any]:
        """As in info.json."""
        names = None if self.kind == "numbers" else _CHW if self.is_channel_first else _HWC
        found: dict[str, Any] = {
            "dtype": str(self.dtype) if self.kind == "numbers" else self.kind,
            "shape": [*self.declared],
        }
        if found == {key: self.known.get(key) for key in found}:
            names = self.known.get("names", names)  # Of joints, for example.
        found["names"] = names
        if self.is_depth:
            found["info"] = self.known.get("info", {"is_depth_map": True})
        return found if self.mark is None else {**found, MARK: dict(self.mark)}

    def frames(self, transitions: Transitions) -> np.ndarray:
        """Its values in an episode, `(T, *shape)`."""
        if not self.path:
            flags = [transitions.steps[name] for name in ("terminated", "truncated") if name in transitions.steps]
            return np.any([flag.astype(bool) for flag in flags], 0)
        tree: Any = {"obs": transitions.observations, **transitions.steps}
        for key in self.path:
            tree = tree[key]
        return tree[: transitions.num_steps]


def planned(
    fields: Fields, left_out: Sequence[str], video: bool, known: Mapping[str, Any], notes: Notes
) -> list[Planned]:
    """The features of a dataset's fields, but `left_out`.

    Args:
        fields: Of the dataset.
        left_out: Names of fields that become no feature.
        video: Whether images of three channels are written as video.
        known: The features of the dataset that was imported.
        notes: Takes what LeRobot cannot hold.
    """
    found: list[Planned] = []
    for path, (name, kind) in zip(fields.paths, fields.items(), strict=True):
        if name in left_out or path[0] in _OF_ROWS:
            continue
        if (reason := _obstacle(kind)) is not None:
            notes.add(f"`{name}` is left out: LeRobot holds no {reason}.")
            continue
        is_first = len(kind.shape) == 3 and is_channel_first(kind.shape, None)
        encoding = _encoding(kind, kind.shape[0 if is_first else -1] if kind.shape else 1, video)
        feature = _name_of(path, encoding != "numbers", {feature.name for feature in found})
        is_first = is_first and encoding != "numbers"
        more = {"known": known.get(feature, {})}
        found.append(Planned(feature, path, encoding, kind.shape, kind.numpy_dtype, is_first, **more))
    flags = [fields[name].shape for name in ("terminated", "truncated") if name in fields]
    if flags and not any(flags) and _DONE not in {feature.name for feature in found}:
        found.append(Planned(_DONE, (), "numbers", (), np.dtype(bool), mark={"is_derived": True}))
    return _marked(found)


def _encoding(kind: TensorType, channels: int, video: bool) -> str:
    # By what it is like: a field may be declared as a plain TensorType.
    looks_like = TensorType.infer(kind.shape, kind.dtype)
    if kind.numpy_dtype == np.uint8 and isinstance(looks_like, ColorImage):
        return "video" if video and channels == 3 else "image"
    is_depth = kind.numpy_dtype == np.uint16 and len(kind.shape) == 3 and channels == 1
    return "image" if is_depth else "numbers"


def _obstacle(kind: TensorType) -> str | None:
    """What keeps LeRobot from holding a type."""
    if kind.numpy_dtype.kind not in "biuf":
        return str(kind.dtype).removeprefix("torch.")
    if 0 in kind.shape:
        return "empty arrays"
    return f"arrays of more than {_MOST_AXES} axes" if len(kind.shape) > _MOST_AXES else None


def _name_of(path: tuple[str, ...], is_image: bool, taken: set[str]) -> str:
    if path[0] == "obs":
        parts = ("observation", *(path[1:] or ("image" if is_image else "state",)))
    else:
        parts = ("next", *path) if len(path) == 1 and path[0] in NEXT else path
    # LeRobot refuses names with a slash.
    name = ".".join(parts).replace("/", ".")
    while name in taken or name in INDEXES or name == "task":
        name = f"field.{name}"
    return name


def _marked(features: list[Planned]) -> list[Planned]:
    """With a mark where `read` would make another field of a feature."""
    paths = default_paths(feature.name for feature in features)
    found = []
    for feature in features:
        mark: dict[str, Any] = {}
        if feature.path and paths[feature.name] != feature.path:
            mark["path"] = [*feature.path]
        is_scalar = is_next_scalar(feature.name, feature.path, feature.declared)
        if feature.declared == (1,) and feature.path and (feature.shape == ()) != is_scalar:
            mark["shape"] = [*feature.shape]
        found.append(replace(feature, mark=mark) if mark else feature)
    return found
