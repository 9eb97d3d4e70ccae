"""Rows that say where they come from, and the check of whatever is drawn from them.

Each row carries (environment, episode, step) in every field, so that a sequence can be read back: it must be of one
environment and one episode, contiguous, and the same in all fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rows(env: Any, episode: Any, step: Any) -> dict[str, Any]:
    """Rows `(*leading, ...)` for integer arrays of one shape `leading`; numbers give a single row."""
    env, episode, step = np.broadcast_arrays(np.asarray(env), np.asarray(episode), np.asarray(step))
    key = (env * 1_000_003 + episode * 1_009 + step) % 251
    pixels = (key[..., None, None, None] + np.arange(4 * 2 * 3).reshape(4, 2, 3)) % 256
    return {
        "obs": {"state": np.stack([env, episode, step], -1).astype(np.float32), "pixels": pixels.astype(np.uint8)},
        "reward": (episode * 1000.0 + step).astype(np.float32),
        "flag": (step % 2 == 1),
        "code": (env * 10**12 + episode * 10**6 + step).astype(np.int64),
    }


def episode(length: int, number: int, env: int = 0) -> dict[str, Any]:
    """A tagged episode `field -> (length, *shape)`."""
    return rows(env, number, np.arange(length))


def origins(batch: Mapping[str, Any], mask: torch.Tensor | None = None) -> list[tuple[int, int, int, int]]:
    """(environment, episode, first step, rows) of each sequence, after checking that all fields agree on it."""
    state = batch["obs"]["state"].numpy()
    assert state.ndim == 3
    found = []
    for b in range(len(state)):
        length = state.shape[1] if mask is None else int(mask[b].sum())
        assert mask is None or bool(mask[b, :length].all())
        env, number, first = (int(value) for value in state[b, 0])
        expected = rows(env, number, first + np.arange(length))
        flat, flat_expected = flatten(batch), flatten(expected)
        assert flat.keys() >= flat_expected.keys()
        for name, value in flat_expected.items():
            drawn = flat[name][b, :length].numpy()
            np.testing.assert_array_equal(drawn, value, err_msg=f"{name} of sequence {b}", strict=True)
            assert not flat[name][b, length:].any(), f"padding of {name} is not zero"
        found.append((env, number, first, length))
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def assert_same_episode(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    flat, flat_expected = flatten(found), flatten(expected)
    assert flat.keys() == flat_expected.keys()
    for name, value in flat_expected.items():
        np.testing.assert_array_equal(flat[name].numpy(), value, err_msg=name, strict=True)


def number_and_length(found: Mapping[str, Any]) -> tuple[int, int]:
    """(episode, length) of a tagged episode, after checking it whole."""
    length = len(found["reward"])
    env, number = (int(value) for value in found["obs"]["state"][0, :2])
    assert_same_episode(found, episode(length, number, env))
    return number, length


def chi_square_is_plausible(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether counts look drawn with these probabilities: within six standard deviations of the statistic's mean."""
    expected = probabilities / probabilities.sum() * counts.sum()
    assert expected.min() >= 5, "draw more"
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return bool(statistic < freedom + 6 * np.sqrt(2 * freedom))
