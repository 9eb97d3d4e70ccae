"""Save: a save that is on the disk, and the files that it needs."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from buffers.disk import DamagedEpisodeError, Descriptor, Directory, as_damage, open_directory
from buffers.fields import TensorType, as_tensor
from buffers.objects import check_local
from buffers.saving.packed_file import DamagedSaveError, PackedReader
from buffers.saving.places import Places, ids_in, numbers_of
from buffers.saving.regions import REGION_UNIT, Regions
from buffers.saving.tree import unpack_tree
from buffers.table import Int64Array

__all__ = [
    "SaidOfSave",
    "Save",
    "SavedPiece",
    "file_name",
    "folder_name",
    "folders_of_links",
    "is_save_directory",
    "list_saves",
    "open_save",
    "save_numbers",
]

_NAME = re.compile(r"save-([0-9]{10})\.safetensors")
_FOLDER = re.compile(r"save-([0-9]{10})-[0-9]+\.episodes")


def file_name(number: int) -> str:
    """Of a save."""
    return f"save-{number:010d}.safetensors"


def folder_name(number: int, store: int) -> str:
    """Of the links to the episodes of a dataset of files that a save has brought."""
    return f"save-{number:010d}-{store}.episodes"


def save_numbers(names: list[str]) -> list[int]:
    """Of the saves among files, ascending."""
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def folders_of_links(names: list[str]) -> dict[str, int]:
    """The folders of links among files, and the save that has made each."""
    return {name: int(match[1]) for name in names if (match := _FOLDER.fullmatch(name))}


def is_save_directory(path: str) -> bool:
    """Whether a directory holds saves."""
    with contextlib.suppress(OSError):
        return bool(save_numbers(os.listdir(path)))
    return False


class SavedPiece(NamedTuple):
    """Episodes of one store that lie together in a file."""

    reader: PackedReader
    prefix: str  # Of the names of the arrays.
    pieces: dict[str, Int64Array]  # By field, the piece of its array.
    episodes: Int64Array  # (n, 4), as in a table.
    is_live: npt.NDArray[np.bool_]  # (n,)
    regions: tuple[str, Int64Array, Int64Array] | None = None  # Array, piece, and bytes of each episode, `(n,)`.

    def read(self, into: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The rows of all its episodes, `field -> (rows, *shape)`."""
        return {
            field: self.reader.read_piece(f"{self.prefix}/{field}", piece, None if into is None else into[field])
            for field, piece in self.pieces.items()
        }

    def read_regions(self, codecs: Any) -> Regions | None:
        """The compressed fields of all its episodes, by codecs that describe themselves so; None if there are none."""
        if self.regions is None:
            return None
        name, piece, num_bytes = self.regions
        return Regions(self.reader.read_piece(name, piece), num_bytes, codecs)

    @property
    def num_bytes(self) -> int:
        """Of its rows."""
        beside = 0 if self.regions is None else int(self.regions[2].sum())
        return int(self.episodes[:, 1].sum()) * sum(kind.nbytes for kind in self.kinds.values()) + beside

    @property
    def kinds(self) -> dict[str, TensorType]:
        """The types of the rows."""
        return {field: self.reader.kinds[f"{self.prefix}/{field}"] for field in self.pieces}


class SaidOfSave:
    """What the file of a save says of itself."""

    def __init__(self, number: int, said: dict[str, Any]) -> None:
        self.number, self.said = number, said

    @property
    def stamp(self) -> str:
        """What tells its file from all others."""
        return str(self.said["stamp"])

    @property
    def stores(self) -> list[dict[str, Any]]:
        """What is said of each store."""
        return self.said["stores"]

    @property
    def places(self) -> list[Places]:
        """Of the episodes of each store."""
        return [[(first, end, number) for first, end, number in store["places"]] for store in self.stores]

    @property
    def stamps(self) -> dict[int, str]:
        """Of the files that it needs, with its own: what they say of themselves."""
        return {**{int(n): str(stamp) for n, stamp in self.said["files"].items()}, self.number: self.stamp}

    @property
    def folders(self) -> dict[str, int]:
        """The folders of links that it needs, and the store of each."""
        return {
            folder_name(number, store): store
            for store, places in enumerate(self.places)
            for _, _, number in places
            if self.stores[store]["is_linked"]
        }

    def live(self, store: int) -> Int64Array:
        """The ids that live, as runs `(n, 2)`."""
        return np.array(self.stores[store]["live"], np.int64).reshape(-1, 2)

    def is_live(self, store: int, ids: Int64Array, numbers: int | Int64Array) -> npt.NDArray[np.bool_]:
        """Which of the episodes `(n,)` that the saves of these numbers have brought live."""
        return ids_in(self.live(store), ids) & (numbers_of(self.places[store], ids) == numbers)


class Save(SaidOfSave):
    """One save; DamagedSaveError if its file, or one that it needs, is not as it was written.

    Attributes:
        number: Of the save.
        newest: Of the newest in its directory.
        said: What its file says.
    """

    def __init__(self, directory: Directory, number: int, newest: int) -> None:
        self.directory, self.number, self.newest = directory, number, newest
        self._readers: dict[int, PackedReader] = {}
        reader = self._open(number)
        self.said, self.reader = reader.said, reader
        with as_damage():
            self.run = str(self.said["run"])
            self.stamps  # noqa: B018  (it has one)

    def _open(self, number: int) -> PackedReader:
        reader = self._readers.get(number)
        if reader is None:
            path = f"{self.directory.path}/{file_name(number)}"
            try:
                file = self.directory.open(file_name(number))
            except FileNotFoundError:
                raise DamagedSaveError(f"{path}, which save {self.number} needs, is not there.") from None
            except DamagedEpisodeError as error:
                raise DamagedSaveError(f"{path} {error}.") from error
            reader = PackedReader(file, path)
            expected = self.stamps.get(number) if self._readers else None
            if reader.said.get("number") != number or expected not in (None, reader.said.get("stamp")):
                raise reader.damaged(f"is not the file that save {self.number} was made with, but one of another save")
            self._readers[number] = reader
        return reader

    def state(self, name: str) -> Any:
        """What `Snapshot.state` was given."""
        return unpack_tree(self.said[name], self._tensor)

    def _tensor(self, name: str) -> torch.Tensor:
        return as_tensor(self.reader.read(name).reshape(self.reader.kinds[name].shape), self.reader.kinds[name])

    def pieces(self, store: int) -> list[SavedPiece]:
        """The pieces that hold the episodes of a store, in the order of their ids."""
        found: list[SavedPiece] = []
        for number in sorted({number for _, _, number in self.places[store]}):
            found += self._pieces_of(self._open(number), store, number)
        return sorted(found, key=lambda piece: int(piece.episodes[0, 2]))

    def _pieces_of(self, reader: PackedReader, store: int, number: int) -> Iterator[SavedPiece]:
        prefix = f"{store}/rows"
        episodes = reader.read(f"{store}/episodes")
        ends = episodes[:, 1].cumsum()
        fields = [name.removeprefix(f"{prefix}/") for name in reader.num_rows if name.startswith(f"{prefix}/")]
        pieces = {field: reader.pieces(f"{prefix}/{field}") for field in fields}
        sizes, beside = self._regions_of(reader, store, len(episodes))
        bounds = next(iter(pieces.values()), np.zeros((0, 3), np.int64))[:, :2]
        if not pieces and sizes is not None:
            # All fields are compressed: the rows of a piece are those of its episodes.
            at = np.append(0, sizes.cumsum()).searchsorted(np.append(0, (beside[:, 0] + beside[:, 1])))
            rows = np.append(0, ends)[at]
            bounds = np.stack([rows[:-1], np.diff(rows)], 1)
        if sizes is not None and len(beside) != len(bounds):
            raise reader.damaged("has compressed fields whose pieces are not those of its rows")
        if any((other[:, :2] != bounds).any() if len(other) == len(bounds) else True for other in pieces.values()):
            raise reader.damaged("has fields whose rows do not belong together")
        is_live = self.is_live(store, episodes[:, 2], number)
        for n, (row, num_rows) in enumerate(bounds.tolist()):
            first, end = ends.searchsorted([row, row + num_rows - 1], "right").tolist()
            if is_live[first : end + 1].any():
                own, within = {field: pieces[field][n] for field in fields}, slice(first, end + 1)
                regions = None if sizes is None else (f"{store}/regions", beside[n], sizes[within])
                if regions is not None and int(regions[2].sum()) != int(beside[n, 1]):
                    raise reader.damaged("has compressed fields of other sizes than it says")
                yield SavedPiece(reader, prefix, own, episodes[within], is_live[within], regions)

    def _regions_of(
        self, reader: PackedReader, store: int, num_episodes: int
    ) -> tuple[Int64Array | None, npt.NDArray[np.int64]]:
        """The bytes of the compressed fields of each episode in a file, None without any, and their pieces."""
        name = f"{store}/region_bytes"
        if name not in reader.num_rows:
            return None, np.zeros((0, 3), np.int64)
        sizes, most = reader.read(name), reader.num_rows[f"{store}/regions"]
        if len(sizes) != num_episodes or ((sizes <= 0) | (sizes > most) | (sizes % REGION_UNIT != 0)).any():
            raise reader.damaged("has compressed fields of sizes that cannot be")
        return sizes, reader.pieces(f"{store}/regions")

    def check(self) -> None:
        """Check the headers of all that it needs; of linked files, whether the folders are there."""
        names = self.directory.names()
        for number in self.stamps:
            self._open(number)
        for folder in self.folders:
            if folder not in names:
                raise DamagedSaveError(f"{self.directory.path}/{folder}, which save {self.number} needs, is not there.")

    def verify(self) -> None:
        """`check`, read all of the files, and compare the checksums."""
        self.check()
        for number in self.stamps:
            self._open(number).verify()


def list_saves(path: str) -> list[tuple[int, str, Callable[[], Save]]]:
    """Number, file, and what opens it, of each save in a directory, oldest first."""
    directory = Directory(os.path.abspath(path), Descriptor(open_directory(path, False)), durable=True)
    numbers = save_numbers(directory.names())
    return [
        (number, os.path.join(path, file_name(number)), partial(Save, directory, number, numbers[-1]))
        for number in numbers
    ]


def open_save(path: str, verify: Callable[[Save], object] | None = None) -> Save:
    """The newest save of a directory; with `verify`, the newest for which that raises no DamagedSaveError.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The path is a URL.
        DamagedSaveError: It, or with `verify` each, is damaged.
    """
    check_local(path, "Bring the saves here with `python -m buffers download URL DIRECTORY`")
    if not is_save_directory(path):
        raise FileNotFoundError(f"{os.path.abspath(path)} is no directory of saves: there is no save in it.")
    saves = list_saves(path)
    for number, _, opened in reversed(saves):
        try:
            save = opened()
            if verify is not None:
                verify(save)
            return save
        except DamagedSaveError as error:
            if verify is None or number == saves[0][0]:
                raise
            warnings.warn(f"Save {number} is passed over: {error}", stacklevel=4)
    raise AssertionError
