"""Layout: which rows of a file are which rows of the episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from buffers.conversion import TO_TORCH
from buffers.dataset.episode_info import EpisodeInfo
from buffers.fields import Fields, TensorType
from buffers.interop.alignment import FINAL_MISSING, unflattened
from buffers.interop.base import Notes, note_absence
from buffers.interop.hdf5.file import HDF5File, Piece, Stored

__all__ = ["Column", "Layout", "listed"]

_FIRST = ("action", "reward", "terminated", "truncated", "is_first", FINAL_MISSING)


def listed(names: Iterable[str]) -> str:
    """Names for a note, at most ten."""
    found = list(names)
    more = f" and {len(found) - 10} others" if len(found) > 10 else ""
    return ", ".join(f"`{name}`" for name in found[:10]) + more


class Column(NamedTuple):
    """A field of an episode of T transitions, in a dataset with a row for each.

    row             0     1     2   ...  T
    arrived: False  x0    x1    x2       edge     known before the action, such as an observation
    arrived: True   edge  x0    x1       xT-1     of the transition: its action, its reward
    """

    body: Stored
    has_arrived: bool
    edge: Stored | None = None  # Without one: a repeated row if it is the last, zeros if it is the first.

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return self.body.shape[1:]

    @property
    def has_next(self) -> bool:
        """Whether its last row is that of a next observation."""
        return not self.has_arrived and self.edge is not None

    def pieces(self, first: int, num: int, edge: int) -> tuple[Piece, ...]:
        """Those of an episode of `num` transitions from row `first` on; `edge` is a row of the other dataset."""
        body = Piece(num, self.body, first)
        if self.has_arrived:
            return (Piece(1) if self.edge is None else Piece(1, self.edge, edge)), body
        last = Piece(1, self.body, first + num - 1) if self.edge is None else Piece(1, self.edge, edge)
        return body, last


class Layout(ABC):
    """The episodes of a file, whose rows have not been read.

    Args:
        file: Is looked at by the constructor, and not kept.
        wants: Whether a field is to be read.

    Attributes:
        types: `field -> (dtype, shape)` in the order of the fields.
        lengths: T of each episode, int64.
        infos: `number -> info` of the episodes that have one.
        metadata: Of the whole file, as JSON.
        notes: What is missing, or not read.
    """

    #: What `layout=` calls it.
    name: ClassVar[str]

    def __init__(self, file: HDF5File, wants: Callable[[str], bool]) -> None:
        self.path, self.version = file.path, file.version
        self.wants = wants
        self.types: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.lengths = np.zeros(0, np.int64)
        self.infos: dict[int, EpisodeInfo] = {}
        self.metadata: dict[str, Any] = {"layout": self.name}
        self.notes = Notes()

    @abstractmethod
    def columns(self, episode: int) -> Mapping[str, Column]:
        """`field -> column` of an episode, of the fields that lie in the file."""

    @abstractmethod
    def _pieces(self, episode: int, column: Column) -> tuple[Piece, ...]:
        """Where the rows of a column lie."""

    @abstractmethod
    def is_final_missing(self, episode: int) -> bool:
        """Whether the final observation of an episode is not there."""

    def last_value(self, episode: int, name: str) -> int:
        """Of a flag that has no column, in the last row of an episode. It is 0 in the others."""
        return self.is_final_missing(episode) if name == FINAL_MISSING else 0

    def pieces(self, episode: int, name: str) -> tuple[Piece, ...]:
        """Where the rows of a field lie."""
        column = self.columns(episode).get(name)
        if column is not None:
            return self._pieces(episode, column)
        num = int(self.lengths[episode])
        if name == "is_first":
            return Piece(1, value=1), Piece(num)
        return Piece(num), Piece(1, value=self.last_value(episode, name))

    def settle_types(self, columns: Mapping[str, Column], flags: Sequence[str], scalars: Sequence[str]) -> None:
        """Set `types` for the columns, and for flags that have none. Scalars are stored as (T,) or (T, 1)."""
        found = {name: (column.body.dtype, column.shape) for name, column in columns.items()}
        for name in scalars:
            if name in found and found[name][1] == (1,):
                found[name] = found[name][0], ()
        found |= {name: (np.dtype(np.bool_), ()) for name in ("is_first", *flags)}
        observed = [name for name in found if f"{name}/".startswith("obs/")]
        first = [*observed, *(name for name in _FIRST if name in found)]
        self.types = {name: found[name] for name in (*first, *(name for name in found if name not in first))}

    @property
    def fields(self) -> Fields:
        """Of the rows."""
        types = {name: TensorType.infer(shape, TO_TORCH[dtype]) for name, (dtype, shape) in self.types.items()}
        return Fields(unflattened(types))

    def note_absence(self) -> None:
        """Say which of rewards and flags are missing."""
        # Of those that are not wanted, nobody has looked.
        note_absence(self.notes, {*self.types, *(name for name in _FIRST if not self.wants(name))})
        if FINAL_MISSING in self.types:
            self.notes.add("Final observations are missing: the last row repeats the one before, and says so.")
