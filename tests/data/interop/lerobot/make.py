"""Writes the LeRobot datasets that tests/interop/test_lerobot*.py read, and beside each its log.

Needs Python 3.12, none of `buffers`. LeRobot 0.6.1 writes v3.0, 0.3.3 writes v2.1:

    python3.12 -m venv v30 && v30/bin/pip install "lerobot[dataset]==0.6.1" torch==2.11.0 datasets==4.8.5 numpy==2.2.6
    python3.12 -m venv v21 && v21/bin/pip install "lerobot==0.3.3"
    v30/bin/python tests/data/interop/lerobot/make.py && v21/bin/python tests/data/interop/lerobot/make.py

NAME.zip holds a dataset, NAME.npz its log: `EPISODE/FEATURE` -> (L, *shape), what was given to `add_frame`, for video
the frames that LeRobot itself reads, uint8 (L, C, H, W). Every value says its episode and frame.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import av  # noqa: E402
import numpy as np  # noqa: E402
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402

HERE = Path(__file__).parent
FPS = 10
LENGTHS = (3, 1, 12, 5)
TASKS = (["open the drawer"] * 3, ["close it"], ["open the drawer"] * 7 + ["close it"] * 5, ["open the drawer"] * 5)
IS_V21 = importlib.metadata.version("lerobot") == "0.3.3"

HWC, CHW = ["height", "width", "channels"], ["channels", "height", "width"]
PLAIN = {
    "observation.state": {"dtype": "float64", "shape": (2,), "names": ["episode", "frame"]},
    "observation.gripper": {"dtype": "float32", "shape": (1,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
}
IMAGES = {
    **PLAIN,
    "observation.images.top": {"dtype": "image", "shape": (8, 8, 3), "names": HWC},
    "observation.images.wrist": {"dtype": "image", "shape": (3, 4, 6), "names": CHW},
    "next.reward": {"dtype": "float64", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    "operator": {"dtype": "string", "shape": (1,), "names": None},
    "aux": {"dtype": "uint8", "shape": (1,), "names": None},
}
# No episode of one frame, which LeRobot 0.6.1 cannot save beside longer ones where a feature is a matrix.
OTHERS = {
    "action": PLAIN["action"],
    "observation.depth": {"dtype": "image", "shape": (6, 8, 1), "names": HWC, "info": {"is_depth_map": True}},
    "observation.grid": {"dtype": "int16", "shape": (2, 3), "names": None},
    "observation.half": {"dtype": "float16", "shape": (2,), "names": None},
}
VIDEO = {**PLAIN, "observation.images.cam": {"dtype": "video", "shape": (64, 64, 3), "names": HWC}}


def value(name: str, feature: dict[str, Any], episode: int, frame: int) -> Any:
    """What a feature has at a frame."""
    shape = feature["shape"]
    if feature["dtype"] == "string":
        return f"person {episode}"
    if name.startswith("next.") and feature["dtype"] == "bool":
        # Done at the end of each but the cut one, a success in even ones.
        is_last = frame == LENGTHS[episode] - 1
        return np.array([is_last and (episode != 3 if name == "next.done" else episode % 2 == 0)])
    if feature["dtype"] == "video":
        return np.full(shape, 20 + 60 * episode + 4 * frame, np.uint8)
    if "depth" in name:
        return (1000 * episode + 10 * frame + np.arange(48).reshape(shape)).astype(np.uint16)
    if feature["dtype"] == "image":
        image = np.random.default_rng((episode, frame)).integers(0, 256, shape, np.uint8)
        image.reshape(-1)[:2] = episode, frame
        return image
    numbers = 100 * episode + frame + np.arange(np.prod(shape)).reshape(shape)
    return (numbers + 1 / 3 if np.dtype(feature["dtype"]).kind == "f" else numbers % 250).astype(feature["dtype"])


def write(root: Path, features: dict[str, Any], finalize: bool = True) -> dict[str, np.ndarray]:
    """A dataset, and its log."""
    dataset = LeRobotDataset.create("local/tagged", FPS, features, root=root, robot_type="arm")
    log: dict[str, list[Any]] = {}
    for episode, length in enumerate(LENGTHS):
        if features is OTHERS and length == 1:
            continue
        for frame in range(length):
            row = {name: value(name, feature, episode, frame) for name, feature in features.items()}
            for name in row:
                log.setdefault(f"{episode}/{name}", []).append(row[name])
            # It takes the task out of the dict that it is given.
            if IS_V21:
                dataset.add_frame(dict(row), task=TASKS[episode][frame])
            else:
                dataset.add_frame({**row, "task": TASKS[episode][frame]})
        dataset.save_episode()
    if not IS_V21 and finalize:
        dataset.finalize()
    elif not IS_V21:
        pack(root, HERE / "open.zip")
    return {name: np.stack(values) for name, values in log.items()}


def read_video(root: Path, log: dict[str, np.ndarray]) -> None:
    """Put the frames that LeRobot reads in place of those that were given.

    0.3.3 needs a torchvision that still reads video; its files hold one episode, whose frames are taken in order.
    """
    name = "observation.images.cam"
    dataset = None if IS_V21 else LeRobotDataset("local/tagged", root=root, video_backend="pyav")
    frames = iter(range(sum(LENGTHS)))
    for episode, length in enumerate(LENGTHS):
        if dataset is None:
            with av.open(str(root / f"videos/chunk-000/{name}/episode_{episode:06d}.mp4")) as container:
                images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            log[f"{episode}/{name}"] = np.stack(images).transpose(0, 3, 1, 2)
        else:
            seen = [dataset[next(frames)][name].numpy() for _ in range(length)]
            log[f"{episode}/{name}"] = (np.stack(seen) * 255).round().astype(np.uint8)


def pack(root: Path, target: Path) -> None:
    """All files of a dataset, but the images that 0.3.3 leaves beside those in Parquet."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file() and "images" not in path.relative_to(root).parts[:1]:
                member = zipfile.ZipInfo(str(path.relative_to(root)), (1980, 1, 1, 0, 0, 0))
                member.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(member, path.read_bytes())


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        if IS_V21:
            mixed = {**VIDEO, "observation.images.top": IMAGES["observation.images.top"]}
            datasets = {"v21": mixed}
        else:
            datasets = {"images": IMAGES, "others": OTHERS, "video": VIDEO}
        for name, features in datasets.items():
            root = Path(directory) / name
            log = write(root, features)
            if "observation.images.cam" in features:
                read_video(root, log)
            pack(root, HERE / f"{name}.zip")
            np.savez_compressed(HERE / f"{name}.npz", **log)
        if not IS_V21:
            write(Path(directory) / "open", PLAIN, finalize=False)


if __name__ == "__main__":
    sys.exit(main())
