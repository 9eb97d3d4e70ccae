"""The info of an episode: a small flat dict of numbers, booleans and strings, such as its task and its success."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

__all__ = ["EpisodeInfo", "checked_info", "info_text", "infos_by_env"]

EpisodeInfo = dict[str, int | float | bool | str]

_MAX_BYTES = 4096
_INT64 = range(-(2**63), 2**63)


def checked_info(info: object) -> EpisodeInfo:
    """A copy as every dataset gives it back, with Python's own numbers in place of numpy's scalars.

    Raises:
        TypeError: No dict, or a key or value of another type.
        ValueError: An empty key, an integer beyond int64, or more than 4,096 bytes of JSON.
    """
    if not isinstance(info, Mapping):
        raise TypeError(f"`info` of an episode must be a dict, found {type(info).__name__}.")
    found = {}
    for key, value in info.items():
        if not isinstance(key, str):
            raise TypeError(f"`info` has the key {key!r:.60}, expected a string.")
        if not key:
            raise ValueError("`info` has an empty key. Name it.")
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, (int, float, str)):
            raise TypeError(
                f"`info` has a {type(value).__name__} under `{key:.60}`, expected a number, a bool or a string. What "
                "has more values belongs in a field."
            )
        if isinstance(value, int) and value not in _INT64:
            raise ValueError(f"`info` has {value:#x} under `{key:.60}`, which int64 cannot hold. Store it as a string.")
        found[key] = value
    text = info_text(found)
    if len(text) > _MAX_BYTES:
        raise ValueError(f"`info` takes {len(text)} bytes as JSON, more than {_MAX_BYTES}. Leave something out.")
    # Subclasses (an enumeration's members) become what they are stored as.
    return json.loads(text)


def info_text(info: EpisodeInfo) -> str:
    """JSON in ASCII; numbers that are not finite are NaN, Infinity and -Infinity."""
    return json.dumps(info, separators=(",", ":"))


def infos_by_env(info: object, leading: tuple[int, ...], envs: Iterable[int]) -> dict[int, EpisodeInfo]:
    """`environment -> info` for some environments, from what is given for all.

    Args:
        info: A dict or, with an environment axis, a sequence of N dicts or None. Values of other environments than
            `envs` are not looked at.
        leading: `(N,)`, or `()` for a single environment without an axis.
        envs: Environments whose episode ends.

    Raises:
        TypeError: Anything else, or as `checked_info`.
        ValueError: Not as many as environments, or as `checked_info`.
    """
    if not leading:
        return {env: checked_info(info) for env in envs}
    num_envs = leading[0]
    if isinstance(info, (Mapping, str)) or not isinstance(info, (Sequence, np.ndarray)):
        raise TypeError(
            f"`info` must be a sequence of {num_envs} dicts or None, one for each environment, found "
            f"{type(info).__name__}."
        )
    if len(info) != num_envs:
        raise ValueError(f"`info` has length {len(info)}, expected {num_envs}: a dict or None for each environment.")
    return {env: checked_info(info[env]) for env in envs if info[env] is not None}
