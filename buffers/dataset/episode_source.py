"""EpisodeSource: what batches are drawn from: an EpisodeDataset, or a mixture."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from buffers.dataset.episode_reader import Rows
from buffers.dataset.printing import counts_line, fields_table
from buffers.dataset.saved_source import SavedSource
from buffers.dataset.statistics import FieldStatistics, RunningStatistics, statistics_of
from buffers.fields import Fields, TensorType
from buffers.loading import LoaderOptions, SequenceLoader, SequenceStream, StreamOptions
from buffers.sampler import Sampler
from buffers.table import EMPTY_PART, DrawContext, EpisodeTable, PartTable, Selection, Split, Windows
from buffers.utils import ThreadLock

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EpisodeSource", "Rows"]


class EpisodeSource(SavedSource):
    """Episodes that windows are drawn from."""

    #: How often a batch is completed by other windows, where episodes are gone before they are read.
    max_sampling_attempts = 100
    #: The larger dataset behind this one, see `EpisodeDataset.extend`.
    extension: Any = None
    #: Whether it is a mixture, see `sources_of`.
    has_members = False
    #: Whether `chunk_size` applies. If not, batches are read as a whole.
    reads_in_chunks = True

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        # Snapshots of the table, or of a part, so that drawing never holds up an addition.
        self._drawn_tables: dict[Split | None, EpisodeTable] = {}
        self._draw_lock = ThreadLock()
        self.running_statistics = RunningStatistics()

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
        self.catch_up()
        with self._draw_lock:
            table, sampler = self.table_to_draw(selection), samplers[0]
            if self.late is not None and self.late.by_name:
                context = context._replace(late=self.late)
            table.context = context
            return _checked(table, sampler, sampler.draw(table, num_windows, length, rng), num_windows, length)

    def num_to_draw(self, length: int | None, selection: Selection, sampler: Sampler | None = None) -> int:
        """How many windows of `length` steps there are now, for a sampler; with None, episodes."""
        with self._draw_lock:
            table = self.table_to_draw(selection)
            return table.num_to_draw(length) if sampler is None else sampler.num_to_draw(table, length)

    def can_draw(self, length: int | None, selection: Selection, samplers: Sequence[Sampler] | None = None) -> bool:
        """Whether there is a window of `length` steps now; with None, whether there is an episode."""
        return self.num_to_draw(length, selection, None if samplers is None else samplers[0]) > 0

    @property
    def longest_window(self) -> int:
        """The most steps that an episode can have."""
        return self.capacity

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
                drop_last=False, stride=1; rank, world_size: see there. Of torch's `DataLoader`: prefetch_factor,
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

    def catch_up(self) -> None:
        """Tell samplers and late fields of episodes that another process has added, in the process that made this."""

    def listen(self, sampler: Sampler) -> None:
        """See `EpisodeDataset.listen`."""
        raise NotImplementedError

    @abstractmethod
    def add_late_field(self, name: str, type: TensorType, default: Any = 0) -> None:
        """See `EpisodeDataset.add_late_field`."""

    @abstractmethod
    def update(self, index: Any, values: Mapping[str, Any], source: Any = None) -> int:
        """See `EpisodeDataset.update`."""

    def tell_fields(self, fields: Fields) -> None:
        """Settle the fields before there is an episode, if that is possible."""

    @property
    def episode_lengths(self) -> list[int]:
        """Steps of each live episode, oldest first."""
        return self.table.lengths.tolist()

    @property
    def average_episode_length(self) -> float:
        """Mean steps of a live episode; 0.0 if there is none."""
        return self.num_timesteps / self.num_episodes if self.num_episodes else 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is no episode."""
        return self.num_episodes == 0

    @property
    def fill(self) -> float:
        """The share of the capacity that is taken."""
        return self.num_timesteps / self.capacity

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
    for values in (windows.weight, windows.density):
        if values is not None and np.shape(values) != (num_windows,):
            found = f"{type(sampler).__name__} gave windows weights or a density of shape {np.shape(values)}"
            raise ValueError(f"{found}, expected {(num_windows,)}.")
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
