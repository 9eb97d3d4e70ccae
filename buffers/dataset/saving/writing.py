"""What a save keeps of a source: the rows of its stores, and the small state of all of it.

A store is a dataset that holds episodes. A mixture has those of its members; an extended dataset has its own, and those
behind it. Each is saved once, and known by its number.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.disk import described_fields
from buffers.fields import Fields, Scalar, TensorType, Vector
from buffers.late import LateField, LateFieldInfo
from buffers.saving import (
    BYTE,
    NOWHERE,
    REGIONS,
    Pieces,
    Places,
    Snapshot,
    cut_into_pieces,
    numbers_of,
    places_of,
    runs_of,
)
from buffers.table import EpisodeTable, Int64Array
from buffers.utils import ThreadLock

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset
    from buffers.dataset.saved_source import SavedSource

__all__ = ["SavedBeside", "Unsaved", "begin_source"]

_MOST_EPISODES = 64
_EPISODE = Vector((4,), torch.int64)


class Unsaved(NamedTuple):
    """What a save has still to write of a store: to be told before rows leave or late values change."""

    rows: Pieces
    late: Pieces

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # Only the process that saves writes.

    def leaving(self, start: int, length: int) -> None:
        """Write now what there is to write of the rows from step id `start` on."""
        self.rows.keep(start, start + length)
        self.late.keep(start, start + length)


class _Store(NamedTuple):
    """A store at the moment of the call."""

    number: int
    dataset: EpisodeDataset
    table: EpisodeTable
    saved_in: Int64Array  # (E,), the number of the save that has each episode.


class SavedBeside(NamedTuple):
    """What belongs to the same moment as a source."""

    lock: ThreadLock  # Held while the source and this put themselves into a snapshot; taken before the source's locks.
    begin: Callable[[Snapshot], object]  # Puts it into a snapshot.


def begin_source(source: SavedSource, snapshot: Snapshot, others: Sequence[SavedBeside]) -> None:
    """Put a source, and others, into a snapshot."""
    with contextlib.ExitStack() as stack:
        for other in others:
            stack.enter_context(other.lock)
        datasets = source.stores
        # In the same order wherever a save takes several.
        for dataset in sorted(datasets, key=id):
            stack.enter_context(dataset.lock)
            if dataset.unsaved is not None and dataset.unsaved.rows.is_ours:
                raise RuntimeError("Another save of the same dataset has begun in another thread.")
        stores = [_shown(number, dataset, snapshot) for number, dataset in enumerate(datasets)]
        packed = snapshot.files_to_pack(_live_bytes(stores))
        snapshot.said["stores"] = [_begin_store(store, snapshot, packed) for store in stores]
        snapshot.said["source"] = source.describe(datasets)
        for other in others:
            other.begin(snapshot)


def _shown(number: int, dataset: EpisodeDataset, snapshot: Snapshot) -> _Store:
    table = EpisodeTable()
    table.show(dataset.table)
    return _Store(number, dataset, table, numbers_of(snapshot.places(number), table.ids))


def _live_bytes(stores: list[_Store]) -> dict[int, int]:
    """Of rows that live, by the save whose file has them."""
    found: dict[int, int] = {}
    for store in stores:
        fields = store.dataset.fields
        if fields is None or store.dataset.has_files:
            continue
        for number in np.unique(store.saved_in[store.saved_in != NOWHERE]).tolist():
            rows = store.table.rows[store.saved_in == number]
            found[number] = found.get(number, 0) + _bytes_of(store.dataset, fields, rows)
    return found


def _bytes_of(dataset: EpisodeDataset, fields: Fields, rows: Int64Array) -> int:
    regions = dataset.region_bytes(rows[:, 0])
    if regions is None:
        return int(rows[:, 1].sum()) * fields.nbytes
    row_bytes = sum(kind.nbytes for name, kind in fields.items() if name not in dataset.codecs)
    return int(rows[:, 1].sum()) * row_bytes + int(regions.sum())


def _begin_store(store: _Store, snapshot: Snapshot, packed: set[int]) -> dict[str, Any]:
    number, dataset, table, _ = store
    places, kept = ([], _nothing(snapshot)) if dataset.is_reader else _begin_episodes(store, snapshot, packed)
    if dataset.is_reader:
        # Rows are another's. By these, late values find theirs, and a source that has changed is noticed.
        snapshot.array(f"{number}/episodes", _EPISODE, table.rows.copy())
    fields = dict(dataset.late.by_name)
    late = _begin_late(store, snapshot, fields)
    snapshot.at_end.append(dataset.end_save)
    dataset.begin_save(Unsaved(kept, late))
    # From here on, nobody changes a value before it is written.
    snapshot.state(f"late{number}", [_described(dataset.late.info_of(name)) for name in fields])
    if state := dataset.evictor.state_dict():
        snapshot.state(f"evictor{number}", state)
    if dataset.extension is not None:
        snapshot.state(f"extension{number}", dataset.extension.state_dict())
    is_linked = dataset.has_files and not dataset.is_reader
    more = {"places": places, "is_linked": is_linked, "is_reader": dataset.is_reader}
    return {**dataset.describe_store(), **_counts(store), **more}


def _nothing(snapshot: Snapshot) -> Pieces:
    return snapshot.pieces(np.zeros((0, 2), np.int64), lambda number: None)


def _begin_episodes(store: _Store, snapshot: Snapshot, packed: set[int]) -> tuple[Places, Pieces]:
    """Where all episodes will have been saved, and those that are to be written."""
    number, dataset, table, saved_in = store
    is_new = saved_in == NOWHERE
    if not dataset.has_files:
        is_new |= np.isin(saved_in, [*packed])
    rows = table.rows[is_new]
    places = places_of(table.ids, np.where(is_new, snapshot.number, saved_in))
    if dataset.has_files:
        return places, dataset.begin_links(snapshot, number, rows)
    kept = _begin_rows(store, snapshot, rows)
    snapshot.needs |= {n for _, _, n in places if n != snapshot.number}
    infos = dataset.known_infos(rows[:, 2])
    text = json.dumps(infos, separators=(",", ":")).encode() if infos else b""
    snapshot.array(f"{number}/infos", BYTE, np.frombuffer(text, np.uint8))
    snapshot.array(f"{number}/episodes", _EPISODE, rows)
    return places, kept


def _counts(store: _Store) -> dict[str, Any]:
    _, dataset, table, _ = store
    return {
        "fields": None if dataset.fields is None else described_fields(dataset.fields),
        "next": [table.next_id, table.next_start],
        "counts": [dataset.num_lost, dataset.num_dismissed],
        "num_steps": table.num_steps,
        "num_episodes": len(table),
        "live": runs_of(table.ids).tolist(),
    }


def _begin_rows(store: _Store, snapshot: Snapshot, rows: Int64Array) -> Pieces:
    dataset: EpisodeDataset = store.dataset
    fields: Mapping[str, TensorType] = dataset.fields or {}
    kinds = {name: dataset.stored_type(kind) if dataset.is_mapped else kind for name, kind in fields.items()}
    regions = dataset.region_bytes(rows[:, 0])
    if regions is not None:
        kinds = {name: kind for name, kind in kinds.items() if name not in dataset.codecs}
        snapshot.array(f"{store.number}/region_bytes", Scalar((), torch.int64), regions)
    row_bytes, lap = sum(kind.nbytes for kind in kinds.values()), dataset.capacity if dataset.is_mapped else None
    if regions is not None:
        row_bytes += int(regions.sum()) // max(1, int(rows[:, 1].sum()))
    # Where episodes are read one by one, who evicts shall not have to wait for many.
    most = None if dataset.is_mapped else _MOST_EPISODES
    at, bounds = cut_into_pieces(rows, row_bytes, lap, most)
    # Without gaps in the step ids, these are as many as rows.
    num_rows = bounds[:, 1] - bounds[:, 0]

    def read(number: int) -> dict[str, np.ndarray]:
        memory = dataset.memory_of(int(bounds[number, 0]), int(num_rows[number]))
        own = slice(at[number], at[number + 1])
        if memory is None:
            return _read_episodes(dataset, rows[own, 2])
        if regions is not None:
            memory[REGIONS] = dataset.regions_of(rows[own, 0], regions[own])
        return memory

    # Where reading takes the lock of the dataset, which those who evict hold, it must be the first of the two.
    lock = None if dataset.reads_beside_writers else dataset.lock
    beside = None
    if regions is not None:
        sums = [int(regions[begin:end].sum()) for begin, end in pairwise(at.tolist())]
        beside = f"{store.number}/regions", np.array(sums, np.int64)
    return snapshot.rows(f"{store.number}/rows", kinds, bounds, num_rows, read, lock, beside)


def _read_episodes(dataset: EpisodeDataset, ids: Int64Array) -> dict[str, np.ndarray]:
    episodes = []
    for episode_id in ids.tolist():
        episode = dataset.arrays_of_id(episode_id)
        if episode is None:
            raise RuntimeError(f"Episode {episode_id} was gone before it could be saved. Save again.")
        episodes.append(episode)
    names = dataset.fields or ()
    return {name: np.concatenate([episode[name] for episode in episodes]) for name in names}


def _described(info: LateFieldInfo) -> dict[str, Any]:
    return {**info._asdict(), "kind": described_fields(Fields({info.name: info.kind}))}


def _begin_late(store: _Store, snapshot: Snapshot, fields: Mapping[str, LateField]) -> Pieces:
    """All values of late fields."""
    kinds = {name: field.kind for name, field in fields.items()}
    _, bounds = cut_into_pieces(store.table.rows, sum(kind.nbytes for kind in kinds.values()))

    def read(number: int) -> dict[str, np.ndarray]:
        steps = np.arange(*bounds[number].tolist())
        return {name: as_array(name, field.rows(steps)) for name, field in fields.items()}

    return snapshot.rows(f"{store.number}/late", kinds, bounds, bounds[:, 1] - bounds[:, 0], read)
