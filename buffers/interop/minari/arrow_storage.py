"""Minari's Arrow and Parquet storage: a directory for each episode.

data/metadata.json
data/7/metadata.json        id, total_steps, seed, options, ...
data/7/part-0.arrow         T + 1 rows; the last one of actions, rewards and flags is zero, and does not count

The files are read without Minari's reader, which takes each record batch for an episode of its own: it cuts those of
more than 32,768 rows.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

import numpy as np

from buffers.interop.base import FormatError
from buffers.interop.minari.arrow_parts import (
    IpcPart,
    ParquetPart,
    Part,
    columns_of_space,
    columns_without_space,
    values_of,
)
from buffers.interop.minari.columns import ROOTS, Column, Path, Storage, StoredEpisode
from buffers.interop.minari.files import METADATA, as_format_error, read_json
from buffers.interop.minari.spaces import Space

__all__ = ["ArrowStorage"]

_ADVICE = "Get a whole copy of the dataset"
_NUMBER = re.compile(r"0|[1-9]\d*")
_OF_STEPS = ("actions", "rewards", "terminations", "truncations")


class ArrowStorage(Storage):
    """The directories of the episodes of a dataset.

    Args:
        data: The directory `data/`.
        kind: "arrow" or "parquet".
        spaces: `root -> space` of observations and actions, which say what the columns are.
    """

    def __init__(self, data: str, kind: str, spaces: Mapping[str, Space]) -> None:
        self.path, self.others = data, []
        self._kind, self._spaces = kind, spaces
        self._num_steps: dict[int, int] = {}  # Of the episodes that were described.
        self._part_name = re.compile(rf"part-(\d+)\.{kind}")

    def ids(self) -> list[int]:
        """As `Storage.ids`."""
        names = [name for name in os.listdir(self.path) if not name.startswith((".", "_")) and name != METADATA]
        self.others = sorted(name for name in names if not _NUMBER.fullmatch(name))
        return sorted(int(name) for name in names if _NUMBER.fullmatch(name))

    def describe(self, episode_id: int) -> StoredEpisode:
        """As `Storage.describe`."""
        directory = os.path.join(self.path, str(episode_id))
        metadata = read_json(os.path.join(directory, METADATA))
        num_steps = metadata.get("total_steps")
        if type(num_steps) is not int or num_steps < 0:
            found = f"has {num_steps!r:.60} as total_steps"
            raise FormatError(os.path.join(directory, METADATA), found, _ADVICE)
        with as_format_error(directory):
            parts = [self._opened(path) for path in self._parts(directory)]
            if any(part.schema != parts[0].schema for part in parts):
                raise FormatError(directory, "has files with different columns", _ADVICE)
            columns = dict(self._columns(parts[0]))
            for part in parts:
                self._check_size(part, columns)
        rows = sum(part.num_rows for part in parts)
        if rows not in (num_steps, num_steps + 1):
            found = f"has {rows} rows, expected {num_steps + 1}, for the total_steps of its {METADATA}"
            raise FormatError(directory, found, _ADVICE)
        self._num_steps[episode_id] = num_steps
        counted = {
            path: one._replace(rows=num_steps if path[0] in _OF_STEPS else rows) for path, one in columns.items()
        }
        return StoredEpisode(num_steps, counted, metadata, [n for n in parts[0].schema.names if n not in ROOTS])

    def read(self, episode_id: int, columns: Mapping[Path, Column]) -> dict[Path, np.ndarray]:
        """As `Storage.read`."""
        directory = os.path.join(self.path, str(episode_id))
        num_steps = self._num_steps[episode_id]
        found: dict[Path, list[np.ndarray]] = {path: [] for path in columns}
        with as_format_error(directory):
            for name in self._parts(directory):
                for batch in self._opened(name).batches({path[0] for path in columns}):
                    # Lengths and offsets of a damaged file would be followed out of its memory.
                    batch.validate(full=True)
                    for path, one in columns.items():
                        found[path].append(values_of(name, path, batch, one))
        # The copy is needed: arrays of Arrow are read-only, and end with the file.
        rows = {path: np.concatenate(arrays) for path, arrays in found.items()}
        return {path: values[:num_steps] if path[0] in _OF_STEPS else values for path, values in rows.items()}

    def _parts(self, directory: str) -> list[str]:
        matches = map(self._part_name.fullmatch, os.listdir(directory))
        parts = sorted((int(match[1]), match[0]) for match in matches if match)
        if not parts:
            raise FormatError(directory, f"has no part-0.{self._kind}", _ADVICE)
        return [os.path.join(directory, name) for _, name in parts]

    def _opened(self, path: str) -> Part:
        return ParquetPart(path) if self._kind == "parquet" else IpcPart(path)

    def _columns(self, part: Part) -> list[tuple[Path, Column]]:
        columns: list[tuple[Path, Column]] = []
        for root in ROOTS:
            if root in part.schema.names:
                field, space = part.schema.field(root), self._spaces.get(root)
                if space is None:
                    columns += columns_without_space((root,), field)
                else:
                    columns += columns_of_space(part.path, (root,), field.type, space)
        return columns

    def _check_size(self, part: Part, columns: Mapping[Path, Column]) -> None:
        """Compare the number of rows with the bytes that are there. Minari does not compress Arrow files."""
        sizes = [math.prod(one.shape) * _bits_of(one) for one in columns.values() if not one.problem]
        size = os.path.getsize(part.path)
        if self._kind == "arrow" and part.num_rows * sum(sizes) > 8 * size:
            raise FormatError(part.path, f"is said to have {part.num_rows} rows, but has {size} bytes", _ADVICE)


def _bits_of(one: Column) -> int:
    if one.is_jpeg:
        return 0
    return 1 if one.dtype == np.bool_ else 8 * one.dtype.itemsize
