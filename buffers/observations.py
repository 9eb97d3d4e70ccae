"""Arrays from the many forms in which environments return observations, for the recorder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.fields import Fields

__all__ = [
    "and_not",
    "differing_rows",
    "dtypes_of",
    "find_final_obs",
    "is_per_env",
    "put_items",
    "split_dones",
    "to_array",
    "tree_of",
]


def to_array(name: str, value: Any) -> np.ndarray:
    """As `as_array`, but also takes what numpy can read (JAX arrays, lazy frames), and no bfloat16."""
    if type(value) is np.ndarray and value.dtype.char in "?bBfdlq" and value.dtype.isnative:
        return value  # The usual case; `as_array` would return the same.
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            raise TypeError(
                f"Field `{name}` is of bfloat16, which numpy has not; convert it, by `.float()` for example."
            )
    elif not isinstance(value, (np.ndarray, np.generic)) and hasattr(value, "__array__"):
        value = np.asarray(value)
    return as_array(name, value)


def tree_of(name: str, value: Any, convert: Callable[[str, Any], np.ndarray] = to_array) -> Any:
    """Nested dicts of arrays, from nested dicts and tuples; a tuple becomes a dict with the keys "0", "1", ..."""
    if isinstance(value, tuple):
        value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, Mapping):
        return {key: tree_of(f"{name}/{key}", item, convert) for key, item in value.items()}
    return convert(name, value)


def find_final_obs(final_obs: Any, infos: Any) -> tuple[str, Any, Any]:
    """Find the final observations of environments that reset themselves.

        final_obs                         as passed
        infos["final_obs"]                Gymnasium: an object array, None where there is none, of arrays, dicts, tuples
                                          Isaac Lab: a full batch
        infos["final_observation"]        Gymnasium before 1.0: an object array;  ManiSkill: a full batch
        infos[i][...]                     a dict an environment, with either name, or SB3's "terminal_observation"

    Returns:
        Their name; the observations, or None; their mask `infos["_" + name]`, or None.
    """
    if final_obs is not None:
        return "final_obs", final_obs, None
    names = ("final_obs", "final_observation", "terminal_observation")
    if isinstance(infos, Mapping):
        for name in names[:2]:
            if infos.get(name) is not None:
                return name, infos[name], infos.get(f"_{name}")
    elif isinstance(infos, (list, tuple)):
        for name in names:
            if any(info.get(name) is not None for info in infos):
                return name, [info.get(name) for info in infos], None
    return "final_obs", None, None


def is_per_env(source: Any) -> bool:
    """Whether there is one item per environment (a list, an object array), None where there is none."""
    return isinstance(source, list) or (isinstance(source, np.ndarray) and source.dtype == np.object_)


def put_items(fields: Fields, arrived: list[np.ndarray], wanted: np.ndarray, name: str, items: Any) -> np.ndarray:
    """Write final observations into the arrays `arrived` `(N, *shape)`, where `wanted`, bool `(N,)`.

    `items` has one observation per environment, None where there is none; errors call it `name`.

    Returns:
        bool `(N,)`, where one was written.
    """
    if len(items) != len(wanted):
        raise ValueError(f"`{name}` has {len(items)} items, expected one of each of {len(wanted)} environments.")
    found = wanted & np.array([item is not None for item in items], np.bool_)
    for env in found.nonzero()[0].tolist():
        leaves = fields.arrays({"obs": tree_of(f"obs ({name})", items[env])})
        for (field, dtype, shape), array, leaf in zip(fields.layout, arrived, leaves, strict=True):
            # An environment may return float64 where the vector environment casts to the float32 of its space.
            if leaf.shape != shape or not np.can_cast(leaf.dtype, dtype, "same_kind"):
                raise ValueError(
                    f"The final observation of environment {env} in `{name}` has dtype {leaf.dtype} and shape "
                    f"{leaf.shape} for field `{field}`, expected {dtype} and {shape}."
                )
            array[env] = leaf
    return found


def split_dones(is_done: np.ndarray, infos: Any) -> tuple[np.ndarray, np.ndarray]:
    """Split SB3's dones, bool `(N,)`, into terminated and truncated by the "TimeLimit.truncated" of its infos."""
    if not isinstance(infos, (list, tuple)) or len(infos) != len(is_done):
        raise ValueError(
            "`truncated` is None, which needs `infos` to be a list of one dict an environment with "
            f"'TimeLimit.truncated' in it (SB3), found {type(infos).__name__}. Pass `truncated`."
        )
    is_truncated = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos], np.bool_) & is_done
    return is_done & ~is_truncated, is_truncated


def differing_rows(arrays: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    """In which environments any of the arrays `(N, *shape)` differ, bool `(N,)`."""
    found = np.zeros(len(arrays[0]), np.bool_)
    for array, other in zip(arrays, others, strict=True):
        differs = (array != other) & ((array == array) | (other == other))  # NaN equals NaN.
        found |= differs.any(axis=tuple(range(1, differs.ndim)))
    return found


def dtypes_of(fields: Fields | None) -> dict[str, np.dtype]:
    """The dtype of each field."""
    return {name: dtype for name, dtype, _ in (fields.layout if fields else ())}


def and_not(mask: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    """The environments of `mask` that are not in `other`; None if there are none."""
    if mask is None or other is None:
        return mask
    left = mask & ~other
    return left if left.any() else None
