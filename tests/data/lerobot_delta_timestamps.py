"""Writes lerobot_delta_timestamps.json: what LeRobot reads for `delta_timestamps`, at every frame of every episode.

Needs Python 3.12 and LeRobot, none of `buffers`:

    python3.12 -m venv venv && venv/bin/pip install "lerobot[dataset]==0.6.1"
    venv/bin/python tests/data/lerobot_delta_timestamps.py

`sets` holds, for each choice of `delta_timestamps`, a list of episodes. An episode has by field `frames`, those that
were read, and `is_pad`, 1 where LeRobot calls one padding: both (L, n), for L frames and n deltas.
`rounding` holds the offset in rows that LeRobot makes of a delta in seconds, or null where it raises ValueError.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np  # noqa: E402
import torch  # noqa: E402
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402

FPS = 10
# An episode of one row lies between two others, so that reading over either of its ends would show.
LENGTHS = (3, 1, 20, 7)
SETS = {
    "history and chunk": {"observation.state": [-0.1, 0.0], "action": [i / FPS for i in range(8)]},
    "frame skips": {"observation.state": [-0.4, -0.2, 0.0], "action": [0.0, 0.2, 0.4]},
    "image": {"observation.image": [-0.2, 0.0], "observation.state": [-0.1], "action": [0.1, 0.5]},
    "longer than episodes": {"observation.state": [-2.5, -0.7, 0.0], "action": [-0.3, 0.0, 0.7, 2.5]},
    "not sorted, twice": {"observation.state": [0.0, -0.3, -0.3], "action": [0.2, -0.2, 0.0]},
}
ROUNDING = {
    10: (0.1, 0.1 + 0.2, 0.70005, 0.7002, 0.75, -0.0998, -0.09995),
    30: (1 / 30, 0.0333, 0.033, 2 / 30, 0.067, 0.06667, -1 / 30),
}
VECTOR = {"dtype": "float32", "shape": (2,), "names": None}
FEATURES = {
    "observation.state": VECTOR,
    "action": VECTOR,
    "observation.image": {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channels"]},
}


def write(root: Path, fps: int, lengths: tuple[int, ...]) -> None:
    """A dataset whose every field says (episode, frame)."""
    dataset = LeRobotDataset.create("local/tagged", fps, FEATURES, root=root, use_videos=False)
    for episode, length in enumerate(lengths):
        for frame in range(length):
            image = np.zeros((16, 16, 3), np.uint8)
            image[..., :2] = episode, frame
            tag = np.array([episode, frame], np.float32)
            row = {"observation.state": tag, "action": -tag, "observation.image": image, "task": "none"}
            dataset.add_frame(row)
        dataset.save_episode()
    dataset.finalize()


def tags(name: str, values: torch.Tensor) -> list[list[int]]:
    """[episode, frame] of each row that was read."""
    if name == "observation.image":
        values = (values * 255).round()[:, :2, 0, 0]
    return [[abs(int(value)) for value in row] for row in values.tolist()]


def read(root: Path, deltas: dict[str, list[float]]) -> list[dict[str, Any]]:
    """By episode and field, `frames` and `is_pad` of every anchor."""
    dataset = LeRobotDataset("local/tagged", root=root, delta_timestamps=deltas)
    found: list[dict[str, Any]] = [{name: {"frames": [], "is_pad": []} for name in deltas} for _ in LENGTHS]
    anchors = [(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)]
    for (episode, frame), item in zip(anchors, (dataset[i] for i in range(len(dataset))), strict=True):
        assert (int(item["episode_index"]), int(item["frame_index"])) == (episode, frame)
        for name in deltas:
            read_from, frames = zip(*tags(name, item[name]), strict=True)
            assert set(read_from) == {episode}, "rows of another episode were read"
            found[episode][name]["frames"].append(frames)
            found[episode][name]["is_pad"].append([int(value) for value in item[f"{name}_is_pad"]])
    return found


def offset(root: Path, delta: float) -> int | None:
    """The rows that LeRobot makes of a delta in seconds, seen from row 20 of 41; None where it refuses."""
    try:
        dataset = LeRobotDataset("local/tagged", root=root, delta_timestamps={"action": [delta]})
    except ValueError:
        return None
    return tags("action", dataset[20]["action"])[0][1] - 20


def main() -> None:
    packages = ("lerobot", "datasets", "torch")
    found: dict[str, Any] = {
        "command": "python tests/data/lerobot_delta_timestamps.py",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "fps": FPS,
        "lengths": LENGTHS,
    }
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory) / "sets", FPS, LENGTHS)
        found["sets"] = {
            name: {"delta_timestamps": deltas, "episodes": read(Path(directory) / "sets", deltas)}
            for name, deltas in SETS.items()
        }
        found["rounding"] = []
        for fps, deltas in ROUNDING.items():
            write(Path(directory) / str(fps), fps, (41,))
            rows = [{"delta": delta, "offset": offset(Path(directory) / str(fps), delta)} for delta in deltas]
            found["rounding"].append({"fps": fps, "deltas": rows})
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
