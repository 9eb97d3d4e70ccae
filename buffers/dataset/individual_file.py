"""IndividualFileDataset: episodes on disk, one file each."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from typing import Any, Literal, final, get_args

import numpy as np
import torch

from buffers.dataset import opening, serialization
from buffers.dataset.archives import NumpyCompressedSerialization, TorchSerialization
from buffers.dataset.directory import DAMAGED, EpisodeDirectory, FileName, Listing, explained
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.following import DirectoryWatch, EpisodeNames, handed_on, new_log, opened_log
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.opening import Inspection, Verify
from buffers.dataset.safetensors_format import SafetensorsSerialization
from buffers.dataset.serialization import DamagedEpisodeError, EpisodeSerializationStrategy, UnknownVersionError
from buffers.dataset.window_reader import WindowReader
from buffers.evictor import Evictor
from buffers.fields import Fields
from buffers.sharing import PublishedTable
from buffers.table import Windows
from buffers.utils import format_bytes, integer, one_of

__all__ = [
    "DamagedEpisodeError",
    "EpisodeSerializationStrategy",
    "IndividualFileDataset",
    "NumpyCompressedSerialization",
    "SafetensorsSerialization",
    "TorchSerialization",
    "UnknownVersionError",
]

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
    `add_episode` has returned for, nor does a machine that loses power, with `durability="fsync"`. Files that are no
    whole episodes are moved into a subfolder, with one warning, and are never served. `docs/format.md` states the
    layout.

    One writer at a time, and any number of readers (`mode="r"`), which see new episodes as they come. A dataset that
    was sent to another process, or forked, is a reader there; a writer's knows at once what comes and goes.

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
        verify: What opening looks at: the "size" of each file, with its name (0.5 s for 100,000), its "header" too,
            or its checksums ("full", all is read). The header is checked in any case before rows are read.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range, or a directory of other fields, or another format or version; or, to
            write, a capacity that the newest episode does not fit.
        RuntimeError: Another writer has the directory.
        OSError: The directory cannot be made, read, or written to.
        MemoryError: There is no shared memory for what workers are told.
    """

    # Of a copy in a worker, the trainer's has told already what there is to tell.
    _warns = True
    # What a writer tells its workers, here and there; None in any other reader. With it comes what they are to bind.
    _log: PublishedTable | None = None
    _told_fields: Fields | None = None

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
        self.max_sampling_attempts = integer("max_sampling_attempts", max_sampling_attempts, 1)
        self.durability = one_of("durability", durability, get_args(Durability))
        self.mode = one_of("mode", mode, get_args(Mode))
        one_of("verify", verify, get_args(Verify))
        self._is_format_open = serialization_strategy is None
        self._strategy = strategy
        # The fields as the files have them: they may be named by other types than in `info`.
        self._stored_fields: Fields | None = None
        self._reader: WindowReader | None = None
        self._is_closed = False
        self._writer = os.getpid() if mode == "a" else None
        self._directory = EpisodeDirectory(os.fspath(directory), self._strategy.suffix, mode == "a")
        self._names, self._watch = EpisodeNames(self.table, self._directory), DirectoryWatch(self._directory)
        try:
            if self._writer is not None:
                self._log = new_log(capacity)
            self._load(verify)
        except BaseException:
            self.close()
            raise

    # An episode that cannot be written shall not cost another one.
    evicts_before_writing = False

    # Opening.

    def _load(self, verify: Verify) -> None:
        if self._told_fields is not None:
            self._bind(self._told_fields)
            self._refresh()
        else:
            self._look_first(verify)
        if len(self.table):
            # Who could not take another of its episodes has been full: there is no other trace of it.
            has_lost = self.table.next_start > self.num_timesteps
            self._has_evicted |= has_lost and self.num_timesteps + int(self.table.lengths.max()) > self.capacity

    def _look_first(self, verify: Verify) -> None:
        listing, inspection = self._scan(verify)
        if self._writer is None:
            self._warn_of(inspection.damaged, "left out")
        else:
            opening.check_capacity(self._directory, self.table, self.capacity)
            for name in listing.temporaries:
                self._directory.remove(name)
            self.table.skip_to(*listing.next_numbers)
            # Before files go that say which numbers have been given.
            self._keep_numbers()
            damaged = opening.set_aside(self._directory, listing, inspection.damaged)
            self._warn_of(damaged, f"moved into the folder `{DAMAGED}`")
            self.make_room(self.table.next_start, 0)
            assert self._log is not None  # A writer has one.
            self._log.add_all(self.table)

    def _scan(self, verify: Verify = "size") -> tuple[Listing, Inspection]:
        """Look for what is new, and add what is good of it to the index."""
        listing, kind = opening.list_episodes(self._directory, self._watch.seen, self._is_format_open)
        if kind is not None:
            self._strategy = kind()
        if self._stored_fields is None:
            opening.check_format(self._directory, listing)
        inspection = opening.inspect(
            self._directory, listing, self._strategy, self._stored_fields, self._fields, verify
        )
        if inspection.fields is not None:
            self._bind(inspection.fields)
        if inspection.texts:
            self._is_format_open = False
            self.table.insert(inspection.numbers[[1, 2, 0]].T)
        if not self._is_writer():
            self._watch.seen = listing.names
        return listing, inspection

    def _bind(self, fields: Fields) -> None:
        if self._stored_fields is not None:
            return
        opening.check_stated_fields(self._directory, fields, self._fields)
        if self._fields is None:
            self.settle_fields(fields)
        self._allocate(fields)

    def _warn_of(self, damaged: list[tuple[str, str]], what_happened: str) -> None:
        if damaged and self._warns:
            warnings.warn(opening.damage_message(self._directory.path, damaged, what_happened), stacklevel=4)

    # What a store implements.

    def _allocate(self, fields: Fields) -> None:
        if hasattr(self, "_directory"):
            self._stored_fields = fields
            self._reader = WindowReader(self._strategy, fields, self._directory, self._names)

    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        if self._stored_fields is None:
            assert self._fields is not None  # They were set before anything is written.
            self._allocate(self._fields)
        fields = self._stored_fields
        assert fields is not None  # They were set just now, if not before.
        tensors = serialization.tensors_to_store(episode, fields)
        length = len(next(iter(episode.values())))
        text = self._names.note(episode_id, start, length)

        def write(file: io.BufferedWriter) -> None:
            self._strategy.save(tensors, fields, file)

        try:
            self._directory.commit(text, write, self.durability == "fsync")
        except OSError as error:
            size = format_bytes(fields.nbytes * length)
            raise explained(
                error,
                self._directory.path,
                f"An episode of {length} steps ({size}) could not be written, those before it are kept",
            ) from error

    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> np.ndarray | None:
        self._check_open()
        assert self._reader is not None  # Windows are drawn from episodes, so there are fields.
        batch = self._reader.batch(out)
        was_read = None
        ids, lengths = windows.episode.tolist(), windows.episode_length.tolist()
        steps, num_rows = windows.step.tolist(), windows.num_rows.tolist()
        # In the order of files, so that each is opened, or decoded, once.
        for b in windows.episode.argsort(kind="stable").tolist():
            try:
                batch.read(b, ids[b], lengths[b], steps[b], num_rows[b])
            except (FileNotFoundError, DamagedEpisodeError) as error:
                self._lose(ids[b], error)
                was_read = np.ones(len(windows), np.bool_) if was_read is None else was_read
                was_read[b] = False
        return was_read

    def _erase(self, episode_id: int, start: int, length: int) -> None:
        self.check_writable()
        if episode_id == self.table.ids[-1] and self._names.get(self.table.next_id) is None:
            self._directory.keep_numbers(self.table.next_id, self.table.next_start, self.durability == "fsync")
        try:
            self._directory.remove(FileName(episode_id, start, length).text(self._directory.suffix))
        except OSError as error:
            raise explained(error, self._directory.path, f"Episode {episode_id} could not be evicted") from error
        self._forget_file(episode_id)
        if self._log is not None:
            self._log.remove(episode_id, self.table)

    # Episodes in.

    def store(self, episode: dict[str, np.ndarray]) -> int:
        """`EpisodeDataset.store`; after an error, the episode is not there, nor its file.

        Others are where they were, unless an evictor failed at a second choice: its first is carried out.
        """
        episode_id, start = self.table.next_id, self.table.next_start
        try:
            return super().store(episode)
        except Exception:
            if self.table.next_id == episode_id:
                self._take_back(episode_id, start)
            raise

    def _publish(self, start: int, length: int, episode_id: int) -> None:
        assert self._log is not None  # A writer has one.
        self._log.add(start, length, episode_id, self.table)

    def _take_back(self, episode_id: int, start: int) -> None:
        """Remove the file of an episode that is not counted: its evictor has failed, say."""
        text = self._names.get(episode_id)
        if text is None:
            return
        self._forget_file(episode_id)
        with contextlib.suppress(OSError):
            self._directory.remove(text)
            self._keep_numbers()
            return
        # It cannot be removed, and the next one must not have its numbers.
        length = int(text.removesuffix(self._strategy.suffix).rpartition("-")[2])
        self.table.skip_to(episode_id + 1, start + length)

    def _keep_numbers(self) -> None:
        """See to it that the numbers of episodes that are gone are not given again, also after the next opening."""
        index = self.table
        if index.next_id and (not len(index) or int(index.ids[-1]) != index.next_id - 1):
            self._directory.keep_numbers(index.next_id, index.next_start, self.durability == "fsync")

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
        # Without fields, there is nothing to tell of, or the first episode has just come, and its file has them.
        if self._log is not None and self._stored_fields is not None:
            for episode_id in self._log.follow(self.table):
                self._forget_file(episode_id)
            if not self._log.has_ended:
                return
            # Others may write from now on.
            self._log = None
            self._watch.seen |= self._names.all()
        self._watch.look(self._look_again, is_urgent)

    def _look_again(self) -> None:
        seen = self._watch.seen
        listing, inspection = self._scan()
        for episode_id in self._names.live_among(seen - listing.names):
            self._forget(episode_id)
        self._warn_of(inspection.damaged, "left out")

    def _lose(self, episode_id: int, error: FileNotFoundError | DamagedEpisodeError) -> None:
        """An episode's file is gone, or damaged: it does not live any more."""
        text = self._names.get(episode_id)
        if text is None:
            return
        self._forget(episode_id)
        if self._is_writer():
            with contextlib.suppress(OSError):
                self._keep_numbers()
        if isinstance(error, DamagedEpisodeError):
            self._watch.seen.add(text)
            is_moved = self._is_writer() and self._directory.set_aside(text)
            self._warn_of([(text, f"it {error}")], f"moved into the folder `{DAMAGED}`" if is_moved else "left out")

    def _forget(self, episode_id: int) -> None:
        self._forget_file(episode_id)
        position = self.table.position(episode_id)
        if position is not None:
            self.table.remove(position)
            if self._log is not None and self._is_writer():
                self._log.remove(episode_id, self.table)

    def _forget_file(self, episode_id: int) -> None:
        self._watch.seen.discard(self._names.get(episode_id) or "")
        self._names.forget(episode_id)
        if self._reader is not None:
            self._reader.forget(episode_id)

    # What is in the directory.

    @property
    def serialization_strategy(self) -> EpisodeSerializationStrategy:
        """The format in use: the one that was given, or else the one found in the directory."""
        return self._strategy

    def file_names(self) -> set[str]:
        """The names of the files of all live episodes."""
        return self._names.all()

    # Closing, and who may do what.

    def close(self) -> None:
        """Give up the lock and close all files. Nothing is lost if this is never called."""
        self._is_closed = True
        if self._log is not None and self._is_writer():
            self.end_workers()
            self._log.end()
        self._log = None
        if self._reader is not None:
            with self._lock:  # Another thread may be reading.
                self._reader.close()
        self._directory.close()

    def __enter__(self) -> IndividualFileDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # What is sent to another process: it finds the episodes by itself, by the log if this is their writer.
        memory = handed_on(self._log) if self._is_writer() else None
        arguments = self.capacity, self.info, None, self._directory.path, self._strategy, self.max_sampling_attempts
        return _follower, (self._stored_fields, memory, *arguments)

    @property
    def longest_window(self) -> int:
        """As of any dataset; who only reads does not know."""
        return sys.maxsize if self._writer is None else self.capacity

    def _is_writer(self) -> bool:
        # A forked child has all that its parent had, but for the lock.
        return self._writer == os.getpid()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"The dataset of {self._directory.path} is closed.")

    def check_writable(self) -> None:
        self._check_open()
        if self._writer is None:
            raise RuntimeError(
                f"This dataset only reads {self._directory.path}: it was opened with mode='r', or is a copy of the one "
                "that writes. Open it with mode='a'."
            )
        if not self._is_writer():
            raise RuntimeError(f"Process {self._writer} writes to {self._directory.path}; this one can only read.")


def _follower(stored_fields: Fields | None, memory: dict[str, Any] | None, *arguments: Any) -> IndividualFileDataset:
    """A reader of a directory, as it arrives in another process."""
    dataset = IndividualFileDataset.__new__(IndividualFileDataset)
    dataset._warns, dataset._log = False, opened_log(memory)
    if dataset._log is not None:
        dataset._told_fields = stored_fields
    dataset.__init__(*arguments, mode="r")
    return dataset
