"""Batches of a ring in its own process, and in one that has attached to it: `python -m benchmarks attaching`.

Both loaders are in this process, and take turns. The attached one maps the ring's memory a second time, as any other
process does.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from benchmarks.peers.ours import info_of
from benchmarks.timing import print_table
from benchmarks.workers import fill
from benchmarks.workloads import Store
from buffers.dataset import RingBufferDataset

SIZES = (
    ("pixels", 50_000, 16, 64),
    ("pixels", 50_000, 256, 3),
    ("state", 1_000_000, 256, 64),
    ("state", 1_000_000, 32, 16),
)
SECONDS = 0.2


def microseconds(batches: Any) -> float:
    """Of a batch, over as many as fill some time."""
    num, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        next(batches)
        num += 1
    return 1e6 * (time.perf_counter() - begin) / num


def attaching(rounds: int) -> None:
    """For pixels and state."""
    torch.set_num_threads(1)
    table = []
    for kind, capacity, batch_size, length in SIZES:
        store = Store(kind, capacity)
        ring = RingBufferDataset(capacity, info_of(store))
        fill(ring, store)
        ring.share(f"benchmark-{os.getpid()}")
        attached = RingBufferDataset.attach(f"benchmark-{os.getpid()}")
        loaders = [iter(source.get_loader(batch_size, length, seed=0)) for source in (ring, attached)]
        times = np.array([[microseconds(loader) for loader in loaders] for _ in range(1 + rounds)])[1:]
        own, others = np.median(times, 0)
        ratio = np.median(times[:, 0] / times[:, 1])
        table.append((f"{kind} {batch_size} x {length}", f"{own:,.0f}", f"{others:,.0f}", f"{ratio:.2f}"))
        del loaders, ring, attached
    header = ("batch", "its own process", "attached", "rate, attached / own")
    print_table("A ring that is attached to: microseconds a batch, one thread", header, table)
