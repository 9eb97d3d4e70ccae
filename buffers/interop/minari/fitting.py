"""The spaces of fields that are written, and values as Minari takes them for a space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from buffers.fields import TensorType
from buffers.interop.minari.spaces import Space, shape_of, subspaces_of

__all__ = ["fitted", "made", "outside", "values_for"]


def made(fields: Any, name: str) -> Space:
    """A space for fields of which only dtype and shape are known: a Box without bounds, a Dict of such.

    Args:
        fields: A TensorType, or a nested dict of them.
        name: Of the field, for errors.

    Raises:
        ValueError: A dtype that no space has.
    """
    if isinstance(fields, Mapping):
        return {"type": "Dict", "subspaces": {key: made(field, f"{name}/{key}") for key, field in fields.items()}}
    dtype = fields.numpy_dtype
    bounds: tuple[Any, Any] = (-np.inf, np.inf)
    if dtype.kind not in "biuf":
        raise ValueError(f"`{name}` is {fields}, and Minari has no space of that dtype. Leave it out by `fields`.")
    if dtype.kind == "b":
        bounds = (False, True)
    elif dtype.kind != "f":
        bounds = (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    low, high = bounds
    return {"type": "Box", "dtype": str(dtype), "shape": list(fields.shape), "low": low, "high": high}


def fitted(space: Space | None, fields: Any, name: str, problems: list[str]) -> Space:
    """A known space as far as it fits the fields; where it does not, a space that is made of them.

    Args:
        space: What is known; None for nothing.
        fields: A TensorType, or a nested dict of them.
        name: Of the field, for `problems`.
        problems: Gets a text for each place where the space does not fit.
    """
    if space is None:
        return made(fields, name)
    if not isinstance(fields, Mapping):
        return _fitted_leaf(space, fields, name, problems)
    known = dict(subspaces_of(space)) if "subspaces" in space else {}
    if not known:
        problems.append(f"`{name}` is nested, and its space is a {space['type']}")
    for key in known.keys() - fields.keys():
        problems.append(f"`{name}/{key}` is in the space, and no field")
    for key in fields.keys() - known.keys() if known else ():
        problems.append(f"`{name}/{key}` is a field, and not in the space")
    subspaces = {key: fitted(known.get(key), field, f"{name}/{key}", problems) for key, field in fields.items()}
    if space["type"] == "Tuple" and known.keys() == fields.keys():
        return {"type": "Tuple", "subspaces": [subspaces[key] for key in known]}
    return {"type": "Dict", "subspaces": subspaces}


def _fitted_leaf(space: Space, field: TensorType, name: str, problems: list[str]) -> Space:
    own = made(field, name)
    kind, dtype = space["type"], field.numpy_dtype
    fits = kind not in ("Dict", "Tuple", "Text") and shape_of(space) == field.shape
    if fits and kind == "Discrete":
        fits = dtype.kind in "iu"
    elif fits and kind == "MultiBinary":
        fits = dtype == np.int8
    elif fits and np.dtype(space["dtype"]) != dtype:
        # Wider numbers have the same bounds: a policy gave float64 where the space has float32.
        fits = kind == "Box" and (dtype.kind == "f" == np.dtype(space["dtype"]).kind)
        space = {**space, "dtype": str(dtype)}
    if fits:
        return space
    problems.append(f"`{name}` is {field}, and its space is a {_named(space)}")
    return own


def _named(space: Space) -> str:
    if space["type"] in ("Dict", "Tuple", "Text"):
        return str(space["type"])
    return f"{space['type']} of {space.get('dtype', 'int8')} {shape_of(space)}"


def values_for(space: Space, tree: Any) -> Any:
    """A nested dict of arrays, with tuples where the space has a Tuple."""
    if not isinstance(tree, Mapping):
        return tree
    values = {key: values_for(subspace, tree[key]) for key, subspace in subspaces_of(space)}
    return tuple(values.values()) if space["type"] == "Tuple" else values


def outside(space: Space, tree: Any, name: str) -> str | None:
    """The name of a field with values that its Discrete space does not have, if there is one."""
    if isinstance(tree, Mapping):
        found = (outside(subspace, tree[key], f"{name}/{key}") for key, subspace in subspaces_of(space))
        return next((one for one in found if one is not None), None)
    if space["type"] != "Discrete":
        return None
    return name if len(tree) and not space["start"] <= tree.min() <= tree.max() < space["start"] + space["n"] else None
