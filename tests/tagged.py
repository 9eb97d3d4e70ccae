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
    """(environment, episode, first step, rows) of each sequence, after checking that all fields agree on it.

    With a mask, bool `(B, T)`, the rows of a sequence come first and all that follows them is zero.
    """
    state = batch["obs"]["state"].numpy()
    assert state.ndim == 3
    num_sequences, num_steps = state.shape[:2]
    is_row = np.ones((num_sequences, num_steps), np.bool_) if mask is None else mask.numpy()
    lengths = is_row.sum(1)
    prefix = np.arange(num_steps) < lengths[:, None]
    np.testing.assert_array_equal(is_row, prefix, err_msg="the mask has gaps", strict=True)
    with np.errstate(invalid="ignore"):  # The comparison below reports NaN by field.
        env, number, first = state[:, 0].astype(np.int64).T
    # What follows from each sequence's first row, to be compared with all rows at once.
    expected = flatten(rows(env[:, None], number[:, None], first[:, None] + np.arange(num_steps)))
    flat = flatten(batch)
    assert not expected.keys() - flat.keys(), f"missing: {expected.keys() - flat.keys()}"
    for name, values in expected.items():
        if mask is not None:
            values[~is_row] = 0
        _assert_same_rows(name, flat[name].numpy(), values, is_row)
    return list(zip(env.tolist(), number.tolist(), first.tolist(), lengths.tolist(), strict=True))


def _assert_same_rows(name: str, found: np.ndarray, expected: np.ndarray, is_row: np.ndarray) -> None:
    """Compare `(B, T, *shape)` at once, and name the first sequence that differs."""
    kinds = (found.dtype, found.shape), (expected.dtype, expected.shape)
    assert kinds[0] == kinds[1], f"{name}: found {kinds[0]}, expected {kinds[1]}"
    differs = found != expected
    if differs.any():
        b, t = np.argwhere(differs)[0, :2]
        where = f"{name} of sequence {b}" if is_row[b, t] else f"padding of {name} of sequence {b} is not zero"
        np.testing.assert_array_equal(found[b], expected[b], err_msg=f"{where}, row {t}")


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


def numbers(dataset: Any) -> list[int]:
    """The numbers of the episodes that live, each checked whole, oldest first."""
    return [number_and_length(found)[0] for found in dataset.episodes()]


def chi_square_is_plausible(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether counts look drawn with these probabilities: within six standard deviations of the statistic's mean."""
    expected = probabilities / probabilities.sum() * counts.sum()
    assert expected.min() >= 5, "draw more"
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return bool(statistic < freedom + 6 * np.sqrt(2 * freedom))
