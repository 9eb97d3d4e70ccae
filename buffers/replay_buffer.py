"""ReplayBuffer: the front-end that an environment loop talks to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from buffers.accumulator import Accumulator
from buffers.conversion import as_array
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.verification import check_rows
from buffers.fields import Fields
from buffers.sampler import Sampler
from buffers.statistics import Statistics
from buffers.utils import integer

__all__ = ["ReplayBuffer"]


class ReplayBuffer:
    """Splits streams of steps into episodes, hands them to a dataset, and draws batches from it.

        >>> from buffers.dataset import RingBufferDataset
        >>> buffer = ReplayBuffer(RingBufferDataset(capacity=100_000), batch_size=32, sequence_length=16, num_envs=1)
        >>> for step in range(100):
        ...     buffer.add_step({"obs": np.zeros(4), "reward": 0.5}, done=step % 50 == 49)
        >>> buffer.num_episodes
        2
        >>> {name: tuple(value.shape) for name, value in buffer.sample().items()}
        {'obs': (32, 16, 4), 'reward': (32, 16)}

    Args:
        dataset: Where episodes live.
        batch_size: B, sequences a batch.
        sequence_length: T, steps of each; None for whole episodes, padded, with `mask`.
        chunk_size: Sequences that one read brings; divides `batch_size`, which is the default.
        num_workers: Processes that load; 0 by default.
        num_envs: N. 1 says that steps come without an environment axis (unless `done` has one); None leaves it to
            the first step.
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
        dataset: EpisodeDataset,
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
        if not isinstance(dataset, EpisodeDataset):
            raise TypeError(f"`dataset` must be an EpisodeDataset, found {type(dataset).__name__}.")
        self.dataset = dataset
        self.max_episode_length = max_episode_length
        if max_episode_length is not None:
            self.max_episode_length = integer("max_episode_length", max_episode_length, 1)
            if self.max_episode_length > dataset.episode_capacity:
                raise ValueError(
                    f"`max_episode_length`={max_episode_length} exceeds the `capacity` of {dataset.episode_capacity} "
                    "steps."
                )
        self._stated_num_envs = None if num_envs is None else integer("num_envs", num_envs, 1)
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
        # Without workers and pinning there is nothing that a DataLoader adds to a batch but time.
        loader = self.dataloader
        self._direct = not (loader.num_workers or loader.pin_memory or loader_options.get("collate_fn"))
        self._batches: Iterator[Any] | None = None
        self._generation = 0
        self._accumulator: Accumulator | None = None
        self._leading: tuple[int, ...] = ()
        # The token of the recorder whose rows come in: one at a time, or the episodes of two would mix.
        self._recorder: object | None = None
        self._is_closed = False
        self._statistics = Statistics(dataset)

    # Steps in.

    def add_step(self, step_data: Mapping[str, Any], done: Any) -> None:
        """Add the current step of the environment, or of each of N environments.

            single         o0 o1 o2 | o0 ...       done=True comes with o2: this row is the episode's last,
                      done F  F  T    F            which can be drawn at once
            vectorized     o0 o1 o2 | o0 ...       done[i]=True comes with o0': environment i ended on the call
                   done[i] F  F  F    T            before and was reset, so this row is its next episode's first

        With batched rows, a plain bool stands for all N. The first step decides which of the two it is: by
        `num_envs` if it was given; else vectorized if `done` has one axis; else vectorized if all leaves
        share their leading size, with a warning.

        Args:
            step_data: `field -> (*shape)`, or `(N, *shape)`; nested dicts allowed. Values are copied. dtypes are
                kept, Python floats become float32.
            done: bool, or bool `(N,)`.

        Raises:
            TypeError: A value that is no tensor, array or number; a `done` that is not bool.
            ValueError: Other fields, dtypes, shapes or N than before, or an open episode as long as the capacity.
                The buffer is as it was.
        """
        flag = _as_flags("done", done)
        if self._accumulator is None:
            self._begin(step_data, {"done": flag})
        if self._leading:
            self._add(step_data, flag, None, None)
        else:
            self._add(step_data, None, flag, None)

    def add(
        self,
        step_data: Mapping[str, Any],
        *,
        is_first: Any = None,
        is_last: Any = None,
        mask: Any = None,
    ) -> None:
        """Add one row of the environment, or of each of N environments, and say where episodes begin and end.

        Args:
            step_data: As in `add_step`.
            is_first: bool, or bool `(N,)`: the rows before this one are a complete episode.
            is_last: bool, or bool `(N,)`: with this row, the episode is complete.
            mask: bool, or bool `(N,)`: False where the environment brings no row; what it has in the other
                arguments is not looked at.

        Raises:
            TypeError: As in `add_step`.
            ValueError: As in `add_step`.
        """
        flags = {
            name: None if value is None else _as_flags(name, value)
            for name, value in (("is_first", is_first), ("is_last", is_last), ("mask", mask))
        }
        if self._accumulator is None:
            self._begin(step_data, {name: flag for name, flag in flags.items() if flag is not None})
        self._add(step_data, *flags.values())

    def add_episode(self, episode: Mapping[str, Any]) -> int:
        """Add a whole episode; open ones are left alone.

        Args:
            episode: `field -> (L, *shape)`, or lists of L rows. Copied.

        Returns:
            The episode's id.

        Raises:
            TypeError: A value that is no tensor, array or list of numbers.
            ValueError: No rows, rows of unequal number, more than the capacity, or other fields than the dataset's.
        """
        self._check_open()
        episode_id = self.dataset.add_episode(episode)
        fields = self.dataset.fields
        if fields is not None and "reward" in fields:
            self._statistics.note_return(episode["reward"])
        return episode_id

    def flush(self) -> None:
        """Hand over the open episodes as they stand: at the end of a run, or when all environments are reset."""
        self._check_open()
        if self._accumulator is not None:
            self._accumulator.flush()

    def _add_known(self, rows: Sequence[np.ndarray], is_first: Any, is_last: Any, mask: Any) -> None:
        """For the recorder: `add` of rows that are known to fit, in the order of `fields`.

        Args:
            rows: `(N, *shape)` a field; N = 1 also where rows have no environment axis.
            is_first: As for `add`, but bool `(N,)` or None; so are the others.
            is_last: The same.
            mask: The same.
        """
        self._check_open()
        accumulator = self._accumulator
        assert accumulator is not None  # The recorder's first row comes by `add`.
        self._check_storable(accumulator.fields, rows)
        if self._leading:
            accumulator.add_rows(rows, is_first, is_last, mask)
        elif mask is None or mask[0]:
            flags = [flag is not None and bool(flag[0]) for flag in (is_first, is_last)]
            accumulator.add_row([row[0] for row in rows], *flags)

    def _truncate(self, mask: Any) -> None:
        """For the recorder: hand over open episodes that a reset cut off, with `truncated` set on their last rows.

        Args:
            mask: bool, or bool `(N,)`: whose episodes.

        Raises:
            ValueError: The mask is of another N; nothing has changed.
        """
        self._check_open()
        accumulator = self._accumulator
        if accumulator is None or mask is False:
            return
        mask = self._flag_for(self._leading, "mask", mask)
        if "truncated" in accumulator.fields:
            accumulator.amend("truncated", True, mask)
        accumulator.flush(mask)

    def _begin(self, step_data: Mapping[str, Any], flags: dict[str, Any]) -> None:
        """From the first row, settle N and the fields; nothing is kept if the row is refused."""
        self.dataset.check_writable()
        leading = self._leading_of(step_data, flags)
        fields = self.dataset.fields
        for name, flag in flags.items():
            self._flag_for(leading, name, flag)
        try:
            if fields is None:
                fields = Fields.from_rows(step_data, len(leading))
            self._rows(fields, leading, step_data)
        except ValueError as error:
            arrays = [name for name, flag in flags.items() if not isinstance(flag, bool)]
            if not arrays:
                raise
            raise ValueError(
                f"{error} As `{arrays[0]}` is an array, these are rows of {leading[0]} environments; for a single one, "
                "pass a plain bool."
            ) from None
        self.dataloader.stream.check_include(fields)
        if self.dataset.fields is None:
            # At once, so that nobody else brings it other fields while episodes are open here.
            self.dataset.settle_fields(fields)
        self._leading = leading
        self._accumulator = Accumulator(
            fields,
            num_envs=leading[0] if leading else 1,
            max_rows=self.dataset.episode_capacity,
            cut_after=self.max_episode_length,
            emit=_HandOver(self.dataset, fields, self._statistics),
        )

    def _leading_of(self, step_data: Mapping[str, Any], flags: dict[str, Any]) -> tuple[int, ...]:
        """`(N,)` if the first row is of N environments, `()` if it is of one without an axis for it."""
        sizes = {len(flag) for flag in flags.values() if not isinstance(flag, bool)}
        if 0 in sizes:
            raise ValueError("A flag has shape (0,), expected one for each of at least one environment.")
        num_envs = self._stated_num_envs
        if num_envs is not None:
            return () if num_envs == 1 and not sizes else (num_envs,)
        if sizes:
            return (max(sizes),)
        row = Fields.from_rows(step_data, 0)
        shapes = [tensor_type.shape for tensor_type in row.values()]
        known = self.dataset.fields
        if known is not None and row.conflict_with(known) is None:
            return ()
        if not all(shape and shape[0] == shapes[0][0] > 0 for shape in shapes):
            return ()
        warnings.warn(
            f"All fields of the first step have leading size {shapes[0][0]}, so they are taken for the rows of "
            f"{shapes[0][0]} environments, and done=True for 'was done on the call before'. Say so with "
            f"`num_envs={shapes[0][0]}`, or `num_envs=1` if it is a single environment.",
            stacklevel=4,
        )
        return (shapes[0][0],)

    def _add(self, step_data: Mapping[str, Any], is_first: Any, is_last: Any, mask: Any) -> None:
        self._check_open()
        accumulator = self._accumulator
        assert accumulator is not None  # Every caller has begun.
        leading = self._leading
        rows = self._rows(accumulator.fields, leading, step_data)
        if leading:
            accumulator.add_rows(
                rows,
                None if is_first is None else self._flag_for(leading, "is_first (done)", is_first),
                None if is_last is None else self._flag_for(leading, "is_last", is_last),
                None if mask is None else self._flag_for(leading, "mask", mask),
            )
            return
        for name, flag in (("is_first", is_first), ("is_last (done)", is_last), ("mask", mask)):
            if flag is not None:
                self._flag_for(leading, name, flag)
        if mask is not False:
            accumulator.add_row(rows, bool(is_first), bool(is_last))

    def _rows(self, fields: Fields, leading: tuple[int, ...], step_data: Mapping[str, Any]) -> list[Any]:
        """The values in the order of the fields, as arrays that are known to fit."""
        rows = fields.arrays(step_data)
        check_rows(fields, rows, leading, self.dataset.verification_mode)
        self._check_storable(fields, rows)
        return rows

    def _check_storable(self, fields: Fields, rows: Sequence[Any]) -> None:
        """Refuse a row now that the store would refuse with its episode, when nothing could be done about it."""
        if self.dataset.refuses_values:
            self.dataset.check(dict(zip(fields.names, rows, strict=True)))

    def _flag_for(self, leading: tuple[int, ...], name: str, flag: Any) -> Any:
        """A flag as it must be for N environments: bool `(N,)`, or None where it is no different from None."""
        if flag is None:
            return None
        if isinstance(flag, bool):
            if not leading or (flag is (name == "mask")):
                return None
            return np.full(leading, flag)
        if flag.shape != leading:
            expected = f"a bool array of shape {leading}, or a plain bool" if leading else "a plain bool"
            raise ValueError(f"`{name}` has shape {flag.shape}, expected {expected}.")
        return flag

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("The buffer is closed.")

    # Batches out.

    def sample(self) -> Any:
        """The next batch, `field -> (B, T, *shape)` with what `include` asked for, or what `transform` made of it.

        Raises:
            RuntimeError: No complete episode is long enough.
        """
        if self._is_closed or not self.dataset.table.num_steps:
            self._check_drawable()
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

    def _check_drawable(self) -> None:
        self._check_open()
        num_open_rows = 0 if self._accumulator is None else self._accumulator.num_open_rows
        if num_open_rows:
            raise RuntimeError(
                f"No episode is complete yet: {num_open_rows} steps are in open episodes. They can be drawn when these "
                "end; `flush()` hands them over as they stand."
            )

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.sample()

    def close(self) -> None:
        """Hand over the open episodes and end the workers. The dataset stays as it is.

        If an episode cannot be handed over, the buffer stays open, so that this can be called again.
        """
        if not self._is_closed:
            try:
                self.flush()
                self._is_closed = True
            finally:
                self._batches = None
                self.dataloader.end_workers()
                self.dataset.end_workers()

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # What there is.

    @property
    def fields(self) -> Fields | None:
        """The fields, None before the first step."""
        return self._accumulator.fields if self._accumulator is not None else self.dataset.fields

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
            `num_evicted` episodes so far, `num_batches` taken, `num_rejected_windows` (drawn again, as their
            episode was evicted meanwhile); `mean_episode_return` of the last 100 complete episodes if there is a
            scalar `reward`; and, after a batch, `newest_age`: steps added since the newest row in the last one (not
            for a mixture, whose members count their steps apart).
        """
        return self._statistics.numbers(self.dataloader.stream)

    def __len__(self) -> int:
        return self.num_timesteps

    def __repr__(self) -> str:
        num_open = 0 if self._accumulator is None else self._accumulator.num_open_rows
        stream = self.dataloader.stream
        return (
            f"ReplayBuffer: batches of {stream.batch_size} x {stream.sequence_length or 'whole episodes'}, "
            f"{num_open:,} steps in open episodes\n{self.dataset!r}"
        )


class _HandOver:
    """Takes complete episodes to the dataset. It holds no buffer, so that one that is dropped is gone at once."""

    def __init__(self, dataset: EpisodeDataset, fields: Fields, statistics: Statistics) -> None:
        self._dataset, self._fields, self._statistics = dataset, fields, statistics
        self.has_taken = False

    def __call__(self, episode: dict[str, np.ndarray]) -> None:
        self._dataset.add(episode)
        self.has_taken = True
        self._statistics.note_return(episode.get("reward"))


def _as_flags(name: str, value: Any) -> bool | np.ndarray:
    """A bool, or a bool array of one axis."""
    if isinstance(value, bool):
        return value
    array = as_array(name, value) if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind != "b":
        raise TypeError(f"`{name}` must be bool or an array of bool, found {array.dtype}: {value!r:.60}.")
    if array.ndim == 0:
        return bool(array)
    if array.ndim > 1:
        raise ValueError(f"`{name}` must have at most one axis, that of the environments, found shape {array.shape}.")
    return array
