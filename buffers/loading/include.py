"""What a batch holds besides the fields."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from buffers.table import CONTINUES, GOES_ON, Windows

__all__ = ["INCLUDABLE", "checked_include", "included", "zero_padding"]

INCLUDABLE = ("index", "episode", "step", "is_first", "is_last", "mask", "weight", "source")


def checked_include(include: Iterable[str], whole_episodes: bool) -> tuple[str, ...]:
    """The names in `include`, each once; whole episodes always have `mask`."""
    if isinstance(include, str):
        raise TypeError(f"`include` must be a tuple of names, found the string {include!r}: write ({include!r},).")
    include = tuple(dict.fromkeys(include))
    unknown = [name for name in include if name not in INCLUDABLE]
    if unknown:
        raise ValueError(f"`include` knows {list(INCLUDABLE)}, found {unknown}.")
    return (*include, "mask") if whole_episodes and "mask" not in include else include


def included(name: str, windows: Windows) -> torch.Tensor:
    """The tensor that `include` calls `name`, except "source", which `EpisodeSource.sources_of` returns."""
    if name == "episode":
        return torch.from_numpy(windows.episode.copy())
    if name == "weight":
        weight = windows.weight
        return torch.ones(len(windows), device="cpu") if weight is None else torch.from_numpy(weight.astype(np.float32))
    steps = windows.step[:, None] + np.arange(windows.length)
    if name in ("is_first", "is_last"):
        at, piece = (0, CONTINUES) if name == "is_first" else (windows.episode_length[:, None] - 1, GOES_ON)
        is_end = steps == at
        return torch.from_numpy(is_end if windows.cut is None else is_end & (windows.cut[:, None] & piece == 0))
    mask = steps < windows.episode_length[:, None]
    if name == "mask":
        return torch.from_numpy(mask)
    values = steps + (windows.start - windows.step)[:, None] if name == "index" else steps
    return torch.from_numpy(np.where(mask, values, -1))


def zero_padding(windows: Windows, rows: dict[str, torch.Tensor]) -> None:
    """Set the rows after the end of episodes to zero."""
    padding = np.arange(windows.length) >= windows.num_rows[:, None]
    if padding.any():
        for tensor in (tensor for tensor in rows.values() if tensor.numel()):
            # As bytes, because torch cannot assign values of all its dtypes.
            data = tensor.view(*tensor.shape[:2], math.prod(tensor.shape[2:])).view(torch.uint8)
            data[torch.from_numpy(padding).to(tensor.device)] = 0
