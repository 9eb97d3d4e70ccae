"""Spaces as Minari writes them: JSON such as {"type": "Box", "dtype": "float32", "shape": [3], "low": [...], ...}.

Nothing of Gymnasium is needed, and no environment is made to ask it for its spaces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from buffers.disk import parse_json
from buffers.interop.base import FormatError
from buffers.interop.minari.columns import Path

__all__ = ["Space", "compact", "expanded", "image_shapes", "leaves", "parse_space", "shape_of", "subspaces_of"]

#: A space as a tree of JSON values.
Space = dict[str, Any]

_ADVICE = "Get a whole copy of the dataset"
_MAX_DEPTH = 32
_MOST_VALUES = 1 << 48
_NEEDED = {
    "Box": ("dtype", "shape", "low", "high"),
    "Dict": ("subspaces",),
    "Discrete": ("n", "start"),
    "MultiBinary": ("n",),
    "MultiDiscrete": ("dtype", "nvec"),
    "Text": (),
    "Tuple": ("subspaces",),
}


def parse_space(source: str, name: str, text: Any) -> Space:
    """A space of the metadata; FormatError if it is none that Minari writes."""
    try:
        space = parse_json(text) if isinstance(text, str) else text
        _check(space)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise FormatError(source, f"`{name}` is no space ({error})", _ADVICE) from error
    return space


def _check(space: Any, depth: int = 0) -> None:
    kind = space["type"]
    if kind not in _NEEDED:
        raise ValueError(f"the type {kind!r:.60} is unknown")
    if missing := [key for key in _NEEDED[kind] if key not in space]:
        raise ValueError(f"a {kind} lacks {missing}")
    if depth > _MAX_DEPTH:
        raise ValueError("it nests too deeply")
    if kind in ("Dict", "Tuple"):
        if not isinstance(space["subspaces"], dict if kind == "Dict" else list):
            raise ValueError(f"the subspaces of a {kind} are a {type(space['subspaces']).__name__}")
        for _, subspace in subspaces_of(space):
            _check(subspace, depth + 1)
    elif kind != "Text":
        shape = shape_of(space)
        if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) > _MOST_VALUES:
            raise ValueError(f"a {kind} has the shape {shape!r:.60}")
        if "dtype" in space:
            np.dtype(str(space["dtype"]))


def subspaces_of(space: Space) -> Iterator[tuple[str, Space]]:
    """(key, space) of a Dict or Tuple; those of a Tuple are "0", "1" ..."""
    found = space["subspaces"]
    yield from found.items() if isinstance(found, dict) else ((str(i), one) for i, one in enumerate(found))


def shape_of(space: Space) -> tuple[int, ...]:
    """Of one value of a Box, Discrete, MultiBinary or MultiDiscrete."""
    if space["type"] == "Box":
        return tuple(space["shape"])
    if space["type"] == "Discrete":
        return ()
    if space["type"] == "MultiBinary":
        return (space["n"],) if isinstance(space["n"], int) else tuple(space["n"])
    return np.shape(space["nvec"])


def leaves(space: Space, path: Path) -> Iterator[tuple[Path, Space]]:
    """(path, space) of all spaces below one that have values of their own."""
    if "subspaces" not in space:
        yield path, space
        return
    for key, subspace in subspaces_of(space):
        yield from leaves(subspace, (*path, key))


def image_shapes(spaces: Mapping[str, Space | None]) -> dict[Path, tuple[int, ...]]:
    """The shapes of all that Minari may have stored as JPEG, for `root -> space`."""
    found = [leaf for root, space in spaces.items() if space is not None for leaf in leaves(space, (root,))]
    is_image = {path: space["type"] == "Box" and space["dtype"] == "uint8" for path, space in found}
    return {path: shape_of(space) for path, space in found if is_image[path] and len(shape_of(space)) in (2, 3)}


def compact(space: Space) -> Space:
    """The space with one number in place of bounds that are the same everywhere: an image has one for each byte."""
    if "subspaces" in space:
        found = space["subspaces"]
        is_dict = isinstance(found, dict)
        subspaces = {k: compact(v) for k, v in found.items()} if is_dict else [compact(one) for one in found]
        return {**space, "subspaces": subspaces}
    return {**space, **{key: _one_bound(space[key]) for key in ("low", "high") if key in space}}


def expanded(space: Space) -> Space:
    """The space with a bound for each value, as Minari needs them."""
    if "subspaces" in space:
        found = space["subspaces"]
        is_dict = isinstance(found, dict)
        subspaces = {k: expanded(v) for k, v in found.items()} if is_dict else [expanded(one) for one in found]
        return {**space, "subspaces": subspaces}
    if space["type"] != "Box":
        return space
    shape, dtype = tuple(space["shape"]), np.dtype(space["dtype"])
    bounds = {key: np.broadcast_to(np.asarray(space[key], dtype), shape).tolist() for key in ("low", "high")}
    return {**space, **bounds}


def _one_bound(bounds: Any) -> Any:
    if not isinstance(bounds, list):
        return bounds
    # Not as an array, in which large integers would become floats.
    values = {json.dumps(value) for value in _flat(bounds)}
    return json.loads(values.pop()) if len(values) == 1 else bounds


def _flat(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value
