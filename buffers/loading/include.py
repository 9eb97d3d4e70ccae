"""What a batch holds besides the fields."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from buffers.table import CONTINUES, GOES_ON, Windows

__all__ = ["INCLUDABLE", "checked_include", "included"]

INCLUDABLE = ("index", "episode", "step", "is_first", "is_last", "mask", "weight", "source")


def checked_include(include: Iterable[str], is_padded: bool) -> tuple[str, ...]:
    """The names in `include`, each once; what may be padded always has `mask`."""
    if isinstance(include, str):
        raise TypeError(f"`include` must be a tuple of names, found the string {include!r}: write ({include!r},).")
    include = tuple(dict.fromkeys(include))
    unknown = [name for name in include if name not in INCLUDABLE]
    if unknown:
        raise ValueError(f"`include` knows {list(INCLUDABLE)}, found {unknown}.")
    return (*include, "mask") if is_padded and "mask" not in include else include


def included(name: str, windows: Windows) -> torch.Tensor:
    """What `include` calls `name`: not "mask" nor "source", which the layout and the source of windows know."""
    if name == "episode":
        return torch.from_numpy(windows.episode.copy())
    if name == "weight":
        weight = windows.weight
        return torch.ones(len(windows), device="cpu") if weight is None else torch.from_numpy(weight.astype(np.float32))
    steps = windows.steps
    if name in ("is_first", "is_last"):
        at, piece = (0, CONTINUES) if name == "is_first" else (windows.episode_length[:, None] - 1, GOES_ON)
        is_end = steps == at
        return torch.from_numpy(is_end if windows.cut is None else is_end & (windows.cut[:, None] & piece == 0))
    values = steps + (windows.start - windows.step)[:, None] if name == "index" else steps
    return torch.from_numpy(np.where(windows.mask, values, -1))
