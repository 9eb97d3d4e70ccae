"""The stream of batches: which windows batch n has, and what it is made of.

Batch n is a function of (seed, n) and of the episodes that live when it is drawn. Worker w of W makes the batches
w, w + W, w + 2W, ... and the DataLoader takes from its workers in turn, so the batches do not depend on W.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import IterableDataset, get_worker_info

from buffers.fields import Fields
from buffers.loading.drawing import WindowDrawer, checked_sampler
from buffers.loading.include import checked_include
from buffers.loading.layout import Rows
from buffers.loading.lifetime import end_with
from buffers.loading.one_pass import LOST_DURING_A_PASS, OnePass
from buffers.loading.options import rows_to_draw
from buffers.loading.randomness import BatchRandom
from buffers.loading.ranks import this_rank
from buffers.loading.slots import Slots
from buffers.sampler import Sampler, UniformSampler
from buffers.sharing import SharedArrays
from buffers.table import Windows
from buffers.utils import ThreadLock, integer

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["SequenceStream"]

_SEQUENCES_PER_READ = 32  # Single sequences are drawn and read this many at a time.
#: Names and sizes of the int64 arrays through which workers and the trainer tell each other:
#: "first", the position at which the iteration began (which persistent workers see change); "newest", by batch, its
#: newest step id plus one; "rejected", by worker, windows that were gone before they could be read; "uncounted", 1 if
#: another DataLoader than a `SequenceLoader` has taken batches; "iteration", the number of the last one that began with
#: workers, and "over", of the last one that is over.
COUNTERS = {"first": 1, "newest": 1024, "rejected": 64, "uncounted": 1, "iteration": 1, "over": 1}


class SequenceStream(IterableDataset):
    """Batches from an `EpisodeSource`; or single sequences `field -> (T, *shape)`, if it has no batch size.

    Arguments are those of `EpisodeSource.get_loader`, and `StreamOptions`. `include` says what a batch holds besides
    the fields: `index` int64 `(B, T)`, step ids; `episode` int64 `(B,)`, ids; `step` int64 `(B, T)`, position in its
    episode; `is_first`, `is_last` bool `(B, T)`; `mask` bool `(B, T)`, True where the row is real; `weight` float32
    `(B,)`; `source` int64 `(B,)`, the member of a mixture. In padding, `index` and `step` are -1. Ids are those of the
    dataset that holds the episode, also in batches of a mixture. With `offsets`, `(B, T)` are the anchors, `(B, 1)`,
    and `mask` is a nested dict like the fields, `(B, n)` each; with `pack`, all are `(B, pack)`.
    """

    def __init__(
        self,
        source: EpisodeSource,
        batch_size: int | None,
        sequence_length: int | None = 1,
        chunk_size: int | None = None,
        *,
        sampler: Sampler | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        include: Iterable[str] = (),
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        epochs: int | None = None,
        shuffle: bool | None = None,
        drop_last: bool = False,
        **row_options: Any,
    ) -> None:
        self.source, self.is_seeded = source, seed is not None
        self.batch_size = None if batch_size is None else integer("batch_size", batch_size, 1)
        #: T of the windows that are drawn.
        self.sequence_length, self.selection, self.layout = rows_to_draw(sequence_length, **row_options)
        self.num_windows = _SEQUENCES_PER_READ if self.batch_size is None else self.batch_size
        self.chunk_size = self.num_windows if chunk_size is None else integer("chunk_size", chunk_size, 1)
        if self.num_windows % self.chunk_size:
            raise ValueError(f"`chunk_size`={chunk_size} does not divide `batch_size`={batch_size}.")
        self.sampler = checked_sampler(sampler, self.layout, self.batch_size is not None)
        if transform is not None and not callable(transform):
            raise TypeError(f"`transform` must be a function of a batch, found {type(transform).__name__}.")
        self.transform = transform
        self.include = checked_include(include, self.layout.is_padded) + self.layout.extra
        self.random = BatchRandom(secrets.randbits(128) if seed is None else integer("seed", seed, 0))
        #: The number n of the next batch.
        self.position = 0
        self.rank, self.world_size = this_rank(rank, world_size, self.is_seeded or epochs is not None)
        #: Batch n of all ranks is at position `(n - offset - rank) / world_size`; not 0 after loading the state of
        #: another number of ranks.
        self.offset = 0
        self._check(shuffle)
        #: Says where an iteration ends; None if it does not.
        self.one_pass = self._make_pass(epochs, shuffle, drop_last)
        self.bind()
        self.counters: Mapping[str, np.ndarray] = {name: np.zeros(n, np.int64) for name, n in COUNTERS.items()}
        #: Makes a batch of windows and their rows, before `transform`.
        self.assemble: Callable[[SequenceStream, Windows, Rows], Any] = _batch_of
        # For workers; the loader sets them.
        self.trainer, self.num_slots, self.is_counted = os.getpid(), 0, False
        self._worker_number = 0
        self._slots: Slots | None = None
        # What was drawn last in this process. Its newest step is looked up when someone asks for it.
        self._last: Windows | None = None
        # Threads that draw from this stream take turns.
        self._lock = ThreadLock()

    def bind(self) -> None:
        """Bind the sampler to the source, which a copy of it was not told of."""
        has_weights = "weight" in self.include
        #: Draws, where there is no pass.
        self.drawer = WindowDrawer(
            self.source, self.sampler, self.sequence_length, self.selection, self.layout, has_weights
        )

    def _check(self, shuffle: bool | None) -> None:
        """ValueError for arguments that do not fit each other or the source."""
        source, length, selection = self.source, self.sequence_length, self.selection
        if (length or 0) - selection.pad_before - selection.pad_after > source.longest_window:
            raise ValueError(f"`sequence_length`={length} exceeds the `capacity` of {source.longest_window} steps.")
        if self.layout.is_packed and self.batch_size is None:
            raise ValueError("`pack` makes batches: use `get_loader`.")
        if "source" in self.include and not source.has_members:
            raise ValueError(f"'source' of `include` is the member of a mixture: a {type(source).__name__} has none.")
        if source.batch_fields is not None:
            self.check_fields(source.batch_fields)
        if selection.split is not None and any(leaf.extension is not None for leaf in source.leaves):
            raise ValueError("Episodes that come back from `extend` have new ids: take `split` of the larger dataset.")
        if self.world_size > 1 and shuffle is not False and not self.is_seeded:
            raise ValueError("Ranks share out what follows from the `seed`: give the same to all.")

    def _make_pass(self, epochs: int | None, shuffle: bool | None, drop_last: bool) -> OnePass | None:
        if epochs is None:
            if shuffle is not None or drop_last or self.selection.stride > 1:
                raise ValueError(
                    "Windows are drawn at random without end, and every batch is full: `shuffle`, `drop_last` and "
                    "`stride` need `epochs`."
                )
            return None
        if self.batch_size is None:
            raise ValueError("`epochs` makes batches: use `get_loader`.")
        if type(self.sampler) is not UniformSampler or self.layout.is_packed:
            raise ValueError("`epochs` brings every window once, in its own order: leave out `sampler` and `pack`.")
        for name, value in (("shuffle", True if shuffle is None else shuffle), ("drop_last", drop_last)):
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` must be a bool, found {value!r:.60}.")
        return OnePass(
            self.source,
            self.batch_size,
            self.sequence_length,
            self.selection,
            epochs=integer("epochs", epochs, 1),
            shuffle=shuffle is not False,
            drop_last=drop_last,
            rank=self.rank,
            world_size=self.world_size,
        )

    # Batches.

    def batch(self, position: int) -> Any:
        """Draw and read a batch: `field -> (B, T, *shape)` with what `include` adds, or what `transform` made of it.

        At a position of this stream, which is that of one rank.

        Raises:
            RuntimeError: No episode is long enough, or episodes leave faster than they can be read.
        """
        n = self.offset + position * self.world_size + self.rank
        if self.one_pass is None:
            windows = self.drawer.draw(n, position, self.num_windows, self.random, self.counters)
        else:
            windows = self.one_pass.windows(position, self.random)
        rows, was_read = self._read(windows)
        if was_read is not None and not was_read.all():
            windows, rows = self._with_others(n, position, windows, was_read)
        if self._slots is None:
            self._last = windows
        else:
            self.counters["newest"][position % COUNTERS["newest"]] = windows.last_steps.max() + 1
        self.drawer.weigh(windows)
        batch = self.assemble(self, windows, rows)
        # `_sequences_of` transforms single sequences.
        return batch if self.transform is None or self.batch_size is None else self.transform(batch)

    def take(self) -> Any:
        """The next batch. One that fails counts: with workers, the next one is already being made."""
        with self._lock:
            if self.one_pass is not None and self.position >= self.one_pass.end:
                raise StopIteration
            self.position += 1
            return self.batch(self.position - 1)

    def share(self) -> None:
        """Share the counters, and where a pass is, with workers."""
        sizes = {**COUNTERS, "pass": 0 if self.one_pass is None else len(self.one_pass.state)}
        self.counters = SharedArrays({name: ((n,), np.dtype(np.int64)) for name, n in sizes.items()})
        if self.one_pass is not None:
            self.counters["pass"][:] = self.one_pass.state
            self.one_pass.state = self.counters["pass"]

    def begin(self) -> None:
        """Begin an iteration, or go on with the last one."""
        if self.one_pass is not None:
            self.one_pass.begin(self.position)

    def _read(self, windows: Windows) -> tuple[Rows, np.ndarray | None]:
        """Read windows into a worker's slot or new memory; also returns which were read, as `EpisodeSource.read`."""
        num_windows, out, source = len(windows.start), None, self.source
        fits = self.chunk_size >= num_windows or not source.reads_in_chunks or self.layout.is_packed
        if fits and self._slots is None:
            return self.layout.read(source, windows, None)
        fields = source.batch_fields
        assert fields is not None  # Windows are drawn from episodes, so there are fields.
        if self._slots is not None:
            out = self._slots.empty_batch(fields, self.layout.leading(fields, windows))
        if fits:
            return self.layout.read(source, windows, out)
        if out is None:
            out = {name: source.empty(name, size) for name, size in self.layout.leading(fields, windows).items()}
        was_read = np.ones(num_windows, np.bool_)
        for begin in range(0, num_windows, self.chunk_size):
            chunk = slice(begin, begin + self.chunk_size)
            part = {name: tensor[chunk] for name, tensor in out.items()}
            _, found = self.layout.read(source, windows[chunk], part)
            if found is not None:
                was_read[chunk] = found
        return out, was_read

    def _with_others(self, n: int, position: int, windows: Windows, was_read: np.ndarray) -> tuple[Windows, Rows]:
        """Replace the windows of batch n that were gone before they could be read, and read all windows again."""
        if self.one_pass is not None:
            gone = np.unique(windows.episode[~was_read]).tolist()
            raise RuntimeError(
                f"Episodes were evicted during the pass, or their files are damaged (ids {gone}). {LOST_DURING_A_PASS}"
            )
        for attempt in range(1, self.source.max_sampling_attempts + 1):
            missed = (~was_read).nonzero()[0]
            self.counters["rejected"][self._worker_number] += len(missed)
            if self.layout.is_packed:
                windows = self.drawer.draw_again(n, position, attempt, windows, self.random)
            else:
                others = self.drawer.draw_again(n, position, attempt, windows[missed], self.random)
                windows = windows.replaced(missed, others)
            if self.sequence_length is None and not self.layout.is_packed:
                windows.length = int(windows.episode_length.max())
            rows, found = self._read(windows)
            if found is None or found.all():
                return windows, rows
            was_read = found
        raise RuntimeError(
            f"{len(was_read) - was_read.sum()} of {len(windows)} windows were gone before they could be read, "
            f"{self.source.max_sampling_attempts} times over. Evict less often or raise the `capacity`."
        )

    def check_fields(self, fields: Fields) -> None:
        """ValueError if a name of `include` is also a field, stored or late, or one of `offsets` is none."""
        late = self.source.late_fields
        if late is not None and not fields.keys() >= late.keys():
            fields = fields.with_others(late)
        self.layout.check(fields)
        for name in self.include:
            if name in fields.roots:
                by_itself = " (padded batches have it by themselves)" if name == "mask" else ""
                raise ValueError(
                    f"'{name}' of `include`{by_itself} is also a field of the steps. Drop it from `include` if the "
                    "field is what you want (a Recorder stores `is_first`), or rename the field."
                )

    @property
    def padding(self) -> float | None:
        """The share of padding in the last batch that was made in this process; None if there is no mask."""
        if self._last is None or not self.layout.is_padded:
            return None
        return self.layout.padding(self.source, self._last)

    @property
    def num_rejected(self) -> int:
        """Windows that were drawn again because their episode was gone before they could be read."""
        return int(self.counters["rejected"].sum())

    @property
    def newest_step(self) -> int | None:
        """The newest step id in the last batch that was taken; None before the first."""
        if self._last is not None:
            return int(self._last.last_steps.max())
        newest = int(self.counters["newest"][(self.position - 1) % COUNTERS["newest"]]) if self.position else 0
        return newest - 1 if newest else None

    # Iterating: in the trainer, or in a worker of a DataLoader.

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        self.counters["uncounted"][0] |= not self.is_counted
        if worker is None:
            if not self.is_counted:
                self.begin()
            batches = _Batches(self.take)
        else:
            end_with(self.trainer)
            if self.num_slots:
                self._slots = self._slots or Slots(self.num_slots)
            if not (self.is_counted or self.is_seeded):
                # A worker's copy of the trainer's stream must not repeat what the last iteration drew.
                self.random = BatchRandom(secrets.randbits(128))
            self._worker_number = worker.id % COUNTERS["rejected"]
            end = 2**63 - 1
            if self.one_pass is not None:
                if not self.is_counted:
                    raise RuntimeError("Another DataLoader's workers cannot make a pass: iterate the loader itself.")
                self.one_pass.state = self.counters["pass"]
                self.one_pass.forget()
                end = self.one_pass.end
            positions = iter(range(int(self.counters["first"][0]) + worker.id, end, worker.num_workers))
            batches = _Batches(lambda: self.batch(next(positions)))
        return batches if self.batch_size is not None else self._sequences_of(batches)

    def _sequences_of(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            for b in range(self.num_windows):
                sequence = _row(batch, b)
                yield sequence if self.transform is None else self.transform(sequence)

    def collate_and_pack(self, collate_fn: Callable[[Any], Any], batch: Any) -> Any:
        """What a worker sends for a batch."""
        assert self._slots is not None  # Only workers of a loader collate by this function.
        return self._slots.pack(collate_fn(batch))


def _batch_of(stream: SequenceStream, windows: Windows, rows: Rows) -> dict[str, Any]:
    source, layout = stream.source, stream.layout
    fields = source.batch_fields
    assert fields is not None  # Windows are drawn from episodes, so there are fields.
    batch = rows if fields.is_flat else fields.unflatten(rows)
    if stream.include:
        stream.check_fields(fields)
    for name in stream.include:
        value = layout.included(name, source, windows)
        is_moved = source.device.type != "cpu"
        batch[name] = tree_map_only(torch.Tensor, lambda tensor: tensor.to(source.device), value) if is_moved else value
    return batch


class _Batches(Iterator[Any]):
    """The results of a function. Unlike a generator, it goes on after an error, such as that of an empty dataset."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def __next__(self) -> Any:
        return self._function()


def _row(batch: Any, b: int) -> Any:
    if isinstance(batch, dict):
        return {name: _row(value, b) for name, value in batch.items()}
    return batch[b]
