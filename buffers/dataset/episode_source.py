"""EpisodeSource: the reading half of an EpisodeDataset, which a mixture shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from buffers.conversion import as_array
from buffers.dataset.printing import counts_line, fields_table
from buffers.dataset.statistics import FieldStatistics, RunningStatistics, statistics_of
from buffers.fields import Fields, TensorType, as_tensor
from buffers.late import LateFields
from buffers.loading import LoaderOptions, SequenceLoader, SequenceStream, StreamOptions
from buffers.loading.padding import shift
from buffers.sampler import Sampler
from buffers.table import EMPTY_PART, DrawContext, EpisodeTable, PartTable, Selection, Split, Windows
from buffers.utils import ThreadLock, integer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EpisodeSource", "Rows"]

Rows = dict[str, torch.Tensor]


class EpisodeSource(IterableDataset, ABC):
    """Episodes that windows are drawn from; `capacity` is in steps over all."""

    device = torch.device("cpu")
    #: How often a batch is completed by other windows, where episodes are gone before they are read.
    max_sampling_attempts = 100
    #: The larger dataset behind this one, see `EpisodeDataset.extend`.
    extension: Any = None
    #: Values that were given after their rows were stored; None where members have them.
    late: LateFields | None = None
    #: Whether it is a mixture, see `sources_of`.
    has_members = False
    #: Whether `_read` takes windows that begin before their episodes, and leaves the rows before those as they are.
    reads_before_episodes = False
    #: Whether `chunk_size` applies. If not, batches are read as a whole.
    reads_in_chunks = True

    def __init__(self, capacity: int) -> None:
        self.capacity = integer("capacity", capacity, minimum=1)
        self.table = EpisodeTable()
        # Snapshots of the table, or of a part, so that drawing never holds up an addition.
        self._drawn_tables: dict[Split | None, EpisodeTable] = {}
        self._draw_lock = ThreadLock()
        #: Of the ids that are gone: those that were not evicted, and those that were evicted without need of room.
        self.num_lost = self.num_dismissed = 0
        self._fields: Fields | None = None
        self._batch_fields: tuple[Fields | None, Fields | None, Fields | None] = (None, None, None)
        self.running_statistics = RunningStatistics()

    @abstractmethod
    def _read(self, windows: Windows, out: Rows) -> np.ndarray | None:
        """Copy windows into `out`.

        Args:
            windows: B windows of T rows; row t of window b is row `windows.step[b] + t` of its episode. They begin in
                their episodes, unless `reads_before_episodes`.
            out: `name -> (B, T, *shape)`, contiguous, for some or all of the fields. Padding need not be written.

        Returns:
            None if all were read, else bool `(B,)`, False for windows whose episode is gone: others replace them.
        """

    def stored_type(self, field: TensorType) -> TensorType:
        """The type as which a field is stored."""
        return field

    def _refresh(self) -> None:
        """Bring the table up to date with what another process has added; called before each draw."""

    def has_news(self) -> bool:
        """Whether another process has added an episode since the last draw, or is about to."""
        return False

    def check_workers(self) -> None:
        """ValueError if worker processes cannot read from here."""

    def check_drawable(self) -> None:
        """RuntimeError while the fields are not known."""
        if self.fields is None:
            with self._draw_lock:
                self._refresh()
        if self.fields is None:
            raise RuntimeError(self.table.no_window_message(None))

    def sources_of(self, windows: Windows) -> np.ndarray:
        """The member of a mixture that each window is in, int64 `(B,)`."""
        raise NotImplementedError

    @property
    def leaves(self) -> list[EpisodeSource]:
        """The datasets that hold the episodes; `Windows.source` is a position in this list."""
        return [self]

    def table_to_draw(self, selection: Selection) -> EpisodeTable:
        """A snapshot of the episodes that a selection has, brought up to date; the caller holds the lock."""
        self._refresh()
        table = self._drawn_tables.get(selection.split)
        if table is None:
            split = selection.split
            table = EpisodeTable() if split is None else PartTable(split.judge, EMPTY_PART)
            self._drawn_tables[selection.split] = table
        table.show(self.table)
        table.selection = selection
        return table

    def refresh(self) -> None:
        """Look for what another process has added or evicted. Drawing does so by itself, but not each time."""
        self._refresh()

    def snapshot(self, selection: Selection, bound: int, is_urgent: bool = False) -> EpisodeTable:
        """A copy of the table, with the episodes of ids below `bound` that a selection has; `is_urgent`: by now."""
        table = EpisodeTable()
        with self._draw_lock:
            if is_urgent:
                self.refresh()
            shown = self.table_to_draw(selection)
            table.replace(shown.rows[: shown.ids.searchsorted(bound)])
            table.skip_to(shown.next_id, 0)
        table.selection = selection
        return table

    def draw(
        self,
        samplers: Sequence[Sampler],
        num_windows: int,
        length: int | None,
        rng: np.random.Generator,
        selection: Selection,
        context: DrawContext,
    ) -> Windows:
        """Draw as `Sampler.draw` does, with the sampler of each leaf.

        Raises:
            RuntimeError: No episode is long enough.
            ValueError: The sampler did not draw what it was asked for.
        """
        with self._draw_lock:
            table, sampler = self.table_to_draw(selection), samplers[0]
            if self.late:
                self.late.follow(self.table)
                context = context._replace(late=self.late)
            table.context = context
            return _checked(table, sampler, sampler.draw(table, num_windows, length, rng), num_windows, length)

    def num_to_draw(self, length: int | None, selection: Selection, sampler: Sampler | None = None) -> int:
        """How many windows of `length` steps there are now, for a sampler; with None, episodes."""
        with self._draw_lock:
            table = self.table_to_draw(selection)
            return (table if sampler is None else sampler.part(table)).num_to_draw(length)

    def can_draw(self, length: int | None, selection: Selection, samplers: Sequence[Sampler] | None = None) -> bool:
        """Whether there is a window of `length` steps now; with None, whether there is an episode."""
        return self.num_to_draw(length, selection, None if samplers is None else samplers[0]) > 0

    def read(
        self, windows: Windows, out: Rows | None = None, names: Iterable[str] | None = None
    ) -> tuple[Rows, np.ndarray | None]:
        """Rows `name -> (B, T, *shape)`, and which windows were read, as `_read` returns.

        Into `out` if that is given, else of the fields in `names`, or of all that a batch has.
        """
        if not self.late or self.late.in_batches is None:
            return self.read_stored(windows, out, names)
        found = list((self.batch_fields or ()) if names is None else names) if out is None else list(out)
        late, stored = [n for n in found if n in self.late], [n for n in found if n not in self.late]
        rows = self.empty_batch(windows, late) if out is None else {name: out[name] for name in late}
        # First, so that what finds out whether an episode has left meanwhile comes after.
        self.late.read(windows, rows)
        if not stored:
            return rows, self.which_are_whole(windows)
        others, was_read = self.read_stored(windows, None if out is None else {n: out[n] for n in stored}, stored)
        return {name: rows[name] if name in rows else others[name] for name in found}, was_read

    def which_are_whole(self, windows: Windows) -> np.ndarray | None:
        """After reading, which windows may have been overwritten meanwhile, as `_read` returns."""
        return None

    def read_stored(
        self, windows: Windows, out: Rows | None = None, names: Iterable[str] | None = None
    ) -> tuple[Rows, np.ndarray | None]:
        """As `read`, without late fields."""
        out = self.empty_batch(windows, names) if out is None else out
        if self.reads_before_episodes or not (windows.step < 0).any():
            return out, self._read(windows, out)
        was_read = self._read(windows.moved_between(0, windows.episode_length - 1), out)
        shift(windows, out)
        return out, was_read

    def empty_batch(self, windows: Windows, names: Iterable[str] | None = None) -> Rows:
        """Uninitialized memory for windows, `name -> (B, T, *shape)`, of the fields in `names` or of all stored."""
        leading = len(windows), windows.length
        return {name: self.empty(name, leading) for name in (self._fields or () if names is None else names)}

    def empty(self, name: str, leading: tuple[int, int]) -> torch.Tensor:
        """Uninitialized memory for a field, `(*leading, *shape)`."""
        fields = self.batch_fields
        assert fields is not None  # Windows are drawn from episodes, so there are fields.
        kind = fields[name]
        if self.device.type == "cpu":
            # numpy is faster, and asks for huge pages.
            return as_tensor(np.empty(leading + kind.shape, kind.numpy_dtype), kind)
        return torch.empty(leading + kind.shape, dtype=kind.dtype, device=self.device)

    @property
    def longest_window(self) -> int:
        """The most steps that an episode can have."""
        return self.capacity

    def get_episode(self, episode_index: int) -> dict[str, Any]:
        """A copy of an episode, `field -> (L, *shape)`: 0 is the oldest; negative numbers count from the newest.

        Raises:
            ValueError: There is no such episode.
            RuntimeError: Its file has been removed.
        """
        while True:
            num_evicted = self.num_evicted
            episode_id = int(self.table.ids[self._position(episode_index)])
            episode = self.episode_of_id(episode_id)
            if episode is not None:
                return episode
            # If another thread has evicted one meanwhile, the index now means another episode.
            if self.num_evicted == num_evicted:
                raise RuntimeError(f"Episode {episode_id} is gone from the store.")

    def episodes(self) -> Iterator[dict[str, Any]]:
        """Copies of all episodes, oldest first, without those that are evicted meanwhile."""
        for episode_id in self.table.ids.tolist():
            episode = self.episode_of_id(episode_id)
            if episode is not None:
                yield episode

    def episode_of_id(self, episode_id: int) -> dict[str, Any] | None:
        """A copy of an episode, `field -> (L, *shape)`; None if it is gone."""
        rows = self.rows_of_id(episode_id)
        return None if rows is None or self._fields is None else self._fields.unflatten(rows)

    def arrays_of_id(self, episode_id: int) -> dict[str, np.ndarray] | None:
        """A copy of an episode as flat arrays, `name -> (L, *shape)`; None if it is gone."""
        rows = self.rows_of_id(episode_id)
        return None if rows is None else {name: as_array(name, tensor) for name, tensor in rows.items()}

    def rows_of_id(self, episode_id: int) -> Rows | None:
        """A copy of an episode as flat tensors, `name -> (L, *shape)`; None if it is gone."""
        table = EpisodeTable()
        table.show(self.table)
        position = table.position(episode_id)
        if position is None:
            return None
        length = table.episode(position)[1]
        rows, was_read = self.read_stored(table.windows(np.array([position]), np.zeros(1, np.int64), length))
        return {name: tensor[0] for name, tensor in rows.items()} if was_read is None else None

    def _position(self, episode_index: int) -> int:
        position = integer("episode_index", episode_index, minimum=-self.num_episodes)
        if position >= self.num_episodes:
            raise ValueError(f"`episode_index`={episode_index} is out of range: {self.num_episodes} episodes live.")
        return position % self.num_episodes

    def statistics(self, progress: bool = False) -> dict[str, FieldStatistics]:
        """Count, mean, standard deviation, minimum and maximum of each element of each field, to normalize by.

        Over all rows, each once, an episode at a time; over all members of a mixture, whatever their weights. A later
        call reads only what was added since, or all again if an episode has left. One that leaves meanwhile may count.
        Rows with which a piece repeats the piece before it (`overlap`) are left out. All episodes count, whatever
        the `split` of a loader, and `std` is that of the population. Rows of a `Recorder` begin with a row whose action
        and reward are zero, and it is counted. For actions, loop over `episodes()` and leave out row 0.

            >>> from buffers.dataset import RingBufferDataset
            >>> dataset = RingBufferDataset(capacity=1_000)
            >>> episode_id = dataset.add_episode({"obs": [[0.0, 1.0], [2.0, float("nan")]]})
            >>> found = dataset.statistics()["obs"]
            >>> found.count, found.mean, found.std
            (tensor([2, 1]), tensor([1., 1.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))

        Fields have their flat names ("obs/image"); complex ones are left out. `progress` shows a bar (of tqdm) over the
        episodes, for each member of a mixture. RuntimeError if there is no episode.
        """
        return statistics_of(self, progress)

    def get_loader(
        self,
        batch_size: int,
        sequence_length: int | None = None,
        chunk_size: int | None = None,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        **options: Unpack[LoaderOptions],
    ) -> SequenceLoader:
        """A `DataLoader` of batches, `field -> (batch_size, sequence_length, *shape)`; without `epochs`, it has no end.

            >>> from buffers.dataset import RingBufferDataset
            >>> dataset = RingBufferDataset(capacity=1_000)
            >>> episode_id = dataset.add_episode({"obs": np.zeros((50, 4)), "reward": np.zeros(50)})
            >>> batch = next(iter(dataset.get_loader(batch_size=8, sequence_length=10, include=("step",))))
            >>> {name: tuple(value.shape) for name, value in batch.items()}
            {'obs': (8, 10, 4), 'reward': (8, 10), 'step': (8, 10)}

        Args:
            batch_size: B, sequences in a batch.
            sequence_length: T, in steps; None for whole episodes, padded to the longest of the batch, with a `mask`.
            chunk_size: Sequences in one read, a divisor of `batch_size`. It does not change what is drawn. Files are
                read a batch at a time.
            num_workers: Worker processes; 0 by default.
            pin_memory: As in `DataLoader`. By default, batches for another `output_device` that is a GPU are pinned.
            **options: See `buffers.loading.StreamOptions` for what they mean, and `docs/windows.md`. Defaults are:
                sampler=UniformSampler(), transform=None, include=(), seed=None, output_device=None; pad_before=0,
                pad_after=0, pad="zero", offsets=None, pack=None, split=None; epochs=None and, with it, shuffle=True,
                drop_last=False, stride=1; rank=0, world_size=1. Of torch's `DataLoader`: prefetch_factor,
                persistent_workers, multiprocessing_context, worker_init_fn, timeout, collate_fn, generator.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An argument out of its range.
        """
        kept: dict[str, Any] = dict(options)
        of_stream = {name: kept.pop(name) for name in StreamOptions.__annotations__ if name in kept}
        stream = SequenceStream(self, batch_size, sequence_length, chunk_size, **of_stream)
        return SequenceLoader(stream, num_workers, pin_memory, **kept)

    def sequences(self, sequence_length: int = 1, **options: Unpack[StreamOptions]) -> SequenceStream:
        """An `IterableDataset` of single sequences `field -> (T, *shape)`, for your own `DataLoader`.

            >>> from torch.utils.data import DataLoader
            >>> from buffers.dataset import RingBufferDataset
            >>> dataset = RingBufferDataset(capacity=1_000)
            >>> episode_id = dataset.add_episode({"obs": np.zeros((50, 4))})
            >>> next(iter(DataLoader(dataset.sequences(16), batch_size=32)))["obs"].shape
            torch.Size([32, 16, 4])

        Options are `StreamOptions`, without `pack` and `epochs`; `transform` gets single sequences. Without `seed`,
        each worker has its own; with one, workers draw the same again in each iteration.
        """
        if sequence_length is None:
            raise TypeError(
                "Whole episodes come in padded batches: use `get_loader(batch_size, sequence_length=None)`."
            )
        return SequenceStream(self, None, sequence_length, **options)

    def __iter__(self) -> Iterator[Any]:
        """Iterate `sequences(1)`."""
        return iter(self.sequences(1))

    @property
    def fields(self) -> Fields | None:
        """The fields, None until they are known."""
        if self._fields is None:
            self._find_fields()
        return self._fields

    def listen(self, sampler: Sampler) -> None:
        """See `EpisodeDataset.listen`."""
        raise NotImplementedError

    @abstractmethod
    def add_late_field(self, name: str, type: TensorType, default: Any = 0) -> None:
        """See `EpisodeDataset.add_late_field`."""

    @abstractmethod
    def update(self, index: Any, values: Mapping[str, Any], source: Any = None) -> int:
        """See `EpisodeDataset.update`."""

    @property
    def late_fields(self) -> Fields | None:
        """The late fields that batches have; None if there are none."""
        return self.late.in_batches if self.late is not None else None

    @property
    def batch_fields(self) -> Fields | None:
        """The fields of a batch: stored ones, then late ones."""
        fields, late = self.fields, self.late_fields
        if fields is None or late is None:
            return fields
        if self._batch_fields[0] is not fields or self._batch_fields[1] is not late:
            self._batch_fields = fields, late, fields.with_others(late)
        return self._batch_fields[2]

    def _find_fields(self) -> None:
        """Set `_fields` if they can be known without an episode."""

    def tell_fields(self, fields: Fields) -> None:
        """Settle the fields before there is an episode, if that is possible."""

    @property
    def num_episodes(self) -> int:
        """Live episodes."""
        return len(self.table)

    @property
    def num_timesteps(self) -> int:
        """Steps of all live episodes."""
        return self.table.num_steps

    @property
    def episode_lengths(self) -> list[int]:
        """Steps of each live episode, oldest first."""
        return self.table.lengths.tolist()

    @property
    def average_episode_length(self) -> float:
        """Mean steps of a live episode; 0.0 if there is none."""
        return self.num_timesteps / self.num_episodes if self.num_episodes else 0.0

    @property
    def num_evicted(self) -> int:
        """Episodes evicted so far."""
        return max(0, self.table.next_id - len(self.table) - self.num_lost)

    @property
    def is_empty(self) -> bool:
        """Whether there is no episode."""
        return self.num_episodes == 0

    @property
    def is_full(self) -> bool:
        """Whether every step is taken, or an episode has been evicted to make room."""
        return self.num_evicted > self.num_dismissed or self.num_timesteps == self.capacity

    def __len__(self) -> int:
        return self.num_timesteps

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("Use `get_episode(index)` for an episode, or `get_loader` for batches of sequences.")

    def __repr__(self) -> str:
        return f"{counts_line(self)}\n{fields_table(self)}"


def _checked(table: EpisodeTable, sampler: Sampler, windows: Windows, num_windows: int, length: int | None) -> Windows:
    """The windows that a sampler has drawn; ValueError if they are not what it was asked for."""
    if type(windows) is not Windows or len(windows.start) != num_windows:
        raise ValueError(f"{type(sampler).__name__} was asked for {num_windows} windows, found {windows!r:.80}.")
    if length is not None and length != windows.length:
        raise ValueError(f"{type(sampler).__name__} was asked for windows of {length} steps, found {windows.length}.")
    if windows.cut is None and table.has_cuts:  # The sampler has not made them with the table.
        windows.cut = table.cuts_of(windows.episode)
    if length is None:
        if windows.step.any():
            raise ValueError(f"{type(sampler).__name__} was asked for whole episodes, which begin at `step` 0.")
    elif not (windows.is_checked or table.has_room_for(windows)):
        before, after = table.selection.room(windows.cut)
        last = windows.episode_length - length + after
        b = int(((windows.step < -before) | (windows.step > last)).argmax())
        raise ValueError(
            f"{type(sampler).__name__} drew a window that is not within its episode: it begins at row "
            f"{windows.step[b]} of {windows.episode_length[b]}. Choose `step` by `table.steps_to_draw(position, "
            f"{length})`, in episodes that have such windows; `pad_before` and `pad_after` of the loader allow more."
        )
    return windows
