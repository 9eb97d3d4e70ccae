"""Datasets that Minari writes of games whose rows are known."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

FORMATS = ["hdf5", "arrow", "parquet"]
# Steps, terminated, truncated: one step, both kinds of end, both at once, and a recording that was cut.
ENDS = [(1, True, False), (3, True, False), (4, False, True), (2, True, True), (5, False, False)]
STATE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTIONS = spaces.Discrete(10_000)


def transitions(number: int, length: int, terminated: bool = True, truncated: bool = False) -> dict[str, np.ndarray]:
    """T transitions as Minari keeps them, whose values say which episode and step they are of."""
    rows, steps = np.arange(length + 1), np.arange(length)
    return {
        "observations": np.stack([np.full(length + 1, number), rows], -1).astype(np.float32),
        "actions": 100 * number + steps,
        "rewards": number + (steps + 1) / 4,
        "terminations": (steps == length - 1) & terminated,
        "truncations": (steps == length - 1) & truncated,
    }


def buffer(number: int, length: int, terminated: bool = True, truncated: bool = False, **others: Any) -> EpisodeBuffer:
    return EpisodeBuffer(**{**transitions(number, length, terminated, truncated), **others})


def arrived(values: np.ndarray) -> np.ndarray:
    """What belongs to transitions, with zeros for row 0."""
    return np.concatenate([np.zeros((1, *values.shape[1:]), values.dtype), values])


def expected(number: int, length: int, terminated: bool = True, truncated: bool = False) -> dict[str, np.ndarray]:
    """The rows of `buffer` as they are to be read."""
    found = transitions(number, length, terminated, truncated)
    return {
        "obs": found["observations"],
        "action": arrived(found["actions"]),
        "reward": arrived(found["rewards"]),
        "terminated": arrived(found["terminations"]),
        "truncated": arrived(found["truncations"]),
        "is_first": np.arange(length + 1) == 0,
    }


def create(
    path: Path,
    buffers: Sequence[EpisodeBuffer],
    data_format: str = "hdf5",
    observation_space: spaces.Space = STATE,
    action_space: spaces.Space = ACTIONS,
    **options: Any,
) -> Path:
    """Let Minari write a dataset; its directory, which is below the store that the environment names."""
    name = f"{path.name}-v0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Of metadata that are not given.
        minari.create_dataset_from_buffers(
            name,
            list(buffers),
            observation_space=observation_space,
            action_space=action_space,
            data_format=data_format,
            **{"jpeg_encoding": False, **options},
        )
    return Path(os.environ["MINARI_DATASETS_PATH"]) / name


def change_json(path: Path, **values: Any) -> None:
    """Replace values of a JSON file; None removes them."""
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def leaves(tree: Any, path: str = "") -> dict[str, np.ndarray]:
    """`name -> array` of nested dicts and tuples."""
    if isinstance(tree, tuple):
        tree = {str(number): value for number, value in enumerate(tree)}
    if not isinstance(tree, dict):
        return {path: tree}
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}/{key}" if path else key)
    return found


def assert_same(found: Any, wanted: dict[str, np.ndarray]) -> None:
    """Names in order, dtypes and values."""
    flat = leaves(found)
    assert list(flat) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(flat[name], values, err_msg=name)
        assert flat[name].dtype == values.dtype, name
