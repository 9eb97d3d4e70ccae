"""Draws: the batches of a learner, asked of shards ahead of time, and again where no answer comes.

    n       0 1 2 3 4 5 6 7 ...      batch n comes whole from one shard
    shard   0 1 0 0 1 0 0 1          in exact shares, by the windows that each has (`Dealer`)
            ^ ^ ^
            delivered in this order; `num_in_flight` are asked for, or wait

Batch n is a function of (seed, n) and of what its shard holds, so it can be asked again, of any shard. One that dies or
hangs has its batches given to the others, and no further ones until it answers.
"""

from __future__ import annotations

import heapq
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from buffers.remote.dealing import Dealer
from buffers.remote.transport import Answer, ShardCalls, ShardLostError, Transport
from buffers.remote.wire import Drawn, News, Request, Told

__all__ = ["Delivery", "Draws"]

_LOOK_SOON, _LOOK_LATER = 0.1, 1.0
#: For a batch that is ready.
_SECONDS_TO_COME = 1.0
_NO_SHARD = -1


class Delivery(NamedTuple):
    """A batch as it travelled, or the error that its shard has raised."""

    shard: int
    batch: Any
    error: Exception | None = None


class _Side:
    """What is known of one shard."""

    def __init__(self, calls: ShardCalls) -> None:
        self.calls = calls
        self.num_windows = 0
        # Whether it has said how many windows it has, and whether it knows the loader.
        self.is_heard = self.is_told = False
        self.news: News | None = None

    @property
    def heard(self) -> tuple[int, int] | None:
        """The last that is known of it: its life, and the steps that it had stored by then."""
        return None if self.news is None else (self.news.life, self.news.num_added)


class Draws:
    """Asks for batches `position`, `position + 1`, ... and has them in this order. Not for several threads at a time.

    Args:
        transport: Asks the shards.
        request: How to draw.
        told: What to tell shards of the learner, with each call.
        deadline: Seconds after which a shard that has not answered is given no batch.
        num_in_flight: Batches that are asked for, or wait to be taken.
        position: The first batch.
        owed: What the shards were owed, if another learner has drawn the batches before: `deal`.
        dealt: The shards that it had asked for the first batches: `dealt`.
        first: The batch at position p is number `first + p * stride` of the stream that the ranks of a job share.
        stride: The number of ranks.
    """

    def __init__(
        self,
        transport: Transport,
        request: Request,
        told: Callable[[], Told],
        deadline: float = 10.0,
        num_in_flight: int = 3,
        position: int = 0,
        owed: Mapping[int, float] | None = None,
        dealt: Sequence[int] = (),
        first: int = 0,
        stride: int = 1,
    ) -> None:
        self._transport, self._request, self._told = transport, request, told
        self._most, self.position, self._next = num_in_flight, position, position
        self._sides = [_Side(ShardCalls(transport, n, deadline)) for n in range(transport.num_shards)]
        self._dealer, self._first, self._stride = Dealer(owed), first, stride
        # The name by which shards know what to draw. Another one has another, so calls of both cannot be mixed up.
        self._name = secrets.token_hex(8)
        # By position, the shards that another learner had asked, until they are asked here.
        self._planned = {position + n: shard for n, shard in enumerate(dealt)}
        # By position, the shard that was asked last; and the positions that are to be asked again.
        self._asked: dict[int, int] = {}
        self._again: list[int] = []
        self._ready: dict[int, Delivery] = {}
        #: Whether news of the shards are needed, also while no batch is asked for.
        self.is_listening = False
        #: What a shard has raised where no batch was asked for: it does not take the arguments.
        self.error: Exception | None = None

    def advance(self, seconds: float = 0.0) -> None:
        """Take the answers that have come, waiting up to so many seconds for the first, and ask for what is missing."""
        self._take_answers(seconds)
        # A batch comes from another machine only while somebody waits for it: after a learner was busy for long, its
        # shard is not late.
        while any(side.calls.is_late and self._asked_of(side) for side in self._sides):
            if not self._take_answers(_SECONDS_TO_COME):
                break
        for side in self._sides:
            if not side.calls.is_well:
                for n in self._asked_of(side):
                    self._withdraw(n)
        self.ask_ahead()
        for side in self._sides:
            self._look_if_due(side)

    def _take_answers(self, seconds: float) -> bool:
        done = self._transport.done(self.pending, seconds)
        for side in self._sides:
            for answer in side.calls.answers(done):
                self._take(side, answer)
        return bool(done)

    def _asked_of(self, side: _Side) -> list[int]:
        return [n for n, shard in self._asked.items() if shard == side.calls.shard]

    def take(self) -> Delivery | None:
        """The next batch, None if it is not here yet."""
        found = self._ready.pop(self.position, None)
        if found is not None:
            self.position += 1
        return found

    def _take(self, side: _Side, answer: Answer) -> None:
        n: int | None = answer.about
        is_ours = n is not None and self._asked.get(n) == side.calls.shard
        if answer.error is not None:
            if isinstance(answer.error, ShardLostError):
                side.is_told = False
                if is_ours:
                    self._withdraw(n)  # type: ignore[arg-type]
            elif is_ours:
                self._arrived(n, Delivery(side.calls.shard, None, answer.error))  # type: ignore[arg-type]
            elif n is None:
                self.error = answer.error
            return
        drawn: Drawn = answer.value
        side.news, side.is_told = drawn.news, drawn.is_known
        if drawn.is_known:
            side.num_windows, side.is_heard = drawn.num_windows, True
        if is_ours and drawn.batch is None:
            self._withdraw(n)  # type: ignore[arg-type]
        elif is_ours:
            self._arrived(n, Delivery(side.calls.shard, drawn.batch))  # type: ignore[arg-type]

    def _arrived(self, n: int, delivery: Delivery) -> None:
        del self._asked[n]
        self._ready[n] = delivery

    def _withdraw(self, n: int) -> None:
        """Ask for a batch again, of whom it will be."""
        del self._asked[n]
        heapq.heappush(self._again, n)

    def ask_ahead(self) -> None:
        """Ask for what is missing, without a look at answers, which takes longer than all else here."""
        # The first to answer would have more than its share.
        if not all(side.is_heard or not side.calls.is_well for side in self._sides):
            return
        while self._again or len(self._asked) + len(self._ready) < self._most:
            weights = self.weights
            if not weights:
                return
            n = heapq.heappop(self._again) if self._again else self._next
            self._next = max(self._next, n + 1)
            shard = self._planned.pop(n, _NO_SHARD)
            if shard not in weights:
                shard = self._dealer.next(weights)
            self._asked[n] = shard
            self._ask(self._sides[shard], n)

    def _ask(self, side: _Side, n: int | None) -> None:
        number = None if n is None else self._first + n * self._stride
        request = None if side.is_told else self._request
        side.calls.ask(n, "draw", self._told(), self._name, request, number, side.heard)

    def _look_if_due(self, side: _Side) -> None:
        """Ask a shard that is given no batch how it is."""
        calls = side.calls
        if not calls.is_well:
            if calls.may_try:
                self._ask(side, None)
            return
        is_soon = self.is_listening or not side.num_windows
        pause = _LOOK_SOON if is_soon else _LOOK_LATER
        if not len(calls) and self._transport.now() - calls.last_asked >= pause:
            self._ask(side, None)

    # What there is.

    @property
    def deal(self) -> dict[int, float]:
        """What the shards are owed, after all batches that were dealt."""
        return self._dealer.owed

    @property
    def dealt(self) -> list[int]:
        """The shards of the batches at `position` and on that were dealt; -1 for one that has none at the moment."""
        ready = {n: delivery.shard for n, delivery in self._ready.items()}
        found = {**self._planned, **self._asked, **ready}
        end = max(self._next, max(found, default=-1) + 1)
        return [found.get(n, _NO_SHARD) for n in range(self.position, end)]

    @property
    def pending(self) -> list[Any]:
        """The calls without an answer, for `Transport.done`."""
        return [call for side in self._sides for call in side.calls.pending]

    @property
    def weights(self) -> dict[int, int]:
        """The windows of each shard that can be given a batch."""
        return {
            number: side.num_windows
            for number, side in enumerate(self._sides)
            if side.num_windows and side.calls.is_well
        }

    @property
    def has_heard(self) -> bool:
        """Whether any shard has said how many windows it has."""
        return any(side.is_heard for side in self._sides)

    @property
    def can_draw(self) -> bool:
        """Whether any shard has a window, as far as is known."""
        return any(side.num_windows for side in self._sides)

    @property
    def news(self) -> list[News]:
        """The last of each shard."""
        return [side.news for side in self._sides if side.news is not None]

    @property
    def troubles(self) -> dict[int, str]:
        """What is wrong with shards, by number."""
        found = {number: side.calls.trouble for number, side in enumerate(self._sides)}
        return {number: trouble for number, trouble in found.items() if trouble is not None}
