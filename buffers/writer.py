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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from buffers.accumulator import Accumulator
from buffers.dataset.episode_info import EpisodeInfo, infos_by_env
from buffers.dataset.verification import VerificationMode, check_rows
from buffers.fields import Fields
from buffers.flags import ONE, as_flag, exact_rows
from buffers.limiter import SamplesPerInsert
from buffers.outbox import Outbox, Rows
from buffers.saving import Save, Snapshot
from buffers.sink import EpisodeSink
from buffers.utils import ThreadLock, integer

__all__ = ["EpisodeSink", "EpisodeWriter"]


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
        recorder: That recorder, as long as it is there.
        saved_recorder: What a save has kept of a recorder, for the next one.
        lock: Between threads: of rows that are added, episodes that end, and the moment of a save.
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
        self.lock = ThreadLock()
        self.recorder: Callable[[], Any] | None = None
        self.saved_recorder: dict[str, Any] | None = None
        self._check_fields, self._limiter = check_fields, limiter
        self._outbox = Outbox(sink, on_stored)
        # Made by the first row, which settles N and the fields.
        self._accumulator: Accumulator | None = None
        self.leading: tuple[int, ...] = ()
        self.overlap = 0
        self.overlap_at_least(integer("overlap", overlap, 0))

    # Steps in.

    def add_step(self, step_data: Mapping[str, Any], done: Any, info: Any = None) -> None:
        """`ReplayBuffer.add_step`."""
        flag = as_flag("done", done)
        rows = self.checked(step_data, {"done": flag}, info)
        try:
            if self.leading:
                self.take(rows, self._per_env(flag))
            else:
                self.take(rows, None, flag)
        finally:
            if info is not None:
                self._outbox.infos = {}
        if self._outbox.waiting or self._outbox.refusals:
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
        flags = {name: as_flag(name, flag) for name, flag in given.items() if flag is not None}
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
            if not isinstance(flag, ONE) and flag.shape != leading:
                expected = f"a bool array of shape {leading}, or a plain bool" if leading else "a plain bool"
                raise ValueError(f"`{name}` has shape {flag.shape}, expected {expected}.")
        mode = self.sink.verification_mode
        # A single environment gives numbers, which have to become arrays first.
        rows = exact_rows(fields, leading, step_data) if leading and mode is not VerificationMode.ALL_CHECKS else None
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
            with self.lock:
                self._outbox.retry()
        accumulator = self._accumulator
        assert accumulator is not None  # The rows were checked.
        if self._limiter is None:
            return self._accumulate(accumulator, rows, is_first, is_last, mask)
        with self._limiter.adding(accumulator.num_envs, mask):
            self._accumulate(accumulator, rows, is_first, is_last, mask)

    def _accumulate(self, to: Accumulator, rows: Sequence[np.ndarray], first: Any, last: Any, mask: Any) -> None:
        with self.lock:
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
        if error := self._outbox.take_refusal() or self._outbox.error:
            raise error

    def _complete(self, mask: np.ndarray | None, truncate: bool = False) -> None:
        self._check_open()
        with self.lock:
            self._outbox.retry()
            if self._accumulator is not None:
                self._accumulator.flush(mask, truncate)
        if self._limiter is not None:
            self._limiter.notify()

    def _per_env(self, flag: Any) -> Any:
        """A plain bool as bool `(N,)`, if the rows have an environment axis; anything else as it is."""
        return np.full(self.leading, flag) if self.leading and isinstance(flag, ONE) else flag

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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recorder": None}

    @property
    def fields(self) -> Fields | None:
        """The fields, None before they are settled."""
        return self.sink.fields

    @property
    def num_open_rows(self) -> int:
        """Steps in open episodes."""
        return 0 if self._accumulator is None else self._accumulator.num_open_rows

    @property
    def moment(self) -> AbstractContextManager[Any]:
        """For a block that no save shall see half done; nothing if there is a limiter, which may wait within it."""
        return self.lock if self._limiter is None else nullcontext()

    def begin_save(self, snapshot: Snapshot, name: str) -> None:
        """Put the open episodes, and those that wait for the sink, into a snapshot; the caller holds the lock."""
        recorder = None if self.recorder is None else self.recorder()
        told: dict[str, Any] = {
            "num_envs": self.num_envs,
            "leading": list(self.leading),
            "overlap": self.overlap,
            "waiting": self._outbox.state_dict(),
            "recorder": self.saved_recorder if recorder is None else recorder.state_dict(),
            "lengths": None,
        }
        if (accumulator := self._accumulator) is not None:
            lengths = accumulator.lengths
            told |= {"lengths": lengths, "cuts": accumulator.cuts}
            envs, kinds = lengths.nonzero()[0], dict(accumulator.fields)
            bounds, num_rows = np.stack([envs, envs + 1], 1), lengths[envs]

            def read(number: int) -> Rows:
                return accumulator.read_open(int(envs[number]), int(num_rows[number]))

            accumulator.unsaved = snapshot.rows(f"{name}/open", kinds, bounds, num_rows, read)
            snapshot.at_end.append(accumulator.end_save)
        snapshot.state(name, told)

    def restore(self, save: Save, name: str, open_episodes: str) -> None:
        """Go on where a save was made; `open_episodes` as in `ReplayBuffer.load`.

        RuntimeError if it has rows already; ValueError for another `num_envs`.
        """
        told, fields = save.state(name), self.sink.fields
        if self._accumulator is not None:
            raise RuntimeError("The buffer has taken steps already: load into a new one.")
        if None not in (self.num_envs, told["num_envs"]) and self.num_envs != told["num_envs"]:
            raise ValueError(f"`num_envs`={self.num_envs}, but the save is of {told['num_envs']} environments.")
        if open_episodes != "drop" and told["lengths"] is not None:
            self._check_open_episodes(int(max(told["lengths"])))
        self.num_envs, self.overlap = told["num_envs"] or self.num_envs, max(self.overlap, told["overlap"])
        self._outbox.load_state_dict(told["waiting"])
        if told["lengths"] is not None and fields is not None:
            self._settle(fields, tuple(told["leading"]))
            assert self._accumulator is not None  # It is settled.
            if open_episodes != "drop":
                rows = {field: save.reader.read(f"{name}/open/{field}") for field in fields}
                self._accumulator.restore(told["lengths"].tolist(), told["cuts"], rows)
        if open_episodes == "keep":
            self.saved_recorder = told["recorder"]
        elif open_episodes == "truncate":
            self._complete(None, truncate=True)

    def _check_open_episodes(self, longest: int) -> None:
        most = min(self.sink.episode_capacity, self.max_episode_length or longest)
        if longest > most:
            raise ValueError(
                f"An open episode of the save has {longest} steps, more than the {most} that it may have. Raise the "
                '`capacity` or `max_episode_length`, or load with `open_episodes="drop"`.'
            )

    # The first row.

    def _leading_of(self, step_data: Mapping[str, Any], flags: Mapping[str, Any]) -> tuple[int, ...]:
        """`(N,)` if the first row is of N environments, `()` if it is of one without an axis for it."""
        sizes = [len(flag) for flag in flags.values() if not isinstance(flag, ONE)]
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
        arrays = [name for name, flag in flags.items() if not isinstance(flag, ONE)]
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
            self.sink.codecs,
        )
