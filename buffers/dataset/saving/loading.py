"""How a save comes back: into a source that is made as it says, or into one that is given."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from buffers.compression import DamagedBlockError, codecs_as, described, rows_in
from buffers.dataset.episode_info import EpisodeInfo, checked_info
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.verification import VerificationMode
from buffers.disk import DamagedEpisodeError, Directory, as_damage, parse_fields
from buffers.fields import as_tensor
from buffers.late import LateFieldInfo, PriorityField
from buffers.saving import Save, SavedPiece
from buffers.table import EpisodeTable, Int64Array, TableRow
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
        made = _opened_again(save, kinds)
        with as_damage():
            source = _make(save, save.said["source"], made, kinds)
    stores, is_same = source.stores, True
    found, saved = _shape(source.describe(stores)), _shape(save.said["source"])
    if found != saved:
        raise ValueError(f"The save is of {saved}, and cannot be loaded into {found}: make it in the same way.")
    for number, store in enumerate(stores):
        _check(save, number, store)
    if is_given or any(store.has_files for store in stores):
        # Before anything changes. What was made for this save is dropped if it turns out to be damaged.
        save.verify()
    parts = [_Loading(save, number, store, kinds) for number, store in enumerate(stores)]
    for part in parts:
        part.check_copied()
    with progress_bar(progress, sum(part.num_bytes for part in parts), "loading") as bar:
        for part in parts:
            is_same &= part.load(bar.update)
    for number, store in enumerate(stores):
        if store.extension is not None:
            store.extension.load_state_dict(save.state(f"extension{number}"))
    source.restore(save.said["source"])
    return source, is_same


def verify_save(save: Save, kinds: Kinds) -> None:
    """Read all that a save needs, and compare the checksums; DamagedSaveError if anything is not as it was."""
    save.verify()
    for number, told in enumerate(save.stores):
        if told["is_linked"] and told["fields"] is not None:
            _verify_links(kinds["IndividualFileDataset"], told, *kinds["IndividualFileDataset"].linked(save, number))


def _verify_links(files: Any, told: Mapping[str, Any], rows: Int64Array, folders: list[Directory]) -> None:
    fields = parse_fields(told["fields"])
    for row, folder in zip(rows.tolist(), folders, strict=True):
        files.read_link(folder, row, told["suffix"], fields)


def _shape(described: Mapping[str, Any]) -> str:
    """What a source is made of, whatever the kinds of its stores."""
    if "members" in described:
        return f"a mixture of ({', '.join(_shape(member) for member in described['members'])})"
    extension = described["extension"]
    extended = "" if extension is None else f" extended by {_shape(extension['other'])}"
    return f"dataset {described['store']}{extended}"


def _opened_again(save: Save, kinds: Kinds) -> dict[int, Any]:
    """The stores that only read, by their numbers; ValueError for what only the caller can make or open."""
    found: dict[int, Any] = {}
    for number, told in enumerate(save.stores):
        with as_damage():
            kind, is_reader, module = str(told["kind"]), bool(told["is_reader"]), str(told.get("module"))
            where = str(told.get("directory"))
        # Classes are known once their modules are imported. A save can have none imported but of other formats.
        if kind not in kinds and re.fullmatch(r"buffers\.interop(\.[a-z0-9_]+)+", module):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        if kind not in kinds:
            what = f"open {where} again, as before" if is_reader else "make an empty one"
            raise ValueError(
                f"The save is of a {kind}, which cannot be made from what a save says: {what}, and pass it as "
                "`dataset=`; if it is in a mixture, pass a mixture that is made as before."
            )
        if is_reader:
            try:
                found[number] = kinds[kind].made_as(told, EpisodeDatasetInfo())
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{where}, from which the saved source reads, cannot be opened again as before: {error} If it is "
                    "elsewhere now, open it there, and pass that as `dataset=`."
                ) from error
            except (LookupError, TypeError, AttributeError) as error:
                raise save.reader.damaged(f"says of {where} what cannot be opened ({error})") from error
    return found


def _make(save: Save, described: Mapping[str, Any], made: dict[int, Any], kinds: Kinds) -> Any:
    """A source as it was described, with nothing in it."""
    if "members" in described:
        members = [_make(save, member, made, kinds) for member in described["members"]]
        return kinds[described["kind"]](members, described["weights"], fields=described["fields"])
    number = described["store"]
    if number not in made:
        told = save.stores[number]
        fields = None if told["fields"] is None else parse_fields(told["fields"])
        info = EpisodeDatasetInfo(fields, VerificationMode(told["verification"]))
        made[number] = kinds[told["kind"]].made_as(told, info)
        if (extension := described["extension"]) is not None:
            made[number].extend(_make(save, extension["other"], made, kinds), *extension["arguments"])
    return made[number]


def _check(save: Save, number: int, store: EpisodeDataset) -> None:
    """Refuse what cannot be loaded, before anything changes."""
    told = save.stores[number]
    if not told["is_reader"]:
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
    for info in map(_late_info, save.state(f"late{number}")):
        if info.name in (store.late_fields or ()):
            store.late.check_same(info.name, info.kind, info.default)


def _late_info(told: Mapping[str, Any]) -> LateFieldInfo:
    return LateFieldInfo(**{**told, "kind": next(iter(parse_fields(told["kind"]).values()))})


class _Loading:
    """One store; DamagedSaveError if some of its episodes are missing."""

    def __init__(self, save: Save, number: int, store: EpisodeDataset, kinds: Kinds) -> None:
        self._save, self._number, self._store = save, number, store
        self._told, self._files = save.stores[number], kinds["IndividualFileDataset"]
        self._codecs: Mapping[str, Any] = self._told.get("compress", {})
        self._is_empty = self._told["fields"] is None
        self._takes_links = self._told["is_linked"] and store.takes_links(self._told["suffix"])
        # The live episodes `(n, 4)`, as the save has them, and where they are.
        self._rows: Int64Array = np.zeros((0, 4), np.int64)
        self._pieces: list[SavedPiece] = []
        self._folders: list[Directory] = []
        if self._told["is_reader"]:
            self._rows = save.reader.read(f"{number}/episodes")
        if self._told["is_reader"] or self._is_empty:
            return
        if self._told["is_linked"]:
            self._rows, self._folders = self._files.linked(save, number)
            return
        self._pieces = save.pieces(number)
        self._rows = np.concatenate([self._rows, *(piece.episodes[piece.is_live] for piece in self._pieces)])
        if len(self._rows) != self._told["num_episodes"] or (np.diff(self._rows[:, 2]) <= 0).any():
            raise save.reader.damaged("does not find all of its episodes")

    @property
    def num_bytes(self) -> int:
        """To be read of rows, for a bar."""
        return sum(piece.num_bytes for piece in self._pieces)

    def check_copied(self) -> None:
        """Check what is in linked files that are to be read, and stored in another form."""
        if self._folders and not self._takes_links:
            _verify_links(self._files, self._told, self._rows, self._folders)

    def load(self, update: Callable[[int], object]) -> bool:
        """Load it; whether its episodes are as the save says."""
        store, told = self._store, self._told
        if told["is_reader"]:
            return self._load_reader()
        if told["fields"] is not None:
            store.settle_fields(parse_fields(told["fields"]))
        stays = self._stays()
        if self._takes_links:
            by_id = dict(zip(self._rows[:, 2].tolist(), self._folders, strict=True))
            store.take_links(by_id, self._rows[stays], self._save.number)
        else:
            if store.has_files:
                store.take_links({}, self._rows[:0], self._save.number)
            self._load_pieces(stays, update)
            self._copy_links(stays)
            if store.capacity_bytes is not None and len(store.table) < stays.sum():
                warnings.warn(
                    f"{len(store.table)} of the {int(stays.sum())} episodes that were saved, the newest, fit "
                    f"`capacity_bytes`={store.capacity_bytes:,}.",
                    stacklevel=2,
                )
        next_id, next_start = told["next"]
        store.restored(next_id, next_start, told["counts"])
        if not self._is_empty:
            self._load_late()
        if (name := f"evictor{self._number}") in self._save.said:
            store.evictor.load_state_dict(self._save.state(name))
        is_same = store.has_files or described(store.codecs) == self._codecs
        return is_same and told["is_linked"] == store.has_files and np.array_equal(store.table.rows, self._rows)

    def _load_reader(self) -> bool:
        """Late values alone: rows are where they were, if the source has the same episodes."""
        store, rows = self._store, self._rows
        if not np.array_equal(store.table.rows[:, 1:3], rows[:, 1:3]):
            num_same = int(_are_same(store.table, rows).sum())
            has_late = bool(self._save.state(f"late{self._number}")) and num_same < len(rows)
            lost = " Late fields of those that are gone, or have another length, are dropped." if has_late else ""
            warnings.warn(
                f"{self._told.get('directory')}, which was open for reading, has other episodes than when the save was "
                f"made: of {len(rows)}, {num_same} are there with the same id and length, and "
                f"{len(store.table) - num_same} others. Batches will not be those that would have come.{lost}",
                stacklevel=2,
            )
        if not self._is_empty:
            self._load_late()
        return store.is_reader

    # Rows.

    def _stays(self) -> np.ndarray:
        """Which of the episodes fit, bool `(n,)`: the newest stay."""
        stays = self._rows[::-1, 1].cumsum()[::-1] <= self._store.capacity
        if not stays.all():
            warnings.warn(
                f"{int(stays.sum())} of the {len(stays)} episodes that were saved, the newest, fit a `capacity` of "
                f"{self._store.capacity} steps.",
                stacklevel=2,
            )
        return stays

    def _load_pieces(self, stays: np.ndarray, update: Callable[[int], object]) -> None:
        first_id = self._rows[stays, 2].min(initial=self._told["next"][0])
        infos: dict[int, EpisodeInfo] = {}
        for reader in {id(piece.reader): piece.reader for piece in self._pieces}.values():
            with as_damage():
                found = json.loads(reader.read(f"{self._number}/infos").tobytes() or b"{}")
                infos |= {int(episode_id): checked_info(info) for episode_id, info in found.items()}
        for piece in self._pieces:
            is_wanted = piece.is_live & (piece.episodes[:, 2] >= first_id)
            if is_wanted.any() and not self._is_in_place(piece, is_wanted, infos):
                self._store_piece(piece, is_wanted, infos)
            update(piece.num_bytes)

    def _copy_links(self, stays: np.ndarray) -> None:
        for at in stays.nonzero()[0].tolist() if self._folders else ():
            row = self._rows[at].tolist()
            episode, info = self._files.read_link(self._folders[at], row, self._told["suffix"], self._store.fields)
            self._keep(episode, row, info)

    def _is_in_place(self, piece: SavedPiece, is_wanted: np.ndarray, infos: dict[int, EpisodeInfo]) -> bool:
        """Read straight to where the rows lie, if they can lie as they did; False if not."""
        store, episodes = self._store, piece.episodes
        start, num_rows = int(episodes[0, 0]), int(episodes[:, 1].sum())
        if not is_wanted.all():
            return False
        regions = piece.read_regions(self._codecs)
        if (memory := store.place_for(start, num_rows, regions)) is None:
            return False
        if any(memory[name].dtype != kind.numpy_dtype for name, kind in piece.kinds.items()):
            return False
        piece.read(memory)
        store.adopt(episodes, {n: infos[n] for n in episodes[:, 2].tolist() if n in infos} if infos else {}, regions)
        return True

    def _store_piece(self, piece: SavedPiece, is_wanted: np.ndarray, infos: dict[int, EpisodeInfo]) -> None:
        store, rows, ends = self._store, piece.read(), piece.episodes[:, 1].cumsum()
        fields, regions = store.fields, piece.read_regions(self._codecs)
        regions_of = [] if regions is None else regions.parts()
        assert fields is not None  # They are settled.
        for number in is_wanted.nonzero()[0].tolist():
            start, length, episode_id, cut = piece.episodes[number].tolist()
            part = slice(int(ends[number]) - length, int(ends[number]))
            episode = {n: array[part].astype(fields[n].numpy_dtype, copy=False) for n, array in rows.items()}
            if regions_of:
                episode = self._decompressed(episode, regions_of[number], length)
            self._keep(episode, (start, length, episode_id, cut), infos.get(episode_id))

    def _keep(self, episode: dict[str, np.ndarray], row: TableRow, info: EpisodeInfo | None) -> None:
        start, _, episode_id, cut = row
        with self._store.prepared(episode) as fits:
            if fits:
                self._store.table.skip_to(episode_id, start)
                self._store.store(episode, cut, info)

    def _decompressed(self, episode: dict[str, np.ndarray], region: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """All fields of an episode, in the order of the dataset's."""
        fields = self._store.fields
        assert fields is not None  # They are settled.
        try:
            with as_damage():
                episode = {**episode, **rows_in(region, codecs_as(self._codecs, fields), length)}
        except (DamagedBlockError, DamagedEpisodeError) as error:
            raise self._save.reader.damaged(str(error)) from error
        return {name: episode[name] for name in fields}

    # Late values.

    def _load_late(self) -> None:
        """Those of the episodes that stay."""
        reader, late, rows = self._save.reader, self._store.late, self._rows
        ends = rows[:, 1].cumsum()
        for info in map(_late_info, self._save.state(f"late{self._number}")):
            field, kind = late.by_name.get(info.name) or late.restore(info, self._store.table), info.kind
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
    number, _ = table.numbers_of_ids(rows[episode, 2])
    steps = table.state.rows[number, 0] + at - (ends[episode] - rows[episode, 1])
    return np.where(_are_same(table, rows)[episode], steps, -1)


def _are_same(table: EpisodeTable, rows: Int64Array) -> np.ndarray:
    """Which of the episodes `(n, 4)` a table has, with as many rows; bool `(n,)`."""
    number, lives = table.numbers_of_ids(rows[:, 2])
    return lives & (table.state.rows[number, 1] == rows[:, 1])
