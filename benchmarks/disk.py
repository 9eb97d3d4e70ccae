"""Drawing batches of pixels from files, and adding episodes to them.

Beside ours: the memory copy of the batch, `.npy` files that are memory-mapped one by one, and compressed `.npz` files
of which each episode is read whole, which is what most projects write by hand. The page cache is warm, one thread is
used, and nothing is decoded ahead or kept. All draw windows of the same size from as many episodes.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Timing, interleave, print_table
from benchmarks.workloads import EPISODE_LENGTH, PIXELS, rows
from buffers.dataset import IndividualFileDataset

NUM_STEPS = 50_000
SIZES = [(16, 64), (256, 3)]
NUM_ADDED = 32


def main() -> None:
    """`python -m benchmarks.disk [--steps 50000] [--rounds 31]`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk", description=__doc__)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="stored")
    parser.add_argument("--rounds", type=int, default=31, help="measurements of each contender")
    arguments = parser.parse_args()
    disk(arguments.rounds, arguments.steps)


def disk(rounds: int, num_steps: int = NUM_STEPS) -> None:
    """Print both tables."""
    reading(rounds, num_steps)
    adding_to_files()


def reading(rounds: int, num_steps: int) -> None:
    """Microseconds a batch."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    num_episodes = max(1, num_steps // EPISODE_LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        episode = rows(PIXELS, EPISODE_LENGTH)
        dataset = IndividualFileDataset(num_steps, directory=Path(folder) / "ours", durability="rename")
        for number in range(num_episodes):
            dataset.add_episode(episode)
            _save_npy(Path(folder) / f"npy{number}", episode)
            np.savez_compressed(Path(folder) / f"{number}.npz", **episode)
        table = []
        for batch_size, length in SIZES:
            _read_once(dataset)
            stream = dataset.get_loader(batch_size, length, seed=0).stream
            quick: dict[str, Callable[[], object]] = {
                "memory copy": memory_copy(batch_size, length),
                "ours": stream.take,
                ".npy, memory-mapped": npy_reader(Path(folder), num_episodes, batch_size, length),
            }
            timings = interleave(quick, rounds)
            # 0.2 to 5 s a batch: a few measurements are enough, and in the same run.
            slow = interleave(
                {"ours": stream.take, ".npz, whole": npz_reader(Path(folder), num_episodes, batch_size, length)},
                rounds=min(3, rounds),
            )
            table += [_row(f"{batch_size} x {length}", name, timings[name], timings) for name in quick]
            table.append(_row(f"{batch_size} x {length}", ".npz, whole", slow[".npz, whole"], timings))
        dataset.close()
    torch.set_num_threads(num_threads)
    header = ("B x T", "contender", "us", "least", "most", "times the memory copy", "times ours")
    print_table(f"Pixels from files, {num_episodes} episodes of {EPISODE_LENGTH} steps", header, table)


def _row(size: str, name: str, timing: Timing, timings: dict[str, Timing]) -> tuple[str, ...]:
    median = timing.median
    return (
        size,
        name,
        *(f"{value:,.0f}" for value in (median, timing.least, timing.most)),
        f"{median / timings['memory copy'].median:.2f}",
        f"{median / timings['ours'].median:.2f}",
    )


def adding_to_files() -> None:
    """Episodes added a second."""
    episode = rows(PIXELS, EPISODE_LENGTH)
    num_bytes = PIXELS.nbytes * EPISODE_LENGTH
    seconds: dict[str, list[float]] = {"fsync": [], "rename": []}
    with tempfile.TemporaryDirectory() as folder:
        datasets = {
            name: IndividualFileDataset(
                EPISODE_LENGTH * NUM_ADDED,
                directory=Path(folder) / name,
                durability=name,  # type: ignore[arg-type]
            )
            for name in seconds
        }
        for _ in range(2 * NUM_ADDED):
            for name, dataset in datasets.items():
                begin = time.perf_counter()
                dataset.add_episode(episode)
                seconds[name].append(time.perf_counter() - begin)
        for dataset in datasets.values():
            dataset.close()
    table = []
    for name, times in seconds.items():
        median = float(np.median(times))
        table.append((name, f"{1 / median:,.0f}", f"{median * 1e3:.2f}", f"{num_bytes / median / 1e6:,.0f}"))
    header = ("durability", "episodes a second", "ms an episode", "MB/s")
    print_table(f"Adding episodes of {EPISODE_LENGTH} steps of pixels, evicting the oldest", header, table)


def memory_copy(batch_size: int, length: int) -> Callable[[], None]:
    """A function that copies the bytes of a batch, field by field, from one place."""
    pairs = []
    for field in PIXELS.values():
        source = torch.ones((batch_size, length, *field.shape)).to(field.dtype)
        pairs.append((torch.empty_like(source), source))

    def copy() -> None:
        for target, source in pairs:
            target.copy_(source)

    return copy


def npy_reader(folder: Path, num_episodes: int, batch_size: int, length: int) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that maps each episode's arrays, and copies the windows."""
    draws = _draws(num_episodes, batch_size, length)

    def read() -> dict[str, torch.Tensor]:
        batch = _empty(batch_size, length)
        for b, (number, step) in enumerate(next(draws)):
            for name, array in batch.items():
                array[b] = np.load(folder / f"npy{number}" / f"{name}.npy", mmap_mode="r")[step : step + length]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    return read


def npz_reader(folder: Path, num_episodes: int, batch_size: int, length: int) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that reads each whole episode, and cuts the windows out."""
    draws = _draws(num_episodes, batch_size, length)

    def read() -> dict[str, torch.Tensor]:
        windows = []
        for number, step in next(draws):
            with np.load(folder / f"{number}.npz") as file:
                episode = {name: file[name] for name in PIXELS}
            windows.append({name: array[step : step + length] for name, array in episode.items()})
        return {name: torch.from_numpy(np.stack([window[name] for window in windows])) for name in PIXELS}

    return read


def _draws(num_episodes: int, batch_size: int, length: int) -> Any:
    rng = np.random.default_rng(1)
    numbers = rng.integers(num_episodes, size=(64, batch_size)).tolist()
    steps = rng.integers(EPISODE_LENGTH - length + 1, size=(64, batch_size)).tolist()
    return itertools.cycle([list(zip(*pair, strict=True)) for pair in zip(numbers, steps, strict=True)])


def _empty(batch_size: int, length: int) -> dict[str, np.ndarray]:
    return {name: np.empty((batch_size, length, *field.shape), field.numpy_dtype) for name, field in PIXELS.items()}


def _save_npy(folder: Path, episode: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    for name, array in episode.items():
        np.save(folder / f"{name}.npy", array)


def _read_once(dataset: IndividualFileDataset) -> None:
    for _ in dataset.episodes():
        pass


if __name__ == "__main__":
    main()
