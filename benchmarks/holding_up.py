"""How long an addition takes while another thread reads: `python -m benchmarks holding_up`.

A thread samples from compressed files of 100 MB, as long as the main thread adds small episodes to the same dataset.
The goal: the slowest of 1,000 additions takes less than 50 ms.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.ours import info_of
from benchmarks.workloads import Store, empty_rows
from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset
from buffers.dataset.individual_file import NumpyCompressedSerialization

# More than a dataset keeps decoded, so that nearly every batch decompresses some of them.
NUM_LARGE, LARGE_LENGTH = 6, 8_192
BATCH_SIZE, SMALL_LENGTH = 4, 4
# The share of an observation that no row has in common with another: files become a sixteenth of their rows.
_NOISE = 16


def hold_up(folder: str, num_added: int, limit: float, large_length: int = LARGE_LENGTH) -> dict[str, Any]:
    """Add episodes while a thread samples from large ones.

    Args:
        folder: Where files are written; the large ones stay for the next call.
        num_added: How many episodes to add.
        limit: Seconds after which no more are added.
        large_length: Rows of a large episode, of 12.3 kB each.

    Returns:
        `milliseconds` of each addition, and `num_batches` that the thread drew meanwhile.
    """
    large, directory = Path(folder) / "large", Path(folder) / "holding_up"
    if not large.exists():
        episode = _large_episode(large_length)
        with _files(large, NUM_LARGE * large_length) as dataset:
            for _ in range(NUM_LARGE):
                dataset.add_episode(episode)
    shutil.copytree(large, directory)
    try:
        with _files(directory, NUM_LARGE * large_length + num_added * SMALL_LENGTH) as dataset:
            return _add_while_sampling(dataset, num_added, limit)
    finally:
        shutil.rmtree(directory)


def _files(directory: Path, capacity: int) -> IndividualFileDataset:
    return IndividualFileDataset(
        capacity,
        info_of(Store("pixels", capacity)),
        directory=directory,
        serialization_strategy=NumpyCompressedSerialization(),
        durability="rename",
    )


def _large_episode(length: int) -> dict[str, np.ndarray]:
    rows = empty_rows("pixels", length)
    flat = rows["obs"].reshape(length, -1)
    num_noise = flat.shape[1] // _NOISE
    flat[:, :num_noise] = np.random.default_rng(1).integers(0, 256, (length, num_noise), np.uint8)
    return rows


def _add_while_sampling(dataset: IndividualFileDataset, num_added: int, limit: float) -> dict[str, Any]:
    stopped, num_batches, failures = threading.Event(), 0, []
    sample, episode = ReplayBuffer(dataset, BATCH_SIZE, SMALL_LENGTH, seed=0).sample, empty_rows("pixels", SMALL_LENGTH)

    def read() -> None:
        nonlocal num_batches
        try:
            while not stopped.is_set():
                sample()
                num_batches += 1
        except Exception as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    milliseconds: list[float] = []
    end = time.perf_counter() + limit
    try:
        while len(milliseconds) < num_added and time.perf_counter() < end:
            begin = time.perf_counter()
            dataset.add_episode(episode)
            milliseconds.append((time.perf_counter() - begin) * 1e3)
    finally:
        stopped.set()
        reader.join()
    if failures:
        raise failures[0]
    return {"milliseconds": milliseconds, "num_batches": num_batches}
