"""Windows from a store of objects: how many bytes they cost, and batches a second: `python -m benchmarks objects`.

The store is moto's server on loopback, a program in Python: what a batch costs without the cache is mostly its time.
Each batch is 16 x 64 of pixels.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import Timing, print_table
from benchmarks.workloads import EPISODE_LENGTH
from buffers.dataset import IndividualFileDataset
from buffers.dataset.transfer import upload

NUM_EPISODES, BATCH_SIZE, LENGTH = 64, 16, 64


def objects(rounds: int) -> None:
    """First touch, a warm cache, no cache, and local files; those that are warm in turn."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, moto_server() as options:
        local = Path(folder) / "episodes"
        with IndividualFileDataset(10**6, directory=local, durability="rename") as dataset:
            for number in range(NUM_EPISODES):
                dataset.add_episode(episode(number))
        begin = time.perf_counter()
        sent = upload(local, "s3://bucket/episodes", storage_options=options)
        uploaded = sent.num_bytes / (time.perf_counter() - begin) / 1e6

        def opened(name: str, **more: object) -> IndividualFileDataset:
            where = {"cache_directory": Path(folder) / name, "storage_options": options, **more}
            return IndividualFileDataset(directory="s3://bucket/episodes", mode="r", **where)  # type: ignore[arg-type]

        ratios, cold = [], []
        for number in range(max(3, rounds // 3)):
            dataset = opened(f"cache-{number}")
            stream = dataset.get_loader(BATCH_SIZE, LENGTH, seed=number).stream
            store = dataset._directory.store  # type: ignore[attr-defined]
            before, begin = store.num_bytes, time.perf_counter()
            batch = stream.take()
            cold.append(time.perf_counter() - begin)
            ratios.append((store.num_bytes - before) / sum(value.nbytes for value in batch.values()))
        warm = {
            "warm cache": opened("cache-warm"),
            "no cache": opened("none", cache_bytes=0),
            "local files": IndividualFileDataset(directory=local, mode="r"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in warm}
        streams = {name: dataset.get_loader(BATCH_SIZE, LENGTH, seed=0).stream for name, dataset in warm.items()}
        for dataset in warm.values():
            for number in range(NUM_EPISODES):
                dataset.get_episode(number)
        for _ in range(rounds):
            for name, stream in streams.items():
                begin = time.perf_counter()
                stream.take()
                seconds[name].append(time.perf_counter() - begin)
    lines = [("first touch", f"{1 / statistics.median(cold):,.1f}", f"{statistics.median(ratios):.3f}")]
    for name, times in seconds.items():
        lines.append((name, f"{1 / Timing.of(times).median:,.1f}", "0" if name != "no cache" else "1"))
    print_table(
        f"Windows of {BATCH_SIZE} x {LENGTH} of pixels from a store of objects, uploaded with {uploaded:,.0f} MB/s",
        ("from", "batches a second", "bytes read over those of the windows"),
        lines,
    )


def episode(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "pixels": rng.integers(0, 256, (EPISODE_LENGTH, 64, 64, 3), np.uint8),
        "action": rng.normal(size=(EPISODE_LENGTH, 6)).astype(np.float32),
        "reward": rng.normal(size=EPISODE_LENGTH).astype(np.float32),
        "terminated": np.zeros(EPISODE_LENGTH, np.bool_),
        "truncated": np.zeros(EPISODE_LENGTH, np.bool_),
    }


@contextlib.contextmanager
def moto_server() -> Iterator[dict[str, str]]:
    """A bucket of this name in a server on loopback, and what it takes to reach it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        options = {"key": "key", "secret": "secret", "endpoint_url": f"http://127.0.0.1:{port}"}
        s3fs.S3FileSystem(**options).mkdir("bucket")
        yield options
    finally:
        server.stop()
