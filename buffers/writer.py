"""EpisodeWriter: steps of environments in, complete episodes out, into a sink.

A call with valid rows always takes them. An episode that the sink cannot store waits, and each call tries again before it
does anything else. Two environments a and b, and a sink that fails for the episode a0 a1 twice:

    call    rows     what ends    the sink               what waits after it    the call
    1       a0 b0    -            -                      -                      returns
    2       a1 b1    a, b         fails for a            a0 a1, b0 b1           takes its rows, raises the sink's error
    3       a2 b2    -            fails for a            a0 a1, b0 b1           takes its rows, raises the sink's error
    4       a3 b3    a            takes a, b, then a     -                      returns: a2 a3 was stored last

So a caller that catches the error goes on with the next step: a call is never to be repeated. Ctrl-C in the middle of an
addition leaves that episode stored or not, it is not tried again; go on with a reset.
"""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from buffers.accumulator import Accumulator
from buffers.dataset.fields import Fields, as_array
from buffers.dataset.verification import VerificationMode, check_rows
from buffers.utils import integer

__all__ = ["EpisodeSink", "EpisodeWriter"]


class EpisodeSink(Protocol):
    """What complete episodes go into: a dataset, or something that sends them to one."""

    @property
    def fields(self) -> Fields | None:
        """The fields, None before they are settled."""

    @property
    def episode_capacity(self) -> int:
        """Steps of the longest episode that it takes."""

    @property
    def verification_mode(self) -> VerificationMode:
        """How closely rows are looked at."""

    @property
    def refuses_values(self) -> bool:
        """Whether `check` may refuse values for what they are; rows are then shown to it before their episode ends."""

    def settle_fields(self, fields: Fields) -> None:
        """Lay out storage. The same fields again are no error; ValueError for others."""

    def check_writable(self) -> None:
        """RuntimeError if no episode can be added."""

    def check(self, rows: dict[str, np.ndarray]) -> None:
        """ValueError for values that it could not give back as they are."""

    def add(self, episode: dict[str, np.ndarray]) -> int:
        """Store a complete episode, or raise and be as before.

        Args:
            episode: Flat `name -> (L, *shape)`, known to fit, valid during the call only. The fields were settled before.

        Returns:
            The episode's id.
        """


class EpisodeWriter:
    """Splits the steps of one environment, or of N that step together, into episodes, and hands these to a sink.

        >>> from buffers.dataset import RingBufferDataset
        >>> dataset = RingBufferDataset(capacity=1_000)
        >>> writer = EpisodeWriter(dataset, num_envs=1)
        >>> for step in range(4):
        ...     writer.add_step({"obs": np.zeros(3), "reward": 0.5}, done=step == 2)
        >>> dataset.episode_lengths, writer.num_open_rows
        ([3], 1)

    Args:
        sink: What takes complete episodes.
        num_envs: N. 1 says that steps come without an environment axis (unless `done` has one); None leaves it to
            the first step.
        max_episode_length: Steps after which an open episode counts as complete, for streams that never end.
        check_fields: Called with the fields before they are settled; it may refuse them by raising.
        on_stored: Called with each episode once the sink has it.

    Attributes:
        owner: Marks who writes, for recorders, of which one at a time may.
        is_closed: Whether `close` was called: no step is taken any more.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        sink: EpisodeSink,
        num_envs: int | None = None,
        max_episode_length: int | None = None,
        *,
        check_fields: Callable[[Fields], object] | None = None,
        on_stored: Callable[[dict[str, np.ndarray]], object] | None = None,
    ) -> None:
        self.sink = sink
        self._num_envs = None if num_envs is None else integer("num_envs", num_envs, 1)
        self.max_episode_length = max_episode_length
        if max_episode_length is not None:
            self.max_episode_length = integer("max_episode_length", max_episode_length, 1)
            if self.max_episode_length > sink.episode_capacity:
                raise ValueError(
                    f"`max_episode_length`={max_episode_length} exceeds the `capacity` of {sink.episode_capacity} steps."
                )
        self.owner: object | None = None
        self.is_closed = False
        self._check_fields = check_fields
        self._outbox = _Outbox(sink, on_stored)
        self._accumulator: Accumulator | None = None
        # (N,), or () for a single environment whose rows have no axis for it.
        self._leading: tuple[int, ...] = ()

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
                Nothing has changed.
            Exception: Whatever the sink raised for an episode. The step was taken.
        """
        flag = _as_flag("done", done)
        if self._accumulator is None:
            self._begin(step_data, {"done": flag})
        rows = self._checked(step_data)
        flag = self._flag_for("done", flag)
        self._take(rows, *((flag, None) if self._leading else (None, flag)), None)
        self.check_stored()

    def add(self, step_data: Mapping[str, Any], *, is_first: Any = None, is_last: Any = None, mask: Any = None) -> None:
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
            Exception: As in `add_step`.
        """
        given = {"is_first": is_first, "is_last": is_last, "mask": mask}
        flags = {name: None if flag is None else _as_flag(name, flag) for name, flag in given.items()}
        if self._accumulator is None:
            self._begin(step_data, {name: flag for name, flag in flags.items() if flag is not None})
        rows = self._checked(step_data)
        self._take(rows, *[self._flag_for(name, flag) for name, flag in flags.items()])
        self.check_stored()

    def flush(self) -> None:
        """Complete the open episodes as they stand: at the end of a run, or when all environments are reset.

        Raises:
            Exception: Whatever the sink raised. The episodes are complete and wait; the next call tries again.
        """
        self._check_open()
        self._outbox.retry()
        if self._accumulator is not None:
            self._accumulator.flush()
        self.check_stored()

    def close(self) -> None:
        """`flush`, and take no further step. If an episode cannot be stored, it stays open, to be closed again."""
        if not self.is_closed:
            self.flush()
            self.is_closed = True

    # For recorders, which call `check_stored` when all of a call is taken.

    def begin(self, step_data: Mapping[str, Any], num_envs: int | None) -> None:
        """Settle N and the fields by rows that are checked and not added; or check that the rows fit.

        Args:
            step_data: As in `add_step`.
            num_envs: N, None for rows without an environment axis.

        Raises:
            TypeError: As in `add_step`.
            ValueError: As in `add_step`.
        """
        if self._accumulator is None:
            self._settle(step_data, () if num_envs is None else (num_envs,))
        else:
            self._checked(step_data)

    def add_rows(self, rows: Sequence[np.ndarray], is_first: Any = None, is_last: Any = None, mask: Any = None) -> None:
        """`add` of rows that are known to fit, in the order of `fields`; the sink's errors are left to `check_stored`.

        Args:
            rows: `(N, *shape)` a field; N = 1 also where rows have no environment axis.
            is_first: As for `add`, but bool `(N,)` or None; so are the others.
            is_last: The same.
            mask: The same.
        """
        assert self._accumulator is not None  # `begin` comes first.
        self._check_open()
        self._check_values(self._accumulator.fields, rows)
        if not self._leading:
            rows = [row[0] for row in rows]
            is_first, is_last, mask = (None if flag is None else bool(flag[0]) for flag in (is_first, is_last, mask))
        self._take(rows, is_first, is_last, mask)

    def truncate(self, mask: Any) -> None:
        """Complete open episodes that a reset cut off, with `truncated` set on their last rows if there is such a field.

        The sink's errors are left to `check_stored`.

        Args:
            mask: bool, or bool `(N,)`: whose episodes.

        Raises:
            ValueError: The mask is of another N; nothing has changed.
        """
        self._check_open()
        accumulator = self._accumulator
        if accumulator is None or mask is False:
            return
        mask = self._flag_for("mask", mask)
        mask = None if mask is True else mask
        self._outbox.retry()
        if "truncated" in accumulator.fields:
            accumulator.amend("truncated", True, mask)
        accumulator.flush(mask)

    def check_stored(self) -> None:
        """Raise the sink's last error if an episode waits."""
        if self._outbox.error is not None:
            raise self._outbox.error

    # What there is.

    @property
    def fields(self) -> Fields | None:
        """The fields, None before the first step."""
        return self._accumulator.fields if self._accumulator is not None else self.sink.fields

    @property
    def num_envs(self) -> int | None:
        """N, None before it is known."""
        return self._num_envs if self._accumulator is None else self._accumulator.num_envs

    @property
    def num_open_rows(self) -> int:
        """Steps in open episodes."""
        return 0 if self._accumulator is None else self._accumulator.num_open_rows

    # The first row.

    def _begin(self, step_data: Mapping[str, Any], flags: dict[str, Any]) -> None:
        """From the first row, settle N and the fields; nothing is kept if the row is refused."""
        leading = self._leading_of(step_data, flags)
        for name, flag in flags.items():
            _check_shape(name, flag, leading)
        try:
            self._settle(step_data, leading)
        except ValueError as error:
            arrays = [name for name, flag in flags.items() if not isinstance(flag, bool)]
            if not arrays:
                raise
            raise ValueError(
                f"{error} As `{arrays[0]}` is an array, these are rows of {leading[0]} environments; for a single one, "
                "pass a plain bool."
            ) from None

    def _settle(self, step_data: Mapping[str, Any], leading: tuple[int, ...]) -> None:
        self._check_open()
        self.sink.check_writable()
        fields = self.sink.fields
        if fields is None:
            fields = Fields.from_rows(step_data, len(leading))
        self._fitting(fields, leading, step_data)
        if self._check_fields is not None:
            self._check_fields(fields)
        # At once, so that no other writer brings other fields while episodes are open here.
        self.sink.settle_fields(fields)
        self._leading = leading
        self._accumulator = Accumulator(
            fields,
            num_envs=leading[0] if leading else 1,
            max_rows=self.sink.episode_capacity,
            cut_after=self.max_episode_length,
            emit=self._outbox.put,
        )

    def _leading_of(self, step_data: Mapping[str, Any], flags: dict[str, Any]) -> tuple[int, ...]:
        """`(N,)` if the first row is of N environments, `()` if it is of one without an axis for it."""
        sizes = {len(flag) for flag in flags.values() if not isinstance(flag, bool)}
        if 0 in sizes:
            raise ValueError("A flag has shape (0,), expected one for each of at least one environment.")
        if self._num_envs is not None:
            return () if self._num_envs == 1 and not sizes else (self._num_envs,)
        if sizes:
            return (max(sizes),)
        row = Fields.from_rows(step_data, 0)
        shapes = [tensor_type.shape for tensor_type in row.values()]
        known = self.sink.fields
        if known is not None and row.conflict_with(known) is None:
            return ()
        if not all(shape and shape[0] == shapes[0][0] > 0 for shape in shapes):
            return ()
        warnings.warn(
            f"All fields of the first step have leading size {shapes[0][0]}, so they are taken for the rows of "
            f"{shapes[0][0]} environments, and done=True for 'was done on the call before'. Say so with "
            f"`num_envs={shapes[0][0]}`, or `num_envs=1` if it is a single environment.",
            stacklevel=_level_of_caller(),
        )
        return (shapes[0][0],)

    # Every row.

    def _take(self, rows: Sequence[Any], is_first: Any, is_last: Any, mask: Any) -> None:
        """Take checked rows; first try again to store what waits."""
        accumulator = self._accumulator
        assert accumulator is not None  # Every caller has begun.
        if self._outbox.waiting:
            self._outbox.retry()
        if self._leading:
            accumulator.add_rows(rows, is_first, is_last, mask)
        elif mask is not False:
            accumulator.add_row(rows, bool(is_first), bool(is_last))

    def _checked(self, step_data: Mapping[str, Any]) -> list[Any]:
        """The values in the order of the fields, as arrays that are known to fit."""
        self._check_open()
        assert self._accumulator is not None  # Every caller has begun.
        return self._fitting(self._accumulator.fields, self._leading, step_data)

    def _fitting(self, fields: Fields, leading: tuple[int, ...], step_data: Mapping[str, Any]) -> list[Any]:
        rows = fields.arrays(step_data)
        check_rows(fields, rows, leading, self.sink.verification_mode)
        self._check_values(fields, rows)
        return rows

    def _check_values(self, fields: Fields, rows: Sequence[Any]) -> None:
        """Refuse a row now that the sink would refuse with its episode, when nothing could be done about it."""
        if self.sink.refuses_values:
            self.sink.check(dict(zip(fields.names, rows, strict=True)))

    def _flag_for(self, name: str, flag: Any) -> Any:
        """A flag for the accumulator: bool `(N,)`, or None where that says the same; for a single environment a bool."""
        if isinstance(flag, bool) and self._leading:
            return None if flag is (name == "mask") else np.full(self._leading, flag)
        _check_shape(name, flag, self._leading)
        return flag

    def _check_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("The writer is closed.")


class _Outbox:
    """Complete episodes on their way to the sink, in the order in which they were completed.

    Attributes:
        waiting: Copies of those that could not be stored, oldest first.
        error: Why the oldest of them could not be stored; None if none waits.
    """

    def __init__(self, sink: EpisodeSink, on_stored: Callable[[dict[str, np.ndarray]], object] | None) -> None:
        self._sink, self._on_stored = sink, on_stored
        self.waiting: deque[dict[str, np.ndarray]] = deque()
        self.error: Exception | None = None

    def put(self, episode: dict[str, np.ndarray]) -> None:
        """Store an episode, or keep a copy of it until that is possible."""
        if self.waiting or not self._is_stored(episode):
            self.waiting.append({name: rows.copy() for name, rows in episode.items()})

    def retry(self) -> None:
        """Store what waits, up to the first that fails."""
        self.error = None
        while self.waiting:
            # Taken out first: if Ctrl-C comes while it is stored, it may be there already, and must not come twice.
            episode = self.waiting.popleft()
            if not self._is_stored(episode):
                self.waiting.appendleft(episode)
                return

    def _is_stored(self, episode: dict[str, np.ndarray]) -> bool:
        try:
            self._sink.add(episode)
        except Exception as error:
            self.error = error
            return False
        if self._on_stored is not None:
            self._on_stored(episode)
        return True


def _as_flag(name: str, value: Any) -> bool | np.ndarray:
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


def _check_shape(name: str, flag: Any, leading: tuple[int, ...]) -> None:
    """Refuse a flag of another shape than that of the environments; a plain bool and None fit any."""
    if isinstance(flag, np.ndarray) and flag.shape != leading:
        expected = f"a bool array of shape {leading}, or a plain bool" if leading else "a plain bool"
        raise ValueError(f"`{name}` has shape {flag.shape}, expected {expected}.")


def _level_of_caller() -> int:
    """For a warning of the function that asks: `stacklevel` of the first frame outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("buffers."):
        level, frame = level + 1, frame.f_back
    return level
