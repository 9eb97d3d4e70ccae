"""IndividualFileDataset: episodes on disk, one file each."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import warnings
from typing import Any, Literal, final, get_args

import numpy as np
import torch

from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.files import opening, serialization
from buffers.dataset.files.directory import DAMAGED, DirectoryWatch, EpisodeDirectory, FileName, Listing, with_advice
from buffers.dataset.files.opening import Verify
from buffers.dataset.files.safetensors_format import SafetensorsSerialization
from buffers.dataset.files.serialization import DamagedEpisodeError, EpisodeSerializationStrategy
from buffers.dataset.files.window_reader import LostWindow, WindowReader
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.evictor import Evictor
from buffers.fields import Fields
from buffers.sharing import PublishedTable, SharedArrays
from buffers.table import Windows
from buffers.utils import format_bytes, integer, one_of

__all__ = ["IndividualFileDataset"]

Durability = Literal["fsync", "rename"]
Mode = Literal["a", "r"]


@final
class IndividualFileDataset(EpisodeDataset):
    """Episodes on disk, one file each, in a directory that is its own index.

        >>> with IndividualFileDataset(capacity=10_000_000, directory="episodes") as dataset:
        ...     dataset.add_episode({"obs": np.zeros((20, 4))})  # It is on the disk when this returns.
        0
        >>> IndividualFileDataset(capacity=10_000_000, directory="episodes", mode="r").episode_lengths
        [20]

    Opening a directory finds the episodes in it and goes on. A process that is killed loses nothing that
    `add_episode` has returned for, nor does a machine that loses power, with `durability="fsync"`. Files whose bytes
    are no whole episode are moved into a subfolder, with one warning, and are never served; other trouble (memory,
    descriptors) reaches the caller, and the file stays. `docs/format.md` states the layout.

    One writer at a time, and any number of readers (`mode="r"`), which see new episodes as they come. A dataset that
    was sent to another process, or forked, is a reader there; one that came from the writer knows at once what comes
    and goes. Threads may add, evict and read at the same time: reading does not hold up the others.

    Args:
        capacity: In steps. A directory that holds more gives up what the evictor chooses; a reader sees all there is.
        info: What is known beforehand; its `fields` must be those of the directory.
        evictor: Any; the oldest leave by default.
        directory: Made if it is not there. By default "individual_file_dataset" in the working directory.
        serialization_strategy: The format. By default that of the episodes in the directory, and safetensors in an
            empty one.
        max_sampling_attempts: How often windows are drawn again whose files have vanished.
        durability: "fsync": an episode survives a power loss once it is added. "rename": it survives the death of
            the process; after a power loss, open with `verify="full"`. It saves some milliseconds an episode.
        mode: "a" reads and writes, "r" only reads; it works in a directory that must not be written to.
        verify: What opening looks at: the "size" of each file, with its name, its "header" too, or its checksums
            ("full", all is read). The header is checked in any case before rows are read.

    Attributes:
        damaged_files: (file name, what is wrong) of the files that were found to be no whole episodes.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range, or a directory of other fields, or another format or version; or, to
            write, a capacity that the newest episode does not fit.
        RuntimeError: Another writer has the directory.
        OSError: The directory cannot be made, read, or written to.
        MemoryError: There is no shared memory.
    """

    # Tells workers of episodes that come and go, exactly; None in a reader that looks at the directory, now and then.
    _log: PublishedTable | None = None
    # The last file that was written. If an addition failed, its number is not counted, and is given again.
    _written: FileName | None = None
    _is_closed = False
    # An episode that cannot be written shall not cost another one.
    evicts_before_writing = False
    reads_beside_writers = True

    def __init__(
        self,
        capacity: int,
        info: EpisodeDatasetInfo | None = None,
        evictor: Evictor | None = None,
        directory: str | os.PathLike[str] = "./individual_file_dataset",
        serialization_strategy: EpisodeSerializationStrategy | None = None,
        max_sampling_attempts: int = 100,
        *,
        durability: Durability = "fsync",
        mode: Mode = "a",
        verify: Verify = "size",
    ) -> None:
        super().__init__(capacity, info, evictor)
        strategy = SafetensorsSerialization() if serialization_strategy is None else serialization_strategy
        serialization.check_strategy(strategy)
        self.serialization_strategy = strategy
        self.max_sampling_attempts = integer("max_sampling_attempts", max_sampling_attempts, 1)
        self.durability = one_of("durability", durability, get_args(Durability))
        self.mode = one_of("mode", mode, get_args(Mode))
        one_of("verify", verify, get_args(Verify))
        self.damaged_files: list[tuple[str, str]] = []
        # Once there is an episode, its format and fields bind those that follow.
        self._is_format_given, self._is_bound = serialization_strategy is not None, False
        self._writer = os.getpid() if mode == "a" else None
        # Names in the directory that a reader need not look at again.
        self._seen: set[str] = set()
        self._directory = EpisodeDirectory(os.fspath(directory), strategy.suffix, mode == "a", durability == "fsync")
        self._reader, self._watch = WindowReader(self._directory), DirectoryWatch(self._directory)
        try:
            if self._writer is None:
                self._refresh() if self._log is not None else self._find_episodes(verify)
            else:
                self._log = PublishedTable(SharedArrays(PublishedTable.layout(2 * capacity + 2)))
                self._open_for_writing(verify)
        except Exception:
            self.close()
            raise

    # Opening.

    def _open_for_writing(self, verify: Verify) -> None:
        listing, damaged = self._scan(verify)
        longest = int(self.table.lengths[-1]) if len(self.table) else 0
        if longest > self.capacity:
            raise ValueError(
                f"The newest episode in {self._directory.path} has {longest} steps, and `capacity`={self.capacity}: "
                "all episodes would be deleted. Raise it, or open with mode='r' to read."
            )
        for name in listing.temporaries:
            self._directory.remove(name)
        self.table.skip_to(*listing.next_numbers)
        self._keep_numbers()  # Before files go that say which numbers have been given.
        self._report_damage(damaged)
        self.make_room(self.table.next_start, 0)
        assert self._log is not None  # A writer has one.
        self._log.add_all(self.table)

    def _find_episodes(self, verify: Verify = "size") -> None:
        seen = self._seen
        listing, damaged = self._scan(verify)
        self._seen = listing.all_names
        for name in map(FileName.parse, seen - listing.all_names):
            if name is not None:
                self._forget(name)
        self._report_damage(damaged)

    def _scan(self, verify: Verify) -> tuple[Listing, list[tuple[str, str]]]:
        """Add the whole episodes that have not been seen to the table; also returns the damaged files."""
        given = self.serialization_strategy if self._is_format_given or self._is_bound else None
        listing, strategy = opening.list_episodes(self._directory, self._seen, given)
        known = self._fields if self._is_bound else None
        fields, rows, damaged = opening.inspect(self._directory, listing, strategy, known, self._fields, verify)
        if fields is not None:
            if self._fields is None:
                self.settle_fields(fields)
            self.serialization_strategy, self._is_bound = strategy, True
            self.table.extend(rows)
        return listing, damaged

    def _report_damage(self, damaged: list[tuple[str, str]]) -> None:
        """Warn of files that are no whole episodes; a writer sets them aside."""
        if not damaged:
            return
        what_happened = "left out"
        if self._is_writer():
            what_happened = f"moved into the folder `{DAMAGED}`"
            damaged = [
                (name, reason if self._directory.set_aside(name) else f"{reason} (and it could not be moved)")
                for name, reason in damaged
            ]
        self.damaged_files += damaged
        named = "; ".join(f"{name}: {reason}" for name, reason in damaged[:5])
        more = f"; and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        where = f"{len(damaged)} files in {self._directory.path}"
        warnings.warn(f"{where} are no whole episodes and were {what_happened}: {named}{more}.", stacklevel=4)

    # What a store implements.

    def _allocate(self, fields: Fields) -> None:
        """Files need no room beforehand."""

    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        fields, strategy = self._fields, self.serialization_strategy
        assert fields is not None  # They were set before anything is written.
        self._remove_uncounted()
        tensors = serialization.tensors_to_store(episode, fields)
        self._written = name = FileName(episode_id, start, len(next(iter(episode.values()))))
        try:
            self._directory.commit(self._text(name), lambda file: strategy.save(tensors, fields, file))
        except OSError as error:
            size = format_bytes(fields.nbytes * name.length)
            what = f"An episode of {name.length} steps ({size}) could not be written, those before it are kept"
            raise with_advice(error, self._directory.path, what) from error
        self._is_bound = True

    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> np.ndarray | None:
        self._check_open()
        assert self._fields is not None  # Windows are drawn from episodes, so there are fields.
        lost = self._reader.read(self.serialization_strategy, self._fields, windows, out)
        for window in lost:
            self._lose(window)
        return ~np.isin(np.arange(len(windows)), [window.position for window in lost]) if lost else None

    def _erase(self, episode_id: int, start: int, length: int) -> None:
        self.check_writable()
        name = self._text(FileName(episode_id, start, length))
        if episode_id == self.table.ids[-1]:
            self._directory.keep_numbers(self.table.next_id, self.table.next_start)
        try:
            self._directory.remove(name)
        except OSError as error:
            raise with_advice(error, self._directory.path, f"Episode {episode_id} could not be evicted") from error
        self._reader.forget(episode_id)
        if self._log is not None:
            self._log.remove(episode_id, self.table)

    # Episodes in.

    def store(self, episode: dict[str, np.ndarray]) -> int:
        """`EpisodeDataset.store`; after an error the episode is not there, nor its file."""
        try:
            return super().store(episode)
        except Exception:
            with contextlib.suppress(OSError):
                self._remove_uncounted()
            raise

    def _publish(self, start: int, length: int, episode_id: int) -> None:
        assert self._log is not None  # A writer has one.
        self._log.add(start, length, episode_id, self.table)

    def _text(self, name: FileName) -> str:
        return name.text(self._directory.suffix)

    def _remove_uncounted(self) -> None:
        """Remove the file of an addition that failed, or was cut off, after writing it: its numbers are given again."""
        if self._written is not None and self._written.id >= self.table.next_id:
            self._directory.remove(self._text(self._written))
        self._written = None

    def _keep_numbers(self) -> None:
        """Do not give the numbers of episodes that are gone again, also after the next opening."""
        table = self.table
        if table.next_id and (not len(table) or int(table.ids[-1]) != table.next_id - 1):
            self._directory.keep_numbers(table.next_id, table.next_start)

    # Files that come and go.

    def refresh(self) -> None:
        """Look for episodes that a writer has added or evicted since; drawing does so by itself.

        Raises:
            RuntimeError: The dataset is closed.
        """
        self._refresh(is_urgent=True)

    def _refresh(self, is_urgent: bool = False) -> None:
        self._check_open()
        if self._is_writer():
            return
        # A log says nothing of fields.
        if self._log is not None and self._fields is not None:
            for episode_id in self._log.follow(self.table):
                self._reader.forget(episode_id)
            if not self._log.has_ended:
                return
            # Others may write from now on.
            self._log = None
            self._seen |= {self._text(FileName(row[2], *row[:2])) for row in self.table.rows.tolist()}
        self._watch.look(self._find_episodes, is_urgent)

    def _lose(self, window: LostWindow) -> None:
        """The file of a window is gone, or damaged: its episode does not live any more."""
        # The table changes, which drawing threads of a reader change, too.
        with self._lock, self._draw_lock:
            if not self._forget(window.name):
                return
            if self._is_writer():
                with contextlib.suppress(OSError):
                    self._keep_numbers()
            if isinstance(window.error, DamagedEpisodeError):
                self._report_damage([(self._text(window.name), f"it {window.error}")])

    def _forget(self, name: FileName) -> bool:
        """Forget an episode whose file is not there any more; False if it does not live."""
        position = self.table.position(name.id)
        if position is None or self.table.episode(position) != (name.start, name.length, name.id):
            return False
        self.table.remove(position)
        self._reader.forget(name.id)
        if self._log is not None and self._is_writer():
            self._log.remove(name.id, self.table)
        return True

    # Closing, and who may do what.

    def close(self) -> None:
        """Give up the lock and close all files. Nothing is lost if this is never called."""
        self._is_closed = True
        with self._lock:
            if self._log is not None and self._is_writer():
                self.end_workers()
                self._log.end()
            self._log = None
        self._reader.close()
        self._directory.close()

    def __enter__(self) -> IndividualFileDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # A reader, which follows the log if this is the writer.
        is_shared = sys.platform == "linux" and self._is_writer()
        log = pickle.dumps(self._log.memory) if self._log is not None and is_shared else None
        arguments = self.capacity, self.info, None, self._directory.path, self.serialization_strategy
        return _open_as_reader, (log, *arguments, self.max_sampling_attempts)

    @property
    def longest_window(self) -> int:
        """The capacity; a reader does not know it."""
        return sys.maxsize if self._writer is None else self.capacity

    def _is_writer(self) -> bool:
        # A forked child has all that its parent had, but for the lock.
        return self._writer == os.getpid()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"The dataset of {self._directory.path} is closed.")

    def check_writable(self) -> None:
        """Refuse changes in a reader, in a process that does not write, and once the dataset is closed."""
        self._check_open()
        if not self._is_writer():
            raise RuntimeError(
                f"This dataset only reads {self._directory.path}: it was opened with mode='r', or is a copy of the one "
                "that writes. Open it with mode='a'."
            )


def _open_as_reader(log: bytes | None, *arguments: Any) -> IndividualFileDataset:
    """A reader of a directory, as it arrives in another process."""
    dataset = IndividualFileDataset.__new__(IndividualFileDataset)
    # Before its constructor, which looks at the directory if there is no log.
    if log is not None:
        with contextlib.suppress(RuntimeError):  # Its memory is gone: what its writer has left is in the directory.
            dataset._log = PublishedTable(pickle.loads(log))
    dataset.__init__(*arguments, mode="r")
    return dataset
