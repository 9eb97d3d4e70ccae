"""Saving by hand, of rows in arrays: what the disk allows, and `torch.save`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contestant import Rows
from benchmarks.peers.limits import RawArrays

_BYTES_AT_ONCE = 4 << 20


class _SavedArrays(RawArrays):
    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        raise NotImplementedError("Arrays are saved, and nothing is drawn from them.")

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        raise NotImplementedError("Arrays are saved, and nothing is drawn from them.")

    def rows_of(self, loaded: Rows) -> Rows:
        return loaded


class PlainFiles(_SavedArrays):
    """The limit: the same bytes in one file a save, written and read in one go, with nothing checked.

    A file `2-100-200` is of the third save, and has rows 100 to 199 of each array, one array after the other.
    """

    syncs = True
    _saved_in: Path | None = None

    def save(self, directory: Path) -> None:
        if directory != self._saved_in:
            self._num_saves, begin, end = 0, 0, self._made.num_steps
        else:
            begin, end = self._saved_to % self._made.num_steps, self._cursor
        temporary = directory / "temporary"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for array in self._arrays.values():
                _write(file, memoryview(array[begin:end]).cast("B"))
            os.fsync(file)
        finally:
            os.close(file)
        temporary.rename(directory / f"{self._num_saves}-{begin}-{end}")
        folder = os.open(directory, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self._saved_in, self._saved_to, self._num_saves = directory, self._cursor, self._num_saves + 1

    def load(self, directory: Path) -> Rows:
        loaded = {name: _empty(self._made.num_steps, *described) for name, described in self._made.fields.items()}
        for path in sorted(directory.iterdir(), key=lambda path: int(path.name.split("-")[0])):
            _, begin, end = map(int, path.name.split("-"))
            with open(path, "rb", buffering=0) as file:
                for array in loaded.values():
                    _read(file, memoryview(array[begin:end]).cast("B"))
        return loaded


class TorchSave(_SavedArrays):
    """`torch.save` of a dict of tensors: one file, which each save writes anew."""

    def save(self, directory: Path) -> None:
        torch.save({name: torch.from_numpy(array) for name, array in self._arrays.items()}, directory / "rows.pt")

    def load(self, directory: Path) -> dict[str, torch.Tensor]:
        return torch.load(directory / "rows.pt")

    def rows_of(self, loaded: dict[str, torch.Tensor]) -> Rows:
        return {name: values.numpy() for name, values in loaded.items()}


def _empty(num_rows: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """New memory; of torch, as numpy asks for huge pages, for which the kernel at times has to look for seconds."""
    return torch.empty((num_rows, *shape), dtype=getattr(torch, dtype)).numpy()


def _write(file: int, content: memoryview) -> None:
    done = 0
    while done < len(content):
        done += os.write(file, content[done : done + _BYTES_AT_ONCE])


def _read(file: Any, content: memoryview) -> None:
    done = 0
    while done < len(content):
        num_read = file.readinto(content[done : done + _BYTES_AT_ONCE])
        if not num_read:
            raise EOFError("A file ends before its rows do.")
        done += num_read
