"""How a save comes back: into a source that is made as it says, or into one that is given."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from buffers.dataset.episode_info import EpisodeInfo, checked_info
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.verification import VerificationMode
from buffers.disk import Directory, as_damage, parse_fields
from buffers.fields import as_tensor
from buffers.late import LateFieldInfo, PriorityField
from buffers.saving import Save, SavedPiece, runs_of
from buffers.table import EpisodeTable, Int64Array
from buffers.utils import progress_bar

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset
    from buffers.dataset.saved_source import SavedSource

__all__ = ["load_source", "verify_save"]

#: The classes of sources, by their names.
Kinds = Mapping[str, Any]


def load_source(save: Save, source: SavedSource | None, kinds: Kinds, progress: bool) -> tuple[SavedSource, bool]:
    """Load into an empty source that is given, or into one that is made as the save says.

    Returns:
        The source, and whether its episodes are as the save says, so that the next save can build on this one.

    Raises:
        DamagedSaveError: The save is not what was written.
        ValueError: The source is made otherwise, or has other fields, than what was saved.
        RuntimeError: It has episodes already.
    """
    is_given = source is not None
    if source is None:
        with as_damage():
            source = _make(save, save.said["source"], {}, kinds)
    stores, is_same = source.stores, True
    found, saved = _shape(source.describe(stores)), _shape(save.said["source"])
    if found != saved:
        raise ValueError(f"The save is of {saved}, and cannot be loaded into {found}: make it in the same way.")
    for number, store in enumerate(stores):
        _check(save, number, store)
    if is_given or any(store.has_files for store in stores):
        # Before anything changes. What was made for this save is dropped if it turns out to be damaged.
        save.verify()
    check_links(save, kinds, is_full=any(_copies_links(save, number, store) for number, store in enumerate(stores)))
    num_bytes = sum(piece.num_bytes for number in range(len(stores)) for piece in _pieces(save, number))
    with progress_bar(progress, num_bytes, "loading") as bar:
        for number, store in enumerate(stores):
            is_same &= _Loading(save, number, store, kinds, bar.update).load()
    for number, store in enumerate(stores):
        if store.extension is not None:
            store.extension.load_state_dict(save.state(f"extension{number}"))
    source.restore(save.said["source"])
    return source, is_same


def _copies_links(save: Save, number: int, store: EpisodeDataset) -> bool:
    """Whether the linked files are read to be stored in another form."""
    told = save.stores[number]
    return told["is_linked"] and not (store.has_files and store.takes_links(told["suffix"]))


def verify_save(save: Save, kinds: Kinds) -> None:
    """Read all that a save needs, and compare the checksums; DamagedSaveError if anything is not as it was."""
    save.verify()
    check_links(save, kinds, is_full=True)


def check_links(save: Save, kinds: Kinds, is_full: bool) -> None:
    """Check that the linked files of a save are there; `is_full`, and what is in them."""
    for number, told in enumerate(save.stores):
        if told["is_linked"] and told["fields"] is not None:
            rows, folders = kinds["IndividualFileDataset"].linked(save, number)
            if len(rows) != told["num_episodes"]:
                raise save.reader.damaged(f"needs {told['num_episodes']} linked episodes, and {len(rows)} are there")
            if is_full:
                fields = parse_fields(told["fields"])
                for row, folder in zip(rows.tolist(), folders, strict=True):
                    kinds["IndividualFileDataset"].read_link(folder, row, told["suffix"], fields)


def _shape(described: Mapping[str, Any]) -> str:
    """What a source is made of, whatever the kinds of its stores."""
    if "members" in described:
        return f"a mixture of ({', '.join(_shape(member) for member in described['members'])})"
    extension = described["extension"]
    extended = "" if extension is None else f" extended by {_shape(extension['other'])}"
    return f"dataset {described['store']}{extended}"


def _make(save: Save, described: Mapping[str, Any], made: dict[int, Any], kinds: Kinds) -> Any:
    """A source as it was described, with nothing in it."""
    if "members" in described:
        members = [_make(save, member, made, kinds) for member in described["members"]]
        return kinds[described["kind"]](members, described["weights"], fields=described["fields"])
    number = described["store"]
    if number not in made:
        told = save.stores[number]
        if told["kind"] not in kinds:
            raise ValueError(
                f"The save is of a {told['kind']}, which cannot be made from what a save says: pass an empty one."
            )
        fields = None if told["fields"] is None else parse_fields(told["fields"])
        info = EpisodeDatasetInfo(fields, VerificationMode(told["verification"]))
        made[number] = kinds[told["kind"]].made_as(told, info)
        if (extension := described["extension"]) is not None:
            made[number].extend(_make(save, extension["other"], made, kinds), *extension["arguments"])
    return made[number]


def _check(save: Save, number: int, store: EpisodeDataset) -> None:
    """Refuse what cannot be loaded, before anything changes."""
    told = save.stores[number]
    if told["is_reader"]:
        return
    store.check_writable()
    if len(store.table) and not store.has_files:
        raise RuntimeError(f"The {type(store).__name__} holds {len(store.table)} episodes: load into an empty one.")
    if told["fields"] is not None and store.fields is not None:
        fields = parse_fields(told["fields"])
        if (conflict := fields.conflict_with(store.fields)) is not None:
            raise ValueError(
                f"The fields of the save differ from those of the dataset: {conflict}. The save has {fields}, the "
                f"dataset {store.fields}."
            )
    for field in save.state(f"late{number}"):
        kind = next(iter(parse_fields(field["kind"]).values()))
        if field["name"] in store.late and field["in_batches"]:
            store.late.add(
                field["name"], kind, field["default"], store.table
            )  # It is there: a ValueError if it differs.


def _pieces(save: Save, number: int) -> list[SavedPiece]:
    told = save.stores[number]
    return [] if told["is_linked"] or told["fields"] is None else save.pieces(number)


class _Loading:
    """One store."""

    def __init__(
        self, save: Save, number: int, store: EpisodeDataset, kinds: Kinds, update: Callable[[int], object]
    ) -> None:
        self._save, self._number, self._store, self._update = save, number, store, update
        self._told, self._files = save.stores[number], kinds["IndividualFileDataset"]

    def load(self) -> bool:
        """Load it; whether its episodes are as the save says."""
        store, told, none = self._store, self._told, np.zeros((0, 4), np.int64)
        if told["is_reader"]:
            if store.is_reader and runs_of(store.table.ids).tolist() != told["live"]:
                warnings.warn(
                    f"{told['directory']}, which was open for reading, has other episodes than when the save was made: "
                    "batches will not be those that would have come.",
                    stacklevel=2,
                )
            return store.is_reader
        if told["fields"] is not None:
            store.settle_fields(parse_fields(told["fields"]))
        rows = self._load_links() if told["is_linked"] else self._load_pieces()
        next_id, next_start = told["next"]
        store.restored(next_id, next_start, told["counts"])
        if told["fields"] is not None:
            self._load_late(rows)
        if (name := f"evictor{self._number}") in self._save.said:
            store.evictor.load_state_dict(self._save.state(name))
        return told["is_linked"] == store.has_files and np.array_equal(store.table.rows, rows if len(rows) else none)

    # Rows.

    def _load_pieces(self) -> Int64Array:
        """The rows of live episodes `(n, 4)`, as the save has them."""
        store, pieces = self._store, _pieces(self._save, self._number)
        if store.has_files:
            store.take_links({}, np.zeros((0, 4), np.int64), self._save.number)
        live = np.concatenate([piece.episodes[piece.is_live] for piece in pieces] or [np.zeros((0, 4), np.int64)])
        first_id = self._first_to_stay(live)
        infos: dict[int, EpisodeInfo] = {}
        for reader in {id(piece.reader): piece.reader for piece in pieces}.values():
            with as_damage():
                found = json.loads(reader.read(f"{self._number}/infos").tobytes() or b"{}")
                infos |= {int(episode_id): checked_info(info) for episode_id, info in found.items()}
        for piece in pieces:
            is_wanted = piece.is_live & (piece.episodes[:, 2] >= first_id)
            if is_wanted.any() and not self._is_in_place(piece, is_wanted, infos):
                self._store_piece(piece, is_wanted, infos)
            self._update(piece.num_bytes)
        return live

    def _first_to_stay(self, live: Int64Array) -> int:
        """The id of the oldest of the episodes `(n, 4)` that fit: the newest stay."""
        if len(live) != self._told["num_episodes"] or (np.diff(live[:, 2]) <= 0).any():
            raise self._save.reader.damaged("does not find all of its episodes")
        stays = live[::-1, 1].cumsum()[::-1] <= self._store.capacity
        if not stays.all():
            warnings.warn(
                f"{int(stays.sum())} of the {len(live)} episodes that were saved, the newest, fit a `capacity` of "
                f"{self._store.capacity} steps.",
                stacklevel=2,
            )
        return int(live[stays][0, 2]) if stays.any() else int(self._told["next"][0])

    def _is_in_place(self, piece: SavedPiece, is_wanted: np.ndarray, infos: dict[int, EpisodeInfo]) -> bool:
        """Read straight to where the rows lie, if they can lie as they did; False if not."""
        store, episodes = self._store, piece.episodes
        start, num_rows = int(episodes[0, 0]), int(episodes[:, 1].sum())
        if not is_wanted.all() or (memory := store.place_for(start, num_rows)) is None:
            return False
        if any(memory[name].dtype != kind.numpy_dtype for name, kind in piece.kinds.items()):
            return False
        piece.read(memory)
        store.adopt(episodes, {n: infos[n] for n in episodes[:, 2].tolist() if n in infos} if infos else {})
        return True

    def _store_piece(self, piece: SavedPiece, is_wanted: np.ndarray, infos: dict[int, EpisodeInfo]) -> None:
        store, rows, ends = self._store, piece.read(), piece.episodes[:, 1].cumsum()
        fields = store.fields
        assert fields is not None  # They are settled.
        for number in is_wanted.nonzero()[0].tolist():
            start, length, episode_id, cut = piece.episodes[number].tolist()
            part = slice(int(ends[number]) - length, int(ends[number]))
            episode = {n: array[part].astype(fields[n].numpy_dtype, copy=False) for n, array in rows.items()}
            store.table.skip_to(episode_id, start)
            store.store(episode, cut, infos.get(episode_id))

    def _load_links(self) -> Int64Array:
        """As `_load_pieces`, of a dataset of files."""
        save, store, suffix = self._save, self._store, self._told["suffix"]
        rows, folders = self._files.linked(save, self._number)
        stays = rows[:, 2] >= self._first_to_stay(rows)
        by_id: dict[int, Directory] = dict(zip(rows[:, 2].tolist(), folders, strict=True))
        if not _copies_links(save, self._number, store):
            store.take_links(by_id, rows[stays], save.number)
            return rows
        if store.has_files:
            store.take_links({}, rows[:0], save.number)
        for row in rows[stays].tolist():
            episode, info = self._files.read_link(by_id[row[2]], row, suffix, store.fields)
            store.table.skip_to(row[2], row[0])
            store.store(episode, row[3], info)
        return rows

    # Late values.

    def _load_late(self, rows: Int64Array) -> None:
        """Those of the episodes in `rows` `(n, 4)`, as the save has them, that stay."""
        reader, late, ends = self._save.reader, self._store.late, rows[:, 1].cumsum()
        for told in self._save.state(f"late{self._number}"):
            kind = next(iter(parse_fields(told["kind"]).values()))
            info = LateFieldInfo(**{**told, "kind": kind})
            field = late.by_name.get(info.name) or late.restore(info, self._store.table)
            if (field.kind.shape, field.kind.dtype) != (kind.shape, kind.dtype):
                raise ValueError(f"Late field `{info.name}` is {kind} in the save, and {field.kind} in the dataset.")
            name, begin = f"{self._number}/late/{info.name}", 0
            for piece in reader.pieces(name):
                values = reader.read_piece(name, piece)
                steps = _steps(self._store.table, rows, ends, begin, len(values))
                begin += len(values)
                lives = steps >= 0
                field.write(steps[lives], field.checked(as_tensor(values[lives], kind), steps[lives])[:, None])
            field.note_all()
            if isinstance(field, PriorityField):
                field.restore_largest(info.largest)


def _steps(table: EpisodeTable, rows: Int64Array, ends: Int64Array, begin: int, num: int) -> Int64Array:
    """Where rows `begin` to `begin + num` of the episodes `rows` `(n, 4)`, end to end, lie by now; -1 if nowhere."""
    at = np.arange(begin, begin + num)
    episode = ends.searchsorted(at, "right")
    number, lives = table.numbers_of_ids(rows[episode, 2])
    steps = table.state.rows[number, 0] + at - (ends[episode] - rows[episode, 1])
    return np.where(lives, steps, -1)
