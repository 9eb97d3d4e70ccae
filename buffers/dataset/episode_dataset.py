"""EpisodeDataset: the contract of a store of whole episodes, and all that is common to stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from buffers.dataset.fields import Fields, TensorType, as_tensor
from buffers.dataset.index import EpisodeIndex, Windows
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.verification import VerificationMode, check_rows
from buffers.evictor.base import Evictor
from buffers.evictor.fifo import FIFOEvictor
from buffers.utils import ThreadLock, format_bytes, integer

if TYPE_CHECKING:
    from buffers.loader import SequenceLoader
    from buffers.stream import SequenceStream

__all__ = ["EpisodeDataset"]


class EpisodeDataset(IterableDataset, ABC):
    """Episodes in, windows out.

    A store of its own implements four methods and inherits the rest. Data is flat there: `name -> array`, the
    names being those of `fields` ("obs/image" for nested dicts).

        _allocate(fields)                 make room; called once, when the fields are known
        _write(episode, start, id)        store `name -> (L, *shape)` numpy arrays
        _read(windows, out)               fill `name -> (B, T, *shape)` tensors
        _erase(id, start, length)         forget an episode

    Args:
        capacity: In steps, over all episodes.
        info: What is known beforehand; with its `fields`, storage is laid out now.
        evictor: Chooses who leaves when room is needed; the oldest by default.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: `capacity` is not positive.
    """

    device = torch.device("cpu")
    #: How often windows that could not be read (their episode had just been evicted) are drawn again.
    max_sampling_attempts = 100
    #: A store whose `_write` may fail (a full disk) sets this to False, and then loses no episode to one that it
    #: could not take.
    _evicts_before_writing = True
    #: Whether `_check` may refuse values for what they are, so that rows are shown to it before their episode ends.
    _refuses_values = False

    def __init__(self, capacity: int, info: EpisodeDatasetInfo | None = None, evictor: Evictor | None = None) -> None:
        self.capacity = integer("capacity", capacity, minimum=1)
        if info is not None and not isinstance(info, EpisodeDatasetInfo):
            raise TypeError(f"`info` must be an EpisodeDatasetInfo, found {type(info).__name__}.")
        if evictor is not None and not isinstance(evictor, Evictor):
            raise TypeError(f"`evictor` must be an Evictor, found {type(evictor).__name__}.")
        self.evictor = FIFOEvictor() if evictor is None else evictor
        self.verification_mode = VerificationMode.BASIC_CHECKS if info is None else info.verification_mode
        self.index = EpisodeIndex()
        # Threads may add and draw at the same time; worker processes need no lock.
        self._lock = ThreadLock()
        #: Episodes evicted so far, for whatever reason.
        self.num_evicted = 0
        self._has_evicted = False
        self._fields: Fields | None = None
        if info is not None and info.fields is not None:
            self._set_fields(info.fields)

    # What a store implements.

    @abstractmethod
    def _allocate(self, fields: Fields) -> None:
        """Make room for the fields. Nothing else has been called before, and it is called once."""

    @abstractmethod
    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        """Store an episode of L rows; room for it has been made, and its arrays are checked.

        Args:
            episode: `name -> (L, *shape)`, valid during the call only: copy.
            start: Step id of its first row. Step ids of successive episodes are contiguous.
            episode_id: Its id, larger than any before.
        """

    @abstractmethod
    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> np.ndarray | None:
        """Copy windows into `out`.

        Args:
            windows: B windows of T rows; row t of window b is row `windows.step[b] + t` of its episode.
            out: `name -> (B, T, *shape)`, contiguous, to be filled. Rows behind the end of an episode (there are
                some only where whole episodes are padded) may be left as they come.

        Returns:
            None if all were read, else bool `(B,)`, False for windows whose episode is gone: they are drawn again.
        """

    @abstractmethod
    def _erase(self, episode_id: int, start: int, length: int) -> None:
        """Give up the room of an episode."""

    def _check(self, episode: dict[str, np.ndarray]) -> None:
        """Refuse, by a ValueError, an episode that the store could not give back as it is. Refuses none by default."""

    def _stored_type(self, field: TensorType) -> TensorType:
        """How the store keeps a field: as it is, unless it says otherwise."""
        return field

    def check_workers(self) -> None:
        """Refuse, by a ValueError, worker processes where they could not read. Refuses none by default."""

    def _refresh(self) -> None:
        """Called before windows are drawn: a store that another process writes to looks for what is new."""

    # Episodes in.

    def add_episode(self, episode: Mapping[str, Any]) -> int:
        """Store a complete episode, evicting others if it needs their room. It can be drawn at once.

        Args:
            episode: `field -> (L, *shape)` arrays or tensors, or lists of L rows; nested as the steps are. Copied.

        Returns:
            The episode's id.

        Raises:
            TypeError: A value that is no tensor, array or list of numbers.
            ValueError: No rows, rows of unequal number, more than the capacity, or other fields than the dataset's.
                The dataset is as it was.
        """
        with self._lock:
            fields = Fields.from_episode(episode) if self._fields is None else self._fields
            return self._add(fields, self._checked(fields, episode))

    def _add(self, fields: Fields, arrays: dict[str, np.ndarray]) -> int:
        """`add_episode` for flat arrays that fit the fields, which are those of the dataset if it has any."""
        self._check(arrays)
        length = len(arrays[fields.names[0]])
        if length > self.capacity:
            raise ValueError(f"An episode of {length} steps does not fit a `capacity` of {self.capacity} steps.")
        if self._fields is None:
            self._set_fields(fields)
        if self._evicts_before_writing:
            self._make_room(length)
        self._write(arrays, self.index.next_start, self.index.next_id)
        if not self._evicts_before_writing:
            self._make_room(length)
        return self.index.append(length)

    def _make_room(self, length: int) -> None:
        while self.num_timesteps + length > self.capacity:
            self._evict(self.evictor.evict(self))
            self._has_evicted = True

    def _checked(self, fields: Fields, episode: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The episode as flat arrays, known to fit the fields."""
        arrays = fields.arrays(episode)
        if arrays[0].ndim == 0 or len(arrays[0]) == 0:
            raise ValueError(f"Field `{fields.names[0]}` has no rows: an episode needs at least one step.")
        for name, array in zip(fields.names, arrays, strict=True):
            if array.ndim and len(array) != len(arrays[0]):
                raise ValueError(f"Field `{name}` has {len(array)} rows, `{fields.names[0]}` has {len(arrays[0])}.")
        check_rows(fields, arrays, (len(arrays[0]),), self.verification_mode)
        return dict(zip(fields.names, arrays, strict=True))

    def _set_fields(self, fields: Fields) -> None:
        self._allocate(fields)
        self._fields = fields

    # Episodes out.

    def evict_episode(self, episode_index: int) -> None:
        """Forget an episode.

        Args:
            episode_index: 0 is the oldest; negative numbers count from the newest.

        Raises:
            ValueError: There is no such episode.
        """
        with self._lock:
            self._evict(episode_index)

    def _evict(self, episode_index: int) -> None:
        position = self._position(episode_index)
        index = self.index
        start, length, episode_id = index.episode(position)
        self._erase(episode_id, start, length)
        index.remove(position)
        self.num_evicted += 1

    def get_episode(self, episode_index: int) -> dict[str, Any]:
        """A copy of an episode, `field -> (L, *shape)`.

        Args:
            episode_index: 0 is the oldest; negative numbers count from the newest.

        Raises:
            ValueError: There is no such episode.
            RuntimeError: It is gone (a file that someone has removed).
        """
        position = self._position(episode_index)
        episode_id = int(self.index.ids[position])
        episode = self._whole(position)
        if episode is None:
            raise RuntimeError(f"Episode {episode_id} is gone from the store.")
        return episode

    def _whole(self, position: int) -> dict[str, Any] | None:
        """A copy of an episode; None if it is gone."""
        length = int(self.index.lengths[position])
        windows = self.index.windows(np.array([position]), np.zeros(1, np.int64), length)
        out = self._empty_batch(windows)
        if self._read(windows, out) is not None:
            return None
        assert self._fields is not None  # An episode was found, so there are fields.
        return self._fields.unflatten({name: tensor[0] for name, tensor in out.items()})

    def episodes(self) -> Iterator[dict[str, Any]]:
        """Copies of all episodes, oldest first; those that are evicted meanwhile are left out."""
        for episode_id in self.index.ids.tolist():
            position = self.index.position(episode_id)
            episode = None if position is None else self._whole(position)
            if episode is not None:
                yield episode

    def _position(self, episode_index: int) -> int:
        position = integer("episode_index", episode_index, minimum=-self.num_episodes)
        if position >= self.num_episodes:
            raise ValueError(f"`episode_index`={episode_index} is out of range: {self.num_episodes} episodes live.")
        return position % self.num_episodes

    def _empty_batch(self, windows: Windows) -> dict[str, torch.Tensor]:
        """Memory for windows: `name -> (B, T, *shape)`."""
        assert self._fields is not None  # Windows are drawn from episodes, so there are fields.
        leading = (len(windows), windows.length)
        if self.device.type == "cpu":
            # 1.0 us a field, and 2.2 us by torch.empty.
            return {
                name: as_tensor(np.empty(leading + shape, dtype), self._fields[name])
                for name, dtype, shape in self._fields.layout
            }
        return {
            name: torch.empty(leading + tensor_type.shape, dtype=tensor_type.dtype, device=self.device)
            for name, tensor_type in self._fields.items()
        }

    # Windows out.

    def get_loader(
        self,
        batch_size: int,
        sequence_length: int | None = None,
        chunk_size: int | None = None,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        **options: Any,
    ) -> SequenceLoader:
        """A `DataLoader` of batches without end: `field -> (batch_size, sequence_length, *shape)`.

        Args:
            batch_size: B, sequences a batch.
            sequence_length: T, steps of each; None for whole episodes, padded with zeros to the longest of the
                batch and accompanied by `mask`.
            chunk_size: Sequences that one read brings; it divides `batch_size`, which is the default. It bounds
                what a store holds at once and changes nothing that is drawn.
            num_workers: Processes that load; 0 by default.
            pin_memory: As in `DataLoader`; off by default.
            **options: `sampler`, `transform`, `include` and `seed` of `SequenceStream`; all else goes to
                torch's `DataLoader` as it is.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An argument out of its range.
        """
        from buffers.loader import SequenceLoader
        from buffers.stream import SequenceStream

        names = ("sampler", "transform", "include", "seed")
        stream_options = {name: options.pop(name) for name in names if name in options}
        stream = SequenceStream(self, batch_size, sequence_length, chunk_size, **stream_options)
        return SequenceLoader(stream, num_workers=num_workers, pin_memory=pin_memory, **options)

    def sequences(self, sequence_length: int = 1, **options: Any) -> SequenceStream:
        """An `IterableDataset` of single sequences `field -> (T, *shape)`, for a `DataLoader` of one's own.

            DataLoader(dataset.sequences(16), batch_size=32, num_workers=2)

        Args:
            sequence_length: T, in steps.
            **options: `sampler`, `transform`, `include` and `seed`. In worker processes without a `seed`, torch's
                own base seed is used.
        """
        from buffers.stream import SequenceStream

        return SequenceStream(self, None, integer("sequence_length", sequence_length, 1), **options)

    def __iter__(self) -> Iterator[Any]:
        """Single steps as sequences of length 1, without end; the same as `iter(dataset.sequences(1))`."""
        return iter(self.sequences(1))

    # What there is.

    @property
    def fields(self) -> Fields | None:
        """The fields, None until they are known."""
        return self._fields

    @property
    def info(self) -> EpisodeDatasetInfo:
        """What another dataset needs to be told to hold the same episodes."""
        return EpisodeDatasetInfo(self._fields, self.verification_mode)

    @property
    def num_episodes(self) -> int:
        """Live episodes."""
        return len(self.index)

    @property
    def num_timesteps(self) -> int:
        """Steps of all live episodes."""
        return self.index.num_steps

    @property
    def episode_lengths(self) -> list[int]:
        """Steps of each live episode, oldest first."""
        return self.index.lengths.tolist()

    @property
    def average_episode_length(self) -> float:
        """Mean steps of a live episode; 0.0 if there is none."""
        return self.num_timesteps / self.num_episodes if self.num_episodes else 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is no episode."""
        return self.num_episodes == 0

    @property
    def is_full(self) -> bool:
        """Whether every step is taken, or episodes have already had to leave for others."""
        return self._has_evicted or self.num_timesteps == self.capacity

    def __len__(self) -> int:
        return self.num_timesteps

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("Use `get_episode(index)` for an episode, or `get_loader` for batches of sequences.")

    def __repr__(self) -> str:
        return _table(self)


def _table(dataset: EpisodeDataset) -> str:
    """The dataset as a table of its fields under a line of its counts."""
    share = dataset.num_timesteps / dataset.capacity
    head = (
        f"{type(dataset).__name__}: {dataset.num_episodes:,} episodes, "
        f"{dataset.num_timesteps:,} of {dataset.capacity:,} steps ({share:.0%})"
    )
    if not dataset.is_empty:
        lengths = dataset.index.lengths
        head += f", length {lengths.min()} to {lengths.max()}, mean {dataset.average_episode_length:.1f}"
    if dataset.fields is None:
        return head + "\n(no fields yet: the first episode decides)"
    rows = [("field", "type", "dtype", "shape", "bytes a step", "bytes stored")]
    for name, field in dataset.fields.items():
        stored = dataset._stored_type(field)
        dtype = str(field.dtype).removeprefix("torch.")
        if stored.dtype != field.dtype:
            dtype += f" as {str(stored.dtype).removeprefix('torch.')}"
        num_bytes = format_bytes(stored.nbytes * dataset.num_timesteps)
        rows.append((name, type(field).__name__, dtype, str(field.shape), f"{stored.nbytes:,}", num_bytes))
    total = sum(dataset._stored_type(field).nbytes for field in dataset.fields.values())
    rows.append(("total", "", "", "", f"{total:,}", format_bytes(total * dataset.num_timesteps)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([head, lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])
