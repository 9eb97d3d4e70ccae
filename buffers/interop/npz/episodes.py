"""Directories with one episode a file, whose rows are aligned on arrival, or taken as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from buffers.interop.alignment import FINAL_MISSING
from buffers.interop.arrays import Archive, as_flags, in_order, note_unread, tree_of
from buffers.interop.base import Episode, FormatError, FormatReader
from buffers.interop.npz.layouts import natural_order

__all__ = ["NpzReader", "check_observations", "check_reserved", "is_observation"]

#: Arrays of Dreamer that are no observations.
_DREAMER = ("action", "reward", "discount", "is_first", "is_last", "is_terminal", FINAL_MISSING)
_RESERVED = ("obs", "terminated", "truncated", "done")
_FINISHED = (
    "`terminated` is where `discount` is 0. Files hold finished episodes, so the last row of others is `truncated`."
)
_DRQ = "DrQ-v2 itself stores a discount of 0 as 1: an episode that terminated there is `truncated` here."
_ONE_EPISODE = "Files of this layout hold one episode each; if it is another, say `layout=`"


def is_observation(name: str, observations: Collection[str] | None) -> bool:
    """Whether an array of Dreamer is an observation: one that is named so, or none of Dreamer's own."""
    if observations is not None:
        return name in observations
    return name not in _DREAMER and not name.startswith("log_")


def check_observations(reader: Any, arrays: Collection[str], observations: Collection[str]) -> None:
    """FormatError if names of observations are not there, or there are none."""
    missing = sorted({*(reader.observations or ())} - {*arrays})
    if missing:
        raise reader.damaged(f"It has no arrays {missing}, but {sorted(arrays)}", "Name others in `obs=`")
    if not observations:
        raise reader.damaged(f"None of its arrays {sorted(arrays)} is an observation", "Name some in `obs=`")


def check_reserved(reader: FormatReader, arrays: Collection[str]) -> None:
    """FormatError for arrays with the names of fields that are made of others."""
    clashing = sorted(name for name in arrays if name.split("/")[0] in _RESERVED)
    if clashing:
        found = f"Its arrays {clashing} have the names of fields that are made of others here"
        raise reader.damaged(found, "Try another layout, or rename them")


class NpzReader(FormatReader):
    """See `buffers.interop.npz.read`."""

    format = "npz"

    def __init__(
        self,
        path: str,
        directory: str,
        stems: Sequence[str],
        layout: str,
        observations: Collection[str] | None,
        fields: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path, fields, dtypes)
        self.layout, self.observations = layout, observations
        key: Callable[[str], Any] = _by_time_and_id if layout == "original" else natural_order
        self.paths = [os.path.join(directory, f"{stem}.npz") for stem in sorted(stems, key=key)]
        first = self._opened(0)
        self.arrays = {name: (column.dtype, column.shape[1:]) for name, column in first.columns.items()}
        lengths = [self._length(number) for number in range(len(self.paths))]
        self.num_episodes, self.num_steps = len(lengths), sum(lengths)
        self.metadata = {"layout": layout}
        note_unread(first, self.notes)
        self._check_roles()
        self._note()

    def files(self) -> list[str]:
        """As `FormatReader.files`."""
        return self.paths

    def _opened(self, number: int) -> Archive:
        archive = Archive(self.paths[number])
        archive.close()
        return archive

    def _length(self, number: int) -> int:
        """Rows of a file, whose arrays are compared with those of the first."""
        columns = self._opened(number).columns
        path, first = self.paths[number], self.paths[0]
        lengths = {name: len(column) for name, column in columns.items()}
        if len({*lengths.values()}) != 1 or not all(lengths.values()):
            raise FormatError(path, f"Its arrays have {lengths} rows", _ONE_EPISODE)
        found = {name: (column.dtype, column.shape[1:]) for name, column in columns.items()}
        if found != self.arrays:
            name = sorted(name for name in {*found, *self.arrays} if found.get(name) != self.arrays.get(name))[0]
            one, other = _described(found.get(name)), _described(self.arrays.get(name))
            text = f"`{name}` is {one}, in {first} {other}"
            raise FormatError(path, text, "All episodes must have the same arrays: move those of another kind away")
        return next(iter(lengths.values()))

    def _check_roles(self) -> None:
        if self.layout == "original":
            return
        observations = [name for name in self.arrays if is_observation(name, self.observations)]
        if self.layout == "dreamer":
            check_observations(self, self.arrays, observations)
        own = observations if self.layout == "dreamer" else []
        check_reserved(self, [name for name in self.arrays if name not in own])

    def _note(self) -> None:
        if self.layout == "original":
            self.notes.add("Rows are as they were stored: which action led to a row is not said.")
            return
        if "reward" not in self.arrays:
            self.notes.add("There are no rewards.")
        if self.layout == "dreamer" and "is_terminal" in self.arrays:
            if "is_last" not in self.arrays:
                self.notes.add("There is no `truncated`, as `is_last` is missing.")
        elif self.layout == "dreamer" and "is_last" in self.arrays and "discount" not in self.arrays:
            self.notes.add("Why an episode ends is not said: `done` is `is_last`.")
        elif "discount" in self.arrays:
            self.notes.add(_FINISHED)
            if self.layout == "exorl":
                self.notes.add(_DRQ)
        else:
            self.notes.add("There are no `terminated` and `truncated`.")

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        build = {"dreamer": self._dreamer, "exorl": self._exorl, "original": self._original}[self.layout]
        for position in range(number, len(self.paths)):
            archive = Archive(self.paths[position])
            try:
                yield Episode(build(archive), {"file": os.path.basename(self.paths[position])})
            finally:
                archive.close()

    def _original(self, archive: Archive) -> dict[str, Any]:
        names = [name for name in archive.columns if self.wants(name)]
        return tree_of(archive.path, {name: archive.columns[name].all() for name in names})

    def _dreamer(self, archive: Archive) -> dict[str, Any]:
        names = [name for name in archive.columns if is_observation(name, self.observations)]
        obs = {name: archive.columns[name].all() for name in names if self.wants(f"obs/{name}")}
        length = len(next(iter(archive.columns.values())))
        flags = {name: self._flags(archive, name) for name in ("is_first", "is_last", "is_terminal", FINAL_MISSING)}
        is_first, is_last, is_terminal, is_missing = flags.values()
        if (is_first is not None and is_first[1:].any()) or (is_last is not None and is_last[:-1].any()):
            found = "`is_first` or `is_last` is set within it, as where it holds more than one episode"
            raise FormatError(archive.path, found, _ONE_EPISODE)
        rows: dict[str, Any] = {"is_first": np.arange(length) == 0 if is_first is None else is_first}
        if obs:
            rows["obs"] = tree_of(archive.path, obs)
        if is_terminal is not None:
            rows["terminated"] = is_terminal
            if is_last is not None:
                rows["truncated"] = is_last & ~is_terminal
        elif "discount" in archive.columns:
            rows |= self._by_discount(archive, None if is_last is None else bool(is_last[-1]))
        elif is_last is not None:
            rows["done"] = is_last
        if is_missing is not None:
            rows[FINAL_MISSING] = is_missing
        others = [name for name in archive.columns if name not in {*names, *flags}]
        rows |= tree_of(archive.path, {name: archive.columns[name].all() for name in others if self.wants(name)})
        return in_order(rows)

    def _exorl(self, archive: Archive) -> dict[str, Any]:
        length = len(archive.columns["observation"])
        rows: dict[str, Any] = {"is_first": np.arange(length) == 0}
        for name, column in archive.columns.items():
            field = "obs" if name == "observation" else name
            if self.wants(field):
                values = column.all()
                # The library stores both as (T + 1, 1).
                is_scalar = name in ("reward", "discount") and values.shape[1:] == (1,)
                rows[field] = values[:, 0] if is_scalar else values
        if FINAL_MISSING in rows:
            rows[FINAL_MISSING] = as_flags(archive.path, FINAL_MISSING, rows[FINAL_MISSING])
        if "discount" in archive.columns:
            rows |= self._by_discount(archive, True)
        return in_order(tree_of(archive.path, rows))

    def _flags(self, archive: Archive, name: str) -> np.ndarray | None:
        column = archive.columns.get(name)
        return None if column is None else as_flags(archive.path, name, column.all())

    def _by_discount(self, archive: Archive, is_over: bool | None) -> dict[str, np.ndarray]:
        """The flags of an episode, which ended if it is not said that it did not."""
        terminated = archive.columns["discount"].all() == 0
        terminated = terminated.reshape(len(terminated), -1).all(1)
        is_last = np.arange(len(terminated)) == len(terminated) - 1
        return {"terminated": terminated, "truncated": is_last & ~terminated & (is_over is not False)}


def _by_time_and_id(stem: str) -> tuple[Any, ...]:
    """Ids begin at 0 in each run of the original project, so time comes first."""
    number, _, time = [*stem.split("_"), "", ""][:3]
    return time, natural_order(number), stem


def _described(kind: tuple[np.dtype, tuple[int, ...]] | None) -> str:
    return "missing" if kind is None else f"{kind[0]} {kind[1]}"
