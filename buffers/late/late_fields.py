"""LateFields: the late fields of one dataset, and how step ids find their rows."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.fields import Fields, TensorType, as_tensor
from buffers.late.changes import ChangedBlocks
from buffers.late.late_field import PADDING, LateField, checked_default
from buffers.late.priorities import PRIORITY, PriorityField
from buffers.table import EpisodeTable, Int64Array, TableRow, Windows
from buffers.utils import ThreadLock

__all__ = ["LateFieldInfo", "LateFields"]

_ROWS_OF_A_PAGE = 1 << 16  # At most, of 64 kB and one byte a row.


class LateFieldInfo(NamedTuple):
    """All that a late field is, but for its values."""

    name: str
    kind: TensorType
    default: torch.Tensor  # `(*shape)`
    in_batches: bool
    initial: float | str | None = None  # Of priorities, as the largest so far.
    largest: float = 0.0


class LateFields(Mapping[str, LateField]):
    """Late fields by name; only the process that made them writes.

    Args:
        capacity: Of the dataset, in steps.
        is_circular: Whether step ids that live lie within `capacity` of each other, as those of a ring.
        device: Where values are kept.
        live: The dataset's table, for copies.

    Attributes:
        marks_changes: Whether fields that are added note what changes, to be kept on disk.
    """

    marks_changes = False

    def __init__(self, capacity: int, is_circular: bool, device: torch.device, live: EpisodeTable) -> None:
        self._capacity, self._is_circular, self._device, self._live = capacity, is_circular, device, live
        #: The fields, replaced as a whole.
        self.by_name: dict[str, LateField] = {}
        #: Those that batches have; None if there are none.
        self.in_batches: Fields | None = None
        self._owner = os.getpid()
        # For writers: an update must not write to a row that has been given to a newer step since it was looked up.
        self._lock = ThreadLock()
        self._table = EpisodeTable()
        # The step id up to which rows hold the default or more.
        self._num_filled = 0
        # Called with the first step ids `(n,)` and the ends of runs that are about to be written.
        self._before_writes: Callable[[Int64Array, Int64Array], object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # On a GPU, the copy has values of its own.
        owner = -1 if self._device.type == "cpu" else self._owner
        state = {name: value for name, value in self.__dict__.items() if name not in ("_table", "_live")}
        return state | {"_owner": owner, "_before_writes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._table = self._live = EpisodeTable()

    def __deepcopy__(self, memo: dict[int, Any]) -> LateFields:
        """Fields with values of their own."""
        other = LateFields(self._capacity, self._is_circular, self._device, copy.deepcopy(self._live, memo))
        other.copy_from(self, self._live)
        return other

    def __getitem__(self, name: str) -> LateField:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    @property
    def is_owner(self) -> bool:
        """Whether this process may write."""
        return self._owner == os.getpid()

    def add(self, name: str, kind: TensorType, default: Any, table: EpisodeTable) -> None:
        """Add a field that batches have, or find it there; ValueError if it is there with another type or default."""
        if name == PRIORITY and (kind.shape, kind.dtype) != ((), torch.float32):
            raise ValueError(f"`{PRIORITY}` is what PrioritizedSampler draws by: it must be a float32 Scalar().")
        if self.in_batches is not None and name in self.in_batches:
            self.check_same(name, kind, default)
            return
        if name == PRIORITY:
            self.add_priorities(float(as_array(name, default)), table)
        else:
            field = LateField(name, kind, default, self._capacity, self._is_circular, self._device)
            self._install(name, field, table)
        self.in_batches = Fields({**(self.in_batches or {}), name: kind})

    def add_priorities(self, initial: float | str, table: EpisodeTable) -> PriorityField:
        """The field of priorities, which is added if it is missing; batches do not have it by this alone."""
        if PRIORITY not in self.by_name:
            self._install(PRIORITY, PriorityField(initial, self._capacity, self._is_circular), table)
        field = self.by_name[PRIORITY]
        assert isinstance(field, PriorityField)  # No other field has this name.
        if field.is_restored:
            field.initial, field.is_restored = initial, False
        return field

    def check_same(self, name: str, kind: TensorType, default: Any) -> None:
        """ValueError unless a field that is there has this type and default."""
        field = self.by_name[name]
        if isinstance(field, PriorityField):
            known: Any = field.initial
            # A sampler may have added it first, with "max".
            is_same = known in ("max", float(as_array(name, default)))
        else:
            known, is_same_type = field.default, (field.kind.shape, field.kind.dtype) == (kind.shape, kind.dtype)
            is_same = is_same_type and checked_default(name, kind, default).tobytes() == known.tobytes()
        if not is_same:
            raise ValueError(
                f"There is a late field `{name}` already: {field.kind} with the default {known}, not {kind} with "
                f"{default!r:.60}. Add it as it is there, or another name."
            )

    def info_of(self, name: str) -> LateFieldInfo:
        """What `restore` needs for an equal field."""
        field, in_batches = self.by_name[name], name in (self.in_batches or ())
        default = as_tensor(np.array(field.default), field.kind)
        if isinstance(field, PriorityField):
            return LateFieldInfo(name, field.kind, default, in_batches, field.initial, field.largest)
        return LateFieldInfo(name, field.kind, default, in_batches)

    def restore(self, info: LateFieldInfo, table: EpisodeTable) -> LateField:
        """Add a field that is missing here, as `info_of` tells of it. Its rows hold what new rows hold."""
        if info.initial is not None:
            field = PriorityField(info.initial, self._capacity, self._is_circular)
            field.set_largest(info.largest)
            field.is_restored = not info.in_batches
            self._install(PRIORITY, field, table)
        if info.in_batches:
            self.add(info.name, info.kind, info.default, table)
        return self.by_name[info.name]

    def copy_from(self, other: LateFields, table: EpisodeTable) -> None:
        """Take over the fields of `other` with the rows of the episodes in `table`, whose step ids are the same."""
        for name, source in other.items():
            field = self.restore(other.info_of(name), table)
            for begin, end in _spans(table):
                steps = np.arange(begin, end)
                rows = source.rows(steps)[:, None]
                field.write(steps, rows if field.memory is None else as_array(name, rows))

    def _install(self, name: str, field: LateField, table: EpisodeTable) -> None:
        if not self.is_owner:
            raise RuntimeError(f"Only the process that made the dataset can add a late field, such as `{name}`.")
        field.changed = ChangedBlocks() if self.marks_changes else None
        with self._lock:
            _fill([field], table)
            self.by_name = {**self.by_name, name: field}
            self._num_filled = max(self._num_filled, table.next_start)

    # As episodes come and go.

    def check_span(self, num_steps: int) -> None:
        """RuntimeError if step ids that live would be so far apart that two have one row."""
        for name, field in self.by_name.items():
            if num_steps > field.num_rows:
                raise RuntimeError(
                    f"Late field `{name}` has room for {field.num_rows:,} step ids from the oldest episode on, and the "
                    f"new one would be at {num_steps:,}. Evict the oldest ones."
                )

    def fill(self, start: int, length: int) -> None:
        """Give the rows of a new episode their defaults, before anyone can draw it."""
        with self._lock:
            for field in self.by_name.values():
                field.fill(start, length)
            self._num_filled = start + length

    def follow(self, table: EpisodeTable) -> None:
        """Fill the rows of episodes that another process has added."""
        if table.next_start <= self._num_filled or not self.by_name or not self.is_owner:
            return
        with self._lock:
            found = table.rows[table.starts >= self._num_filled]
            try:
                for start, length, *_ in found.tolist():
                    self.fill(start, length)
                for field in self.by_name.values():
                    # Workers may have looked at it before.
                    field.note(found[:, 2], np.zeros(len(found), np.int64), found[:, 1])
            except BaseException:  # Ctrl-C.
                for field in self.by_name.values():
                    field.note_all()
                raise
            self._num_filled = table.next_start

    def release(self, row: TableRow, position: int, table: EpisodeTable) -> None:
        """Give back the memory of an episode that has left `table`, where it was at `position`."""
        if self._is_circular:
            return
        begin, end = row[0] - _ROWS_OF_A_PAGE, row[0] + row[1] + _ROWS_OF_A_PAGE
        # Pages that it shared with others may be free now; those of its neighbours are not.
        if position:
            begin = max(begin, int(table.starts[position - 1] + table.lengths[position - 1]))
        if position < len(table):
            end = min(end, int(table.starts[position]))
        with self._lock:
            for field in self.by_name.values():
                field.release(max(begin, 0), min(end, table.next_start))

    # Values in.

    def update(self, table: EpisodeTable, index: Any, values: Mapping[str, Any]) -> int:
        """Write values `(B, T, *shape)` for step ids `(B, T)`; returns how many ids are of no live episode."""
        return self.write(table, *self.checked(index, values))

    def checked(self, index: Any, values: Mapping[str, Any]) -> tuple[Int64Array, dict[str, Any]]:
        """Step ids `(n, T)`, and values `(n, T, *shape)` as they are stored, or a TypeError or ValueError."""
        if not self.is_owner:
            raise RuntimeError("Only the process that made the dataset can update its late fields; workers read them.")
        if not isinstance(values, Mapping):
            raise TypeError(f"Values must be a dict from late fields to arrays, found {type(values).__name__}.")
        unknown = [name for name in values if name not in self.by_name]
        if unknown or not values:
            raise ValueError(f"{unknown or 'Nothing'} is no late field. There are {list(self)}: see `add_late_field`.")
        ids = as_array("index", index)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"`index` must be step ids, as `include=('index',)` gives them, found {ids.dtype}.")
        ids = ids.astype(np.int64, copy=False)
        rows = {name: self.by_name[name].checked(value, ids) for name, value in values.items()}
        length = max(1, ids.shape[-1]) if ids.ndim > 1 else 1
        shape = ids.size // length, length
        return ids.reshape(shape), {n: value.reshape(*shape, *self[n].kind.shape) for n, value in rows.items()}

    def write(self, table: EpisodeTable, ids: Int64Array, rows: dict[str, Any]) -> int:
        """Write what has been `checked`; returns how many ids are of no live episode."""
        with self._lock:
            self.follow(table)
            self._table.show(table)
            return self._write(ids, rows)

    def _write(self, ids: Int64Array, rows: dict[str, Any]) -> int:
        length = ids.shape[1]
        is_whole: Any = True
        if length > 1 and not (is_run := ids[:, :1] + np.arange(length) == ids).all():
            is_whole = is_run.all(1)
        number, step = self._table.numbers_of(ids[:, 0])
        episode = self._table.state.rows.take(number, axis=0)
        is_whole &= (step >= 0) & (step + length <= episode[:, 1])
        if is_whole.all():
            self._write_runs(ids[:, 0], episode[:, 2], step, rows)
            return 0
        runs = {name: values[is_whole] for name, values in rows.items()}
        self._write_runs(ids[is_whole, 0], episode[is_whole, 2], step[is_whole], runs)
        # Row by row: windows with padding, and rows of several episodes.
        single = ids[~is_whole].ravel()
        number, step = self._table.numbers_of(single)
        lives = step >= 0
        shape = len(single), 1
        others = {n: values[~is_whole].reshape(*shape, *self[n].kind.shape)[lives] for n, values in rows.items()}
        self._write_runs(single[lives], self._table.state.rows[number[lives], 2], step[lives], others)
        return int(((single != PADDING) & ~lives).sum())

    def keep_before_writes(self, keep: Callable[[Int64Array, Int64Array], object] | None) -> None:
        """Call a function of runs of step ids, [first, end), before their values change; None to stop."""
        with self._lock:
            self._before_writes = keep

    def refill(self, table: EpisodeTable) -> None:
        """Give all rows what new rows hold."""
        with self._lock:
            _fill(self.by_name.values(), table)
            self._num_filled = table.next_start

    def _write_runs(self, starts: Int64Array, episode_ids: Int64Array, steps: Int64Array, rows: dict[str, Any]) -> None:
        if self._before_writes is not None:
            self._before_writes(starts, starts + next(iter(rows.values())).shape[1])
        for name, values in rows.items():
            field = self.by_name[name]
            try:
                field.write(starts, values)
                field.note(episode_ids, steps, values.shape[1])
            except BaseException:  # Ctrl-C: some may have been written.
                field.note_all()
                raise

    def take_changes(self) -> dict[str, ChangedBlocks]:
        """What has changed in each field, which is forgotten here."""
        with self._lock:
            return {name: field.changed.take() for name, field in self.items() if field.changed is not None}

    def put_back_changes(self, changes: dict[str, ChangedBlocks]) -> None:
        """Note again what was taken."""
        with self._lock:
            for name, taken in changes.items():
                if (changed := self[name].changed) is not None:
                    changed.put_back(taken)

    # Values out.

    def read(self, windows: Windows, out: dict[str, torch.Tensor]) -> None:
        """Copy the rows of windows into `out`, `name -> (B, T, *shape)`."""
        for name, tensor in out.items():
            field = self.by_name[name]
            if field.device == tensor.device:
                field.read(windows, tensor)
            else:
                rows = torch.empty(tensor.shape, dtype=tensor.dtype)
                field.read(windows, rows)
                tensor.copy_(rows)


def _fill(fields: Iterable[LateField], table: EpisodeTable) -> None:
    """Give the rows of all live episodes what new rows hold."""
    for begin, end in _spans(table):
        for field in fields:
            field.fill(begin, end - begin)


def _spans(table: EpisodeTable) -> list[tuple[int, int]]:
    """The step ids that live, as (first, end) of runs without gaps."""
    starts, ends = table.starts, table.starts + table.lengths
    if not len(starts):
        return []
    breaks = np.flatnonzero(starts[1:] != ends[:-1])
    firsts, lasts = [0, *(breaks + 1).tolist()], [*breaks.tolist(), len(starts) - 1]
    return [(int(starts[a]), int(ends[b])) for a, b in zip(firsts, lasts, strict=True)]
