"""ReplayBuffer: the front-end that an environment loop talks to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.fields import Fields
from buffers.sampler import Sampler
from buffers.statistics import Statistics
from buffers.writer import EpisodeWriter

__all__ = ["ReplayBuffer"]


class ReplayBuffer:
    """Splits streams of steps into episodes, hands them to a dataset, and draws batches from it.

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
        dataset: Where episodes live, or a source that batches are only drawn from (a `MixtureDataset`).
        batch_size: B, sequences a batch.
        sequence_length: T, steps of each; None for whole episodes, padded, with `mask`.
        chunk_size: As in `EpisodeSource.get_loader`; so are all that are not named here.
        num_workers: Processes that load; 0 by default.
        num_envs: N. 1 says that steps have no environment axis (unless `done` has one); None leaves it to the first.
        sampler: Which windows are drawn; uniformly over all windows by default.
        transform: A function on the batch.
        include: What else a batch holds, see `SequenceStream`.
        seed: Of all draws; None takes it from the operating system.
        max_episode_length: Steps after which an open episode counts as complete, for streams that never end.
        **loader_options: Go to torch's `DataLoader` as they are.

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
        sampler: Sampler | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        include: Iterable[str] = (),
        seed: int | None = None,
        max_episode_length: int | None = None,
        **loader_options: Any,
    ) -> None:
        if not isinstance(dataset, EpisodeSource):
            raise TypeError(f"`dataset` must be an EpisodeSource, found {type(dataset).__name__}.")
        self.dataset = dataset
        self.dataloader = dataset.get_loader(
            batch_size,
            sequence_length,
            chunk_size,
            num_workers,
            sampler=sampler,
            transform=transform,
            include=include,
            seed=seed,
            **loader_options,
        )
        # Without workers and pinning, all that a DataLoader adds to a batch is time.
        loader = self.dataloader
        self._direct = not (loader.num_workers or loader.pin_memory or loader_options.get("collate_fn"))
        self._batches: Iterator[Any] | None = None
        self._generation = 0
        self._is_closed = False
        self._statistics = Statistics(dataset)
        self._writer: EpisodeWriter | None = None
        if isinstance(dataset, EpisodeDataset):
            self._writer = EpisodeWriter(
                dataset,
                num_envs,
                max_episode_length,
                check_fields=loader.stream.check_include,
                on_stored=self._statistics.note,
            )

    # Steps in.

    @property
    def writer(self) -> EpisodeWriter:
        """What splits steps into episodes; RuntimeError for a source that takes none."""
        if self._writer is None:
            raise RuntimeError(
                f"A {type(self.dataset).__name__} holds no episodes of its own: add to one of its members, or evict "
                "from it."
            )
        return self._writer

    def add_step(self, step_data: Mapping[str, Any], done: Any) -> None:
        """Add the current step of the environment, or of each of N environments.

            single         o0 o1 o2 | o0 ...       done=True comes with o2: this row is the episode's last,
                      done F  F  T    F            which can be drawn at once
            vectorized     o0 o1 o2 | o0 ...       done[i]=True comes with o0': environment i ended on the call
                   done[i] F  F  F    T            before and was reset, so this row is its next episode's first

        With batched rows, a plain bool stands for all N. The first step decides which of the two it is: by `num_envs`
        if given; else vectorized if `done` has one axis; else if all leaves share their leading size, with a warning.

        Args:
            step_data: `field -> (*shape)`, or `(N, *shape)`; nested dicts allowed. Values are copied. dtypes are
                kept, Python floats become float32.
            done: bool, or bool `(N,)`.

        Raises:
            TypeError: A value that is no tensor, array or number; a `done` that is not bool.
            ValueError: Other fields, dtypes, shapes or N than before, or an open episode as long as the capacity.
                The buffer is as it was.
            Exception: Whatever the dataset raised for an episode that ends here or did before: an OSError of a full
                disk. The step was taken, and the next call tries again to store the episode.
        """
        (self._writer or self.writer).add_step(step_data, done)

    def add(self, step_data: Mapping[str, Any], *, is_first: Any = None, is_last: Any = None, mask: Any = None) -> None:
        """Add one row of the environment, or of each of N environments, and say where episodes begin and end.

        Args:
            step_data: As in `add_step`; so are the errors.
            is_first: bool, or bool `(N,)`: the rows before this one are a complete episode.
            is_last: bool, or bool `(N,)`: with this row, the episode is complete.
            mask: bool, or bool `(N,)`: False where the environment brings no row, and the rest is not looked at.
        """
        self.writer.add(step_data, is_first=is_first, is_last=is_last, mask=mask)

    def add_episode(self, episode: Mapping[str, Any]) -> int:
        """Add a whole episode, as by `EpisodeDataset.add_episode`; open ones are left alone."""
        self._check_open()
        dataset = self.writer.sink
        assert isinstance(dataset, EpisodeDataset)  # It has a writer.
        episode_id = dataset.add_episode(episode)
        self._statistics.note(episode)
        return episode_id

    def flush(self) -> None:
        """Complete the open episodes as they stand: at the end of a run, or when all environments are reset."""
        if self._writer is not None:
            self._writer.flush()

    # Batches out.

    def sample(self) -> Any:
        """The next batch, `field -> (B, T, *shape)` with what `include` asked for, or what `transform` made of it.

        Raises:
            RuntimeError: No complete episode is long enough.
        """
        if self._is_closed or not self.dataset.table.num_steps:
            self._check_open()
            if self._num_open_rows:
                raise RuntimeError(
                    f"No episode is complete yet: {self._num_open_rows} steps are in open episodes. They can be drawn "
                    "when these end; `flush()` completes them as they stand."
                )
        if self._direct:
            return self.dataloader.stream.take()
        if self._batches is None or self._generation != self.dataloader.generation:
            self._batches, self._generation = iter(self.dataloader), self.dataloader.generation
        try:
            return next(self._batches)
        except BaseException:
            # The workers may be gone: the next call starts over, where this one stood.
            self._batches = None
            raise

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("The buffer is closed.")

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.sample()

    def close(self) -> None:
        """Complete the open episodes and end the workers. If an episode cannot be stored, the buffer stays open."""
        if not self._is_closed:
            try:
                if self._writer is not None:
                    self._writer.close()
                self._is_closed = True
            finally:
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
        """Complete episodes that live."""
        return self.dataset.num_episodes

    @property
    def num_timesteps(self) -> int:
        """Steps of complete episodes that live; open episodes do not count."""
        return self.dataset.num_timesteps

    @property
    def is_empty(self) -> bool:
        """Whether there is no complete episode."""
        return self.dataset.is_empty

    def stats(self) -> dict[str, float]:
        """Numbers for a logger.

        Returns:
            `num_episodes` and `num_timesteps` that live, `fill` (their share of the capacity), `mean_episode_length`,
            `num_evicted` episodes so far, `num_batches` taken, `num_rejected_windows` (drawn again, as their episode
            was evicted meanwhile); `mean_episode_return` of the last 100 complete episodes if there is a scalar
            `reward`; and, after a batch, `newest_age`: steps added since the newest row in it (not for a mixture).
        """
        return self._statistics.numbers(self.dataloader.stream)

    def __len__(self) -> int:
        return self.num_timesteps

    def __repr__(self) -> str:
        stream = self.dataloader.stream
        return (
            f"ReplayBuffer: batches of {stream.batch_size} x {stream.sequence_length or 'whole episodes'}, "
            f"{self._num_open_rows:,} steps in open episodes\n{self.dataset!r}"
        )
