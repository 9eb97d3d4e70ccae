"""Other formats: importing, and reading in place, beside the formats' own libraries: `python -m benchmarks interop`.

Everything lies on the disk of this repository, in the page cache. Contestants take turns in every round.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.lerobot_reading import LeRobotProcess, milliseconds_a_batch
from benchmarks.peers.ours import info_of
from benchmarks.saving import FOLDER
from benchmarks.timing import in_turn, print_table
from benchmarks.workloads import EPISODE_LENGTH, OFFSETS, Store, blocks
from buffers.dataset import IndividualFileDataset
from buffers.interop import hdf5, import_episodes, lerobot

NUM_STEPS = 100_000
# PNG images take longer to write than all that is measured.
NUM_IMAGES = 20_000
BATCH = 16, 64
FPS = 10


def interop(rounds: int) -> None:
    """All tables."""
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        _hdf5(Path(folder), max(1, rounds // 5))
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        _lerobot(Path(folder), max(1, rounds // 5))


def episodes(num_steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Episodes of pixels, as the other benchmarks have them."""
    for rows in blocks(Store("pixels", num_steps)):
        for begin in range(0, len(rows["reward"]), EPISODE_LENGTH):
            yield {name: values[begin : begin + EPISODE_LENGTH] for name, values in rows.items()}


def lines(found: dict[str, list[float]], limit: str, unit: float = 1.0) -> list[tuple[str, ...]]:
    """Median, least and most, and the median ratio to the limit of the same round."""
    rows = []
    for name, values in found.items():
        ratio = float(np.median(np.array(values) / np.array(found[limit])))
        figures = (np.median(values), min(values), max(values))
        rows.append((name, *(f"{unit * figure:,.1f}" for figure in figures), f"{ratio:.2g}"))
    return rows


HEADER = ("", "median", "least", "most", "ratio")


def _seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


# HDF5.


def _hdf5(folder: Path, rounds: int) -> None:
    import h5py

    path = folder / "pixels.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for number, rows in enumerate(episodes(NUM_STEPS)):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = EPISODE_LENGTH
            demo["obs/image"] = rows["obs"]
            demo["actions"], demo["rewards"] = rows["action"], rows["reward"]
            demo["dones"] = rows["terminated"].astype(np.int64)

    def read_all() -> None:
        with h5py.File(path, "r") as file:
            for demo in file["data"].values():
                for name in ("obs/image", "actions", "rewards", "dones"):
                    demo[name][...]

    def copied() -> float:
        shutil.rmtree(folder / "copied", ignore_errors=True)
        (folder / "copied").mkdir()
        return _seconds(lambda: _copy(path, folder / "copied"))

    def imported() -> float:
        shutil.rmtree(folder / "imported", ignore_errors=True)
        return _seconds(lambda: import_episodes("hdf5", path, folder / "imported"))

    functions = {"h5py reads all bytes": lambda: _seconds(read_all), "and a file each is written": copied}
    found = in_turn({**functions, "import into files": imported}, rounds)
    print_table(f"Importing {NUM_STEPS:,} steps of pixels from HDF5, s", HEADER, lines(found, "h5py reads all bytes"))
    _windows(path, folder / "imported", rounds)


def _copy(path: Path, folder: Path) -> None:
    """Write the bytes of each episode to a file, on the disk when this returns: the least that an import does."""
    import h5py

    with h5py.File(path, "r") as file:
        for name, demo in file["data"].items():
            with open(folder / name, "wb") as copy:
                for values in ("obs/image", "actions", "rewards", "dones"):
                    copy.write(np.ascontiguousarray(demo[values][...]).data)
    os.sync()


def _windows(path: Path, directory: Path, rounds: int) -> None:
    import h5py

    num, length = BATCH
    rng = np.random.default_rng(0)
    file = h5py.File(path, "r")
    demos = [file[f"data/demo_{number}"] for number in range(NUM_STEPS // EPISODE_LENGTH)]

    def by_hand() -> dict[str, np.ndarray]:
        chosen = [
            (demos[i], s) for i, s in zip(rng.integers(len(demos), size=num), rng.integers(137, size=num), strict=True)
        ]
        names = ("obs/image", "actions", "rewards", "dones")
        return {name: np.stack([demo[name][start : start + length] for demo, start in chosen]) for name in names}

    opened = hdf5.open(path)
    files = IndividualFileDataset(directory=directory, mode="r")
    in_place, ours = (iter(source.get_loader(*BATCH, seed=0)) for source in (opened, files))

    def per_batch(draw: Callable[[], Any]) -> Callable[[], float]:
        def measure() -> float:
            return 1e6 * _seconds(lambda: [draw() for _ in range(20)]) / 20

        return measure

    found = in_turn(
        {
            "h5py by hand": per_batch(by_hand),
            "`hdf5.open`, in place": per_batch(lambda: next(in_place)),
            "files, imported": per_batch(lambda: next(ours)),
        },
        2 * rounds,
    )
    print_table("Windows of 16 x 64 of pixels from HDF5, us a batch", HEADER, lines(found, "h5py by hand"))
    file.close()
    opened.close()
    files.close()


# LeRobot.


def _lerobot(folder: Path, rounds: int) -> None:
    root, store = folder / "lerobot", Store("pixels", NUM_IMAGES)
    with IndividualFileDataset(NUM_IMAGES, info_of(store), directory=folder / "rows", durability="rename") as dataset:
        for rows in episodes(NUM_IMAGES):
            dataset.add_episode(rows)
        lerobot.write(dataset, root, fps=FPS, task="benchmark")
    with LeRobotProcess(root) as process:

        def imported() -> float:
            shutil.rmtree(folder / "imported", ignore_errors=True)
            return _seconds(lambda: import_episodes("lerobot", root, folder / "imported"))

        functions = {"`datasets` reads and decodes all": process.read_all, "import into files": imported}
        found = in_turn(functions, rounds)
        title = f"Importing {NUM_IMAGES:,} steps of PNG images from LeRobot, s"
        print_table(title, HEADER, lines(found, "`datasets` reads and decodes all"))
        _anchors(folder / "imported", root, process, rounds)


def _anchors(directory: Path, root: Path, process: LeRobotProcess, rounds: int) -> None:
    """Batches of 256 anchors with offsets, per second."""
    files = IndividualFileDataset(directory=directory, mode="r")
    opened = lerobot.open(root)
    offsets = {f"obs/{name}" if name == "obs" else name: values for name, values in OFFSETS.items()}
    for num_workers in (0, 2):
        theirs = f"LeRobot, {num_workers} workers"
        functions = {theirs: lambda num=num_workers: process.batches(num)}
        for name, source in (("in place", opened), ("files, imported", files)):
            known = {n: values for n, values in offsets.items() if n in source.fields} or {"action": OFFSETS["action"]}
            images = next(n for n, kind in source.fields.items() if len(kind.shape) == 3)
            chosen: Any = {"offsets": {**known, images: OFFSETS["obs"]}, "pad": "edge", "num_workers": num_workers}
            loader = iter(source.get_loader(256, seed=0, **chosen))
            functions[f"{name}, {num_workers} workers"] = partial(milliseconds_a_batch, loader, num_workers, 40)
        found = in_turn(functions, rounds)
        print_table("Batches of 256 anchors (2 images, 16 actions), ms", HEADER, lines(found, theirs))
    files.close()
