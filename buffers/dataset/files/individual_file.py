"""IndividualFileDataset: episodes on disk, one file each."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any, final, get_args

import numpy as np
import torch

from buffers.compression import Compress
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.files.copies import open_copy, pickled_handle
from buffers.dataset.files.directory import FileName
from buffers.dataset.files.late_files import LateFiles
from buffers.dataset.files.object_directory import ObjectOptions, open_files
from buffers.dataset.files.object_reader import window_reader
from buffers.dataset.files.opening import Durability, Inspection, Mode, Verify, check_capacity, report_damage
from buffers.dataset.files.safetensors_format import SafetensorsSerialization
from buffers.dataset.files.serialization import EpisodeSerializationStrategy, check_strategy
from buffers.dataset.files.writing import WrittenDataset
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.disk import DamagedEpisodeError, UnknownVersionError, with_advice
from buffers.evictor import Evictor
from buffers.late import LateFields
from buffers.objects import DEFAULT_CACHE_BYTES
from buffers.sharing import PublishedTable, SharedArrays
from buffers.table import TableRow, Windows
from buffers.utils import integer, one_of

__all__ = ["IndividualFileDataset"]


@final
class IndividualFileDataset(WrittenDataset):
    """Episodes on disk, one file each, in a directory that is its own index.

        >>> with IndividualFileDataset(capacity=10_000_000, directory="episodes") as dataset:
        ...     dataset.add_episode({"obs": np.zeros((20, 4))})  # It is on the disk when this returns.
        0
        >>> IndividualFileDataset(directory="episodes", mode="r").episode_lengths
        [20]

    Opening a directory finds the episodes in it. A file whose bytes are not a whole episode is moved into a subfolder,
    with a warning, and is never served. After any other failure (no memory, no descriptors), the caller gets the error
    and the file stays. Late fields are written by `sync` and `close`. `docs/format.md` describes the layout.

    One writer at a time, and any number of readers (`mode="r"`), which see new episodes as they come, but the values of
    late fields as they were on opening; those that a reader updates are not written. A copy in another process, pickled
    or forked, is a reader; a copy of the writer learns of changes at once. Threads may add, evict and read at a time.

    Args:
        capacity: In steps. A reader sees everything; by default, its capacity is that of the last writer.
        info: What is known beforehand; its `fields` must be those of the directory.
        evictor: Chooses the episode that leaves; the oldest by default.
        directory: Created if necessary. By default "individual_file_dataset" in the working directory. Readers also
            take a URL, "s3://bucket/folder" for example: see `docs/objects.md`.
        serialization_strategy: The format. By default that of the episodes in the directory, or safetensors if there
            are none.
        max_sampling_attempts: How often windows are drawn again whose files have vanished.
        durability: "fsync": an added episode survives a loss of power. "rename": it survives the death of the process,
            and adding is some milliseconds faster. After a loss of power, open with `verify="full"`.
        mode: "a" reads and writes, "r" only reads, also where writing is not permitted.
        verify: What opening checks of each file: its name and "size", its "header" too, or also its checksums ("full",
            which reads everything). The header is always checked before rows are read.
        shrink: Let a directory that holds more than `capacity` give up what the evictor chooses.
        lock: False where the file system cannot lock files, and you know that there is no other writer.
        storage_options: For a URL (extra `objects`): what fsspec needs to reach the store.
        cache_directory: Where blocks of objects are kept; by default `buffers/objects` in the user's folder of caches.
        cache_bytes: The most that these take; 0 for none.
        timeout: Seconds until the store must have answered a request.
        compress: Fields that new episodes have compressed, as for `RingBufferDataset`; in the default format only. By
            default those that the newest episode in the directory has; `{}` for none.

    Attributes:
        damaged_files: (file name, what is wrong) of files that turned out not to be whole episodes.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range; a directory with other fields, another format or version; for a
            writer without `shrink`, a directory that holds more than `capacity`.
        RuntimeError: Another writer has the directory.
        OSError: The directory cannot be created, read, written to, or locked; a store does not answer.
        MemoryError: Shared memory is not available.
    """

    # The exact changes, for copies in other processes. None in a reader that lists the directory instead.
    _log: PublishedTable | None = None
    _late_files: LateFiles | None = None  # Only after opening has succeeded.
    _shared_late: LateFields | None = None  # In a copy, those of the dataset that it is a copy of.
    _is_closed = _is_copy = False
    evicts_before_writing = False
    reads_beside_writers = reads_before_episodes = True
    # A chunk could need the file of the chunk before.
    reads_in_chunks = False

    def __init__(
        self,
        capacity: int | None = None,
        info: EpisodeDatasetInfo | None = None,
        evictor: Evictor | None = None,
        directory: str | os.PathLike[str] = "./individual_file_dataset",
        serialization_strategy: EpisodeSerializationStrategy | None = None,
        max_sampling_attempts: int = 100,
        *,
        durability: Durability = "fsync",
        mode: Mode = "a",
        verify: Verify = "size",
        shrink: bool = False,
        lock: bool = True,
        storage_options: Mapping[str, Any] | None = None,
        cache_directory: str | os.PathLike[str] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        timeout: float = 10.0,
        compress: Compress | None = None,
    ) -> None:
        if capacity is None and mode == "a":
            raise TypeError("`capacity` is missing. Only with mode='r', it can be left out.")
        strategy = SafetensorsSerialization() if serialization_strategy is None else serialization_strategy
        check_strategy(strategy)
        self.serialization_strategy, self._given_strategy = strategy, serialization_strategy
        super().__init__(1 if capacity is None else capacity, info, evictor, compress)
        self._goes_on_compressing = compress is None and (info is None or info.compress is None)
        self._check_format()
        self.max_sampling_attempts = integer("max_sampling_attempts", max_sampling_attempts, 1)
        self.durability = one_of("durability", durability, get_args(Durability))
        self.mode = one_of("mode", mode, get_args(Mode))
        one_of("verify", verify, get_args(Verify))
        self.damaged_files: list[tuple[str, str]] = []
        # The format and the fields of the first episode bind those that follow.
        self._is_bound = False
        self._writer = os.getpid() if mode == "a" else None
        self._seen: set[str] = set()  # Names that a reader has inspected.
        path, is_durable = os.fspath(directory), durability == "fsync"
        cached_in = None if cache_directory is None else os.fspath(cache_directory)
        self._objects = ObjectOptions(storage_options, cached_in, integer("cache_bytes", cache_bytes, 0), timeout)
        self._directory = open_files(path, strategy.suffix, mode == "a", is_durable, lock, self._objects)
        self._reader = window_reader(self._directory)
        try:
            if capacity is None:
                self.capacity = max(1, self._directory.last_capacity)
            self._stated_capacity = self.capacity
            if self._writer is not None:
                self._log = PublishedTable(SharedArrays(PublishedTable.layout(2 * self.capacity + 2)))
                self._open_for_writing(verify, shrink)
            elif self._log is not None:
                self._refresh()
            else:
                self._find_episodes(verify)
            self._open_late_fields()
        except Exception:
            self.close()
            raise

    # Opening.

    def _open_for_writing(self, verify: Verify, shrink: bool) -> None:
        inspection = self._scan(verify)
        inspection.refuse_later_versions()
        self._check_format()
        self._compress_as_before()
        if self.table.num_steps > self.capacity and not shrink:
            check_capacity(self, self._own)
        for name in inspection.listing.temporaries:
            self._own.remove(name)
        self.table.skip_to(*inspection.listing.next_numbers)
        self.num_lost = self.table.next_id - len(self.table)
        # First, because the numbers may come from the names of files that are about to go.
        self._own.keep_numbers_of(self.table)
        self._report_damage(inspection.damaged)
        self.make_room(self.table.next_start, 0)
        self._own.keep_capacity(self.capacity)
        assert self._log is not None
        self._log.add_all(self.table)

    def _open_late_fields(self) -> None:
        """Restore the late fields of the directory, which keep their values, then add those of `info`."""
        stated = dict(self.late_fields or {})
        self.late = self._shared_late or LateFields(self.capacity, self.has_circular_ids, self.device, self.table)
        if self._shared_late is None:
            files = LateFiles(self._directory)
            self.damaged_files += files.load(self.late, self.table, self._is_writer())
            self._late_files = files
        for name, kind in stated.items():
            self.add_late_field(name, kind)

    def _find_episodes(self, verify: Verify = "size") -> None:
        """Bring a reader's table up to date with the directory."""
        inspection, seen = self._scan(verify), self._seen
        self._seen = inspection.listing.all_names
        for name in map(FileName.parse, seen - self._seen):
            if name is not None:
                self._forget(name)
        self.num_lost = self.num_lost + len(inspection.damaged) if seen else self.table.next_id - len(self.table)
        # A reader holds everything, so its capacity is never less.
        self.capacity = max(self._stated_capacity, self.table.num_steps)
        self._report_damage(inspection.damaged)

    def _scan(self, verify: Verify) -> Inspection:
        """Add whole episodes that have not been seen to the table."""
        given = self.serialization_strategy if self._is_bound else self._given_strategy
        inspection = Inspection(self._directory, self._seen, given)
        if not self._seen and not self._is_copy:
            inspection.warn_of_strangers()
        fields = self._fields if self._is_bound else inspection.find_fields(self._fields)
        if fields is not None:
            rows = inspection.whole_episodes(fields, verify)
            if self._fields is None:
                self.settle_fields(fields)
            self.serialization_strategy, self._is_bound = inspection.strategy, True
            self.table.extend(rows)
        return inspection

    def _report_damage(self, damaged: list[tuple[str, str]]) -> None:
        """Warn of files that are not whole episodes. A writer sets them aside."""
        self.damaged_files += report_damage(self._directory, damaged, moves=self._is_writer())

    # The methods of a storage.

    def _find_info(self, row: TableRow) -> EpisodeInfo:
        self._check_open()
        name = self._directory.name_of(*row)
        try:
            return self._directory.read(str(name), self.serialization_strategy.load_info)
        except UnknownVersionError as error:
            raise ValueError(f"{self._directory.path}/{name} {error}.") from None
        except (DamagedEpisodeError, FileNotFoundError) as error:
            self._lose(name, str(error) if isinstance(error, DamagedEpisodeError) else None)
            raise RuntimeError(f"Episode {name.id} is gone from the store.") from error

    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> np.ndarray | None:
        self._check_open()
        assert self._fields is not None  # Windows are drawn from episodes, so there are fields.
        lost = self._reader.read(self.serialization_strategy, self._fields, windows, out)
        for name, damage in lost.items():
            self._lose(name, damage)
        return ~np.isin(windows.episode, [name.id for name in lost]) if lost else None

    def _erase(self, episode_id: int, start: int, length: int) -> None:
        self.check_writable()
        if episode_id == self.table.ids[-1]:
            self._own.keep_numbers(self.table.next_id, self.table.next_start)
        try:
            self._own.remove(str(self._directory.name_of(*self.table.row_of(episode_id))))
        except OSError as error:
            raise with_advice(error, self._directory.path, f"Episode {episode_id} could not be evicted") from error
        self._reader.forget(episode_id)
        if self._log is not None:
            self._log.remove(episode_id, self.table)

    def _publish(self, row: TableRow) -> None:
        assert self._log is not None
        self._log.add(row, self.table)

    # Files that come and go.

    def refresh(self) -> None:
        """Look for episodes that the writer has added or evicted. Drawing does so by itself, but not each time.

        Raises:
            RuntimeError: The dataset is closed.
        """
        self._refresh(is_urgent=True)

    def _refresh(self, is_urgent: bool = False) -> None:
        self._check_open()
        if self._is_writer():
            return
        # The log does not hold the fields.
        if self._log is not None and self._fields is not None:
            for episode_id in self._log.follow(self.table):
                self._reader.forget(episode_id)
            if not self._log.has_ended:
                return
            # Another writer may come.
            self._log = None
            self._seen |= {str(self._directory.name_of(*row)) for row in self.table.rows.tolist()}
        self._directory.look(self._find_episodes, is_urgent)

    def _lose(self, name: FileName, damage: str | None) -> None:
        """Forget an episode whose file is damaged or, if `damage` is None, gone."""
        # Drawing changes the table of a reader, too.
        with self._lock, self._draw_lock:
            if not self._forget(name):
                return
            # What is missing in a reader's directory was evicted by the writer.
            self.num_lost += damage is not None or self._is_writer()
            if self._log is not None and self._is_writer():
                self._log.remove(name.id, self.table)
                with contextlib.suppress(OSError):
                    self._own.keep_numbers_of(self.table)
            if damage is not None:
                self._report_damage([(str(name), f"it {damage}")])

    def _forget(self, name: FileName) -> bool:
        """Remove an episode from the table; False if it is not there."""
        position = self.table.position(name.id)
        if position is None or self._directory.name_of(*self.table.episode(position)) != name:
            return False
        self.table.remove(position)
        self._reader.forget(name.id)
        return True

    # Closing, pickling, and who may write.

    def sync(self) -> None:
        """Write down the late fields, and their values that have changed: after this, they outlive the process.

        A crash meanwhile leaves the values of an episode in a field as they were before or after, never in between.

        Raises:
            RuntimeError: In a reader or a copy, or once the dataset is closed.
            OSError: A file could not be written. Calling it again tries again.
        """
        self.check_writable()
        assert self._late_files is not None  # It is open.
        self._late_files.save(self.late, self.table, self._lock)

    def close(self) -> None:
        """`sync`, release the lock and close all files. Episodes are not lost if this is never called.

        OSError, with which the dataset stays open, if values of late fields could not be written.
        """
        self.wait_for_save()
        if self._late_files is not None and self._is_writer():
            self.sync()
        self._is_closed, self._late_files = True, None
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
        handle = pickled_handle(self._log if self._is_writer() else None, self.late)
        info = EpisodeDatasetInfo(self.fields, self.verification_mode)
        arguments = self.capacity, info, None, self._directory.path, self.serialization_strategy
        counts = self.num_lost, self.num_dismissed
        return open_copy, (
            IndividualFileDataset,
            handle,
            counts,
            self._objects._asdict(),
            *arguments,
            self.max_sampling_attempts,
        )

    @property
    def longest_window(self) -> int:
        """The capacity; unlimited for a reader, because the writer may have a larger capacity."""
        return sys.maxsize if self._writer is None else self.capacity

    def _is_writer(self) -> bool:
        # A forked child has inherited everything but the lock.
        return self._writer == os.getpid()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"The dataset of {self._directory.path} is closed.")

    def check_writable(self) -> None:
        """RuntimeError in a reader, in a process other than the writer's, and once the dataset is closed."""
        self._check_open()
        if not self._is_writer():
            raise RuntimeError(
                f"This dataset only reads {self._directory.path}: it was opened with mode='r', or is a copy of the one "
                "that writes. Open it with mode='a'."
            )
