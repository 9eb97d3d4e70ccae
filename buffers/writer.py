"""EpisodeWriter: steps of environments in, complete episodes out, into a sink.

A call with valid rows always takes them. An episode that the sink cannot store waits, and every call first tries to
store what waits. Two environments a and b, and a sink that fails twice to store the episode b0 b1:

    call    rows     completes       the sink                  waits afterwards    the call
    1       a0 b0    -               -                         -                   returns
    2       a1 b1    a0 a1, b0 b1    stores a, fails for b     b0 b1               takes its rows, raises the error
    3       a2 b2    -               fails for b               b0 b1               takes its rows, raises the error
    4       a3 b3    a2 a3           stores b, then a          -                   returns

So a caller that catches the error goes on with the next step and never repeats a call. An episode that is being stored
when Ctrl-C comes is not tried again; go on with a reset.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from buffers.accumulator import Accumulator
from buffers.conversion import as_array
from buffers.dataset.episode_info import EpisodeInfo, infos_by_env
from buffers.dataset.verification import VerificationMode, check_rows
from buffers.fields import Fields
from buffers.limiter import SamplesPerInsert
from buffers.sink import EpisodeSink
from buffers.table import GOES_ON
from buffers.utils import integer

__all__ = ["EpisodeSink", "EpisodeWriter"]


Rows = dict[str, np.ndarray]
# A flag that is one value, not an array of one for each environment.
_ONE = (bool, np.bool_)


class EpisodeWriter:
    """Splits the steps of one environment, or of N that step together, into episodes, and passes these to a sink.

        >>> from buffers.dataset import RingBufferDataset
        >>> dataset = RingBufferDataset(capacity=1_000)
        >>> writer = EpisodeWriter(dataset, num_envs=1)
        >>> for step in range(4):
        ...     writer.add_step({"obs": np.zeros(3), "reward": 0.5}, done=step == 2)
        >>> dataset.episode_lengths, writer.num_open_rows
        ([3], 1)

    Args:
        sink: Takes the complete episodes.
        num_envs: As for `ReplayBuffer`; so are the errors.
        max_episode_length: As for `ReplayBuffer`; so is `overlap`.
        check_fields: Called with the fields before they are settled; raises to refuse them.
        on_stored: Called with each episode's environment, rows and cut after the sink has stored it.
        limiter: That of a buffer, which says when rows may be added, and counts them.

    Attributes:
        owner: The recorder that may write, as an object that it made; None before the first.
        num_envs: N, None before it is known.
        leading: The axes before those of a field: `(N,)`, or `()` for a single environment without an axis of its own.
            Settled by the first row, or set by a recorder.
        max_episode_length: As given.
        overlap: Rows by which pieces overlap.
        is_closed: Whether `close` was called; a closed writer takes no step.
    """

    def __init__(
        self,
        sink: EpisodeSink,
        num_envs: int | None = None,
        max_episode_length: int | None = None,
        overlap: int = 0,
        *,
        check_fields: Callable[[Fields], object] | None = None,
        on_stored: Callable[[int, dict[str, np.ndarray], int], object] | None = None,
        limiter: SamplesPerInsert | None = None,
    ) -> None:
        self.sink = sink
        self.num_envs = None if num_envs is None else integer("num_envs", num_envs, 1)
        if max_episode_length is not None:
            max_episode_length = integer("max_episode_length", max_episode_length, 1)
            if max_episode_length > sink.episode_capacity:
                raise ValueError(
                    f"`max_episode_length`={max_episode_length} exceeds the `capacity` of {sink.episode_capacity} "
                    "steps."
                )
        self.max_episode_length = max_episode_length
        self.owner: object | None = None
        self.is_closed = False
        self._check_fields, self._limiter = check_fields, limiter
        self._outbox = _Outbox(sink, on_stored)
        # Made by the first row, which settles N and the fields.
        self._accumulator: Accumulator | None = None
        self.leading: tuple[int, ...] = ()
        self.overlap = 0
        self.overlap_at_least(integer("overlap", overlap, 0))

    # Steps in.

    def add_step(self, step_data: Mapping[str, Any], done: Any, info: Any = None) -> None:
        """`ReplayBuffer.add_step`."""
        flag = _as_flag("done", done)
        rows = self.checked(step_data, {"done": flag}, info)
        try:
            if self.leading:
                self.take(rows, self._per_env(flag))
            else:
                self.take(rows, None, flag)
        finally:
            if info is not None:
                self._outbox.infos = {}
        if self._outbox.waiting:
            self.check_stored()

    def add(
        self,
        step_data: Mapping[str, Any],
        *,
        is_first: Any = None,
        is_last: Any = None,
        mask: Any = None,
        info: Any = None,
    ) -> None:
        """`ReplayBuffer.add`."""
        given = {"is_first": is_first, "is_last": is_last, "mask": mask}
        flags = {name: _as_flag(name, flag) for name, flag in given.items() if flag is not None}
        rows = self.checked(step_data, flags, info)
        try:
            self.take(rows, *[self._per_env(flags.get(name)) for name in given])
        finally:
            if info is not None:
                self._outbox.infos = {}
        self.check_stored()

    def flush(self) -> None:
        """`ReplayBuffer.flush`."""
        self._complete(None)
        self.check_stored()

    def close(self) -> None:
        """Flush and take no further step. If an episode cannot be stored, the writer stays open."""
        if not self.is_closed:
            self.flush()
            self.is_closed = True

    # Steps in, in parts: for a recorder, which takes all rows of a call before it raises the sink's error.

    def checked(self, step_data: Mapping[str, Any], flags: Mapping[str, Any], info: Any = None) -> list[np.ndarray]:
        """The values in the order of the fields, as arrays `(*leading, *shape)` that fit; nothing is added.

        The first call settles N and the fields. Errors are those of `add`. An `info` is kept for the episodes that the
        next `take` completes.
        """
        if self.is_closed:
            self._check_open()
        if self._accumulator is None:
            leading = self.leading or self._leading_of(step_data, flags)
            fields = self._fields_of(step_data, leading, flags)
        else:
            leading, fields = self.leading, self._accumulator.fields
        for name, flag in flags.items():
            if not isinstance(flag, _ONE) and flag.shape != leading:
                expected = f"a bool array of shape {leading}, or a plain bool" if leading else "a plain bool"
                raise ValueError(f"`{name}` has shape {flag.shape}, expected {expected}.")
        mode = self.sink.verification_mode
        # A single environment gives numbers, which have to become arrays first.
        rows = _exact_rows(fields, leading, step_data) if leading and mode is not VerificationMode.ALL_CHECKS else None
        if rows is None:
            rows = fields.arrays(step_data)
            check_rows(fields, rows, leading, mode)
        if self.sink.refuses_values:
            self.sink.check(dict(zip(fields.names, rows, strict=True)))
        infos = None if info is None else self._infos_of(info, leading, flags)
        if self._accumulator is None:
            self._settle(fields, leading)
        if infos is not None:
            self._outbox.infos = infos
        return rows

    def _infos_of(self, info: Any, leading: tuple[int, ...], flags: Mapping[str, Any]) -> dict[int, EpisodeInfo]:
        """`environment -> info` of those that these flags complete an episode of."""
        done = flags.get("done", False)
        is_first, is_last = (done, False) if leading else (False, done)
        is_open = False if self._accumulator is None else self._accumulator.is_open
        ends = np.logical_or(flags.get("is_last", is_last), np.logical_and(flags.get("is_first", is_first), is_open))
        ends = np.broadcast_to(np.logical_and(ends, flags.get("mask", True)), leading or (1,))
        infos = infos_by_env(info, leading, ends.nonzero()[0].tolist())
        for found in infos.values():
            self.sink.check_info(found)
        return infos

    def take(self, rows: Sequence[np.ndarray], is_first: Any = None, is_last: Any = None, mask: Any = None) -> None:
        """Add `checked` rows; flags are bool `(N,)` or None, without an environment axis plain bools or None."""
        if self._outbox.waiting:
            self._outbox.retry()
        accumulator = self._accumulator
        assert accumulator is not None  # The rows were checked.
        if self._limiter is None:
            return self._accumulate(accumulator, rows, is_first, is_last, mask)
        with self._limiter.adding(accumulator.num_envs, mask):
            self._accumulate(accumulator, rows, is_first, is_last, mask)

    def _accumulate(self, to: Accumulator, rows: Sequence[np.ndarray], first: Any, last: Any, mask: Any) -> None:
        if self.leading:
            to.add_rows(rows, first, last, mask)
        elif mask is None or mask:
            to.add_row(rows, bool(first), bool(last))

    def truncate(self, mask: np.ndarray) -> None:
        """Complete the open episodes under the mask, bool `(N,)`, as truncated unless they terminated."""
        self._complete(mask, truncate=True)

    def read_last(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """`Accumulator.read_last`, also before the first row."""
        return np.zeros(self.leading, np.bool_) if self._accumulator is None else self._accumulator.read_last(arrays)

    def check_stored(self) -> None:
        """Raise the sink's last error if an episode waits."""
        if self._outbox.error is not None:
            raise self._outbox.error

    def _complete(self, mask: np.ndarray | None, truncate: bool = False) -> None:
        self._check_open()
        self._outbox.retry()
        if self._accumulator is not None:
            self._accumulator.flush(mask, truncate)
        if self._limiter is not None:
            self._limiter.notify()

    def _per_env(self, flag: Any) -> Any:
        """A plain bool as bool `(N,)`, if the rows have an environment axis; anything else as it is."""
        return np.full(self.leading, flag) if self.leading and isinstance(flag, _ONE) else flag

    def _check_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("The writer is closed.")

    def overlap_at_least(self, num_rows: int) -> None:
        """Let pieces that `max_episode_length` cuts overlap by so many rows; ValueError if that is all of a piece."""
        most = self.max_episode_length
        if num_rows and (most is None or num_rows >= most):
            raise ValueError(
                f"`overlap`={num_rows} must be less than `max_episode_length`, found {most}. A recorder overlaps "
                "pieces by 1 at least, so that no transition is lost."
            )
        self.overlap = max(self.overlap, num_rows)
        if self._accumulator is not None:
            self._accumulator.overlap = self.overlap

    # State.

    @property
    def fields(self) -> Fields | None:
        """The fields, None before they are settled."""
        return self.sink.fields

    @property
    def num_open_rows(self) -> int:
        """Steps in open episodes."""
        return 0 if self._accumulator is None else self._accumulator.num_open_rows

    # The first row.

    def _leading_of(self, step_data: Mapping[str, Any], flags: Mapping[str, Any]) -> tuple[int, ...]:
        """`(N,)` if the first row is of N environments, `()` if it is of one without an axis for it."""
        sizes = [len(flag) for flag in flags.values() if not isinstance(flag, _ONE)]
        if 0 in sizes:
            raise ValueError("A flag has shape (0,), expected one for each of at least one environment.")
        if self.num_envs is not None:
            return () if self.num_envs == 1 and not sizes else (self.num_envs,)
        if sizes:
            return (max(sizes),)
        if any(isinstance(flag, np.bool_) for flag in flags.values()):
            return ()
        row = Fields.from_rows(step_data, 0)
        known = self.sink.fields
        if known is not None and row.conflict_with(known) is None:
            return ()
        shapes = [tensor_type.shape for tensor_type in row.values()]
        if not all(shape and shape[0] == shapes[0][0] > 0 for shape in shapes):
            return ()
        num_envs = shapes[0][0]
        say = f"Say so with `num_envs={num_envs}`, or `num_envs=1` if it is a single environment."
        if num_envs == 1:
            say = "Say so by `done` as an array of shape (1,); `num_envs=1` means that steps have no environment axis."
        warnings.warn(
            f"All fields of the first step have leading size {num_envs}, so they are taken for the rows of {num_envs} "
            f"environments, and done=True for 'was done on the call before'. {say}",
            stacklevel=5,  # The caller of `ReplayBuffer.add_step`.
        )
        return (num_envs,)

    def _fields_of(self, step_data: Mapping[str, Any], leading: tuple[int, ...], flags: Mapping[str, Any]) -> Fields:
        """The fields of the sink, inferred from the first row if it has none yet."""
        self.sink.check_writable()
        if self.sink.fields is not None:
            return self.sink.fields
        arrays = [name for name, flag in flags.items() if not isinstance(flag, _ONE)]
        try:
            return Fields.from_rows(step_data, len(leading))
        except ValueError as error:
            if not arrays:
                raise
            raise ValueError(
                f"{error} As `{arrays[0]}` is an array, these are rows of {leading[0]} environments; for a single one, "
                "pass a plain bool."
            ) from None

    def _settle(self, fields: Fields, leading: tuple[int, ...]) -> None:
        if self._check_fields is not None:
            self._check_fields(fields)
        if self._limiter is not None:
            self._limiter.settle_num_envs(leading[0] if leading else 1)
        # Now, so that no other writer settles other fields while episodes are open here.
        self.sink.settle_fields(fields)
        self.leading, self.num_envs = leading, leading[0] if leading else 1
        self._accumulator = Accumulator(
            fields,
            self.num_envs,
            self.sink.episode_capacity,
            self.max_episode_length,
            self.overlap,
            self._outbox.put,
        )


class _Outbox:
    """Passes episodes to the sink. Keeps copies of those that wait, oldest first, and the sink's last error."""

    def __init__(self, sink: EpisodeSink, on_stored: Callable[[int, Rows, int], object] | None) -> None:
        self._sink, self._on_stored = sink, on_stored
        self.waiting: deque[tuple[int, Rows, int, EpisodeInfo | None]] = deque()
        self.error: Exception | None = None
        # By environment, for the episodes that end in the current call.
        self.infos: dict[int, EpisodeInfo] = {}

    def put(self, env: int, episode: Rows, cut: int) -> None:
        info = None if cut & GOES_ON else self.infos.get(env)
        if self.waiting or not self._is_stored(env, episode, cut, info):
            self.waiting.append((env, {name: rows.copy() for name, rows in episode.items()}, cut, info))

    def retry(self) -> None:
        """Store what waits, up to the first that fails."""
        self.error = None
        while self.waiting:
            # Taken out first: if Ctrl-C interrupts the sink after it has stored the episode, it must not come twice.
            oldest = self.waiting.popleft()
            if not self._is_stored(*oldest):
                self.waiting.appendleft(oldest)
                return

    def _is_stored(self, env: int, episode: Rows, cut: int, info: EpisodeInfo | None) -> bool:
        try:
            self._sink.add(episode, cut, info)
        except Exception as error:
            self.error = error
            return False
        if self._on_stored is not None:
            self._on_stored(env, episode, cut)
        return True


def _exact_rows(fields: Fields, leading: tuple[int, ...], step_data: Mapping[str, Any]) -> list[np.ndarray] | None:
    """The values if all are arrays that fit as they are; None if they have to be converted, or refused."""
    if type(step_data) is not dict or len(step_data) != len(fields.layout):
        return None
    rows = []
    for name, dtype, shape in fields.layout:
        value = step_data.get(name)
        if type(value) is not np.ndarray or value.dtype is not dtype or value.shape != leading + shape:
            return None
        rows.append(value)
    return rows


def _as_flag(name: str, value: Any) -> Any:
    """A bool `(N,)`, a plain bool, or an np.bool_ for an array without axes, which means a single environment."""
    if isinstance(value, bool):
        return value
    array = value
    if type(value) is not np.ndarray:
        array = as_array(name, value) if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind != "b":
        if array.dtype.kind not in "iuf":
            raise TypeError(f"`{name}` must be bool or an array of bool, found {array.dtype}: {array!r:.60}.")
        flags = array != 0
        if (array != flags).any():
            raise ValueError(f"`{name}` must be bool, or numbers that are 0 or 1, found {array!r:.60}.")
        array = np.asarray(flags)
    if array.ndim > 1:
        raise ValueError(f"`{name}` must have at most one axis, that of the environments, found shape {array.shape}.")
    if array.ndim:
        return array
    return bool(array) if isinstance(value, (int, float)) else np.bool_(array)
