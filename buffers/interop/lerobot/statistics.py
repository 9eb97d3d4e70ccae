"""Statistics of features as LeRobot has them, of episodes and of all: `min`, `max`, `mean`, `std`, `count`, quantiles.

Those of all are made of those of episodes. Quantiles are then only means of the episodes' quantiles, as LeRobot's are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Statistics", "of_depths", "of_images", "of_numbers"]

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def of_numbers(frames: np.ndarray) -> dict[str, Any]:
    """Those of the frames `(T, *shape)` of an episode, by position in the last axis, as LeRobot does for matrices."""
    values = frames.reshape(-1, frames.shape[-1] if frames.ndim > 1 else 1).astype(np.float64)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    quantiles = dict(zip(_QUANTILES, np.quantile(values, [*_QUANTILES.values()], 0), strict=True))
    return {**found, "count": np.array([len(frames)]), **quantiles}


def of_images(frames: np.ndarray) -> dict[str, Any]:
    """Those of images uint8 `(T, H, W, C)` by channel, in [0, 1], of the shape (C, 1, 1)."""
    counts = np.zeros((frames.shape[-1], 256))
    for frame in frames:
        for channel in range(frame.shape[-1]):
            counts[channel] += np.bincount(frame[..., channel].ravel(), minlength=256)
    share = counts / counts.sum(1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    deviation = (share * (values - mean[:, None]) ** 2).sum(1)
    is_there = counts > 0
    found = {"min": values[is_there.argmax(1)], "max": values[255 - is_there[:, ::-1].argmax(1)]}
    found |= {"mean": mean, "std": np.sqrt(deviation)}
    below = share.cumsum(1)
    quantiles = {name: values[(below >= level - 1e-12).argmax(1)] for name, level in _QUANTILES.items()}
    return _by_channel({**found, **quantiles}, len(frames))


def of_depths(frames: np.ndarray) -> dict[str, Any]:
    """Those of images of one channel, in their own unit, of the shape (1, 1, 1)."""
    found = of_numbers(frames.reshape(-1))
    return _by_channel({name: value for name, value in found.items() if name != "count"}, len(frames))


def _by_channel(found: dict[str, np.ndarray], num_frames: int) -> dict[str, Any]:
    return {**{name: value.reshape(-1, 1, 1) for name, value in found.items()}, "count": np.array([num_frames])}


class Statistics:
    """Those of all episodes, from those of each."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Take in those of a feature in one more episode."""
        old = self._found.get(name)
        if old is None:
            self._found[name] = dict(found)
            return
        count = old["count"] + found["count"]
        share = found["count"][0] / count[0]
        mixed = {key: old[key] + share * (found[key] - old[key]) for key in ("mean", *_QUANTILES)}
        square = (1 - share) * (old["std"] ** 2 + (old["mean"] - mixed["mean"]) ** 2)
        square = square + share * (found["std"] ** 2 + (found["mean"] - mixed["mean"]) ** 2)
        ends = {"min": np.minimum(old["min"], found["min"]), "max": np.maximum(old["max"], found["max"])}
        self._found[name] = {**ends, **mixed, "std": np.sqrt(square), "count": count}

    def as_json(self) -> dict[str, dict[str, Any]]:
        """As in meta/stats.json."""
        return {name: {key: value.tolist() for key, value in found.items()} for name, found in self._found.items()}
