"""What the storages of Minari share: episodes and their columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from buffers.conversion import TO_TORCH

__all__ = ["Column", "Path", "ROOTS", "Storage", "StoredEpisode", "column", "field_of"]

#: The names on the way to a column, such as ("observations", "camera").
Path = tuple[str, ...]

#: The parts of an episode, and the fields that they become.
ROOTS = {
    "observations": "obs",
    "actions": "action",
    "rewards": "reward",
    "terminations": "terminated",
    "truncations": "truncated",
    "infos": "infos",
}


class Column(NamedTuple):
    """An array of an episode."""

    dtype: np.dtype
    shape: tuple[int, ...]  # Of one row.
    rows: int
    problem: str = ""  # Why it is not read.
    is_jpeg: bool = False


class StoredEpisode(NamedTuple):
    """What a storage knows of an episode without reading rows."""

    num_steps: int  # T.
    columns: dict[Path, Column]
    metadata: dict[str, Any]  # Flat; names are joined by "/".
    others: list[str]  # Names of what is there besides.


class Storage(ABC):
    """The files of a dataset."""

    path: str  # For errors.
    others: list[str]  # Names of what is there besides episodes.

    @abstractmethod
    def ids(self) -> list[int]:
        """Of the episodes that are there, ascending."""

    @abstractmethod
    def describe(self, episode_id: int) -> StoredEpisode:
        """Look at an episode, without reading its rows."""

    @abstractmethod
    def read(self, episode_id: int, columns: Mapping[Path, Column]) -> dict[Path, np.ndarray]:
        """The rows of some columns of an episode; shapes are those that were described."""

    def close(self) -> None:  # noqa: B027  # Not all keep a file open.
        """Close what is open; reading opens it again."""


def column(dtype: Any, shape: tuple[int, ...], rows: int) -> Column:
    """A column of numbers, or one that is not read, because torch has no such dtype."""
    known = np.dtype(dtype).newbyteorder("=")
    is_known = known.kind in "biufc" and known in TO_TORCH
    return Column(known, shape, rows, "" if is_known else f"has the dtype {known}")


def field_of(path: Path) -> str:
    """The name of the field that a column becomes."""
    return "/".join((ROOTS[path[0]], *path[1:]))
