"""SavedSource: how a source is saved, and loaded."""

from __future__ import annotations

import inspect
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from buffers.dataset.episode_reader import EpisodeReader
from buffers.dataset.saving import SavedBeside, begin_source, load_source, verify_save
from buffers.objects import check_local
from buffers.saving import Save, SaveDirectory, open_save

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["SavedSource"]


class SavedSource(EpisodeReader):
    """What can be read, and saved."""

    #: The classes that a save can be made of again, by their names.
    kinds: dict[str, Any] = {}

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        # By the path of a directory.
        self._saves = _Saves()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not inspect.isabstract(cls) and cls.__module__.startswith("buffers."):
            SavedSource.kinds[cls.__name__] = cls

    @property
    @abstractmethod
    def stores(self) -> list[EpisodeDataset]:
        """The datasets that hold episodes, with those behind them, each once."""

    @abstractmethod
    def describe(self, stores: Sequence[object]) -> dict[str, Any]:
        """What it is made of, as JSON can hold it: stores by their numbers in `stores`, and what else they need."""

    def restore(self, described: Mapping[str, Any]) -> None:
        """Go on as one was that was described so."""

    def save(
        self, directory: str | os.PathLike[str], *, keep: int = 1, block: bool = True, progress: bool = False
    ) -> Future[str]:
        """Save all episodes, late fields and what else it takes to go on exactly, in a directory of saves.

            >>> import tempfile
            >>> import numpy as np
            >>> from buffers.dataset import RingBufferDataset
            >>> dataset, directory = RingBufferDataset(capacity=1_000), tempfile.mkdtemp()
            >>> episode_id = dataset.add_episode({"obs": np.zeros((50, 4))})
            >>> _ = dataset.save(directory)
            >>> RingBufferDataset.load(directory).episode_lengths
            [50]

        What is saved is the moment of the call. Only episodes that are new since the last save in this directory are
        written, and all values of late fields. Until the last byte is on the disk, the save before stands: no power
        loss, kill or full disk harms it. Episodes in files are saved by links to the files. `docs/resuming.md` has a
        whole script, and what is in a save.

        Args:
            directory: Made if necessary. A run needs one of its own.
            keep: How many saves can be loaded afterwards; older ones are removed.
            block: False returns at once and lets a thread write, while the dataset is used on. The next save waits for
                it; so does the end of the program.
            progress: Whether to show a bar (of tqdm).

        Returns:
            Its `result()` is the path of the save's file; with `block=False`, it waits for it, and raises what failed.

        Raises:
            OSError: Something could not be written. The save before stands.
            RuntimeError: The directory holds saves of another run, or another process saves there.
        """
        return self.save_with((), directory, keep, block, progress)

    def save_with(
        self,
        others: Sequence[SavedBeside],
        directory: str | os.PathLike[str],
        keep: int,
        block: bool,
        progress: bool,
    ) -> Future[str]:
        """`save`, with what others put into the snapshot at the same moment."""
        check_local(
            os.fspath(directory), "Save to one, and bring it there with `python -m buffers upload DIRECTORY URL`"
        )
        path = os.path.realpath(os.fspath(directory))
        for store in self.stores:
            if not store.is_reader:
                store.check_writable()
            store.wait_for_save()  # To another directory, perhaps.
        return self._saves.setdefault(path, SaveDirectory(path)).save(
            partial(begin_source, self, others=others), keep, block, progress
        )

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        dataset: SavedSource | None = None,
        *,
        newest_whole: bool = False,
        progress: bool = False,
    ) -> Any:
        """Go on where the newest save of a directory was made.

        Args:
            directory: Of saves.
            dataset: An empty dataset, or mixture, made in the same way as the one that was saved, to load into; None
                to make it as it was. It may have another capacity (then the newest episodes stay), device or
                half_precision, and be of another kind.
            newest_whole: Check all saves from the newest on, and load the first of which everything is whole.
            progress: Whether to show a bar (of tqdm).

        Raises:
            DamagedSaveError: The save is not what was written; names the file.
            FileNotFoundError: There is no save.
            ValueError: The save has other fields than `dataset`, or is of another kind than this class.
            RuntimeError: `dataset` holds episodes. A dataset of files may: those that are not of the save are moved
                into a folder of its directory, with a warning.
        """
        save = cls.open_save(directory, newest_whole)
        return cls.load_save(save, dataset, progress)

    @classmethod
    def open_save(cls, directory: str | os.PathLike[str], newest_whole: bool) -> Save:
        """The save that `load` loads."""
        return open_save(os.fspath(directory), partial(verify_save, kinds=cls.kinds) if newest_whole else None)

    @classmethod
    def load_save(cls, save: Save, dataset: SavedSource | None, progress: bool) -> Any:
        """`load` of a save that is open."""
        if dataset is None:
            kind = save.said["source"].get("kind") or save.stores[save.said["source"]["store"]]["kind"]
            if cls.__name__ in cls.kinds and kind != cls.__name__:
                raise ValueError(f"The save is of a {kind}: call its `load`, or pass a {cls.__name__} to load into.")
        elif not isinstance(dataset, SavedSource):
            raise TypeError(f"`dataset` must be an EpisodeSource, found {type(dataset).__name__}.")
        source, is_same = load_source(save, dataset, cls.kinds, progress)
        path = os.path.realpath(save.directory.path)
        source._saves[path] = SaveDirectory(path, save, is_same)
        return source


class _Saves(dict[str, SaveDirectory]):
    """A copy, in another process for example, has saved nothing."""

    def __reduce__(self) -> Any:
        return _Saves, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Saves:
        return _Saves()
