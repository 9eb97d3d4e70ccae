"""A look at all files of rows: whether they have the declared columns, each frame where it should be, times and tasks.

Of the rows, only the columns that LeRobot adds to frames are read, some rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from buffers.interop.base import FormatError
from buffers.interop.lerobot.columns import array_of, is_image_type, is_number_type
from buffers.interop.lerobot.features import INDEXES
from buffers.interop.lerobot.layout import EpisodeEntry, Layout
from buffers.interop.lerobot.parquet import checked_file, opened, reading

__all__ = ["Survey", "survey"]

_ROWS = 1 << 16
# Relative: what float32, and sums of it, may be off.
_TOLERANCE = 2**-21


@dataclass
class Survey:
    """What was seen.

    Attributes:
        tasks: By episode, the `task_index` of its first frame, -1 where there is none.
        has_times: Whether some `timestamp` is not `frame_index / fps`.
        has_task_changes: Whether the task changes within an episode.
        unknown: Columns that are no feature.
    """

    tasks: np.ndarray
    has_times: bool = False
    has_task_changes: bool = False
    unknown: set[str] = field(default_factory=set)


def survey(layout: Layout, videos: Collection[str]) -> Survey:
    """That of a dataset; the files of `videos`, by feature, must be there, too.

    FormatError for a file or column that is missing, or of another type; for frames that are missing, there twice, or
    in another order than meta/episodes says.
    """
    found = Survey(np.full(len(layout.episodes), -1, np.int64))
    for name, entries in layout.files():
        _File(os.path.join(layout.path, name), entries, layout, found).read()
    needed = (entry.videos[name].file for entry in layout.episodes for name in videos)
    for name in dict.fromkeys(needed):
        checked_file(os.path.join(layout.path, name))
    return found


class _File:
    """The episodes of a file, which follow each other."""

    def __init__(self, path: str, entries: list[EpisodeEntry], layout: Layout, found: Survey) -> None:
        self.path, self.layout, self.found = path, layout, found
        self.numbers = np.array([entry.number for entry in entries])
        self.starts = np.array([entry.start for entry in entries])
        self.firsts = np.array([-1 if entry.first_index is None else entry.first_index for entry in entries])
        lengths = np.array([entry.length for entry in entries])
        self.num_rows = int(lengths.sum())
        if (self.starts != lengths.cumsum() - lengths).any():
            raise FormatError(path, "is the file of two episodes at once", "Get a whole copy of the dataset")

    def read(self) -> None:
        """Look at all rows, some at a time."""
        position = 0
        with opened(self.path) as file, reading(self.path):
            self._check_columns(file.schema_arrow)
            self._check_rows(file.metadata.num_rows)
            names = [name for name in INDEXES if name in file.schema_arrow.names]
            if names:
                for batch in file.iter_batches(_ROWS, columns=names, use_threads=False):
                    self._look_at({name: self._array(batch, name) for name in names}, position, batch.num_rows)
                    position += batch.num_rows
                self._check_rows(position)

    def _check_columns(self, schema: Any) -> None:
        names, features = schema.names, self.layout.features
        for feature in features:
            if feature.kind == "video":
                continue
            if names.count(feature.name) != 1:
                raise FormatError(self.path, f"has no column `{feature.name}`", "Get a whole copy, of one time")
            kind = schema.field(feature.name).type
            is_right = is_image_type(kind) if feature.kind == "image" else is_number_type(kind, len(feature.declared))
            if not is_right:
                expected = "encoded images" if feature.kind == "image" else f"{feature.dtype} {feature.declared}"
                found = f"has `{feature.name}` as {kind}, where meta/info.json says {expected}"
                raise FormatError(self.path, found, "Get a whole copy, of one time")
        described = {feature.name for feature in features} | self.layout.unread.keys() | {*INDEXES}
        self.found.unknown |= {*names} - described - self.layout.derived

    def _check_rows(self, num_rows: int) -> None:
        if num_rows != self.num_rows:
            found = f"has {num_rows} rows, where its episodes have {self.num_rows}"
            raise FormatError(self.path, found, "Get a whole copy, of one time")

    def _array(self, batch: Any, name: str) -> np.ndarray:
        dtype = np.dtype(np.float64 if name == "timestamp" else np.int64)
        column = batch.column(name)
        if not is_number_type(column.type, 1):
            raise FormatError(self.path, f"has `{name}` as {column.type}", "Get a whole copy of it")
        return array_of(self.path, name, [column], dtype, (1,))[:, 0]

    def _look_at(self, columns: dict[str, np.ndarray], position: int, num_rows: int) -> None:
        rows = np.arange(position, position + num_rows)
        which = np.searchsorted(self.starts, rows, "right") - 1
        frames, numbers, firsts = rows - self.starts[which], self.numbers[which], self.firsts[which]
        expected = {"episode_index": numbers, "frame_index": frames}
        if (firsts >= 0).all():
            expected["index"] = firsts + frames
        for name, values in expected.items():
            if name in columns and (wrong := np.flatnonzero(columns[name] != values)).size:
                row = wrong[0]
                found = f"has `{name}` {columns[name][row]} in row {position + row}, where {values[row]} is expected"
                raise FormatError(self.path, found, "Frames are missing or in another order. Get a whole copy of it")
        if "timestamp" in columns:
            times = frames / self.layout.fps
            is_close = abs(columns["timestamp"] - times) <= _TOLERANCE * np.maximum(times, 1)
            self.found.has_times |= not is_close.all()
        if "task_index" in columns:
            self._look_at_tasks(columns["task_index"], numbers, frames)

    def _look_at_tasks(self, tasks: np.ndarray, numbers: np.ndarray, frames: np.ndarray) -> None:
        is_first = frames == 0
        self.found.tasks[numbers[is_first]] = tasks[is_first]
        self.found.has_task_changes |= bool((self.found.tasks[numbers] != tasks).any())
        if unknown := {*np.unique(tasks).tolist()} - self.layout.tasks.keys():
            found = f"has the tasks {sorted(unknown)[:9]}, which meta/tasks does not have"
            raise FormatError(self.path, found, "Get a whole copy, of one time")
