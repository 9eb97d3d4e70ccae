"""LeRobot datasets of the tests: those that LeRobot has written, beside their logs, and small ones that we write."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from buffers.dataset import RingBufferDataset
from buffers.interop import lerobot
from buffers.interop.alignment import rows_on_arrival

DATA = Path(__file__).parent.parent / "data" / "interop" / "lerobot"
LENGTHS = (3, 1, 12, 5)
FPS = 10
OPEN, CLOSE = "open the drawer", "close it"
ROWS = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
INFO = "meta/info.json"


def unpacked(name: str, path: Path) -> Path:
    """A dataset that LeRobot has written, in a directory of its own."""
    target = path / name
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(target)
    return target


def log_of(name: str) -> list[dict[str, np.ndarray]]:
    """What LeRobot was given: `feature -> (T, *shape)` for each episode."""
    with np.load(DATA / f"{name}.npz") as archive:
        found: dict[str, dict[str, np.ndarray]] = {}
        for key in archive.files:
            episode, feature = key.split("/")
            found.setdefault(episode, {})[feature] = archive[key]
    return [found[key] for key in sorted(found, key=int)]


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}/")
        else:
            yield path + key, value


def as_observed(frames: np.ndarray) -> np.ndarray:
    """T frames as T + 1 rows: there is no final one."""
    return np.concatenate([frames, frames[-1:]])


def as_arrived(frames: np.ndarray) -> np.ndarray:
    """T frames as T + 1 rows, a row later: what came of an action."""
    return np.concatenate([np.zeros_like(frames[:1]), frames])


def check_equal(found: np.ndarray, expected: np.ndarray, name: str = "") -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert np.array_equal(found, expected), name


def steps_of(episode: int, length: int) -> dict[str, Any]:
    """An episode of T transitions whose values say episode and step; T + 1 observations."""
    number = 100 * episode + np.arange(length + 1)
    image = np.zeros((length + 1, 6, 5, 3), np.uint8)
    image[:, 0, 0, 0], image[:, 1, 1, 1], image[:, -1, -1, 2] = episode, np.arange(length + 1), 255
    is_last = np.arange(length) == length - 1
    obs = {
        "images": {"top": image, "wrist": image.transpose(0, 3, 1, 2).copy(), "gray": image[..., :1].copy()},
        "state": np.stack([number, number + 1 / 3], 1),
        "speed": number.astype(np.float32),
    }
    return {
        "obs": obs,
        "action": np.stack([number[:-1], -number[:-1]], 1).astype(np.float32),
        "reward": number[:-1] + 1 / 3,
        "terminated": is_last & (episode % 2 == 0),
        "truncated": is_last & (episode % 3 == 0),
        "grid": (number[:-1, None, None] + np.arange(6).reshape(2, 3)).astype(np.int16),
    }


def rows_of(episode: int, length: int) -> dict[str, Any]:
    """The same as rows, as a recorder stores them."""
    steps = steps_of(episode, length)
    return rows_on_arrival(steps.pop("obs"), steps)


def dataset_of(*lengths: int, task: str | None = OPEN) -> RingBufferDataset:
    dataset = RingBufferDataset(10_000)
    for episode, length in enumerate(lengths):
        info = {"number": episode, "good": episode % 2 == 0, "note": f"no. {episode}", "score": episode / 3}
        dataset.add_episode(rows_of(episode, length), info if task is None else {**info, "task": task})
    return dataset


def written(path: Path, *lengths: int, **options: Any) -> Path:
    """A directory that we wrote."""
    lerobot.write(dataset_of(*(lengths or (3, 1, 4))), path / "written", **{"fps": FPS, **options})
    return path / "written"


def change_info(path: Path, **values: Any) -> None:
    info = json.loads((path / INFO).read_text())
    (path / INFO).write_text(json.dumps({**info, **values}))


def change_feature(path: Path, name: str, **values: Any) -> None:
    features = json.loads((path / INFO).read_text())["features"]
    change_info(path, features={**features, name: {**features.get(name, {}), **values}})


def change_table(path: Path, name: str, function: Callable[[pa.Table], pa.Table]) -> None:
    """Write a Parquet file anew, changed."""
    table = pq.read_table(path / name, partitioning=None)
    pq.write_table(function(table), path / name)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(
        table.schema.get_field_index(name), name, values if isinstance(values, pa.Array) else [values]
    )
