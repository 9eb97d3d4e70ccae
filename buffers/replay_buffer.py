"""ReplayBuffer: the front-end that an environment loop talks to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.printing import compression_of
from buffers.episode_returns import EpisodeReturns
from buffers.fields import Fields
from buffers.late import PRIORITY
from buffers.limiter import SamplesPerInsert
from buffers.resumable import ResumableBuffer
from buffers.writer import EpisodeWriter

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from buffers.loading import LoaderOptions

__all__ = ["ReplayBuffer"]

_MANY_EPISODES = 10  # So many should have a window; with fewer, longer ones may come.


class ReplayBuffer(ResumableBuffer):
    """Splits streams of steps into episodes, adds these to a dataset, and draws batches from it.

        >>> import numpy as np
        >>> from buffers.dataset import RingBufferDataset
        >>> buffer = ReplayBuffer(RingBufferDataset(capacity=100_000), batch_size=32, sequence_length=16, num_envs=1)
        >>> for step in range(100):
        ...     buffer.add_step({"obs": np.zeros(4), "reward": 0.5}, done=step % 50 == 49)
        >>> buffer.num_episodes
        2
        >>> {name: tuple(value.shape) for name, value in buffer.sample().items()}
        {'obs': (32, 16, 4), 'reward': (32, 16)}

    Args:
        dataset: Where episodes are stored, or a source that batches are only drawn from (a `MixtureDataset`).
        batch_size: B; this and all arguments that are not listed here are those of `EpisodeSource.get_loader`.
        num_envs: N. With 1, steps have no environment axis, unless `done` has one. None leaves it to the first step.
        max_episode_length: Steps after which an open episode that goes on is cut, for streams that never end. Windows
            do not cross a cut, but for what `overlap` gives.
        overlap: k, rows with which a piece begins that the piece before it ends with. Windows of up to k + 1 rows then
            exist once each, also across cuts. A recorder takes 1 at least, so that no transition is lost.
        limiter: Keeps how often steps are drawn near a ratio: the one of `sample` and the methods that add which is
            ahead waits. Only what goes through this buffer counts.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        dataset: EpisodeSource,
        batch_size: int,
        sequence_length: int | None = 1,
        chunk_size: int | None = None,
        num_workers: int | None = None,
        *,
        num_envs: int | None = None,
        max_episode_length: int | None = None,
        overlap: int = 0,
        limiter: SamplesPerInsert | None = None,
        **options: Unpack[LoaderOptions],
    ) -> None:
        if not isinstance(dataset, EpisodeSource):
            raise TypeError(f"`dataset` must be an EpisodeSource, found {type(dataset).__name__}.")
        if options.get("epochs") is not None:
            raise ValueError("A buffer's batches have no end: iterate `dataset.get_loader(..., epochs=1)` instead.")
        given: dict[str, Any] = {"batch_size": batch_size, "sequence_length": sequence_length, "chunk_size": chunk_size}
        given |= {"num_workers": num_workers, "num_envs": num_envs, "overlap": overlap, "limiter": limiter}
        self._remember({**given, "max_episode_length": max_episode_length, **options})
        self.dataset = dataset
        self.dataloader = dataset.get_loader(batch_size, sequence_length, chunk_size, num_workers, **options)
        # Without workers and pinning, a DataLoader adds nothing but time.
        loader = self.dataloader
        self._direct = not (loader.num_workers or loader.pin_memory or options.get("collate_fn"))
        self._batches: Iterator[Any] | None = None
        self._generation = 0
        self._is_closed = False
        self.returns = EpisodeReturns()
        self._has_warned = False
        self._writer: EpisodeWriter | None = None
        if isinstance(dataset, EpisodeDataset):
            self._writer = EpisodeWriter(
                dataset,
                num_envs,
                max_episode_length,
                overlap,
                check_fields=loader.stream.check_fields,
                on_stored=self.returns.note,
                limiter=limiter,
            )
        self.limiter = limiter
        if limiter is not None:
            if not isinstance(limiter, SamplesPerInsert):
                raise TypeError(f"`limiter` must be a SamplesPerInsert, found {type(limiter).__name__}.")
            limiter.attach(dataset, loader.stream, num_envs)  # Last, as it then belongs to this buffer.

    # Steps in.

    @property
    def writer(self) -> EpisodeWriter:
        """What splits steps into episodes; RuntimeError for a source that takes no episodes."""
        if self._writer is None:
            raise RuntimeError(
                f"A {type(self.dataset).__name__} holds no episodes of its own: add to one of its members, or evict "
                "from it."
            )
        return self._writer

    def add_step(self, step_data: Mapping[str, Any], done: Any, info: Any = None) -> None:
        """Add the current step of the environment, or of each of N environments.

            single         o0 o1 o2 | o0 ...       done=True comes with o2: this row is the episode's last,
                      done F  F  T    F            which can be drawn at once
            vectorized     o0 o1 o2 | o0 ...       done[i]=True comes with o0: environment i ended on the call
                   done[i] F  F  F    T            before and was reset, so this row is its next episode's first

        The first step decides between the two: by `num_envs` if given; else it is vectorized if `done` has an axis, or
        if it is a plain bool and all leaves share their leading size, which gives a warning.

        Args:
            step_data: `field -> (*shape)`, or `(N, *shape)`; nested dicts allowed. Values are copied. dtypes are
                kept, Python floats become float32.
            done: bool, or bool `(N,)`; numbers that are 0 or 1 will do. A plain bool stands for all N. On the first
                step, an array or tensor without an axis means a single environment.
            info: A dict or, for N environments, a sequence of N dicts or None: the `info` of the episodes that this
                call completes, as in `EpisodeDataset.add_episode`. Not looked at where no episode ends.

        Raises:
            TypeError: A value that is no tensor, array or number; a `done` that is neither bool nor a number; in the
                `info` of an episode that ends, no number, bool or string.
            ValueError: Other fields, dtypes, shapes or N than before, an open episode as long as the capacity, or an
                `info` that cannot be stored. Nothing has changed.
            Exception: The dataset could not store an episode that ended now or before, because of a full disk for
                example. The step was taken, and the next call tries again to store the episode.
        """
        (self._writer or self.writer).add_step(step_data, done, info)

    def add(
        self,
        step_data: Mapping[str, Any],
        *,
        is_first: Any = None,
        is_last: Any = None,
        mask: Any = None,
        info: Any = None,
    ) -> None:
        """Add one row of the environment, or of each of N environments, and say where episodes begin and end.

        Args:
            step_data: As in `add_step`; so are the errors.
            is_first: bool, or bool `(N,)`: the rows before this one are a complete episode.
            is_last: bool, or bool `(N,)`: the episode is complete with this row.
            mask: bool, or bool `(N,)`: False where the environment has no row; its other values are ignored.
            info: As in `add_step`; of both, where a call completes two episodes of an environment.
        """
        self.writer.add(step_data, is_first=is_first, is_last=is_last, mask=mask, info=info)

    def add_episode(self, episode: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> int:
        """`EpisodeDataset.add_episode`; open episodes stay open."""
        self._check_open()
        dataset = self.writer.sink
        assert isinstance(dataset, EpisodeDataset)  # It has a writer.
        with nullcontext() if self.limiter is None else self.limiter.adding_episode(episode):
            episode_id = dataset.add_episode(episode, info)
        self.returns.note(-1, episode, 0)
        return episode_id

    def flush(self) -> None:
        """Complete the open episodes as they are: at the end of a run, or when all environments are reset."""
        if self._writer is not None:
            self._writer.flush()

    # Batches out.

    @property
    def num_batches_due(self) -> int:
        """How many batches the limiter lets `sample` draw now; RuntimeError if there is no limiter."""
        if self.limiter is None:
            raise RuntimeError(
                "Only a limiter knows what is due: `ReplayBuffer(..., limiter=SamplesPerInsert(ratio))`."
            )
        due = self.limiter.num_batches_due
        if not due and not self._has_warned and self.num_episodes >= _MANY_EPISODES and not self.can_sample:
            self._has_warned = True
            warnings.warn(
                f"No batch is due, as none can be drawn: of {self.num_episodes} episodes, none has a window of "
                f"`sequence_length`={self.dataloader.stream.sequence_length} steps that the sampler takes.",
                stacklevel=2,
            )
        return due

    def sample(self) -> Any:
        """The next batch, `field -> (B, T, *shape)` with what `include` adds, or what `transform` made of it.

        Raises:
            RuntimeError: No complete episode is long enough; with a limiter, no batch was due within its timeout.
        """
        if self.limiter is None:
            return self._next_batch()
        with self.limiter.drawing():
            return self._next_batch()

    def _next_batch(self) -> Any:
        if self._is_closed or not self.dataset.table.num_steps:
            self._check_open()
            if self._num_open_rows:
                raise RuntimeError(
                    f"No episode is complete yet: {self._num_open_rows} steps are in open episodes. They can be drawn "
                    "when these end; `flush()` completes them as they stand."
                )
        stream = self.dataloader.stream
        # Before batches 0, 1, 2, 4, 8, ... only, because it looks at every episode.
        if stream.position & (stream.position - 1) == 0 and not self._has_warned:
            self._warn_of_unreachable()
        if self._direct:
            batch = stream.take()
            return batch if self.dataloader.output_device is None else self.dataloader.deliver(batch)
        if self._batches is None or self._generation != self.dataloader.generation:
            self._batches, self._generation = iter(self.dataloader), self.dataloader.generation
        try:
            return next(self._batches)
        except BaseException:
            # The workers may have ended. The next call starts others, which go on with the batch after this one.
            self._batches = None
            raise

    def update(self, index: Any, values: Mapping[str, Any], source: Any = None) -> int:
        """`EpisodeDataset.update`: give rows new values of late fields; of a mixture, with the batch's `source`."""
        return self.dataset.update(index, values, source)

    def update_priorities(self, index: Any, values: Any, source: Any = None) -> int:
        """Give rows the priorities that a `PrioritizedSampler` draws by.

        Batches that are made later are drawn by them; with workers, that begins `num_workers * prefetch_factor` batches
        later, plus one.

        Args:
            index: Step ids `(B, T)`, as `include=("index",)` gives them; -1 for padding.
            values: `(B, T)`; or `(B,)`, one for all rows of a window. Finite, and not negative.
            source: Of a mixture, `(B,)`, the members, as `include=("source",)` gives them.

        Returns:
            How many step ids are of no episode that is stored; they are ignored.

        Raises:
            ValueError: Priorities that are negative or not finite, or of another shape. Nothing has changed.
            RuntimeError: Nothing draws by priorities.
        """
        if not any(leaf.late and PRIORITY in leaf.late for leaf in self.dataset.leaves):
            raise RuntimeError("Nothing draws by priorities here: give the buffer `sampler=PrioritizedSampler()`.")
        ids = as_array("index", index)
        # numpy has no bfloat16.
        priorities = as_array("values", values.float() if isinstance(values, torch.Tensor) else values)
        if priorities.ndim < ids.ndim and priorities.shape == ids.shape[:1]:
            priorities = np.broadcast_to(priorities[:, None], ids.shape)
        return self.update(ids, {PRIORITY: priorities}, source)

    @property
    def _reachable(self) -> float:
        """The share of stored steps that lie in some window of T steps; 0.0 if there are none."""
        stream = self.dataloader.stream
        return self.dataset.table.reachable(stream.sequence_length, stream.selection, stream.layout.num_packed)

    def _warn_of_unreachable(self) -> None:
        share, length = self._reachable, self.dataloader.stream.sequence_length
        if 0 < share < 0.5 and length is not None:
            self._has_warned = True
            warnings.warn(
                f"Only {share:.0%} of the stored steps can be drawn: all others are in episodes of fewer than "
                f"`sequence_length`={length} steps. Pad windows (`pad_before`, `pad_after`), lower it, or draw whole "
                "episodes: `sequence_length=None`.",
                stacklevel=4,  # The caller of `sample`.
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("The buffer is closed.")

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.sample()

    def close(self) -> None:
        """Flush and end the workers. If an episode cannot be stored, the buffer stays open."""
        if not self._is_closed:
            try:
                if self._writer is not None:
                    self._writer.close()
                self._is_closed = True
                if self.limiter is not None:
                    self.limiter.close()
            finally:
                for store in self.dataset.stores:
                    store.wait_for_save()
                self._batches = None
                self.dataloader.end_workers()
                if isinstance(self.dataset, EpisodeDataset):
                    self.dataset.end_workers()

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # What there is.

    @property
    def fields(self) -> Fields | None:
        """The fields, None before the first step."""
        return self.dataset.fields

    @property
    def _num_open_rows(self) -> int:
        return 0 if self._writer is None else self._writer.num_open_rows

    @property
    def num_episodes(self) -> int:
        """Complete episodes that are stored."""
        return self.dataset.num_episodes

    @property
    def num_timesteps(self) -> int:
        """Steps of complete episodes that are stored."""
        return self.dataset.num_timesteps

    @property
    def is_empty(self) -> bool:
        """Whether there is no complete episode."""
        return self.dataset.is_empty

    @property
    def can_sample(self) -> bool:
        """Whether `sample` would find an episode that is long enough now; of a mixture, one in each member."""
        return not self._is_closed and self.dataloader.stream.drawer.can_draw()

    def stats(self) -> dict[str, float]:
        """Numbers for a logger.

        Returns:
            `num_episodes` and `num_timesteps` that are stored, `fill` (their share of the capacity), `reachable` (the
            share of the steps that lie in some window of T steps), `mean_episode_length`, `num_evicted` episodes so
            far, `num_batches` taken, `num_rejected_windows` (drawn again because their episode was evicted), `padding`
            (its share in the last batch, if that has a `mask`; without workers); of compressed fields,
            `compressed_bytes` and `compression_ratio`; `mean_episode_return` of the last 100 complete episodes if there
            is a scalar `reward`; after a batch, `newest_age`: steps added since its newest row (not for a mixture);
            with a limiter, `samples_per_insert` (drawn steps for each added one, once there are both). Lengths and
            returns are those of episodes, not of the pieces that `max_episode_length` cuts.
        """
        dataset, stream = self.dataset, self.dataloader.stream
        found: dict[str, float] = {
            "num_episodes": dataset.num_episodes,
            "num_timesteps": dataset.num_timesteps,
            "fill": dataset.fill,
            "reachable": self._reachable,
            "mean_episode_length": dataset.table.mean_length,
            "num_evicted": dataset.num_evicted,
            "num_batches": stream.position,
            "num_rejected_windows": stream.num_rejected,
            **compression_of(dataset),
        }
        if stream.padding is not None:
            found["padding"] = stream.padding
        missed = [sampler.num_missed for sampler in stream.drawer.samplers if sampler.num_missed is not None]
        if missed:
            found["num_missed_windows"] = sum(missed)
        last = self.returns.last
        if last:
            found["mean_episode_return"] = sum(last) / len(last)
        if stream.newest_step is not None and not dataset.has_members:
            found["newest_age"] = dataset.table.num_steps_after(stream.newest_step)
        if self.limiter is not None and self.limiter.samples_per_insert is not None:
            found["samples_per_insert"] = self.limiter.samples_per_insert
        return found

    def __len__(self) -> int:
        return self.num_timesteps

    def __repr__(self) -> str:
        stream, share = self.dataloader.stream, self._reachable
        return (
            f"ReplayBuffer: batches of {stream.batch_size} x {stream.sequence_length or 'whole episodes'}, "
            f"{self._num_open_rows:,} steps in open episodes"
            + (f", {share:.0%} of the stored steps can be drawn" if 0 < share < 1 else "")
            + f"\n{self.dataset!r}"
        )
