"""OGBench (1.2): trajectories one after the other in an `.npz` file, downloaded or as `load_dataset` returns them."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from buffers.fields import Fields
from buffers.interop.alignment import first_gap, rows_on_arrival
from buffers.interop.arrays import Archive, as_flags, in_order, note_unread
from buffers.interop.base import Episode, FormatError, FormatReader, chosen_fields, fill
from buffers.interop.in_place import InPlaceDataset
from buffers.interop.npy import Header, reading

__all__ = ["OGBenchDataset", "OGBenchReader", "open", "read"]

# As the library names them: arrays with a row for each observation, and those with one for each action.
_OF_STATES = ("qpos", "qvel", "button_states", "oracle_reps")
_OF_TRANSITIONS = {"actions": "action", "rewards": "reward", "masks": "masks"}
_ADVICE = (
    "Read what `ogbench.download_datasets` brings, or what `ogbench.utils.load_dataset` returns, saved by np.savez"
)


def read(
    path: str | os.PathLike[str], *, fields: Sequence[str] | None = None, dtypes: Mapping[str, Any] | None = None
) -> OGBenchReader:
    """The trajectories of an OGBench file, in their order.

    Three layouts are told apart by their arrays. Of two trajectories of 4 and 1 transitions:

        file          as downloaded            `next_observations`      `valids`
                                               (regular)                (compact)
        observations  s0 s1 s2 s3 s4  s0 s1    s0 s1 s2 s3  s0          s0 s1 s2 s3 s4  s0 s1
        next_obs...                            s1 s2 s3 s4  s1
        actions       a0 a1 a2 a3 --  a0 --    a0 a1 a2 a3  a0          a0 a1 a2 a3 --  a0 --
        terminals      0  0  0  0  1   0  1     0  0  0  1   1           0  0  0  1  1   1  1
        valids                                                           1  1  1  1  0   1  0

        here, row      0  1  2  3  4   0  1
        obs           s0 s1 s2 s3 s4  s0 s1
        action         0 a0 a1 a2 a3   0 a0

    The action in a trajectory's last row (`--`) has no result in the file and is left out, as the library leaves it
    out. dtypes are those of the file, where the library makes everything float32. `qpos`, `qvel`, `button_states` and
    `oracle_reps` have a row for each observation; in the regular layout their last row is missing, so they are not
    read. `rewards` and `masks` exist only where somebody saved a single-task dataset. The library computes them from
    the state before the action and uses them with the transition: `reward` and `masks` of row t + 1 belong to action t.

    There are no `terminated` and `truncated`: `terminals` say where a trajectory ends, not why. Where the file ends
    within a trajectory, its rows up to there are an episode.

    Args:
        path: The file.
        fields: The fields to read; None for all.
        dtypes: `field -> dtype` for fields that are to be stored as another one.

    Raises:
        FormatError: No such file, or no whole one.
    """
    return OGBenchReader(os.fspath(path), fields, dtypes)


def open(path: str | os.PathLike[str], *, fields: Sequence[str] | None = None) -> OGBenchDataset:
    """The trajectories of a file as a dataset that reads ranges of rows where they lie.

    Only where the file is not compressed. Downloaded ones are: `np.savez(new, **np.load(old))` stores one anew.

    Args:
        path: The file.
        fields: The fields to read; None for all.

    Raises:
        FormatError: As `read`; or arrays are compressed, or in Fortran order.
        ValueError: There is no such field.
    """
    reader = OGBenchReader(os.fspath(path), fields)
    try:
        return OGBenchDataset(reader)
    finally:
        reader.close()


class _Layout(NamedTuple):
    """Where the trajectories of a file lie."""

    name: str  # "raw", "regular", "compact".
    starts: np.ndarray  # Row of the first observation of each.
    lengths: np.ndarray  # T of each, in transitions.
    finals: np.ndarray  # bool: whether its final observation is the last of its `next_observations`.
    is_cut: bool = False  # Whether the file ends within the last one.


def _raw_layout(name: str, ends: np.ndarray) -> _Layout:
    """That of rows whose last of each trajectory, where `ends` is True, is only an observation."""
    bounds = np.flatnonzero(ends) + 1
    is_cut = not ends[-1]
    if is_cut:
        bounds = np.append(bounds, len(ends))
    starts = np.append(0, bounds[:-1])
    return _Layout(name, starts, bounds - starts - 1, np.zeros(len(starts), bool), is_cut)


def _regular_layout(ends: np.ndarray, num_next: int) -> _Layout:
    """That of rows of transitions, the last of each trajectory where `ends` is True."""
    bounds = np.append(np.flatnonzero(ends[:-1]) + 1, len(ends))
    starts = np.append(0, bounds[:-1])
    lengths, finals = bounds - starts, np.ones(len(starts), bool)
    if num_next < len(ends):
        # The library flags the last row of a cut trajectory, too, and leaves out the next observation it does not have.
        lengths[-1] -= 1
        finals[-1] = False
    return _Layout("regular", starts, lengths, finals, num_next < len(ends) or not ends[-1])


class OGBenchReader(FormatReader):
    """See `read`."""

    format = "ogbench"

    def __init__(self, path: str, fields: Sequence[str] | None = None, dtypes: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, fields, dtypes)
        self._file = Archive(path)
        try:
            self.layout = self._find_layout()
            self._check_columns()
        finally:
            self._file.close()
        columns, is_regular = self._file.columns, self.layout.name == "regular"
        #: Arrays by field, of transitions and of states.
        self.steps = {field: name for name, field in _OF_TRANSITIONS.items() if name in columns}
        self.states = {} if is_regular else {name: name for name in _OF_STATES if name in columns}
        self.num_episodes = len(self.layout.starts)
        self.num_steps = int(self.layout.lengths.sum()) + self.num_episodes
        self.metadata = {"layout": self.layout.name}
        self._note()

    def _find_layout(self) -> _Layout:
        columns = self._file.columns
        missing = [name for name in ("observations", "actions", "terminals") if name not in columns]
        if missing:
            raise self.damaged(f"It has no arrays of numbers {missing}, but {sorted(columns)}", _ADVICE)
        if "next_observations" in columns and "valids" in columns:
            raise self.damaged("It has both `next_observations` and `valids`", _ADVICE)
        ends = as_flags(self.path, "terminals", columns["terminals"].all())
        if not len(ends):
            raise self.damaged("It has no rows", _ADVICE)
        if "next_observations" in columns:
            return _regular_layout(ends, len(columns["next_observations"]))
        if "valids" in columns:
            valid = as_flags(self.path, "valids", columns["valids"].all())
            if not np.array_equal(ends, ~valid | np.append(~valid[1:], True)):
                found = "`terminals` are not 1 exactly on the rows of `valids` 0, those before them, and the last"
                raise self.damaged(found, _ADVICE)
            return _raw_layout("compact", ~valid)
        pairs = np.flatnonzero(ends)[: ends.sum() // 2 * 2].reshape(-1, 2)
        # A trajectory of one row has no transition, so that every second one has one row is a mistake.
        if len(pairs) and (pairs[:, 1] == pairs[:, 0] + 1).all():
            found = "`terminals` are 1 on two rows in a row everywhere, as in a compact dataset without its `valids`"
            raise self.damaged(found, "Save `valids`, too")
        return _raw_layout("raw", ends)

    def _check_columns(self) -> None:
        columns, num_rows = self._file.columns, len(self._file.columns["terminals"])
        for name in {"observations", *_OF_TRANSITIONS, *_OF_STATES} & set(columns):
            if len(columns[name]) != num_rows:
                raise self.damaged(f"`{name}` has {len(columns[name])} rows, `terminals` {num_rows}")
        if self.layout.name == "regular":
            now, after = columns["observations"], columns["next_observations"]
            if len(after) not in (num_rows, num_rows - 1):
                raise self.damaged(f"`next_observations` has {len(after)} rows, `terminals` {num_rows}")
            if (now.dtype, now.shape[1:]) != (after.dtype, after.shape[1:]):
                found = f"Observations are {now.dtype} {now.shape[1:]}, next ones {after.dtype} {after.shape[1:]}"
                raise self.damaged(found, _ADVICE)

    def _note(self) -> None:
        self.notes.add("`terminals` say where a trajectory ends, not why: there are no `terminated` and `truncated`.")
        if "reward" not in self.steps:
            self.notes.add("There are no rewards.")
        if self.layout.name != "regular":
            self.notes.add("The action in the last row of a trajectory, whose result is not in the file, is left out.")
        if self.layout.is_cut:
            self.notes.add("The file ends within its last trajectory.")
        known = {"observations", "next_observations", "terminals", "valids", *_OF_TRANSITIONS, *self.states}
        for name in sorted(set(self._file.columns) - known):
            is_state = name in _OF_STATES
            why = "has no row for final observations here" if is_state else "is no array that OGBench knows"
            self.notes.add(f"`{name}` {why}, and is not read.")
        note_unread(self._file, self.notes)

    def row_fields(self) -> Fields:
        """The fields of a row."""
        rows: dict[str, Any] = {"is_first": np.zeros(1, bool)}
        for field, name in {"obs": "observations", **self.steps, **self.states}.items():
            column = self._file.columns[name]
            rows[field] = np.zeros((1, *column.shape[1:]), column.dtype)
        return Fields.from_episode(in_order(rows))

    def stored_arrays(self) -> dict[str, tuple[int, Header]]:
        """`array -> where its values begin in the file, and its header`.

        Raises:
            FormatError: They are compressed, or not row after row.
        """
        names = ["observations", *self.steps.values(), *self.states.values()]
        if self.layout.finals.any():
            names.append("next_observations")
        found = {name: self._file.stored_array(name) for name in names}
        stored = {name: place for name, place in found.items() if place is not None}
        if len(stored) < len(found):
            advice = "Import it, or store it anew: `np.savez(new_path, **np.load(path))`"
            raise self.damaged("Its arrays are compressed", advice)
        if any(header.fortran_order and len(header.shape) > 1 for _, header in stored.values()):
            raise self.damaged("It has arrays in Fortran order, whose rows do not lie one after the other", "Import it")
        return stored

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        try:
            for episode in range(number, len(self.layout.starts)):
                yield Episode(self._rows(episode), {})
        finally:
            self.close()

    def close(self) -> None:
        """As `FormatReader.close`."""
        self._file.close()

    def _rows(self, episode: int) -> dict[str, Any]:
        columns, layout = self._file.columns, self.layout
        start, length = int(layout.starts[episode]), int(layout.lengths[episode])
        end = start + length
        steps = {f: columns[name].rows(start, end) for f, name in self.steps.items() if self.wants(f)}
        states = {f: columns[name].rows(start, end + 1) for f, name in self.states.items() if self.wants(f)}
        observations = np.empty((length + 1, 0))
        if self.wants("obs"):
            observations = self._observations(start, end, layout.finals[episode])
        return in_order(rows_on_arrival(observations, steps, more=states))

    def _observations(self, start: int, end: int, has_next: bool) -> np.ndarray:
        if not has_next:
            return self._file.columns["observations"].rows(start, end + 1)
        now = self._file.columns["observations"].rows(start, end)
        after = self._file.columns["next_observations"].rows(start, end)
        if (gap := first_gap(now, after)) is not None:
            found = f"`next_observations` of row {start + gap} is not the observation of the row behind it"
            raise self.damaged(found, "Rows must be in the order of their trajectory")
        return np.concatenate([now, after[-1:]])


class OGBenchDataset(InPlaceDataset):
    """See `open`."""

    format: ClassVar[str] = "ogbench"

    def __init__(self, reader: OGBenchReader) -> None:
        fields = chosen_fields(reader.path, reader.row_fields(), reader.fields)
        lengths = (reader.layout.lengths + 1).tolist()
        super().__init__(reader.path, fields, lengths, options={"fields": reader.fields})
        self._arrays = reader.stored_arrays()
        self._layout, self._steps, self._states = reader.layout, reader.steps, reader.states

    def _open_file(self) -> BinaryIO:
        with reading(self.path):
            return builtins.open(self.path, "rb", buffering=0)

    def _read_rows(self, file: Any, episode: int, start: int, stop: int, out: Mapping[str, np.ndarray]) -> None:
        first, last = int(self._layout.starts[episode]), int(self._layout.lengths[episode])
        for name, rows in out.items():
            if name == "is_first":
                rows[:] = np.arange(start, stop) == 0
            elif name in self._steps:
                # Row t has action t - 1; there is none before row 0.
                skipped = int(start == 0)
                rows[:skipped] = 0
                self._copy(file, self._steps[name], first + start + skipped - 1, rows[skipped:])
            else:
                taken = int(stop == last + 1 and name == "obs" and self._layout.finals[episode])
                split = len(rows) - taken
                self._copy(file, "observations" if name == "obs" else self._states[name], first + start, rows[:split])
                self._copy(file, "next_observations", first + last - 1, rows[split:])

    def _copy(self, file: Any, name: str, row: int, out: np.ndarray) -> None:
        """Read rows of an array from one on, as many as `out` has."""
        if not len(out):
            return
        offset, header = self._arrays[name]
        row_bytes = header.values_bytes // header.shape[0]
        direct = header.dtype.isnative and out.flags.c_contiguous
        values = out if direct else np.empty(out.shape, header.dtype)
        if not fill(file.fileno(), values, offset + row * row_bytes):
            raise FormatError(self.path, f"It has become shorter: `{name}` ends early", "Get a whole copy of it")
        if not direct:
            out[...] = values
