"""What `features.json` says of the episodes of a tensorflow-datasets directory.

It nests `featuresDict` and `sequence` down to leaves: `tensor`, `image`, `text`, `classLabel`, `boundingBox`. In an
Example, the values of a leaf for all steps are one list, whose name is the path joined by "/".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from buffers.conversion import TO_TORCH
from buffers.disk import DamagedEpisodeError

__all__ = ["Leaf", "Schema", "parse_schema"]

_STEPS = "steps"
_MAX_DEPTH = 50
_DTYPES = {str(dtype): dtype for dtype in TO_TORCH if dtype.kind in "biuf"}
_TEXTS = ("string", "object", "str")
_ENCODINGS = {"": "numbers", "none": "numbers", "bytes": "raw", "zlib": "zlib"}
_CHANNELS = {"uint8": (1, 2, 3, 4), "uint16": (1,), "float32": (1,)}


class Leaf(NamedTuple):
    """A feature with values."""

    path: tuple[str, ...]  # Below the step, or the episode.
    key: str  # Its name in an Example.
    kind: str  # "numbers", "raw" (the bytes of an array), "zlib" (the same, packed), "image" or "text".
    dtype: np.dtype
    shape: tuple[int, ...]  # Height and width of images may be -1: not stated.
    is_optional: bool

    @property
    def name(self) -> str:
        """The path, joined."""
        return "/".join(self.path)


class Schema(NamedTuple):
    """The features of steps and episodes, and why others are not read."""

    steps: dict[str, Leaf]
    episode: dict[str, Leaf]
    unread: list[str]


def parse_schema(described: Any) -> Schema:
    """Read the JSON of a features.json. DamagedEpisodeError, or what parsers raise, if it is none with steps."""
    if "type" in described:
        raise DamagedEpisodeError("has the layout of old versions of tensorflow-datasets")
    schema = Schema({}, {}, [])
    features = described["featuresDict"]["features"]
    if _STEPS not in features:
        raise DamagedEpisodeError(f"has the features {sorted(features)!r:.200} and no `{_STEPS}`")
    for name, feature in features.items():
        if name != _STEPS:
            _walk(feature, (name,), name, schema.episode, schema.unread)
    steps = features[_STEPS].get("sequence", {}).get("feature", {})
    if "featuresDict" not in steps:
        raise DamagedEpisodeError(f"has `{_STEPS}` that are no dataset of dicts")
    _walk(steps, (), _STEPS, schema.steps, schema.unread)
    return schema


def _walk(
    feature: Mapping[str, Any], path: tuple[str, ...], key: str, found: dict[str, Leaf], unread: list[str]
) -> None:
    if len(path) > _MAX_DEPTH:
        raise DamagedEpisodeError("nests too deeply")
    if "featuresDict" in feature:
        for name, below in feature["featuresDict"].get("features", {}).items():
            if not name or "/" in name:
                raise DamagedEpisodeError(f"has a feature of the name {name!r:.60}")
            _walk(below, (*path, name), f"{key}/{name}", found, unread)
        return
    try:
        leaf = _leaf(feature, path, key)
    except _Unread as reason:
        unread.append(f"`{key:.200}` {reason}, and is not read.")
    else:
        found[leaf.name] = leaf


class _Unread(Exception):
    """Why a feature is not read."""


def _leaf(feature: Mapping[str, Any], path: tuple[str, ...], key: str) -> Leaf:
    if "text" in feature:
        return Leaf(path, key, "text", np.dtype(object), (), bool(feature["text"].get("optional", False)))
    if "classLabel" in feature:
        return Leaf(path, key, "numbers", _DTYPES["int64"], (), False)
    if "image" in feature:
        return _image(feature["image"], path, key)
    content = feature.get("tensor", feature.get("boundingBox"))
    if content is None:
        kind = str(feature.get("pythonClassName", "")).rpartition(".")[2]
        raise _Unread(f"is of the kind {kind or sorted(feature)!r:.60}")
    dtype, shape = str(content["dtype"]), _shape(content)
    is_optional = bool(content.get("optional", False))
    if dtype in _TEXTS:
        if shape:
            raise _Unread("has several texts")
        return Leaf(path, key, "text", np.dtype(object), (), is_optional)
    if dtype not in _DTYPES:
        raise _Unread(f"is of dtype {dtype:.40}")
    if -1 in shape:
        raise _Unread(f"has no fixed shape {shape}")
    encoding = str(content.get("encoding", ""))
    if encoding not in _ENCODINGS:
        raise _Unread(f"is encoded as {encoding!r:.40}")
    return Leaf(path, key, _ENCODINGS[encoding], _DTYPES[dtype], shape, is_optional)


def _image(content: Mapping[str, Any], path: tuple[str, ...], key: str) -> Leaf:
    dtype, shape = str(content.get("dtype") or "uint8"), _shape(content)
    if len(shape) != 3 or shape[2] not in _CHANNELS.get(dtype, ()):
        raise _Unread(f"has images of {dtype:.40} {shape}")
    return Leaf(path, key, "image", _DTYPES[dtype], shape, False)


def _shape(content: Mapping[str, Any]) -> tuple[int, ...]:
    """The sizes, -1 where one is not stated."""
    sizes = tuple(int(size) for size in content.get("shape", {}).get("dimensions", ()))
    if not all(-1 <= size < 2**31 for size in sizes):
        raise DamagedEpisodeError(f"has a feature of shape {sizes!r:.60}")
    return sizes
