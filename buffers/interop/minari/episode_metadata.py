"""Between what Minari keeps of an episode (its seed, options, and what a callback adds) and the info of an episode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from buffers.dataset.episode_info import EpisodeInfo, checked_info, info_text
from buffers.interop.alignment import unflattened
from buffers.interop.base import Notes

__all__ = ["info_of", "metadata_of"]

_MAX_BYTES = 4096
_MAX_DEPTH = 32
_INT64 = range(-(2**63), 2**63)
_UINT64 = range(2**64)
# Minari's own, which it sets when an episode is stored.
_OWN = ("id", "total_steps")


def info_of(metadata: Mapping[str, Any], notes: Notes) -> EpisodeInfo:
    """The info of an episode: its id first, its seed, and all else that is a number, a bool or text.

    The 64 bits of a seed that Minari's DataCollector draws do not always fit an int64; such a one is text.
    """
    info: dict[str, Any] = {}
    for key, value in _flat(metadata):
        value = value.item() if isinstance(value, np.generic) else value
        value = str(value) if isinstance(value, int) and value not in _INT64 else value
        if isinstance(value, (bool, int, float, str)) and key:
            info[key] = value
        elif value is not None:
            notes.add(f"`{key}` of episodes is a {type(value).__name__}, and is not in their info.")
    info.pop("total_steps", None)
    order = [key for key in ("id", "seed") if key in info] + sorted(info.keys() - {"id", "seed"})
    info = {key: info[key] for key in order}
    while len(info_text(info)) > _MAX_BYTES:
        longest = max(info, key=lambda key: len(info_text({key: info[key]})))
        notes.add(f"`{longest}` of some episodes is too long for their info, and is left out.")
        del info[longest]
    return checked_info(info)


def _flat(tree: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _flat(value, name, depth + 1)
        else:
            yield name, value


def metadata_of(info: EpisodeInfo, number: int, is_nested: bool, notes: Notes) -> dict[str, Any]:
    """What is written of the info of an episode.

    Args:
        info: Of the episode.
        number: The id that Minari gives it.
        is_nested: Whether the storage nests names with a "/", instead of keeping them as they are.
        notes: Gets what is left out.
    """
    kept: dict[str, Any] = {}
    for key, value in info.items():
        if key == "id" and value != number:
            notes.add("Episodes get the ids 0, 1, 2 ... of their order.")
        if key not in _OWN and (problem := _problem(key, value, info)):
            notes.add(f"`{key}` of the info of episodes {problem}, and is left out.")
        elif key == "seed":
            kept[key] = int(value)
        elif key not in _OWN:
            kept[key] = value
    return unflattened(kept) if is_nested else kept


def _problem(key: str, value: Any, info: EpisodeInfo) -> str | None:
    if "\0" in f"{key}{value}" or not _is_unicode(f"{key}{value}"):
        return "has characters that HDF5 cannot hold"
    if any(f"{key}/" == other[: len(key) + 1] for other in info if other != key):
        return "is the beginning of another name"
    if key == "seed" and not _is_seed(value):
        return "is no integer of 64 bits"
    return None


def _is_unicode(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


def _is_seed(value: Any) -> bool:
    """Whether it is an integer, or one beyond int64 as `info_of` writes it."""
    if not isinstance(value, str):
        return type(value) is int and value in _UINT64
    is_number = value.isascii() and value.isdecimal() and len(value) <= 20
    return is_number and int(value) in _UINT64 and int(value) not in _INT64
