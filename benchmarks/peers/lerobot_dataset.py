"""LeRobot: rows in its dataset, images as PNG within Parquet, no video; a DataLoader reads anchors one by one.

Images come as float32 in [0, 1], channels first: that is how it delivers them, and nothing is done to them here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before it is imported: nothing is looked up on the hub, and what it caches goes away with this process.
_CACHE = tempfile.TemporaryDirectory(prefix="buffers_benchmarks_lerobot_")
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_CACHE.name)

import torch  # noqa: E402
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402
from torch.utils.data import DataLoader, RandomSampler  # noqa: E402

from benchmarks.contestant import Contestant, Rows  # noqa: E402
from benchmarks.workloads import OFFSETS, Store  # noqa: E402

_FPS = 10
_ID = "benchmarks/offsets"
_FOREVER = 1 << 40


class LeRobot(Contestant):
    """`LeRobotDataset` with `delta_timestamps`, from files in the page cache."""

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self._num_workers, self.prefetched = num_workers, 2 * num_workers

    def make(self, store: Store) -> None:
        self._root = Path(self.folder) / "lerobot"
        shutil.rmtree(self._root, ignore_errors=True)
        features = {
            name: {"dtype": "image", "shape": shape, "names": ["height", "width", "channels"]}
            if name == "obs"
            else {"dtype": dtype, "shape": shape or (1,), "names": None}
            for name, (shape, dtype) in store.fields.items()
        }
        self._shapes = {name: feature["shape"] for name, feature in features.items()}
        self._dataset = LeRobotDataset.create(_ID, _FPS, features, root=self._root, use_videos=False)

    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        def add() -> None:
            for begin in range(0, len(rows["reward"]), length):
                for row in range(begin, begin + length):
                    frame = {name: rows[name][row].reshape(shape) for name, shape in self._shapes.items()}
                    self._dataset.add_frame({**frame, "task": "benchmark"})
                self._dataset.save_episode()

        return add

    def fill_rows(self, store: Store) -> None:
        super().fill_rows(store)
        self._dataset.finalize()

    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        raise NotImplementedError("It is measured with offsets alone.")

    def offset_drawer(self, batch_size: int) -> Callable[[], Any]:
        deltas = {name: [offset / _FPS for offset in offsets] for name, offsets in OFFSETS.items()}
        dataset = LeRobotDataset(_ID, root=self._root, delta_timestamps=deltas)
        anchors = RandomSampler(dataset, replacement=True, num_samples=_FOREVER)
        batches = iter(DataLoader(dataset, batch_size, sampler=anchors, num_workers=self._num_workers))
        return lambda: next(batches)

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        rows = {name: batch[name].reshape(batch_size, -1, *batch[name].shape[2:]) for name in self._shapes}
        rows["obs"] = (rows["obs"] * 255).round().to(torch.uint8).movedim(-3, -1)
        return {name: values.numpy() for name, values in rows.items()}

    def set_threads(self, number: int) -> None:
        torch.set_num_threads(number)
