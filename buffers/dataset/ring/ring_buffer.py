"""RingBufferDataset: episodes in memory, in one preallocated tensor a field."""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, final

import numpy as np
import torch

from buffers.compression import MOST_BYTES, BlockRoom, Compress, CompressedEpisode, chosen_codecs
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.episode_source import Rows
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.ring.admission import AdmittingRing
from buffers.dataset.ring.rows import Kind, RingRows
from buffers.evictor import Evictor, FIFOEvictor
from buffers.fields import Fields, TensorType
from buffers.sharing import PublishedTable, SharedArrays
from buffers.sharing.handover import Door, Owner, enter
from buffers.table import EpisodeTable, TableRow, Windows
from buffers.utils import Process, format_bytes, integer, number, usable_device

__all__ = ["RingBufferDataset"]

_LARGEST_HALF = float(np.finfo(np.float16).max)


@final
class RingBufferDataset(AdmittingRing):
    """Episodes in RAM or on a GPU; the oldest are overwritten by the newest.

    The row with step id s lies at offset `s % capacity`. An episode never wraps: one that does not fit before the end
    begins at offset 0, and step ids skip to the next multiple of the capacity:

        offset    0  1  2  3  4  5  6  7          capacity 8, episodes of 3, 4 and 3 rows: the third does not
        step id   8  9 10  3  4  5  6  .          fit behind the second, and overwrites the first

    So every episode is one slice. The rows left over at the end stay empty for a lap, so a ring may evict up to (its
    longest episode - 1) steps early. It always holds the newest episodes, whole.

        >>> dataset = RingBufferDataset(capacity=8)
        >>> for length in (3, 4, 3):
        ...     episode_id = dataset.add_episode({"obs": np.zeros(length)})
        >>> dataset.episode_lengths
        [4, 3]

    Args:
        capacity: In steps. Memory for all of them is reserved when the fields are known, and used as it is written.
        info: Fields and checks; if it has `fields`, memory is reserved now.
        evictor: `FIFOEvictor` or None; other datasets take any.
        device: Where episodes are stored and batches are made.
        half_precision: Whether to store float32 as float16 (up to 65,504), if it is not compressed. Batches are
            float32 again.
        compress: Fields to be kept compressed, and how: `{"obs/image": "lz4"}`, or by type, `{ColorImage: "lz4"}`.
            "lz4" is fast, "zstd" smaller, "jpeg" lossy. Needs the extra `compress`; see `docs/memory.md`.
            By default what `info` says.
        capacity_bytes: The most bytes of compressed rows: the oldest episodes leave when that is reached, too.

    Raises:
        TypeError: `compress` is no dict from names, or types, to names of codecs.
        ValueError: Another evictor than `FIFOEvictor`, a device that is not available or no CPU if rows are compressed,
            or a field that there is not, or that a codec cannot compress.
        ImportError: The library of a codec is missing.
        MemoryError: The memory for `capacity` steps could not be allocated. More than there is in all is a warning.
    """

    reads_beside_writers = reads_before_episodes = has_circular_ids = True

    def __init__(
        self,
        capacity: int,
        info: EpisodeDatasetInfo | None = None,
        evictor: Evictor | None = None,
        device: torch.device | str = "cpu",
        half_precision: bool = False,
        *,
        compress: Compress | None = None,
        capacity_bytes: int | None = None,
    ) -> None:
        if evictor is not None and type(evictor) is not FIFOEvictor:
            raise ValueError(
                f"A RingBufferDataset overwrites its oldest rows, so it can only use FIFOEvictor, found "
                f"{type(evictor).__name__}. IndividualFileDataset takes any evictor."
            )
        self.device = usable_device("device", device)
        self.half_precision = self.refuses_values = bool(half_precision)
        # Its memory holds the rows, too. None on a GPU.
        self._published: PublishedTable | None = None
        # Rows before this step id may be overwritten.
        self._oldest_step = 0
        # Of episodes with smaller ids, a copy of a reader does not know the info.
        self._first_info_id = 0
        # The process that adds episodes; in others, this dataset reads what that one publishes.
        self._writer = Process.number
        # Where other processes attach; and in those, who shares it.
        self._door: Door | None = None
        self._owner: Owner | None = None
        self.capacity_bytes = None if capacity_bytes is None else integer("capacity_bytes", capacity_bytes, 1)
        # Compressed rows; None if there are none, or before the fields are known.
        self._room: BlockRoom | None = None
        super().__init__(capacity, info, evictor, compress)
        if self.compress and self.device.type != "cpu":
            raise ValueError(f"Rows are decompressed by the CPU: leave out `compress` for a ring on {self.device}.")
        if self.capacity_bytes is not None and not self.compress:
            raise ValueError("`capacity_bytes` bounds compressed rows: give `compress`, or leave it out.")
        if self.capacity_bytes is not None and self.capacity_bytes > MOST_BYTES:
            raise ValueError(f"`capacity_bytes` must be at most {MOST_BYTES}, 128 GiB, found {self.capacity_bytes}.")

    def _allocate(self, fields: Fields) -> None:
        self.codecs = chosen_codecs(self.compress, fields)
        kinds = self._kinds(fields)
        num_bytes = sum(kind.stored.nbytes for kind in kinds.values()) * self.capacity
        needs = f"A `capacity` of {self.capacity} steps needs {format_bytes(num_bytes)} on {self.device}"
        try:
            if self.device.type == "cpu":
                rows = RingRows.layout(kinds, self.capacity)
                # Episodes leave in order, so a published table of this size never has to move a live one.
                self._published = PublishedTable(SharedArrays({**rows, **PublishedTable.layout(self.capacity + 2)}))
            self._room = BlockRoom(self.codecs, self.capacity, self.capacity_bytes) if self.codecs else None
            self._set_rows(fields)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise MemoryError(f"{needs}, which could not be allocated. Lower it.") from None
        total = _total_memory(self.device)
        if num_bytes > total:
            warnings.warn(f"{needs} once it is full, which has {format_bytes(total)} in all. Lower it.", stacklevel=2)

    def _kinds(self, fields: Fields) -> dict[str, Kind]:
        return {
            name: Kind(self.stored_type(field), field.dtype)
            for name, field in fields.items()
            if name not in self.codecs
        }

    def _set_rows(self, fields: Fields) -> None:
        memory = None if self._published is None else self._published.memory
        self._rows = RingRows(self._kinds(fields), self.capacity, self.device, memory)

    def stored_type(self, field: TensorType) -> TensorType:
        """The type of a field in memory: float16 for float32 with `half_precision`, else the same."""
        if self.half_precision and field.dtype == torch.float32:
            return TensorType(field.shape, torch.float16)
        return field

    def _check(self, episode: dict[str, np.ndarray]) -> None:
        # Before the fields are known, neither are the codecs; `store` checks again.
        if not self.half_precision or (self.compress and self._fields is None):
            return
        for name, rows in episode.items():
            is_half = rows.dtype == np.float32 and name not in self.codecs
            if is_half and (np.isfinite(rows) & (np.abs(rows) > _LARGEST_HALF)).any():
                raise ValueError(
                    f"Field `{name}` holds numbers beyond {_LARGEST_HALF:.0f}, which half_precision=True cannot store."
                )

    def check_writable(self) -> None:
        """RuntimeError in any process but the one that made the ring."""
        # Ask the kernel: `Process.number` is stale after a fork outside of Python, and a second writer destroys data.
        if os.getpid() != self._writer:
            raise RuntimeError("Only the process that made a RingBufferDataset can change it; this one reads along.")

    def _find_info(self, row: TableRow) -> EpisodeInfo:
        if Process.number != self._writer or row[2] < self._first_info_id:
            raise RuntimeError(
                "The info of episodes stays in the process that made a RingBufferDataset; this one reads along. Look "
                "it up there, or use an IndividualFileDataset."
            )
        return super()._find_info(row)

    def start_of_next(self, length: int) -> int:
        """The step id at which an episode of `length` rows will begin: the next, or the next multiple of capacity."""
        start = self.table.next_start
        num_left = -start % self.capacity
        return start if length <= (num_left or self.capacity) else start + num_left

    def lacks_room(self, start: int, length: int) -> bool:
        """Whether the oldest episode lies where `length` rows from step id `start` on will be written.

        Or whether its compressed rows do.
        """
        if not len(self.table):
            return False
        is_full = self._room is not None and self._room.lacks(len(self._region))
        return is_full or self.table.oldest_start < start + length - self.capacity

    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        self._rows.write(start % self.capacity, episode)
        if self._room is not None:
            self._room.write(start, self._region)

    def _publish(self, row: TableRow) -> None:
        if self._published is not None:
            self._published.add(row, self.table)

    def _announce(self) -> None:
        if self._published is not None:
            self._published.announce()

    def _erase(self, episode_id: int, start: int, length: int) -> None:
        if start != self.table.oldest_start:
            raise ValueError("A RingBufferDataset can only evict its oldest episode, `episode_index`=0.")
        self._oldest_step = start + length
        if self._published is not None:
            self._published.retire(self._oldest_step)

    def _read(self, windows: Windows, out: Rows) -> np.ndarray | None:
        plain = out if self._room is None else {name: out[name] for name in out if name not in self.codecs}
        self._rows.gather(windows.start % self.capacity, windows.length, plain)
        if self._room is not None:
            names = [name for name in out if name in self.codecs]
            self._room.read(windows, out, self._find_oldest_step, names)
        return self.which_are_whole(windows)

    def read_stored(
        self, windows: Windows, out: Rows | None = None, names: Iterable[str] | None = None
    ) -> tuple[Rows, np.ndarray | None]:
        """As `EpisodeSource.read_stored`."""
        if out is None and self._room is None:
            gathers = self._rows.item_gathers(len(windows.start), windows.length)
            if gathers:
                offsets = windows.start % self.capacity
                try:
                    rows = {name: gathers[name](offsets) for name in (gathers if names is None else names)}
                    return rows, self.which_are_whole(windows)
                except IndexError:
                    pass  # Padding reaches beyond an end of the ring.
        return super().read_stored(windows, out, names)

    def which_are_whole(self, windows: Windows) -> np.ndarray | None:
        """After reading: None if all are whole, else bool `(B,)`, False where rows may have been overwritten."""
        oldest_step = self._find_oldest_step()
        if oldest_step <= windows.oldest_step:
            return None  # No episode has left since the draw.
        is_whole = windows.first_steps >= oldest_step
        return None if is_whole.all() else is_whole

    def compressed_bytes(self) -> dict[str, int]:
        """As `EpisodeReader.compressed_bytes`."""
        return {} if self._room is None else self._room.field_bytes

    @property
    def fill(self) -> float:
        """As `EpisodeSource.fill`; or of `capacity_bytes`, if that is more."""
        num_bytes = sum(self.compressed_bytes().values())
        return max(super().fill, 0.0 if self.capacity_bytes is None else num_bytes / self.capacity_bytes)

    def _find_oldest_step(self) -> int:
        """Rows of smaller step ids may be overwritten."""
        if self._published is None or Process.number == self._writer:
            return self._oldest_step
        return self._published.oldest_step

    # Other processes of this host.

    def share(self, name: str) -> None:
        """Let other processes of this user and host `attach` to the ring, for as long as it exists.

        Args:
            name: 1 to 64 letters, digits, '.', '_' or '-'. It is a socket in a folder that only this user can enter:
                `$XDG_RUNTIME_DIR/buffers`, or `buffers-UID` in the folder for temporary files.

        Raises:
            ValueError: Another name, or a ring on a GPU.
            RuntimeError: Another ring is shared under the name, or this one under another; this is not the process that
                made the ring, or not Linux.
        """
        self.check_writable()
        self.check_workers()
        if self._door is not None and self._door.name != name:
            raise RuntimeError(f"The ring is shared already, as `{self._door.name}`.")
        ring = weakref.ref(self)
        self._door = self._door or Door(name, lambda: None if (alive := ring()) is None else alive._handed_over())

    @classmethod
    def attach(cls, name: str, timeout: float = 10.0) -> RingBufferDataset:
        """The live ring that another process shares under a name: torchrun's ranks, an evaluation.

        It draws what that process adds, without a copy; `num_workers` are its own. It cannot add, evict, update late
        fields, or draw by priorities. Once the other process has ended, or has given the ring up, drawing is a
        RuntimeError. Late fields that are added after this call are not seen.

        Args:
            name: As given to `share`.
            timeout: Seconds to wait for a ring of that name, and its first episode or fields.

        Raises:
            ValueError: A name that `share` would not take, or a timeout that is no finite number.
            RuntimeError: There is no such ring in time; or this is not Linux.
        """
        state, owner = enter(name, number("timeout", timeout, 0.0))
        ring = cls.__new__(cls)
        ring.__setstate__({**state, "_owner": owner})
        return ring

    def _handed_over(self) -> dict[str, Any] | None:
        """What another process needs to attach; None while there are no fields."""
        with self._lock:
            if self._published is None or self._fields is None:
                return None
            return {**self.__getstate__(), "extension": None, "unsaved": None}

    def check_workers(self) -> None:
        """ValueError if the ring is on a GPU."""
        if self.device.type != "cpu":
            raise ValueError(f"A ring on {self.device} makes its batches there: workers cannot. Use `num_workers`=0.")

    def _refresh(self) -> None:
        if self._owner is not None:
            self._owner.check()
        if Process.number != self._writer and self._published is not None:
            self._published.follow(self.table)

    def has_news(self) -> bool:
        """As `EpisodeSource.has_news`."""
        return self._published is not None and Process.number != self._writer and self._published.has_news

    def __getstate__(self) -> dict[str, Any]:
        """A handle of a few kilobytes for a process that is being started; on a GPU, the data itself."""
        state = self.__dict__.copy()
        state["_door"] = None
        rows = state.pop("_rows", None)
        if self._published is None:
            columns = {} if rows is None else rows.columns
            state["tensors"] = {name: column.tensor for name, column in columns.items()}
        else:
            state["table"], state["_drawn_tables"], state["_infos"] = EpisodeTable(), {}, {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = state.pop("tensors", {})
        self.__dict__.update(state)
        # An unpickled ring is a reader, even in the writer's process; on a GPU it has its own data.
        self._writer = Process.number if self._published is None else -1
        if self._fields is not None:
            self._set_rows(self._fields)
        for name, tensor in tensors.items():
            self._rows.columns[name].tensor.copy_(tensor)
        self._refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> RingBufferDataset:
        """A ring of its own with the same episodes."""
        info = EpisodeDatasetInfo(self.fields, self.verification_mode)
        other = RingBufferDataset(
            self.capacity,
            info,
            None,
            self.device,
            self.half_precision,
            compress=self.compress,
            capacity_bytes=self.capacity_bytes,
        )
        other.max_sampling_attempts = self.max_sampling_attempts
        with self._lock:
            for start, length, episode_id, cut in self.table.rows.tolist():
                episode = self.arrays_of_id(episode_id)
                if episode is not None:  # A reader finds one gone if the writer has overwritten it.
                    # A reader's could be overwritten meanwhile.
                    if self._room is not None and Process.number == self._writer:
                        episode = CompressedEpisode(episode, self._room.blocks(start, length), self.codecs)
                    other.table.skip_to(episode_id, start)
                    other.add(episode, cut, self._infos.get(episode_id))
            other.num_lost, other.num_dismissed = self.num_lost, self.num_dismissed
            other.table.skip_to(self.table.next_id, self.table.next_start)
            other.late.copy_from(self.late, other.table)
            is_writer = Process.number == self._writer
            other._first_info_id = self._first_info_id if is_writer else self.table.next_id
        return other


def _total_memory(device: torch.device) -> float:
    """Bytes, used or not; infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    is_known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if is_known else math.inf
