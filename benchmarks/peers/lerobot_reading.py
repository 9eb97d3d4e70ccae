"""LeRobot's own reading of a dataset that is there, in a process of its environment: told what to do by lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.environments import python_of
from benchmarks.workloads import OFFSETS

_ID, _FPS = "benchmarks/reading", 10
_WARM, _NUM_BATCHES = 5, 6


class LeRobotProcess:
    """The driver's end. Times are measured in the process itself."""

    def __init__(self, root: Path) -> None:
        python = python_of("lerobot")
        if python is None:
            raise RuntimeError("LeRobot is not there: `python -m benchmarks environments` installs it.")
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.lerobot_reading", str(root)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def _ask(self, request: Any) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        return float(json.loads(self._process.stdout.readline()))

    def read_all(self) -> float:
        """Seconds to read all rows and decode all images."""
        return self._ask("read_all")

    def batches(self, num_workers: int) -> float:
        """Milliseconds of a batch of 256."""
        return self._ask(num_workers)

    def __enter__(self) -> LeRobotProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def milliseconds_a_batch(batches: Iterator[Any], num_workers: int, num_batches: int) -> float:
    """Of `num_batches`, once those are taken that the workers have made while others had their turn."""
    for _ in range(2 * num_workers + 1):
        next(batches)
    begin = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return 1e3 * (time.perf_counter() - begin) / num_batches


def serve(root: str) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torch.utils.data import DataLoader, RandomSampler

    image = next(name for name, f in LeRobotDataset(_ID, root=root).meta.features.items() if f["dtype"] == "image")
    deltas = {image: [offset / _FPS for offset in OFFSETS["obs"]], "action": [o / _FPS for o in OFFSETS["action"]]}
    dataset = LeRobotDataset(_ID, root=root, delta_timestamps=deltas)
    loaders: dict[int, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request == "read_all":
            begin = time.perf_counter()
            for _ in dataset.hf_dataset.with_format("numpy").iter(batch_size=200):
                pass
            taken = time.perf_counter() - begin
        else:
            if request not in loaders:
                sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 40)
                loaders[request] = iter(DataLoader(dataset, 256, sampler=sampler, num_workers=request))
                for _ in range(_WARM):
                    next(loaders[request])
            taken = milliseconds_a_batch(loaders[request], request, _NUM_BATCHES)
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = answers
    serve(sys.argv[1])
