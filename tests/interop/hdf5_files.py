"""The files of the tests of HDF5, and what the game's log says that they hold."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.interop.logged import PLAYED, on_arrival, play

FILES = Path(__file__).parents[1] / "data" / "interop" / "hdf5" / "files.zip"
DEMOS = ["demo_0", "demo_1", "demo_2", "demo_3", "demo_4", "demo_10"]


def unpacked(folder: Path) -> Path:
    """A folder with what the libraries wrote; see `make.py` beside the archive."""
    with zipfile.ZipFile(FILES) as archive:
        archive.extractall(folder)
    return folder


def repeated(values: np.ndarray) -> np.ndarray:
    """T values known before an action as T + 1 rows, the last of which is not known."""
    return np.concatenate([values, values[-1:]])


def first_row(num: int) -> np.ndarray:
    return np.arange(num + 1) == 0


def last_row(num: int) -> np.ndarray:
    return np.arange(num + 1) == num


def robomimic_log(has_next: bool = True, done_mode: int = 2) -> list[dict[str, Any]]:
    """What `read` must give for `robomimic`, or for `robomimic_small`."""
    found = []
    for log in play():
        num = len(log["action"])
        done = log["terminated"] | ((np.arange(num) == num - 1) if done_mode == 2 else False)
        observed = {name: log[key] for name, key in {"image": "image", "vector": "obs"}.items()}
        rows = {
            "obs": observed if has_next else {name: repeated(values[:-1]) for name, values in observed.items()},
            "action": on_arrival(log["action"]),
            "reward": on_arrival(log["reward"].astype(np.float64)),
            "is_first": first_row(num),
            "final_obs_missing": last_row(num),
            "done": on_arrival(done.astype(np.int64)),
            "states": repeated(log["state"][:-1].astype(np.float64)),
        }
        if has_next:
            del rows["final_obs_missing"]
        found.append(rows)
    return found


def isaaclab_log() -> list[dict[str, Any]]:
    found = []
    for log in play():
        num = len(log["action"])
        pose = np.zeros((num + 1, 7), np.float32)
        pose[:, :1] = log["state"]
        found.append(
            {
                "obs": {"camera": {"rgb": repeated(log["image"][:-1])}, "vector": repeated(log["obs"][:-1])},
                "action": on_arrival(log["action"]),
                "is_first": first_row(num),
                "final_obs_missing": last_row(num),
                "processed_actions": on_arrival(2 * log["action"]),
                "states": {
                    "articulation": {"robot": {"root_pose": pose}},
                    "rigid_object": {"cube": {"count": log["state"]}},
                },
            }
        )
    return found


def d4rl_log(has_next: bool = False) -> list[dict[str, Any]]:
    found = []
    for log in play():
        num = len(log["action"])
        obs = log["obs"].astype(np.float32)
        rows = {
            "obs": obs if has_next else repeated(obs[:-1]),
            "action": on_arrival(log["action"]),
            "reward": on_arrival(log["reward"]),
            "terminated": on_arrival(log["terminated"]),
            "truncated": on_arrival(log["truncated"]),
            "is_first": first_row(num),
            "final_obs_missing": last_row(num),
            "infos": {"qpos": repeated(log["state"][:-1].astype(np.float32))},
        }
        if has_next:
            del rows["final_obs_missing"]
        found.append(rows)
    return found


def flattened(tree: Any, path: str = "") -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    found: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        found |= flattened(value, f"{path}/{key}" if path else key)
    return found


def assert_same(found: Any, expected: Any) -> None:
    """Rows of an episode: the same fields in the same order, values, dtypes and shapes."""
    one, other = flattened(found), flattened(expected)
    assert list(one) == list(other)
    for name, values in other.items():
        np.testing.assert_array_equal(one[name], values, err_msg=name, strict=True)


def content(path: Path) -> dict[str, Any]:
    """All of a small file: arrays by name, and attributes by name and key."""
    found: dict[str, Any] = {}

    def add(name: str, item: Any) -> None:
        found.update({f"{name}@{key}": value for key, value in item.attrs.items()})
        found[name] = item[()] if isinstance(item, h5py.Dataset) else None

    with h5py.File(path) as file:
        add("/", file)
        file.visititems(add)
    return found


assert len(PLAYED) == len(DEMOS)
