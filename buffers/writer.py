"""EpisodeWriter: steps of environments in, complete episodes out, into a sink.

A call with valid rows always takes them. An episode that the sink cannot store waits, and each call tries again before
it does anything else. Two environments a and b, and a sink that fails for b0 b1 twice:

    call    rows     completes       the sink                  waits afterwards    the call
    1       a0 b0    -               -                         -                   returns
    2       a1 b1    a0 a1, b0 b1    stores a, fails for b     b0 b1               takes its rows, raises the error
    3       a2 b2    -               fails for b               b0 b1               takes its rows, raises the error
    4       a3 b3    a2 a3           stores b, then a          -                   returns

So a caller that catches the error goes on with the next step, and never repeats a call. Ctrl-C while an episode is
stored leaves it stored or not, and it is not tried again; go on with a reset.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from buffers.accumulator import Accumulator
from buffers.conversion import as_array
from buffers.dataset.verification import VerificationMode, check_rows
from buffers.fields import Fields
from buffers.utils import integer

__all__ = ["EpisodeSink", "EpisodeWriter"]


class EpisodeSink(Protocol):
    """What takes complete episodes: a dataset, or something that sends them to one."""

    @property
    def fields(self) -> Fields | None:
        """The fields, None before they are settled."""

    @property
    def episode_capacity(self) -> int:
        """Steps of the longest episode that it takes."""

    @property
    def verification_mode(self) -> VerificationMode:
        """How closely rows are checked."""

    @property
    def refuses_values(self) -> bool:
        """Whether `check` may refuse values; then it is shown every row before its episode ends."""

    def settle_fields(self, fields: Fields) -> None:
        """Lay out storage. The same fields again are no error; ValueError for others."""

    def check_writable(self) -> None:
        """RuntimeError if no episode can be added."""

    def check(self, rows: dict[str, np.ndarray]) -> None:
        """ValueError for values that it could not give back."""

    def add(self, episode: dict[str, np.ndarray]) -> int:
        """Copy and store `name -> (L, *shape)` of the settled fields, and return its id; or raise and be as before."""


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
        num_envs: As for `ReplayBuffer`; so are the errors.
        max_episode_length: As for `ReplayBuffer`.
        check_fields: Called with the fields before they are settled; it may refuse them by raising.
        on_stored: Called with each episode once the sink has it.

    Attributes:
        owner: Set by a recorder to an object of its own: one recorder at a time may write.
        is_closed: Whether `close` was called; no step is taken any more.
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
        if max_episode_length is not None:
            max_episode_length = integer("max_episode_length", max_episode_length, 1)
        if max_episode_length is not None and max_episode_length > sink.episode_capacity:
            raise ValueError(
                f"`max_episode_length`={max_episode_length} exceeds the `capacity` of {sink.episode_capacity} steps."
            )
        self._max_episode_length = max_episode_length
        self.owner: object | None = None
        self.is_closed = False
        self._check_fields = check_fields
        self._outbox = _Outbox(sink, on_stored)
        self._accumulator: Accumulator | None = None
        # `(N,)`, or `()` for a single environment whose rows have no axis for it.
        self._leading: tuple[int, ...] = ()

    # Steps in.

    def add_step(self, step_data: Mapping[str, Any], done: Any) -> None:
        """`ReplayBuffer.add_step`."""
        flag = _as_flag("done", done)
        rows = self._checked(step_data, {"done": flag})
        flag = self._flag_for("done", flag)
        is_first, is_last = (flag, None) if self._leading else (None, flag)
        self._take(rows, is_first, is_last, None)
        if self._outbox.waiting:
            self.check_stored()

    def add(self, step_data: Mapping[str, Any], *, is_first: Any = None, is_last: Any = None, mask: Any = None) -> None:
        """`ReplayBuffer.add`."""
        given = {"is_first": is_first, "is_last": is_last, "mask": mask}
        flags = {name: _as_flag(name, flag) for name, flag in given.items() if flag is not None}
        rows = self._checked(step_data, flags)
        self._take(rows, *[self._flag_for(name, flags[name]) if name in flags else None for name in given])
        self.check_stored()

    def flush(self) -> None:
        """`ReplayBuffer.flush`."""
        self._check_open()
        self._outbox.retry()
        if self._accumulator is not None:
            self._accumulator.flush()
        self.check_stored()

    def close(self) -> None:
        """Complete the open episodes and take no further step. If one cannot be stored, this can be called again."""
        if not self.is_closed:
            self.flush()
            self.is_closed = True

    # Steps in, of a recorder, which takes its step whole before it lets `check_stored` raise the sink's error.

    def begin(self, step_data: Mapping[str, Any], mask: bool | np.ndarray) -> None:
        """Settle N (by the mask's axis, if it has one) and the fields by rows that are not added; errors of `add`."""
        self._checked(step_data, {"mask": mask})

    def add_rows(self, rows: Sequence[np.ndarray], is_first: Any = None, is_last: Any = None, mask: Any = None) -> None:
        """Add rows that fit, `(N, *shape)` a field in the order of `fields`, with flags bool `(N,)` or None."""
        self._check_open()
        assert self._accumulator is not None  # It has begun.
        if self.sink.refuses_values:
            self._check_values(self._accumulator.fields, rows)
        self._outbox.retry()
        self._accumulator.add_rows(rows, is_first, is_last, mask)

    def truncate(self, mask: np.ndarray) -> None:
        """Complete the open episodes under the mask, bool `(N,)`; their field `truncated`, if any, ends with True."""
        self._check_open()
        self._outbox.retry()
        if self._accumulator is not None:
            changes = {"truncated": True} if "truncated" in self._accumulator.fields else {}
            self._accumulator.flush(mask, **changes)

    def check_stored(self) -> None:
        """Raise the sink's last error if an episode waits."""
        if self._outbox.error is not None:
            raise self._outbox.error

    # What there is.

    @property
    def fields(self) -> Fields | None:
        """The fields, None before they are settled."""
        return self.sink.fields

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
        """Fix N and the fields; nothing is kept if the row is refused."""
        self._leading = leading = self._leading_of(step_data, flags)
        for name, flag in flags.items():
            _check_shape(name, flag, leading)
        sink = self.sink
        sink.check_writable()
        fields = sink.fields or self._inferred(step_data, flags)
        self._fitting(fields, leading, step_data)
        if self._check_fields is not None:
            self._check_fields(fields)
        # At once, so that no other writer brings other fields while episodes are open here.
        sink.settle_fields(fields)
        self._accumulator = Accumulator(
            fields, leading[0] if leading else 1, sink.episode_capacity, self._max_episode_length, self._outbox.put
        )

    def _inferred(self, step_data: Mapping[str, Any], flags: dict[str, Any]) -> Fields:
        arrays = [name for name, flag in flags.items() if not isinstance(flag, bool)]
        try:
            return Fields.from_rows(step_data, len(self._leading))
        except ValueError as error:
            if not arrays:
                raise
            raise ValueError(
                f"{error} As `{arrays[0]}` is an array, these are rows of {self._leading[0]} environments; for a "
                "single one, pass a plain bool."
            ) from None

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
        known = self.sink.fields
        if known is not None and row.conflict_with(known) is None:
            return ()
        shapes = [tensor_type.shape for tensor_type in row.values()]
        if not all(shape and shape[0] == shapes[0][0] > 0 for shape in shapes):
            return ()
        warnings.warn(
            f"All fields of the first step have leading size {shapes[0][0]}, so they are taken for the rows of "
            f"{shapes[0][0]} environments, and done=True for 'was done on the call before'. Say so with "
            f"`num_envs={shapes[0][0]}`, or `num_envs=1` if it is a single environment.",
            stacklevel=6,  # The caller of `ReplayBuffer.add_step`.
        )
        return (shapes[0][0],)

    # Every row.

    def _checked(self, step_data: Mapping[str, Any], flags: dict[str, Any]) -> list[Any]:
        """The values in the order of the fields, as arrays that are known to fit."""
        if self.is_closed:
            self._check_open()
        if self._accumulator is None:
            self._begin(step_data, flags)
        assert self._accumulator is not None  # It has begun.
        return self._fitting(self._accumulator.fields, self._leading, step_data)

    def _fitting(self, fields: Fields, leading: tuple[int, ...], step_data: Mapping[str, Any]) -> list[Any]:
        mode = self.sink.verification_mode
        # Of a single environment, numbers come, which are no arrays yet.
        rows = _exact_rows(fields, leading, step_data) if leading and mode is not VerificationMode.ALL_CHECKS else None
        if rows is None:
            rows = fields.arrays(step_data)
            check_rows(fields, rows, leading, mode)
        if self.sink.refuses_values:
            self._check_values(fields, rows)
        return rows

    def _check_values(self, fields: Fields, rows: Sequence[Any]) -> None:
        # Now, as nothing can be done about it when the episode ends.
        self.sink.check(dict(zip(fields.names, rows, strict=True)))

    def _flag_for(self, name: str, flag: bool | np.ndarray) -> Any:
        """A flag as the accumulator takes it; of N environments bool `(N,)`, or None where that says the same."""
        if isinstance(flag, bool):
            return flag if not self._leading else None if flag is (name == "mask") else np.full(self._leading, flag)
        _check_shape(name, flag, self._leading)
        return flag

    def _take(self, rows: Sequence[Any], is_first: Any, is_last: Any, mask: Any) -> None:
        """Take checked rows; before, try again to store what waits."""
        if self._outbox.waiting:
            self._outbox.retry()
        accumulator = self._accumulator
        assert accumulator is not None  # Every caller has begun.
        if self._leading:
            accumulator.add_rows(rows, is_first, is_last, mask)
        elif mask is not False:
            accumulator.add_row(rows, bool(is_first), bool(is_last))

    def _check_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("The writer is closed.")


class _Outbox:
    """Complete episodes on their way to the sink: copies of those that wait, oldest first, and why it could not be."""

    def __init__(self, sink: EpisodeSink, on_stored: Callable[[dict[str, np.ndarray]], object] | None) -> None:
        self._sink, self._on_stored = sink, on_stored
        self.waiting: deque[dict[str, np.ndarray]] = deque()
        self.error: Exception | None = None

    def put(self, episode: dict[str, np.ndarray]) -> None:
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


def _exact_rows(fields: Fields, leading: tuple[int, ...], step_data: Mapping[str, Any]) -> list[np.ndarray] | None:
    """The values if all are arrays that fit as they are; None if there is more to look at."""
    if type(step_data) is not dict or len(step_data) != len(fields.layout):
        return None
    rows = []
    for name, dtype, shape in fields.layout:
        value = step_data.get(name)
        if type(value) is not np.ndarray or value.dtype is not dtype or value.shape != leading + shape:
            return None
        rows.append(value)
    return rows


def _as_flag(name: str, value: Any) -> bool | np.ndarray:
    if isinstance(value, bool):
        return value
    if type(value) is not np.ndarray:
        value = as_array(name, value) if isinstance(value, torch.Tensor) else np.asarray(value)
    if value.dtype.kind != "b":
        raise TypeError(f"`{name}` must be bool or an array of bool, found {value.dtype}: {value!r:.60}.")
    if value.ndim > 1:
        raise ValueError(f"`{name}` must have at most one axis, that of the environments, found shape {value.shape}.")
    return value if value.ndim else bool(value)


def _check_shape(name: str, flag: bool | np.ndarray, leading: tuple[int, ...]) -> None:
    if not isinstance(flag, bool) and flag.shape != leading:
        expected = f"a bool array of shape {leading}, or a plain bool" if leading else "a plain bool"
        raise ValueError(f"`{name}` has shape {flag.shape}, expected {expected}.")
