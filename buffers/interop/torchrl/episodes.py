"""Which rows make an episode, in which order, and whether they follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from buffers.interop.base import FormatError, Notes
from buffers.interop.torchrl.layout import MASK_KEY, TRAJ_KEY, Options, StoredRows, by_row, flags_of, key_of
from buffers.interop.torchrl.memmaps import Column, MemoryMapped

__all__ = ["EpisodeTable", "Pair", "episode_table", "first_gap"]

Pair = tuple[Column, Column]  # Of an observation: at the row, and after its step.

_CHUNK_BYTES = 1 << 22
_FIRST_BYTES = 1 << 26  # What is compared before the first episode is read.


@dataclass(frozen=True)
class EpisodeTable:
    """The rows of each episode.

    Attributes:
        order: Flat rows of the file, those of an episode one after the other.
        starts: Position in `order` of each episode's first row; episodes are ordered by when that row was written.
        lengths: Transitions of each episode.
        streams: The trajectory or environment of each.
        stream_name: Which of the two; None if the numbers say nothing.
    """

    order: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    streams: np.ndarray
    stream_name: str | None

    def rows_of(self, episode: int) -> np.ndarray:
        """The flat rows of an episode."""
        start = int(self.starts[episode])
        return self.order[start : start + int(self.lengths[episode])]


@dataclass
class _Ordered:
    """Rows of one stream after the other, each oldest first."""

    ages: np.ndarray  # 0 for the oldest row of all.
    order: np.ndarray  # Flat rows of the file.
    streams: np.ndarray
    stream_name: str | None

    def only(self, chosen: np.ndarray) -> _Ordered:
        return _Ordered(self.ages[chosen], self.order[chosen], self.streams[chosen], self.stream_name)

    def goes_on(self) -> np.ndarray:
        """Whether a row is of the same stream as the one before it."""
        return np.concatenate([[False], self.streams[1:] == self.streams[:-1]])


def episode_table(
    columns: MemoryMapped, stored: StoredRows, options: Options, pairs: Sequence[Pair], notes: Notes
) -> EpisodeTable:
    """Find the episodes; FormatError where the file leaves open which rows follow each other.

    An episode ends at a row with `next/done`, and before one with `is_init`.
    """
    ends = _ends(columns)
    rows = _ordered(columns, stored, options, bool(pairs))
    if not len(rows.order):
        raise FormatError(columns.source, "It has no rows", "Import a source with rows")
    _check_rows(columns, rows.order, ends)
    is_init = columns.columns.get(("is_init",))
    firsts = None if is_init is None else flags_of(columns, is_init)
    rows = _without_repeats(columns, rows, ends, firsts, options, notes)
    begins = ~rows.goes_on() | np.concatenate([[True], ends[rows.order[:-1]]])
    if firsts is not None:
        begins |= firsts[rows.order]
    if options.gaps == "split":
        inner = np.flatnonzero(~begins)
        begins[inner] = _differs(columns, pairs, rows.order[inner - 1], rows.order[inner])
    else:
        _check_first(columns, pairs, rows.order, np.flatnonzero(~begins))
    starts = np.flatnonzero(begins)
    if firsts is not None and (late := int((~firsts[rows.order[starts]]).sum())):
        notes.add(f"Episodes that lack their beginning, since `is_init` is False in their first row: {late:,}.")
    elif stored.has_lost_rows:
        notes.add("The oldest rows were overwritten, so that the first episodes may lack their beginning.")
    lengths = np.diff(starts, append=len(begins))
    by_age = np.argsort(rows.ages[starts], kind="stable")
    starts, lengths = starts[by_age], lengths[by_age]
    return EpisodeTable(rows.order, starts, lengths, rows.streams[starts], rows.stream_name)


def first_gap(columns: MemoryMapped, pairs: Sequence[Pair], rows: np.ndarray) -> FormatError | None:
    """The error for an episode in which a row's next observation is not the observation of the following row."""
    for pair in pairs:
        found = np.flatnonzero(_differs(columns, [pair], rows[:-1], rows[1:]))
        if len(found):
            return _gap(columns, pair, int(rows[found[0]]), int(rows[found[0] + 1]), len(found), len(rows) - 1)
    return None


def _ordered(columns: MemoryMapped, stored: StoredRows, options: Options, has_pairs: bool) -> _Ordered:
    batch = columns.batch
    flat = np.arange(columns.num_rows).reshape(batch)[stored.first_axis]
    ages, streams, name = _streams(columns, stored, options, flat, has_pairs)
    rows = _Ordered(ages, flat.reshape(-1)[ages], streams, name)
    mask = _mask(columns, options)
    return rows if mask is None else rows.only(mask[rows.order])


def _streams(
    columns: MemoryMapped, stored: StoredRows, options: Options, flat: np.ndarray, has_pairs: bool
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Ages of the rows of one stream after the other, the stream of each, and what a stream is."""
    ages = np.arange(flat.size)
    ids = _trajectories(columns, options)
    if ids is not None:
        found = ids[flat.reshape(-1)]
        by_id = np.argsort(found, kind="stable")
        return by_id, found[by_id], "traj_id"
    if flat.ndim > 1:
        axis = _time_axis(columns, stored, options)
        moved = np.moveaxis(ages.reshape(flat.shape), axis, -1)
        streams = np.repeat(np.arange(flat.size // flat.shape[axis]), flat.shape[axis])
        # Rows of a storage that are recordings themselves are of any environment.
        return moved.reshape(-1), streams, "environment" if axis == 0 or stored.is_plain else None
    num_envs = options.num_envs
    if num_envs is None and not has_pairs:
        unknown = "There is no next observation, so nothing tells the rows of several environments from those of one"
        raise FormatError(columns.source, unknown, "Give `num_envs`, 1 for a single one")
    if num_envs in (None, 1):
        return ages, np.zeros(len(ages), np.int64), None
    envs = (ages + _phase(columns, stored, num_envs)) % num_envs
    by_env = np.argsort(envs, kind="stable")
    return by_env, envs[by_env], "environment"


def _phase(columns: MemoryMapped, stored: StoredRows, num_envs: int) -> int:
    """The environment of the oldest row."""
    if stored.num_before is not None:
        return stored.num_before % num_envs
    if columns.batch[0] % num_envs:
        found = f"Nothing says of which of {num_envs} environments the oldest of {columns.batch[0]} rows is"
        raise FormatError(columns.source, found, "Store `collector/traj_ids`")
    return int(stored.first_axis[0]) % num_envs


def _time_axis(columns: MemoryMapped, stored: StoredRows, options: Options) -> int:
    num_axes = len(columns.batch)
    if options.num_envs is not None:
        raise ValueError(f"`num_envs` is for rows of one axis. Those of {columns.source} have {columns.batch}.")
    if options.time_axis is not None:
        if options.time_axis >= num_axes:
            raise ValueError(f"`time_axis` is {options.time_axis}, and {columns.source} has {num_axes} axes of rows.")
        return options.time_axis
    if stored.is_plain:
        return num_axes - 1
    if stored.ndim == num_axes:
        return 0
    found = f"Nothing says which axis of its rows {columns.batch} is time"
    raise FormatError(columns.source, found, "Give `time_axis`, 0 or 1")


def _trajectories(columns: MemoryMapped, options: Options) -> np.ndarray | None:
    column = _named(columns, "traj_key", options.traj_key, TRAJ_KEY)
    if column is None:
        return None
    ids = by_row(columns, column)
    if ids.dtype.kind not in "iu":
        raise FormatError(columns.source, f"`{column.name}` is {ids.dtype}, expected integers", "Give `traj_key=None`")
    return ids


def _mask(columns: MemoryMapped, options: Options) -> np.ndarray | None:
    column = _named(columns, "mask_key", options.mask_key, MASK_KEY)
    if column is not None:
        return flags_of(columns, column)
    other = columns.columns.get(("mask",))
    if options.mask_key is not None and other is not None and _is_mask(columns, other):
        advice = '`mask_key="mask"` if rows where it is False are padding, `mask_key=None` if they are not'
        raise FormatError(columns.source, "`mask` may say which rows are padding", f"Give {advice}")
    return None


def _is_mask(columns: MemoryMapped, column: Column) -> bool:
    return column.dtype == torch.bool and column.shape == columns.batch


def _named(columns: MemoryMapped, option: str, name: str | None, default: str) -> Column | None:
    """The column of a name; None if it is the default and not there."""
    found = None if name is None else columns.columns.get(key_of(name))
    if found is None and name not in (None, default):
        raise ValueError(f"`{option}` is {name!r}, which {columns.source} does not have.")
    return found


def _ends(columns: MemoryMapped) -> np.ndarray:
    """By flat row: whether the episode ends with its step."""
    found = [columns.columns.get(("next", name)) for name in ("done", "terminated", "truncated")]
    done, terminated, truncated = (None if column is None else flags_of(columns, column) for column in found)
    if done is not None:
        return done
    if terminated is None or truncated is None:
        advice = "Episodes need `next/done`, or both `next/terminated` and `next/truncated`"
        raise FormatError(columns.source, "There is no `next/done`", advice)
    return terminated | truncated


def _check_rows(columns: MemoryMapped, order: np.ndarray, ends: np.ndarray) -> None:
    """FormatError for steps that are no single steps, and for flags that contradict each other."""
    steps = columns.columns.get(("steps_to_next_obs",))
    if steps is not None and np.any(by_row(columns, steps)[order] > 1):
        found = "`steps_to_next_obs` is more than 1: a multi-step transform has summed rewards"
        raise FormatError(columns.source, found, "Save single steps, without that transform")
    for name in ("terminated", "truncated"):
        column = columns.columns.get(("next", name))
        if column is not None:
            wrong = order[flags_of(columns, column)[order] & ~ends[order]]
            if len(wrong):
                found = f"Row {wrong[0]} has `next/{name}` and not `next/done`"
                raise FormatError(columns.source, found, "Save rows with `next/done` at each end")


def _without_repeats(
    columns: MemoryMapped, rows: _Ordered, ends: np.ndarray, firsts: np.ndarray | None, options: Options, notes: Notes
) -> _Ordered:
    """Leave out rows that repeat an end.

    With `rollout(break_when_all_done=True)`, an environment that has ended repeats its last row, `next/done` included,
    until all have ended. Equal episodes of one step look the same. `is_init` tells, unless the episode had one step.
    """
    is_end = ends[rows.order]
    found = np.flatnonzero(rows.goes_on() & is_end & np.concatenate([[False], is_end[:-1]]))
    own = {("index",), key_of(options.traj_key or TRAJ_KEY), key_of(options.mask_key or MASK_KEY)}
    for key, column in columns.columns.items():
        if key not in own and len(found):
            found = found[~_differs(columns, [(column, column)], rows.order[found - 1], rows.order[found])]
    if options.repeats is None and len(found):
        unclear = found if firsts is None else found[firsts[rows.order[found]]]
        if len(unclear):
            row = int(rows.order[unclear[0]])
            what = f"Row {row} is equal to the one before it, which ends an episode ({len(unclear):,} rows are so)"
            advice = 'as `rollout(break_when_all_done=True)` writes them, or `repeats="keep"` if they are episodes'
            raise FormatError(columns.source, what, f'Give `repeats="drop"` if they only repeat an end, {advice}')
    if options.repeats == "keep" or not len(found):
        return rows
    notes.add(f"Rows that repeat the end before them are left out: {len(found):,}.")
    chosen = np.ones(len(rows.order), bool)
    chosen[found] = False
    return rows.only(chosen)


def _check_first(columns: MemoryMapped, pairs: Sequence[Pair], order: np.ndarray, inner: np.ndarray) -> None:
    """FormatError if rows that should follow each other do not; only the first of them are compared."""
    for pair in pairs:
        row_bytes = max(2 * pair[0].num_bytes // columns.num_rows, 1)
        some = inner[: max(_FIRST_BYTES // row_bytes, 1)]
        found = some[_differs(columns, [pair], order[some - 1], order[some])]
        if len(found):
            raise _gap(columns, pair, int(order[found[0] - 1]), int(order[found[0]]), len(found), len(some))


def _gap(columns: MemoryMapped, pair: Pair, row: int, following: int, count: int, of: int) -> FormatError:
    here, after = pair
    found = (
        f"`{after.name}` of row {row} is not `{here.name}` of row {following}, which should follow it ({count:,} of "
        f"{of:,} rows differ)"
    )
    advice = "Give `num_envs` if environments take turns" if len(columns.batch) == 1 else "Give `time_axis`"
    return FormatError(
        columns.source,
        found,
        f'{advice}, `gaps="split"` if recordings were cut there without a flag, or `observations` if `{here.name}` is '
        "none. Where environments are mixed in another way, only `collector/traj_ids` tells. Next observations of a "
        "multi-step transform, and frames that are stacked when they are sampled, cannot be read",
    )


def _differs(columns: MemoryMapped, pairs: Sequence[Pair], before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Whether the observation after each of the rows `before` is another one than that at the row in `after`."""
    found = np.zeros(len(before), bool)
    for here, following in pairs:
        left, right = columns.flat_rows(following), columns.flat_rows(here)
        chunk = max(_CHUNK_BYTES // max(left[:1].nbytes, 1), 1)
        for start in range(0, len(before), chunk):
            part = slice(start, start + chunk)
            found[part] |= _unequal(left[before[part]], right[after[part]])
    return found


def _unequal(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """By row; NaN equals NaN."""
    if left.dtype.kind == "V":
        left, right = left.view(np.int16), right.view(np.int16)
    if np.array_equal(left, right):
        return np.zeros(len(left), bool)
    unequal = (left != right) & ~((left != left) & (right != right))
    return unequal.reshape(len(left), -1).any(1)
