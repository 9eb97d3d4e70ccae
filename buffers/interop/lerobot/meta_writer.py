"""The directory `meta` of a LeRobot dataset v3.0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from buffers.dataset.episode_info import EpisodeInfo, info_text
from buffers.interop.base import library
from buffers.interop.lerobot.layout import INFOS
from buffers.interop.lerobot.parquet import EXTRA
from buffers.interop.lerobot.statistics import Statistics

__all__ = ["EpisodesWriter", "Tasks", "write_info"]

_EPISODES = "meta/episodes/chunk-000/file-000.parquet"
_A_GROUP = 100  # Episodes whose statistics are in memory.


class Tasks:
    """Texts of tasks and their numbers: first those that are known, then others in the order in which they came."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._numbers: dict[str, int] = {task: number for number, task in enumerate(known)}

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, task: str) -> int:
        """The `task_index` of a task."""
        return self._numbers.setdefault(task, len(self._numbers))

    def write(self, path: str) -> None:
        """Write meta/tasks.parquet, in which pandas finds the texts as the index."""
        arrow = library("pyarrow", EXTRA)
        described = [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
            {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
        ]
        column = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
        pandas = {
            "index_columns": ["task"],
            "column_indexes": [{**column, "metadata": {"encoding": "UTF-8"}}],
            "columns": [{**value, "metadata": None} for value in described],
            "creator": {"library": "pyarrow", "version": arrow.__version__},
            "pandas_version": "2.0.0",
        }
        table = arrow.table({"task_index": [*self._numbers.values()], "task": [*self._numbers]})
        table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
        library("pyarrow.parquet", EXTRA).write_table(table, os.path.join(path, "meta", "tasks.parquet"))


class EpisodesWriter:
    """Writes meta/episodes and the infos of episodes, and gathers meta/stats.json.

    LeRobot cannot load meta/episodes with columns of its own beside ours, which it would write when it records on. So
    the columns are LeRobot's, and the infos are in a file that it ignores.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.statistics = Statistics()
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        os.makedirs(os.path.join(path, os.path.dirname(_EPISODES)))
        self._infos = open(os.path.join(path, INFOS), "w", encoding="ascii")  # noqa: SIM115  # `close` closes it.

    def add(self, row: Mapping[str, Any], info: EpisodeInfo, statistics: Mapping[str, Mapping[str, Any]]) -> None:
        """Write an episode: what LeRobot knows of it, its info, and `feature -> statistics`."""
        found = {**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for name, values in statistics.items():
            self.statistics.add(name, dict(values))
            found.update({f"stats/{name}/{key}": value.tolist() for key, value in values.items()})
        self._infos.write(info_text({key: value for key, value in info.items() if key != "task"}) + "\n")
        self._rows.append(found)
        if len(self._rows) == _A_GROUP:
            self._flush()

    def _flush(self) -> None:
        arrow = library("pyarrow", EXTRA)
        table = arrow.table({key: [row[key] for row in self._rows] for key in self._rows[0]})
        if self._writer is None:
            where = os.path.join(self.path, _EPISODES)
            self._writer = library("pyarrow.parquet", EXTRA).ParquetWriter(where, table.schema, compression="snappy")
        self._writer.write_table(table)
        self._rows = []

    def close(self) -> None:
        """Write what is left, and end the file."""
        try:
            if self._rows:
                self._flush()
        finally:
            self._infos.close()
            if self._writer is not None:
                self._writer.close()


def write_info(path: str, info: Mapping[str, Any], statistics: Statistics) -> None:
    """Write meta/info.json and meta/stats.json."""
    for name, content in (("info", info), ("stats", statistics.as_json())):
        with open(os.path.join(path, "meta", f"{name}.json"), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=4)
