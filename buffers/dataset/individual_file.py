"""IndividualFileDataset: episodes on disk, one file each."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
import warnings
from typing import Any, Literal, final, get_args

import numpy as np
import torch

from buffers.dataset.archives import NumpyCompressedSerialization, TorchSerialization
from buffers.dataset.directory import DAMAGED, EpisodeDirectory, FileName, Listing, explained
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.fields import Fields, as_tensor
from buffers.dataset.index import Windows
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.opening import Inspection, Verify, damage_message, inspect, set_aside
from buffers.dataset.safetensors_format import SafetensorsSerialization
from buffers.dataset.serialization import DamagedEpisodeError, EpisodeSerializationStrategy, UnknownVersionError
from buffers.dataset.window_reader import WindowReader
from buffers.evictor.base import Evictor
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

_FORMATS = (SafetensorsSerialization, NumpyCompressedSerialization, TorchSerialization)
# A reader looks for new episodes for at most a twentieth of its time.
_SCAN_REST = 20.0
# Two changes of a directory within the clock's grain (2 s on some file systems) look like one.
_CLOCK_GRAIN_NS = 2 * 10**9


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
    was sent to another process, or forked, is a reader there.

    Args:
        capacity: In steps. A directory that holds more gives up what the evictor chooses; a reader sees all there is.
        info: What is known beforehand; its `fields` must be those of the directory.
        evictor: Any; the oldest leave by default.
        directory: Made if it is not there.
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
        ValueError: An argument out of its range, or a directory of other fields, or another format or version.
        RuntimeError: Another writer has the directory.
        OSError: The directory cannot be made, read, or written to.
    """

    # Of a copy in a worker, the trainer's has told already what there is to tell.
    _warns = True

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
        strategy = serialization_strategy
        if strategy is not None and not isinstance(strategy, EpisodeSerializationStrategy):
            raise TypeError(
                f"`serialization_strategy` must be an EpisodeSerializationStrategy, found {type(strategy).__name__}."
            )
        if strategy is not None:
            _check_suffix(strategy.suffix)
        self.max_sampling_attempts = integer("max_sampling_attempts", max_sampling_attempts, 1)
        self.durability = one_of("durability", durability, get_args(Durability))
        self.mode = one_of("mode", mode, get_args(Mode))
        one_of("verify", verify, get_args(Verify))
        self._is_format_open = strategy is None
        self._strategy = SafetensorsSerialization() if strategy is None else strategy
        # The fields as the files have them: they may be named by other types than in `info`.
        self._stored_fields: Fields | None = None
        self._reader: WindowReader | None = None
        self._names: dict[int, str] = {}
        self._seen: set[str] = set()
        self._scanned_change, self._next_scan = -1, 0.0
        self._is_closed = False
        self._writer = os.getpid() if mode == "a" else None
        self._directory = EpisodeDirectory(os.fspath(directory), self._strategy.suffix, mode == "a")
        try:
            self._load(verify)
        except BaseException:
            self.close()
            raise

    # An episode that cannot be written shall not cost another one.
    _evicts_before_writing = False

    # Opening.

    def _load(self, verify: Verify) -> None:
        listing, inspection = self._scan(verify)
        if self._writer is None:
            self._warn_of(inspection.damaged, "left out")
        else:
            for name in listing.temporaries:
                self._directory.remove(name)
            self.index.next_id, self.index.next_start = listing.next_numbers
            # Before files go that say which numbers have been given.
            self._keep_numbers()
            damaged = set_aside(self._directory, listing, inspection.damaged)
            self._warn_of(damaged, f"moved into the folder `{DAMAGED}`")
            self._make_room(0)
        if len(self.index):
            # Who could not take another of its episodes has been full: there is no other trace of it.
            has_lost = self.index.next_start > self.num_timesteps
            self._has_evicted |= has_lost and self.num_timesteps + int(self.index.lengths.max()) > self.capacity

    def _scan(self, verify: Verify = "size") -> tuple[Listing, Inspection]:
        """Look for what is new, and add what is good of it to the index."""
        listing = self._directory.list(self._seen)
        if self._is_format_open and not listing.texts:
            for kind in _FORMATS:
                if kind.suffix in listing.other_suffixes:
                    self._strategy = kind()
                    self._directory.suffix = kind.suffix
                    listing = self._directory.list(self._seen)
                    break
        if self._stored_fields is None:
            self._check_format(listing)
        inspection = inspect(self._directory, listing, self._strategy, self._stored_fields, self._fields, verify)
        if inspection.fields is not None:
            self._bind(inspection.fields)
        self._insert(inspection.texts, inspection.numbers)
        self._seen = listing.names
        return listing, inspection

    def _check_format(self, listing: Listing) -> None:
        """Refuse a directory of another format; single files that merely look like it (a backup) are no matter."""
        others = listing.other_suffixes
        if others and (not listing.texts or any(kind.suffix in others for kind in _FORMATS)):
            raise ValueError(
                f"{self._directory.path} holds episodes in the format {sorted(others)}, not only in "
                f"`{self._strategy.suffix}`. Give the `serialization_strategy` they were written with, or choose "
                "another `directory`."
            )

    def _bind(self, fields: Fields) -> None:
        if self._stored_fields is not None:
            return
        conflict = None if self._fields is None else fields.conflict_with(self._fields)
        if conflict is not None:
            raise ValueError(
                f"The fields of {self._directory.path} differ from those of `info`: {conflict}. The directory has "
                f"{fields}, `info` has {self._fields}. Choose another `directory`, or leave them out of `info`."
            )
        if self._fields is None:
            self._set_fields(fields)
        self._allocate(fields)

    def _insert(self, texts: list[str], numbers: np.ndarray) -> None:
        if texts:
            self._is_format_open = False
            self._names.update(zip(numbers[0].tolist(), texts, strict=True))
            self.index.insert(numbers[[1, 2, 0]].T)

    def _warn_of(self, damaged: list[tuple[str, str]], what_happened: str) -> None:
        if damaged and self._warns:
            warnings.warn(damage_message(self._directory.path, damaged, what_happened), stacklevel=4)

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
        length = len(next(iter(episode.values())))
        tensors = {}
        for name, tensor_type in fields.items():
            rows = np.array(episode[name], tensor_type.numpy_dtype, order="C")
            if rows.shape != (length, *tensor_type.shape):
                raise ValueError(f"Field `{name}` has shape {rows.shape}, expected {(length, *tensor_type.shape)}.")
            tensors[name] = as_tensor(rows, tensor_type)
        text = FileName(episode_id, start, length).text(self._strategy.suffix)
        self._names[episode_id] = text
        self._seen.add(text)  # A forked child shall not find it anew.

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
        self._check_writable()
        if episode_id == next(reversed(self._names)):
            self._directory.keep_numbers(self.index.next_id, self.index.next_start, self.durability == "fsync")
        try:
            self._directory.remove(self._names[episode_id])
        except OSError as error:
            raise explained(error, self._directory.path, f"Episode {episode_id} could not be evicted") from error
        self._forget_file(episode_id)

    def _refresh(self) -> None:
        self._check_open()
        if not self._is_writer():
            self._follow(is_urgent=False)

    # Episodes in.

    def _add(self, fields: Fields, arrays: dict[str, np.ndarray]) -> int:
        """`add_episode`; after any error, the episode is not there, nor its file.

        Others are where they were, unless an evictor failed at a second choice: its first is carried out.
        """
        self._check_writable()
        fields_before, stored_before = self._fields, self._stored_fields
        index, episode_id, start = self.index, self.index.next_id, self.index.next_start
        try:
            return super()._add(fields, arrays)
        except BaseException:
            if index.next_id == episode_id:
                self._take_back(episode_id, start)
                self._fields, self._stored_fields = fields_before, stored_before
            raise

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
        self.index.next_id, self.index.next_start = episode_id + 1, start + length

    def _keep_numbers(self) -> None:
        """See to it that the numbers of episodes that are gone are not given again, also after the next opening."""
        index = self.index
        if index.next_id and (not len(index) or int(index.ids[-1]) != index.next_id - 1):
            self._directory.keep_numbers(index.next_id, index.next_start, self.durability == "fsync")

    # Files that come and go.

    def refresh(self) -> None:
        """Look for episodes that a writer has added or evicted since; drawing does so by itself, now and then.

        Raises:
            RuntimeError: The dataset is closed.
        """
        self._check_open()
        if not self._is_writer():
            self._follow(is_urgent=True)

    def _follow(self, is_urgent: bool) -> None:
        begin = time.monotonic()
        if begin < self._next_scan and not is_urgent:
            return
        changed_at, now = self._directory.modified_at(), time.time_ns()
        if changed_at == self._scanned_change and not is_urgent:
            return
        listing, inspection = self._scan()
        for episode_id in [number for number, text in self._names.items() if text not in listing.names]:
            self._forget(episode_id)
        self._warn_of(inspection.damaged, "left out")
        self._scanned_change = changed_at if now - changed_at > _CLOCK_GRAIN_NS else -1
        end = time.monotonic()
        self._next_scan = end + _SCAN_REST * (end - begin)

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
            self._seen.add(text)
            is_moved = self._is_writer() and self._directory.set_aside(text)
            self._warn_of([(text, f"it {error}")], f"moved into the folder `{DAMAGED}`" if is_moved else "left out")

    def _forget(self, episode_id: int) -> None:
        self._forget_file(episode_id)
        position = self.index.position(episode_id)
        if position is not None:
            self.index.remove(position)

    def _forget_file(self, episode_id: int) -> None:
        self._seen.discard(self._names.pop(episode_id, ""))
        if self._reader is not None:
            self._reader.forget(episode_id)

    # Closing, and who may do what.

    def close(self) -> None:
        """Give up the lock and close all files. Nothing is lost if this is never called."""
        self._is_closed = True
        if self._reader is not None:
            self._reader.close()
        self._directory.close()

    def __enter__(self) -> IndividualFileDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # What is sent to another process: it finds the episodes by itself.
        return _follower, (self.capacity, self.info, self._directory.path, self._strategy, self.max_sampling_attempts)

    def _is_writer(self) -> bool:
        # A forked child has all that its parent had, but for the lock.
        return self._writer == os.getpid()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"The dataset of {self._directory.path} is closed.")

    def _check_writable(self) -> None:
        self._check_open()
        if self._writer is None:
            raise RuntimeError(f"{self._directory.path} was opened with mode='r', which only reads. Open it with 'a'.")
        if not self._is_writer():
            raise RuntimeError(f"Process {self._writer} writes to {self._directory.path}; this one can only read.")


def _follower(
    capacity: int, info: EpisodeDatasetInfo, path: str, strategy: EpisodeSerializationStrategy, attempts: int
) -> IndividualFileDataset:
    """A reader of a directory, as it arrives in another process."""
    dataset = IndividualFileDataset.__new__(IndividualFileDataset)
    dataset._warns = False
    dataset.__init__(capacity, info, None, path, strategy, attempts, mode="r")
    return dataset


def _check_suffix(suffix: object) -> None:
    if not isinstance(suffix, str) or not re.fullmatch(r"\.[A-Za-z0-9_.-]*[A-Za-z0-9_-]", suffix):
        raise ValueError(f"The `suffix` of a format must be like `.name`, found {suffix!r}.")
    if suffix in (".lock", ".next"):
        raise ValueError(f"The `suffix` {suffix!r} is kept for the directory's own files.")
