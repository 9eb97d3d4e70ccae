"""Fields that are compressed, beside the same fields as they are: `python -m benchmarks compression`.

Frames are those of `frames.py`, in episodes that begin anywhere in them, and more of them than caches hold. What is
compared takes turns in one run; a ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attaching import microseconds
from benchmarks.driver import say
from benchmarks.frames import NAMES, episodes, frames
from benchmarks.peers.torchrl_compressed import CompressedTorchRL
from benchmarks.saving import FOLDER
from benchmarks.timing import in_turn, print_table
from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset

NUM_FRAMES = 4_096
STORED_BYTES = 300_000_000
BATCH = 16, 64
COPY, PLAIN, CODECS = "copy", "plain", ("lz4", "zstd")
# Threads of torch, and workers.
MODES = {"1 thread": (1, 0), "2 threads": (2, 0), "2 workers": (1, 2)}
# Adding steps: environments, steps of the ring, and calls of a measurement, of which a few end an episode.
NUM_ENVS, CAPACITY, NUM_CALLS = 16, 20_000, 512
ADDED = ("pendulum-64", "minigrid-64", "mujoco-64")
# Memory: steps that are added, steps of the ring.
NUM_ADDED, NUM_HELD = 1_000_000, 200_000
# What TorchRL takes ten seconds to add.
BESIDE_TORCHRL, NUM_BESIDE = ("breakout-84", "pendulum-64"), 8_192


def compression(rounds: int) -> None:
    """All tables."""
    FOLDER.mkdir(exist_ok=True)
    _batches(max(1, rounds // 4))
    _steps_added(rounds)
    _memory()
    _beside_torchrl(max(1, rounds // 4))
    torch.set_num_threads(1)


def _median_ratio(values: list[float], limits: list[float]) -> float:
    return float(np.median(np.array(values) / np.array(limits)))


def _chosen(codec: str) -> dict[str | type, str] | None:
    return None if codec == PLAIN else {"image": codec}


# Batches.


def _batches(rounds: int) -> None:
    """Size and microseconds of a batch, over the same uncompressed, and over the copy; from rings and from files."""
    header = ["frames", "codec", "size, %"]
    header += [column for mode in MODES for column in (f"us, {mode}", "/ plain", "/ copy")]
    tables: dict[str, list[list[str]]] = {"rings": [], "files, in the page cache": []}
    for name in NAMES:
        say(name)
        found = frames(name, NUM_FRAMES)
        stored = list(episodes(found, STORED_BYTES // found[0].nbytes))
        for kind, lines in tables.items():
            with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
                lines += _lines_of(name, stored, None if kind == "rings" else Path(folder), rounds)
    for kind, lines in tables.items():
        print_table(f"Batches of {BATCH[0]} x {BATCH[1]} from {kind}", header, lines)


def _lines_of(name: str, stored: list[np.ndarray], folder: Path | None, rounds: int) -> list[list[str]]:
    datasets = {codec: _filled(stored, codec, folder) for codec in (PLAIN, *CODECS)}
    raw = sum(episode.nbytes for episode in stored)
    copies, measured = _copies(np.concatenate(stored)), {}
    for mode, (threads, workers) in MODES.items():
        torch.set_num_threads(threads)
        loaders = {
            codec: iter(each.get_loader(*BATCH, num_workers=workers, seed=0)) for codec, each in datasets.items()
        }
        sources = {COPY: copies, **loaders}
        turns = {n: lambda n=n, s=s, w=workers: _measured(s, w if n != COPY else 0) for n, s in sources.items()}
        measured[mode] = in_turn(turns, rounds)
        del loaders, sources, turns
    lines = []
    for codec in (PLAIN, *CODECS):
        line = [name, codec, f"{100 * _num_bytes(datasets[codec], folder and folder / codec) / raw:.2f}"]
        for times in measured.values():
            ratios = (_median_ratio(times[codec], times[limit]) for limit in (PLAIN, COPY))
            line += [f"{np.median(times[codec]):,.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append(line)
    for dataset in datasets.values():
        if isinstance(dataset, IndividualFileDataset):
            dataset.close()
    return lines


def _filled(stored: list[np.ndarray], codec: str, folder: Path | None) -> EpisodeDataset:
    num_steps, compress = sum(map(len, stored)), _chosen(codec)
    dataset: EpisodeDataset = (
        RingBufferDataset(num_steps, compress=compress)
        if folder is None
        else IndividualFileDataset(num_steps, directory=folder / codec, durability="rename", compress=compress)
    )
    for episode in stored:
        dataset.add_episode({"image": episode})
    return dataset


def _num_bytes(dataset: EpisodeDataset, folder: Path | None) -> int:
    """Of all rows, as they are stored, with their index."""
    if folder is not None:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert isinstance(dataset, RingBufferDataset) and dataset.fields is not None
    return dataset.num_timesteps * dataset.fields["image"].nbytes if dataset._room is None else dataset._room.num_bytes


def _copies(rows: np.ndarray) -> Iterator[torch.Tensor]:
    """Batches of windows from anywhere, copied into the same memory each time."""
    rng, source, (size, length) = np.random.default_rng(0), torch.from_numpy(rows), BATCH
    out = torch.empty((size, length, *rows.shape[1:]), dtype=torch.uint8)
    while True:
        for window, start in zip(out, rng.integers(0, len(rows) - length, size).tolist(), strict=True):
            window.copy_(source[start : start + length])
        yield out


def _measured(batches: Iterator[Any], num_workers: int) -> float:
    """Microseconds of a batch, without those that workers have made meanwhile; they rest when this returns."""
    for _ in itertools.islice(batches, 2 * num_workers + 1):
        pass
    taken = microseconds(batches)
    time.sleep(min(1.0, 2 * num_workers * taken / 1e6))
    return taken


# Adding steps.


def _steps_added(rounds: int) -> None:
    """Microseconds of `add_step` of 16 environments, once the ring is full."""
    torch.set_num_threads(1)
    lines = []
    for name in ADDED:
        found = frames(name, NUM_FRAMES)
        turns = {}
        for codec in (PLAIN, *CODECS):
            buffer = ReplayBuffer(RingBufferDataset(CAPACITY, compress=_chosen(codec)), 1, num_envs=NUM_ENVS)
            steps = _steps(found)
            while not buffer.dataset.is_full:
                _add(buffer, steps)
            turns[codec] = partial(_add, buffer, steps)
        times = in_turn(turns, rounds)
        means, tails = ({c: [of(part) for part in t] for c, t in times.items()} for of in (np.mean, _tail))
        for codec in times:
            line = [name, codec]
            for figures in (means, tails):
                ratio = _median_ratio(figures[codec], figures[PLAIN])
                line += [f"{np.median(figures[codec]):,.0f}", f"{ratio:.2f}"]
            lines.append(line)
    print_table(
        f"`add_step` of {NUM_ENVS} environments, 64 x 64 RGB",
        ("frames", "codec", "us, mean", "/ plain", "us, 99th percentile", "/ plain"),
        lines,
    )


def _steps(found: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames of the environments, and where the episode before has ended: episodes of 200 to 1,000 steps."""
    rng = np.random.default_rng(0)
    place, left = rng.integers(0, len(found), NUM_ENVS), rng.integers(1, 1_001, NUM_ENVS)
    while True:
        done = left == 0
        left[done] = rng.integers(200, 1_001, done.sum())
        place[done] = rng.integers(0, len(found), done.sum())
        yield found[place], done
        place, left = (place + 1) % len(found), left - 1


def _add(buffer: ReplayBuffer, steps: Iterator[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Microseconds of each call."""
    times = []
    for image, done in itertools.islice(steps, NUM_CALLS):
        begin = time.perf_counter()
        buffer.add_step({"image": image}, done)
        times.append(time.perf_counter() - begin)
    return 1e6 * np.array(times)


def _tail(times: np.ndarray) -> float:
    return float(np.percentile(times, 99))


# Memory.


def _memory() -> None:
    """What a process grows by that fills a ring, over the blocks in it."""
    lines = []
    for codec in CODECS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            held, grown, ratio = process.submit(_growth, codec).result()
        lines.append((codec, f"{held / 1e6:.1f}", f"{grown / 1e6:.1f}", f"{grown / held:.3f}", f"{ratio:.3f}"))
    print_table(
        f"Memory of a ring of {NUM_HELD:,} steps of breakout-84, after {NUM_ADDED:,}, MB",
        ("codec", "compressed rows", "growth of the process", "ratio", "most on the way"),
        lines,
    )


def _growth(codec: str) -> tuple[int, int, float]:
    """Compressed bytes and growth at the end, and the largest ratio of them once the ring is full."""
    torch.set_num_threads(1)
    found = frames("breakout-84", NUM_FRAMES)
    added = episodes(found, NUM_ADDED)
    # What a first episode brings in is not the ring's.
    RingBufferDataset(2_000, compress=_chosen(codec)).add_episode({"image": next(added)})
    gc.collect()
    before, most = _proportional_set_size(), 0.0
    ring = RingBufferDataset(NUM_HELD, compress=_chosen(codec))
    for number, episode in enumerate(added):
        ring.add_episode({"image": episode})
        if ring.is_full and number % 20 == 0:
            most = max(most, (_proportional_set_size() - before) / _num_bytes(ring, None))
    return _num_bytes(ring, None), _proportional_set_size() - before, most


def _proportional_set_size() -> int:
    """Bytes of this process, without files: its share of those of libraries changes as other processes come and go."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return sum(1024 * int(line[1]) for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:"))


# Beside TorchRL.


def _beside_torchrl(rounds: int) -> None:
    """Microseconds of a batch, one thread."""
    torch.set_num_threads(1)
    lines = []
    for name in BESIDE_TORCHRL:
        stored = list(episodes(frames(name, NUM_FRAMES), NUM_BESIDE))
        rings = {codec: _filled(stored, codec, None) for codec in CODECS}
        raw = sum(episode.nbytes for episode in stored)
        sizes = {codec: _num_bytes(ring, None) / raw for codec, ring in rings.items()}
        with CompressedTorchRL(name, NUM_FRAMES, NUM_BESIDE, BATCH) as theirs:
            turns = {"TorchRL": theirs.microseconds}
            for codec, ring in rings.items():
                turns[codec] = partial(microseconds, iter(ring.get_loader(*BATCH, seed=0)))
            times = in_turn(turns, rounds)
            sizes["TorchRL"] = theirs.num_bytes() / raw
        for who, taken in times.items():
            ratio = _median_ratio(times["TorchRL"], taken)
            lines.append((name, who, f"{100 * sizes[who]:.2f}", f"{np.median(taken):,.0f}", f"{ratio:.1f}"))
    print_table(
        f"Batches of {BATCH[0]} x {BATCH[1]} beside TorchRL's compressed storage",
        ("frames", "from", "size, %", "us", "times TorchRL's rate"),
        lines,
    )
