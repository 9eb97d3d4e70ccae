"""How a dataset of files is saved, and how it comes back: by links to its files, which never change."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from buffers.compression import choice_as, described_choice
from buffers.conversion import as_array
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.files.directory import EpisodeDirectory, EpisodeFiles, FileName
from buffers.dataset.files.object_reader import window_reader
from buffers.dataset.files.opening import FORMATS
from buffers.dataset.files.sending import Contents, Transfer, episodes_in, send
from buffers.dataset.files.serialization import EpisodeSerializationStrategy
from buffers.dataset.files.window_reader import WindowReader
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.disk import DamagedEpisodeError, Directory
from buffers.fields import Fields
from buffers.objects import ObjectStore
from buffers.saving import DamagedSaveError, Pieces, Save, Snapshot, folder_name
from buffers.sharing import PublishedTable, SharedArrays
from buffers.table import EpisodeTable, Int64Array

__all__ = ["LinkedDataset"]


class LinkedDataset(EpisodeDataset):
    """What saves need of a dataset of files."""

    has_files = True
    serialization_strategy: EpisodeSerializationStrategy
    durability: str
    mode: str
    _directory: EpisodeFiles
    _reader: WindowReader
    _log: PublishedTable | None
    _is_bound: bool
    # Whether new episodes are compressed as the newest one is.
    _goes_on_compressing: bool

    @abstractmethod
    def sync(self) -> None:
        """As `IndividualFileDataset.sync`."""

    @property
    def _own(self) -> EpisodeDirectory:
        """The directory, for what only a writer does."""
        assert isinstance(self._directory, EpisodeDirectory)
        return self._directory

    @property
    def is_reader(self) -> bool:
        """As `EpisodeDataset.is_reader`: with mode="r"."""
        return self.mode == "r"

    def describe_store(self) -> dict[str, Any]:
        """As `EpisodeDataset.describe_store`."""
        own: dict[str, Any] = {
            "directory": self._directory.path,
            "suffix": self._directory.suffix,
            "durability": self.durability,
        }
        if self.codecs and self._fields is not None:
            own["compress"] = {name: codec.name for name, codec in self.codecs.items()}
        elif not self._goes_on_compressing:
            # There are no fields yet, or nothing is to be compressed.
            own["choice"] = described_choice(self.compress)
        return {**super().describe_store(), **own, "mode": self.mode}

    @classmethod
    def made_as(cls, told: Mapping[str, Any], info: EpisodeDatasetInfo) -> EpisodeDataset:
        """As `EpisodeDataset.made_as`, in the directory where it was."""
        strategy = _strategy(told["suffix"])
        options = {name: told[name] for name in ("directory", "durability", "mode")}
        options["compress"] = choice_as(told["choice"]) if "choice" in told else told.get("compress")
        return cls(told["capacity"], info, serialization_strategy=strategy, **options)  # type: ignore[call-arg]

    def begin_links(self, snapshot: Snapshot, store: int, rows: Int64Array) -> Pieces:
        """Link the files of the episodes `(n, 4)` into a folder of a save."""
        folders: list[Directory] = []

        def write(number: int) -> None:
            start, length, episode_id, cut = rows[number].tolist()
            name = str(self._directory.name_of(start, length, episode_id, cut))
            if not folders:
                folder = snapshot.directory.folder(folder_name(snapshot.number, store), create=True)
                assert folder is not None  # It was created.
                folders.append(folder)
            try:
                self._own.link(name, folders[0])
            except FileExistsError:
                return  # Ctrl-C has cut off a call.
            except FileNotFoundError:
                raise RuntimeError(f"The file {name} of episode {episode_id} is gone, so it cannot be saved.") from None
            if self.durability != "fsync":
                folders[0].sync_file(name)

        def finish() -> None:
            for folder in folders:
                folder.sync()

        def close() -> None:
            for folder in folders:
                folder.close()

        snapshot.at_written += [finish, self.sync]
        snapshot.at_end.append(close)
        return snapshot.pieces(np.stack([rows[:, 0], rows[:, 0] + rows[:, 1]], 1), write)

    def check_info(self, info: EpisodeInfo) -> None:
        """ValueError for an info that the format, or a dataset behind this one, cannot keep."""
        if info and not self.serialization_strategy.keeps_info:
            suffix = self.serialization_strategy.suffix
            raise ValueError(f"The format `{suffix}` does not keep `info` of episodes. Leave it out, or use another.")
        super().check_info(info)

    def upload(
        self,
        url: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        timeout: float = 10.0,
        progress: bool = False,
    ) -> Transfer:
        """Copy the episodes and late fields to a URL, as `buffers.dataset.transfer.upload` does."""
        if not isinstance(self._directory, EpisodeDirectory):
            raise RuntimeError(f"This dataset reads {self._directory.path}. `download` it to upload it elsewhere.")
        if not self.is_reader:
            self.sync()

        def list_contents() -> Contents:
            self.refresh()
            return episodes_in(self._own, self.table, self.fields, self.capacity)

        return send(self._directory.path, list_contents, ObjectStore(url, storage_options, timeout), progress)

    def takes_links(self, suffix: str) -> bool:
        """Whether its episodes are in the same format."""
        return self._directory.suffix == suffix

    def take_links(self, folders: Mapping[int, Directory], rows: Int64Array, number: int) -> None:
        """Let the directory hold the episodes `(n, 4)`, whose files are in folders by their ids, and no others.

        Files of other episodes are set aside, in a folder of their own: they may be all that is left of a later run.
        """
        self.check_writable()
        directory, names = self._own, [str(self._directory.name_of(*row)) for row in self.table.rows.tolist()]
        wanted = {str(directory.name_of(start, n, e, cut)): folders[e] for start, n, e, cut in rows.tolist()}
        others = {name for name in names if name not in wanted or not directory.is_same(name, wanted[name])}
        aside = f"after-save-{number:010d}"
        for name in sorted(others):
            if not directory.set_aside(name, aside):
                raise OSError(f"{name} could not be moved to the folder {aside} of {directory.path}.")
        if others:
            warnings.warn(
                f"{len(others)} episodes in {directory.path} are not those of save {number}, from which it is loaded: "
                f"they were moved to its folder `{aside}`. Nothing was deleted.",
                stacklevel=2,
            )
        for name in sorted(wanted.keys() - ({*names} - others)):
            wanted[name].link(name, directory)
        directory.sync()
        self._replace(rows)

    def _replace(self, rows: Int64Array) -> None:
        """Take the episodes `(n, 4)`, which are in the directory, for those that live."""
        self.table.show(EpisodeTable())  # Later episodes may get numbers that were given before.
        self.table.replace(rows)
        self._reader.close()
        self._reader = window_reader(self._directory)
        self._log = PublishedTable(SharedArrays(PublishedTable.layout(2 * self.capacity + 2)))
        self._log.add_all(self.table)
        self._is_bound = self._is_bound or len(rows) > 0
        self.late.refill(self.table)
        for row in rows.tolist():
            self._tell(tuple(row))

    def restored(self, next_id: int, next_start: int, counts: Any) -> None:
        """As `EpisodeDataset.restored`."""
        super().restored(next_id, next_start, counts)
        self._own.forget_numbers()
        self._own.keep_numbers_of(self.table)

    @staticmethod
    def linked(save: Save, store: int) -> tuple[Int64Array, list[Directory]]:
        """The episodes of a store whose files a save links, `(n, 4)` as in a table, and the folder of each.

        DamagedSaveError if some are missing.
        """
        found: list[tuple[int, ...]] = []
        folders: dict[int, Directory] = {}
        for number in sorted({number for _, _, number in save.places[store]}):
            name = folder_name(number, store)
            if (folder := save.directory.folder(name)) is None:
                raise save.reader.damaged(f"needs the folder {name}, which is not there")
            folders[number] = folder
            for file in map(FileName.parse, folder.names()):
                if file is not None and file.suffix == save.stores[store]["suffix"]:
                    found.append((file.start, file.length, file.id, file.cut, number))
        rows = np.array(sorted(found, key=lambda row: row[2]), np.int64).reshape(-1, 5)
        rows = rows[save.is_live(store, rows[:, 2], rows[:, 4])]
        if len(rows) != (num := save.stores[store]["num_episodes"]):
            raise save.reader.damaged(f"needs {num} linked episodes, and {len(rows)} are there")
        return rows[:, :4], [folders[number] for number in rows[:, 4].tolist()]

    @staticmethod
    def read_link(
        folder: Directory, row: list[int], suffix: str, fields: Fields
    ) -> tuple[dict[str, np.ndarray], EpisodeInfo]:
        """An episode of such a folder, and its info, after checking all of its file."""
        strategy = _strategy(suffix)
        start, length, episode_id, cut = row
        name = str(FileName(episode_id, start, length, cut, suffix))
        try:
            folder.read(name, strategy.verify, fields, length)
            rows = folder.read(name, strategy.load, fields, length)
            return {n: as_array(n, rows[n]) for n in fields}, folder.read(name, strategy.load_info)
        except (DamagedEpisodeError, FileNotFoundError) as error:
            raise DamagedSaveError(f"{folder.path}/{name}, which a save needs, {error}.") from error


def _strategy(suffix: str) -> EpisodeSerializationStrategy:
    if suffix not in FORMATS:
        raise ValueError(
            f"The save has episodes in the format `{suffix}`, which only its own strategy can read: pass an "
            "IndividualFileDataset with that strategy."
        )
    return FORMATS[suffix]()
