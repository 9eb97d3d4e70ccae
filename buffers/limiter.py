"""SamplesPerInsert: keeps the number of drawn steps near a ratio of the added ones."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.loading.layout import OffsetLayout
from buffers.loading.stream import SequenceStream
from buffers.utils import ThreadLock, integer

__all__ = ["SamplesPerInsert"]


class SamplesPerInsert:
    """Keeps (drawn steps) / (added steps) of a `ReplayBuffer` near a ratio: the side that is ahead waits.

        >>> import numpy as np
        >>> from buffers import ReplayBuffer
        >>> from buffers.dataset import RingBufferDataset
        >>> limiter = SamplesPerInsert(ratio=2, min_steps=100)
        >>> buffer = ReplayBuffer(RingBufferDataset(capacity=1_000), batch_size=8, num_envs=1, limiter=limiter)
        >>> for step in range(300):
        ...     buffer.add_step({"obs": np.zeros(4)}, done=step % 10 == 9)
        ...     for _ in range(buffer.num_batches_due):
        ...         batch = buffer.sample()
        >>> limiter.state_dict()
        {'num_added': 300, 'num_drawn': 408}

    What counts, in steps:

        added    rows given to `add_step`, `add`, `add_episode` or a recorder, also those of episodes that are open; not
                 the rows that `mask` leaves out, nor those that `overlap` repeats
        drawn    B x T for each batch that `sample` has returned, padding included; B x `pack`, or B with `offsets`
        due      ratio * (added - min_steps) - drawn

    What it allows, if one call adds n steps (N for N environments):

        a batch  if added >= min_steps, due - B * T >= -tolerance, and an episode that is long enough is complete
        n steps  if due + ratio * n <= tolerance, or if no batch may be drawn

    So after `min_steps`, due stays within the tolerance, except when much is added at once: by a long episode, or until
    the first one is complete. Batches then make up for it before more is added, so the mean is kept. An example with
    ratio=2, B * T = 4, tolerance=3, and episodes of 5 steps given to `add_episode`:

        call     add   sample  sample  sample   add   sample  sample   add
        due       10        6       2      -2     8        4       0    10
                                        no batch, so add    no batch, so add

    Calls that may not go on wait, which takes a thread that adds and another that draws. A loop in one thread draws
    `ReplayBuffer.num_batches_due` batches after each step, and never waits.

    Args:
        ratio: Drawn steps for each added step, more than 0.
        tolerance: In drawn steps, at least (B * T + ratio * N) / 2: with less, there is a balance at which neither a
            batch nor a step fits. None for twice that.
        min_steps: Steps that are added before the first batch. All that were ever added count, so it may exceed the
            capacity.
        timeout: Seconds after which a call that waits raises a RuntimeError. Nothing was added or drawn then, so the
            call can be repeated. `math.inf` waits for ever.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range.
    """

    def __init__(self, ratio: float, tolerance: float | None = None, min_steps: int = 0, timeout: float = 60.0) -> None:
        self.ratio = _fraction("ratio", ratio)
        if self.ratio <= 0:
            raise ValueError(f"`ratio` must be more than 0, found {ratio}.")
        self.given_tolerance = None if tolerance is None else _fraction("tolerance", tolerance)
        self.min_steps = integer("min_steps", min_steps, 0)
        self.timeout = _number("timeout", timeout)
        if not self.timeout >= 0:
            raise ValueError(f"`timeout` must be at least 0 seconds, found {timeout}.")
        self._added, self._drawn = _Count(), _Count()
        self._can_draw: Callable[[], bool] | None = None
        self._is_closed = False
        self._make_condition()

    def _make_condition(self) -> None:
        self._lock = ThreadLock()
        self._changed = threading.Condition(self._lock)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_changed")}
        # Calls that are under way belong to the original.
        return state | {"_added": _Count(self._added.total), "_drawn": _Count(self._drawn.total)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_condition()

    # For the buffer and its writer.

    def attach(self, source: EpisodeSource, stream: SequenceStream, num_envs: int | None) -> None:
        """Belong to the buffer that adds to this source and draws from this stream; N if it is known yet.

        Raises:
            ValueError: It belongs to a buffer already, or does not fit this one. Nothing has changed.
            RuntimeError: The dataset only reads.
        """
        if self._can_draw is not None:
            raise ValueError("This `limiter` counts for another buffer: give each a SamplesPerInsert of its own.")
        if not isinstance(source, EpisodeDataset):
            raise ValueError(
                f"A `limiter` counts the steps that are added through its buffer, but a {type(source).__name__} takes "
                "none: add and draw through a buffer of one of its members."
            )
        source.check_writable()
        length = 1 if isinstance(stream.layout, OffsetLayout) else stream.layout.num_packed or stream.sequence_length
        if length is None:
            raise ValueError(
                "A `limiter` counts the B x T steps of a batch, but whole episodes (`sequence_length=None`) have no "
                "fixed T: give a `sequence_length`, or `pack`."
            )
        self._set_limits(stream.num_windows * length, num_envs or 1)
        self._can_draw = stream.drawer.can_draw

    def settle_num_envs(self, num_envs: int) -> None:
        """Take N, which the first step has told; ValueError if the tolerance is too small for it."""
        with self._lock:
            self._set_limits(self._batch_steps, num_envs)

    def _set_limits(self, batch_steps: int, num_envs: int) -> None:
        least = (batch_steps + self.ratio * num_envs) / 2
        tolerance = 2 * least if self.given_tolerance is None else self.given_tolerance
        if tolerance < least:
            raise ValueError(
                f"`tolerance`={_shown(tolerance)} cannot be kept: at some balance, neither a batch of {batch_steps} "
                f"steps nor a call that adds {num_envs} (times `ratio`={_shown(self.ratio)}) fits within it. It must "
                f"be at least {_shown(least)}, which is (B * T + ratio * N) / 2."
            )
        self._tolerance, self._batch_steps = tolerance, batch_steps
        # Balances are whole numbers of 1 / unit drawn steps: with rounding, each side could wait for the other.
        unit = math.lcm(self.ratio.denominator, tolerance.denominator)
        self._per_added, self._per_drawn, self._slack = int(self.ratio * unit), unit, int(tolerance * unit)

    def adding(self, num_envs: int, mask: Any = None) -> AbstractContextManager[None]:
        """Wait until a step of N environments, or of those under the mask, may be added.

        It counts once the block, which adds it, is left without an error. RuntimeError if it may not be added within
        the timeout, or the buffer is closed.
        """
        return self._adding(num_envs if mask is None else int(np.sum(mask)))

    def adding_episode(self, episode: Any) -> AbstractContextManager[None]:
        """As `adding`, for an episode: `field -> (L, *shape)`."""
        while isinstance(episode, Mapping):
            episode = next(iter(episode.values()), ())
        try:
            return self._adding(len(episode))
        except TypeError:
            return self._adding(0)  # The dataset will refuse it.

    def _adding(self, num_steps: int) -> AbstractContextManager[None]:
        is_allowed, reason = partial(self._may_add, num_steps), partial(self._why_not_add, num_steps)
        return self._counting(self._added, num_steps, is_allowed, reason)

    def drawing(self) -> AbstractContextManager[None]:
        """As `adding`, for a batch."""
        return self._counting(self._drawn, self._batch_steps, self._may_draw, self._why_not_draw)

    @contextmanager
    def _counting(
        self, count: _Count, num_steps: int, is_allowed: Callable[[], bool], reason: Callable[[], str]
    ) -> Iterator[None]:
        with self._lock:
            # An episode may have been completed meanwhile, which the other side may be waiting for.
            self._changed.notify_all()
            seconds = min(self.timeout, threading.TIMEOUT_MAX)
            if not self._changed.wait_for(lambda: self._is_closed or is_allowed(), seconds):
                raise RuntimeError(reason())
            if self._is_closed:
                raise RuntimeError("The buffer is closed.")
            count.pending += num_steps
        num_done = 0
        try:
            yield
            num_done = num_steps
        finally:
            with self._lock:
                count.pending -= num_steps
                count.total += num_done
                self._changed.notify_all()

    def notify(self) -> None:
        """Let those that wait look again: an episode was completed."""
        with self._lock:
            self._changed.notify_all()

    def close(self) -> None:
        """Let those that wait, and all later calls, raise that the buffer is closed."""
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()

    # What is allowed. A call that is under way counts against its own side, and for the other only once it is done.

    def _due(self, added: int, drawn: int) -> int:
        return self._per_added * (added - self.min_steps) - self._per_drawn * drawn

    def _num_allowed(self, added: int, drawn: int) -> int:
        """How many batches may be drawn."""
        num = (self._due(added, drawn) + self._slack) // (self._per_drawn * self._batch_steps)
        is_drawable = num > 0 and added >= self.min_steps and self._can_draw is not None and self._can_draw()
        return num if is_drawable else 0

    def _may_draw(self) -> bool:
        return self._num_allowed(self._added.total, self._drawn.total + self._drawn.pending) > 0

    def _may_add(self, num_steps: int) -> bool:
        added, drawn = self._added.total + self._added.pending, self._drawn.total
        return self._due(added + num_steps, drawn) <= self._slack or not self._num_allowed(added, drawn)

    def _why_not_draw(self) -> str:
        added, drawn = self._added.total, self._drawn.total + self._drawn.pending
        lacking = self._per_drawn * self._batch_steps - self._slack - self._due(added, drawn)
        num_steps = max(self.min_steps - added, -(-lacking // self._per_added))
        if num_steps <= 0:
            what, advice = "a complete episode that is long enough", "`flush()` completes open episodes."
        else:
            what = f"{_counted(num_steps, 'more step')} to be added"
            advice = "Add in another thread, or draw `num_batches_due` batches after each step."
        return f"`sample` waited {self.timeout:g} s for {what}: {self._numbers()} {advice}"

    def _why_not_add(self, num_steps: int) -> str:
        added, drawn = self._added.total + self._added.pending, self._drawn.total
        batch = self._per_drawn * self._batch_steps
        excess = self._due(added + num_steps, drawn) - self._slack
        num_batches = min(-(-excess // batch), self._num_allowed(added, drawn))
        what = f"{_counted(num_batches, 'batch', 'es')} to be drawn"
        return (
            f"Adding {_counted(num_steps, 'step')} waited {self.timeout:g} s for {what}: {self._numbers()} Draw in "
            "another thread, or draw `num_batches_due` batches after each step."
        )

    def _numbers(self) -> str:
        return (
            f"{self._added.total:,} were added and {self._drawn.total:,} drawn, {self._batch_steps:,} a batch "
            f"(`ratio`={_shown(self.ratio)}, `tolerance`={_shown(self._tolerance)}, `min_steps`={self.min_steps})."
        )

    # What there is.

    @property
    def num_batches_due(self) -> int:
        """`ReplayBuffer.num_batches_due`."""
        with self._lock:
            return self._num_allowed(self._added.total, self._drawn.total + self._drawn.pending)

    @property
    def samples_per_insert(self) -> float | None:
        """(drawn steps) / (added steps) so far; None before there are both."""
        with self._lock:
            added, drawn = self._added.total, self._drawn.total
        return drawn / added if added and drawn else None

    def state_dict(self) -> dict[str, int]:
        """`num_added` and `num_drawn`, in steps."""
        with self._lock:
            return {"num_added": self._added.total, "num_drawn": self._drawn.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from the counts of another limiter; ValueError for a state that `state_dict` has not made."""
        if {*state} != {"num_added", "num_drawn"}:
            raise ValueError(f"The state of a limiter has ['num_added', 'num_drawn'], found {sorted(state)}.")
        added, drawn = (integer(name, state[name], 0) for name in ("num_added", "num_drawn"))
        with self._lock:
            self._added.total, self._drawn.total = added, drawn
            self._changed.notify_all()


@dataclass
class _Count:
    """Steps of one side.

    Attributes:
        total: Added, or drawn.
        pending: Of calls that are under way.
    """

    total: int = 0
    pending: int = 0


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, found {type(value).__name__}: {value!r:.60}.")
    return float(value)


def _fraction(name: str, value: Any) -> Fraction:
    """A number as the fraction that was meant: 0.1 is 1/10."""
    number = _number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, found {value}.")
    return Fraction(number).limit_denominator(10**9)


def _shown(value: Fraction) -> str:
    return f"{float(value):.10g}"


def _counted(num: int, noun: str, plural: str = "s") -> str:
    return f"{num:,} {noun}{'' if num == 1 else plural}"
