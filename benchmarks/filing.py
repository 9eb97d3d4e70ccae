"""Adding episodes to files: how many a second, and what making each of them durable costs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.peers.ours import info_of
from benchmarks.timing import Timing, print_table
from benchmarks.workloads import EPISODE_LENGTH, Store, empty_rows
from buffers.dataset import IndividualFileDataset

NUM_ADDED = 32


def filing(rounds: int) -> None:
    """Episodes of pixels, the oldest evicted; both ways in turn."""
    store = Store("pixels", NUM_ADDED * EPISODE_LENGTH)
    episode = empty_rows("pixels", EPISODE_LENGTH)
    num_bytes = store.num_bytes // NUM_ADDED
    seconds: dict[str, list[float]] = {"fsync": [], "rename": []}
    with tempfile.TemporaryDirectory() as folder:
        datasets = {
            name: IndividualFileDataset(
                store.num_steps,
                info_of(store),
                directory=Path(folder) / name,
                durability=name,  # type: ignore[arg-type]
            )
            for name in seconds
        }
        for _ in range(NUM_ADDED + rounds):
            for name, dataset in datasets.items():
                begin = time.perf_counter()
                dataset.add_episode(episode)
                seconds[name].append(time.perf_counter() - begin)
        for dataset in datasets.values():
            dataset.close()
    lines = []
    for name, times in seconds.items():
        median = Timing.of(times[NUM_ADDED:]).median
        lines.append((name, f"{1 / median:,.0f}", f"{median * 1e3:.2f}", f"{num_bytes / median / 1e6:,.0f}"))
    header = ("durability", "episodes a second", "ms an episode", "MB/s")
    print_table(f"Adding episodes of {EPISODE_LENGTH} steps of pixels to files, evicting the oldest", header, lines)
