"""Files by hand: an episode is a file, or a folder of files, and a DataLoader reads sequences one by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.contestant import Contestant, Rows
from benchmarks.workloads import Store


class _Sequences(IterableDataset):
    """What most projects write: take an episode, load it, cut a sequence out."""

    def __init__(self, load: Callable[[Path], Any], paths: list[Path], names: list[str], length: int) -> None:
        self._load, self._paths, self._names, self._length = load, paths, names, length

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = get_worker_info()
        rng = np.random.default_rng(0 if worker is None else worker.seed)
        while True:
            episode = self._load(self._paths[rng.integers(len(self._paths))])
            rows = {name: episode[name] for name in self._names}
            num_starts = len(rows["reward"]) - self._length + 1
            if num_starts > 0:
                start = rng.integers(num_starts)
                yield {name: np.array(values[start : start + self._length]) for name, values in rows.items()}


class NpzFiles(Contestant):
    """One .npz file an episode, uncompressed; every field of an episode is read whole."""

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self._num_workers = num_workers
        self.prefetched = 2 * num_workers
        self._batches: Any = None

    def make(self, store: Store) -> None:
        self._batches = None
        self._made, self._paths = store, []
        self._directory = Path(self.folder) / "by_hand"
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()

    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        def add() -> None:
            for begin in range(0, len(rows["reward"]), length):
                episode = {name: values[begin : begin + length] for name, values in rows.items()}
                self._paths.append(self._save(self._directory / f"{len(self._paths):06}", episode))

        return add

    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        sequences = _Sequences(self._load, self._paths, list(self._made.fields), length)
        self._batches = None  # Ends the workers of the one before.
        self._batches = batches = iter(DataLoader(sequences, batch_size=batch_size, num_workers=self._num_workers))
        return lambda: next(batches)

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        return {name: values.numpy() for name, values in batch.items()}

    def set_threads(self, number: int) -> None:
        torch.set_num_threads(number)

    @staticmethod
    def _save(path: Path, episode: Rows) -> Path:
        path = path.with_suffix(".npz")
        np.savez(path, **episode)
        return path

    @staticmethod
    def _load(path: Path) -> Any:
        return np.load(path)


class NpyFiles(NpzFiles):
    """A folder an episode, a .npy file a field, memory-mapped: a sequence costs its own bytes."""

    @staticmethod
    def _save(path: Path, episode: Rows) -> Path:
        path.mkdir()
        for name, values in episode.items():
            np.save(path / f"{name}.npy", values)
        return path

    @staticmethod
    def _load(path: Path) -> Any:
        return {file.stem: np.load(file, mmap_mode="r") for file in path.glob("*.npy")}
