"""The stream of batches: which windows batch n has, and what it is made of.

Batch n is a function of (seed, n) and of the episodes that live when it is drawn. Worker w of W makes the batches
w, w + W, w + 2W, ... and the DataLoader takes from its workers in turn, so their number changes nothing.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from buffers.dataset.fields import Fields
from buffers.dataset.index import Windows
from buffers.lifetime import end_with
from buffers.randomness import BatchRandom
from buffers.sampler.base import Sampler
from buffers.sampler.uniform import UniformSampler
from buffers.transport import Slots
from buffers.utils import integer

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["SequenceStream"]

INCLUDABLE = ("index", "episode", "step", "is_first", "is_last", "mask", "weight", "source")
# Single sequences are drawn and read so many at a time.
_SEQUENCES_PER_READ = 32
# For an episode that another process has announced; it writes some gigabytes a second.
_SECONDS_TO_WAIT, _PAUSE = 10.0, 0.0005
COUNTERS = {"first": 1, "newest": 1024, "rejected": 64}


class SequenceStream(IterableDataset):
    """Batches without end from an `EpisodeDataset`; or single sequences, if it has no batch size.

    Args:
        dataset: Where the sequences come from.
        batch_size: B; None for single sequences `field -> (T, *shape)`.
        sequence_length: T, in steps; None for whole episodes, padded, with `mask`.
        chunk_size: Sequences that one read brings; divides `batch_size`, which is the default.
        sampler: Which windows are drawn; uniformly over all windows by default.
        transform: A function on the batch, called where it is made (in the worker).
        include: What else a batch holds, besides the fields:
            `index` int64 `(B, T)`, step ids; `episode` int64 `(B,)`, episode ids; `step` int64 `(B, T)`, position in
            the episode; `is_first`, `is_last` bool `(B, T)`; `mask` bool `(B, T)`, True where the row is real;
            `weight` float32 `(B,)`; `source` int64 `(B,)`, the member of a mixture. In padding, `index` and `step` are
            -1.
        seed: Of all randomness; None takes it from the operating system.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        dataset: EpisodeSource,
        batch_size: int | None,
        sequence_length: int | None = 1,
        chunk_size: int | None = None,
        *,
        sampler: Sampler | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        include: Iterable[str] = (),
        seed: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = None if batch_size is None else integer("batch_size", batch_size, 1)
        self.sequence_length = None if sequence_length is None else integer("sequence_length", sequence_length, 1)
        if self.sequence_length is not None and self.sequence_length > dataset._longest_drawable:
            raise ValueError(
                f"`sequence_length`={sequence_length} exceeds the `capacity` of {dataset._longest_drawable} steps."
            )
        self.num_windows = _SEQUENCES_PER_READ if self.batch_size is None else self.batch_size
        self.chunk_size = self.num_windows if chunk_size is None else integer("chunk_size", chunk_size, 1)
        if self.num_windows % self.chunk_size:
            raise ValueError(f"`chunk_size`={chunk_size} does not divide `batch_size`={batch_size}.")
        if sampler is not None and not isinstance(sampler, Sampler):
            name = type(sampler).__name__
            found = f"the class {sampler.__name__}: pass {sampler.__name__}()" if isinstance(sampler, type) else name
            raise TypeError(f"`sampler` must be a Sampler, found {found}.")
        self.sampler = UniformSampler() if sampler is None else sampler
        if transform is not None and not callable(transform):
            raise TypeError(f"`transform` must be a function of a batch, found {type(transform).__name__}.")
        self.transform = transform
        self.include = _checked_include(include, whole_episodes=self.sequence_length is None)
        if "source" in self.include and not dataset.has_members:
            raise ValueError(f"'source' of `include` is the member of a mixture: a {type(dataset).__name__} has none.")
        self.is_seeded = seed is not None
        self.random = BatchRandom(_fresh_seed() if seed is None else integer("seed", seed, 0))
        #: The number n of the next batch.
        self.position = 0
        # first: the position at which an iteration by workers began; persistent ones see it change. The position would
        # not do, as it goes on while slow workers are still starting. newest: by batch, its newest step id, and one.
        # rejected: by worker, windows that were gone before they could be read.
        self.counters: Mapping[str, np.ndarray] = {name: np.zeros(n, np.int64) for name, n in COUNTERS.items()}
        #: Makes a batch of windows and their rows, before `transform`.
        self.assemble: Callable[[SequenceStream, Windows, dict[str, torch.Tensor]], Any] = _batch_of
        # Set by the loader for its workers.
        self.trainer, self.num_slots = os.getpid(), 0
        self._number = 0
        self._slots: Slots | None = None
        # What was drawn last in this process: looking for the newest step in it can wait until someone asks.
        self._last: Windows | None = None

    def batch(self, n: int) -> Any:
        """Draw and read batch n.

        Returns:
            `field -> (B, T, *shape)` and what `include` asked for; or what `transform` made of it.

        Raises:
            RuntimeError: No episode is long enough, or episodes leave faster than they can be read.
            ValueError: A name of `include` is also a field's.
        """
        batch = self.untransformed_batch(n)
        return batch if self.transform is None else self.transform(batch)

    def untransformed_batch(self, n: int) -> Any:
        """Batch n before `transform`."""
        windows, out, missed = self._attempt(n, 0)
        if missed is not None:
            windows, out = self._drawn_again(n, windows, out, missed)
        if self._slots is None:
            self._last = windows
        else:
            self.counters["newest"][n % COUNTERS["newest"]] = windows.last_steps.max() + 1
        return self.assemble(self, windows, out)

    def check_include(self, fields: Fields) -> None:
        """Refuse, by a ValueError, names of `include` that are also fields."""
        for name in self.include:
            if name in fields.roots:
                by_itself = " (whole episodes have it by themselves)" if name == "mask" else ""
                raise ValueError(
                    f"'{name}' of `include`{by_itself} is also a field of the steps. Drop it from `include` if the "
                    "field is what you want (a Recorder stores `is_first`), or rename the field."
                )

    @property
    def num_rejected(self) -> int:
        """Windows that were drawn again, as their episode was gone before they could be read."""
        return int(self.counters["rejected"].sum())

    @property
    def newest_step(self) -> int | None:
        """The newest step id in the last batch that was taken; None before the first."""
        if self._last is not None:
            return int(self._last.last_steps.max())
        newest = int(self.counters["newest"][(self.position - 1) % COUNTERS["newest"]]) if self.position else 0
        return newest - 1 if newest else None

    def take(self) -> Any:
        """The next batch. One that fails has its number, too: with workers, the next one is under way by then."""
        self.position += 1
        return self.batch(self.position - 1)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None:
            end_with(self.trainer)
        if self.batch_size is None:
            return _single_sequences(self, worker)
        if worker is None:
            return _Batches(self.take)
        self._slots = self._slots or Slots(self.num_slots)
        self._number = worker.id % COUNTERS["rejected"]
        first = int(self.counters["first"][0])
        numbers = iter(range(first + worker.id, 2**63 - 1, worker.num_workers))
        return _Batches(lambda: self.batch(next(numbers)))

    def pack(self, batch: Any) -> Any:
        """What a worker sends instead of a batch."""
        return batch if self._slots is None else self._slots.pack(batch)

    def _drawn_again(
        self, n: int, windows: Windows, out: dict[str, torch.Tensor], missed: np.ndarray
    ) -> tuple[Windows, dict[str, torch.Tensor]]:
        """Batch n with others in place of those windows, `missed`, that were gone before they could be read."""
        for attempt in range(1, self.dataset.max_sampling_attempts + 1):
            self.counters["rejected"][self._number] += len(missed)
            if self.sequence_length is None:
                # Another episode may be longer than all of these, which changes the padding: begin anew.
                windows, out, still_missed = self._attempt(n, attempt)
                if still_missed is None:
                    return windows, out
                missed = still_missed
                continue
            others, rows, still_missed = self._attempt(n, attempt, again=windows[missed])
            read = np.setdiff1d(np.arange(len(missed)), () if still_missed is None else still_missed)
            windows = windows.replaced(missed[read], others[read])
            for name, tensor in out.items():
                if tensor.numel():
                    as_bytes(tensor)[missed[read]] = as_bytes(rows[name])[read]
            if still_missed is None:
                return windows, out
            missed = missed[still_missed]
        raise RuntimeError(
            f"{len(missed)} of {len(windows)} windows were gone before they could be read, "
            f"{self.dataset.max_sampling_attempts} times over. Evict less often or raise the `capacity`."
        )

    def _attempt(
        self, n: int, attempt: int, again: Windows | None = None
    ) -> tuple[Windows, dict[str, torch.Tensor], np.ndarray | None]:
        """Windows, their data, and the positions of those that were gone, if any; `again`: those that were, before."""
        dataset, windows = self.dataset, None
        with dataset._lock:
            dataset._refresh()
            try:
                windows = self._draw_windows(n, attempt, again)
            except RuntimeError:
                if dataset._num_changes() == 0:
                    raise
            if windows is None:
                windows = self._wait_for_windows(n, attempt, again)
            was_read: np.ndarray | None
            if self._slots is not None or self.chunk_size < self.num_windows:
                out, was_read = self._read_chunks(windows, again is None)
            else:
                out, was_read = dataset._read_new(windows)
            if was_read is None or was_read.all():
                return windows, out, None
            return windows, out, (~was_read).nonzero()[0]

    def _draw_windows(self, n: int, attempt: int, again: Windows | None) -> Windows:
        num_windows, rng = self.num_windows if again is None else len(again), self.random.generator(n, attempt)
        return self.dataset._draw(self.sampler, num_windows, self.sequence_length, rng, again)

    def _wait_for_windows(self, n: int, attempt: int, again: Windows | None) -> Windows:
        """Draw where there was nothing to draw: all may have left for an episode that is about to come."""
        dataset, deadline = self.dataset, time.monotonic() + _SECONDS_TO_WAIT
        while True:
            num_changes = dataset._num_changes()
            dataset._refresh()
            try:
                return self._draw_windows(n, attempt, again)
            except RuntimeError:
                nothing_comes = num_changes % 2 == 0 and dataset._num_changes() == num_changes
                if nothing_comes or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE)

    def _read_chunks(self, windows: Windows, is_whole_batch: bool) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """The data of windows, in a worker's slot, or brought by several reads, and which of them were read."""
        num_windows = len(windows)
        if is_whole_batch and self._slots is not None and self.dataset.fields is not None:
            out = self._slots.empty_batch(self.dataset.fields, (num_windows, windows.length))
        else:
            out = self.dataset._empty_batch(windows)
        was_read = np.ones(num_windows, np.bool_)
        for begin in range(0, num_windows, self.chunk_size):
            chunk = slice(begin, begin + self.chunk_size)
            found = self.dataset._read(windows[chunk], {name: tensor[chunk] for name, tensor in out.items()})
            if found is not None:
                was_read[chunk] = found
        return out, was_read


def _checked_include(include: Iterable[str], whole_episodes: bool) -> tuple[str, ...]:
    if isinstance(include, str):
        raise TypeError(f"`include` must be a tuple of names, found the string {include!r}: write ({include!r},).")
    include = tuple(dict.fromkeys(include))
    unknown = [name for name in include if name not in INCLUDABLE]
    if unknown:
        raise ValueError(f"`include` knows {list(INCLUDABLE)}, found {unknown}.")
    return (*include, "mask") if whole_episodes and "mask" not in include else include


def _fresh_seed() -> int:
    entropy = np.random.SeedSequence().entropy
    assert isinstance(entropy, int)
    return entropy


def _batch_of(stream: SequenceStream, windows: Windows, out: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A batch `field -> (B, T, *shape)` with what `include` asks for."""
    if stream.sequence_length is None:
        _zero_padding(windows, out)
    fields = stream.dataset.fields
    assert fields is not None  # Windows are drawn from episodes, so there are fields.
    batch = out if fields.is_flat else fields.unflatten(out)
    if not stream.include:
        return batch
    stream.check_include(fields)
    for name in stream.include:
        is_source = name == "source"
        value = torch.from_numpy(stream.dataset.sources_of(windows)) if is_source else _included(name, windows)
        batch[name] = value.to(stream.dataset.device)
    return batch


def _included(name: str, windows: Windows) -> torch.Tensor:
    """The tensor that `include` calls `name`."""
    if name == "episode":
        return torch.from_numpy(windows.episode.copy())
    if name == "weight":
        weight = windows.weight
        return torch.ones(len(windows)) if weight is None else torch.from_numpy(weight.astype(np.float32))
    steps = windows.step[:, None] + np.arange(windows.length)
    if name == "is_first":
        return torch.from_numpy(steps == 0)
    if name == "is_last":
        return torch.from_numpy(steps == windows.episode_length[:, None] - 1)
    mask = steps < windows.episode_length[:, None]
    if name == "mask":
        return torch.from_numpy(mask)
    values = steps + (windows.start - windows.step)[:, None] if name == "index" else steps
    return torch.from_numpy(np.where(mask, values, -1))


def _zero_padding(windows: Windows, out: dict[str, torch.Tensor]) -> None:
    """Zero what lies behind the end of episodes."""
    padding = np.arange(windows.length) >= windows.num_rows[:, None]
    if padding.any():
        for tensor in (tensor for tensor in out.values() if tensor.numel()):
            as_bytes(tensor)[torch.from_numpy(padding).to(tensor.device)] = 0


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A view `(B, T, bytes)` of contiguous `(B, T, *shape)`: torch assigns bytes whatever the dtype was."""
    return tensor.view(*tensor.shape[:2], math.prod(tensor.shape[2:])).view(torch.uint8)


class _Batches(Iterator[Any]):
    """An iterator over a function. Unlike a generator it goes on after an error (an empty dataset, say)."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def __next__(self) -> Any:
        return self._function()


def _single_sequences(stream: SequenceStream, worker: Any) -> Iterator[Any]:
    """Single sequences, drawn and read several at a time: worker w of W draws the blocks w, w + W, ..."""
    n, step = stream.position, 1
    if worker is not None:
        n, step = n + worker.id, worker.num_workers
        if not stream.is_seeded:
            # A forked worker has a copy of the trainer's stream and must not draw what its siblings draw.
            stream.random = BatchRandom(_fresh_seed())
    while True:
        block = stream.untransformed_batch(n)
        n += step
        if worker is None:
            stream.position = n
        for b in range(stream.num_windows):
            sequence = _row(block, b)
            yield sequence if stream.transform is None else stream.transform(sequence)


def _row(batch: Any, b: int) -> Any:
    if isinstance(batch, dict):
        return {name: _row(value, b) for name, value in batch.items()}
    return batch[b]
