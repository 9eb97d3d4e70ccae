"""Transport: how a shard is asked, and how its answer comes. `on_ray` is the one of Ray.

An answer may come late, or never; a call that failed may have been executed, and a repeated one may be executed twice.
All that follows from this is dealt with here and above, and is tested with a transport that does all of it at will.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any, NamedTuple, Protocol

__all__ = ["Answer", "RETRY_AFTER", "ShardCalls", "ShardLostError", "Transport", "warn_of_new"]

#: Seconds before a shard that failed is asked again.
RETRY_AFTER = 0.5


class ShardLostError(RuntimeError):
    """A shard died, or did not answer in time. Whether it has done what it was asked is not known."""


class Transport(Protocol):
    """How shards are asked. It can be sent to another process."""

    @property
    def num_shards(self) -> int:
        """How many there are."""

    def submit(self, shard: int, method: str, *arguments: Any) -> Any:
        """Ask a shard for a method of `Shard`. Does not wait."""

    def done(self, calls: Collection[Any], seconds: float) -> set[Any]:
        """Those of the calls that have an answer, after waiting up to so many seconds for the first.

        Without calls, it waits for no longer than that, and may wait less.
        """

    def result(self, call: Any) -> Any:
        """The answer of a call that is done; ShardLostError, or what the method has raised."""

    def now(self) -> float:
        """Seconds, of a clock that does not go back."""

    def end(self) -> None:
        """End the shards."""


class Answer(NamedTuple):
    """What came of a call: a value or an error.

    Attributes:
        about: As given with the call.
        value: What the shard has returned.
        error: ShardLostError, or what the shard has raised; None if there is a value.
    """

    about: Any
    value: Any
    error: Exception | None


class _Asked(NamedTuple):
    call: Any
    about: Any
    since: float


class ShardCalls:
    """The calls to one shard that have no answer yet, and whether it is well.

        well     answers within the deadline
        late     its oldest call is older than the deadline: it hangs, or is cut off
        lost     its last call failed: it died, and may come back

    Args:
        transport: What asks the shard.
        shard: Its number.
        deadline: Seconds after which a shard that has not answered is late.
    """

    def __init__(self, transport: Transport, shard: int, deadline: float) -> None:
        self.shard, self._transport, self._deadline = shard, transport, deadline
        self._asked: deque[_Asked] = deque()
        self._failure: str | None = None
        #: When a shard that is not well may be asked again.
        self._next_try = 0.0
        self.last_asked = float("-inf")

    def ask(self, about: Any, method: str, *arguments: Any) -> None:
        """Ask the shard; `about` comes back with the answer."""
        now = self._transport.now()
        self.last_asked = now
        self._next_try = now + (self._deadline if self.is_late else RETRY_AFTER)
        try:
            call = self._transport.submit(self.shard, method, *arguments)
        except ShardLostError as error:
            call = error
        except Exception as error:
            # No memory, or no disk, for what is sent. Whoever asks has done its part, and asks again as after a loss.
            call = ShardLostError(f"it could not be asked: {type(error).__name__}: {error}")
        self._asked.append(_Asked(call, about, now))

    @property
    def pending(self) -> list[Any]:
        """The calls without an answer, for `Transport.done`."""
        return [asked.call for asked in self._asked if not isinstance(asked.call, ShardLostError)]

    @property
    def subjects(self) -> list[Any]:
        """What the calls without an answer are about, oldest first."""
        return [asked.about for asked in self._asked]

    def __len__(self) -> int:
        return len(self._asked)

    def answers(self, done: Collection[Any]) -> Iterator[Answer]:
        """The answers of the calls that are done, oldest first, and of those that will never have one."""
        overtaken: list[_Asked] = []
        for asked in [*self._asked]:
            if isinstance(asked.call, ShardLostError):
                self._asked.remove(asked)
                yield self._lost(asked, asked.call)
            elif asked.call in done:
                answer = self._answer(asked)
                # Not before: Ctrl-C while it is fetched leaves it to the next time.
                self._asked.remove(asked)
                yield answer
                if self._failure is None:
                    # A shard answers in order, so those before it will have no answer. Large ones take their time.
                    overtaken = [
                        before for before in self._asked if before.since <= asked.since and before is not asked
                    ]
        now = self._transport.now()
        for asked in overtaken:
            if asked in self._asked and now - asked.since > self._deadline:
                self._asked.remove(asked)
                yield Answer(asked.about, None, ShardLostError(f"Shard {self.shard} has not answered a call."))

    def _answer(self, asked: _Asked) -> Answer:
        try:
            value = self._transport.result(asked.call)
        except ShardLostError as error:
            return self._lost(asked, error)
        except Exception as error:
            self._failure = None
            return Answer(asked.about, None, error)
        self._failure = None
        return Answer(asked.about, value, None)

    def _lost(self, asked: _Asked, error: ShardLostError) -> Answer:
        self._failure = str(error)
        self._next_try = self._transport.now() + RETRY_AFTER
        return Answer(asked.about, None, error)

    @property
    def is_late(self) -> bool:
        """Whether it has not answered within the deadline."""
        return bool(self._asked) and self._transport.now() - self._asked[0].since > self._deadline

    @property
    def is_well(self) -> bool:
        """Whether it can be given new work."""
        return self._failure is None and not self.is_late

    @property
    def may_try(self) -> bool:
        """Whether a shard that is not well may be asked again, to see whether it is back."""
        return (self.is_late or not self._asked) and self._transport.now() >= self._next_try

    @property
    def trouble(self) -> str | None:
        """What is wrong with the shard; None if it is well."""
        if self.is_late:
            seconds = self._transport.now() - self._asked[0].since
            return f"shard {self.shard} has not answered for {seconds:.0f} s"
        return None if self._failure is None else f"shard {self.shard} is lost ({self._failure})"


def warn_of_new(troubles: Mapping[int, str], named: Set[int], consequence: str, stacklevel: int) -> set[int]:
    """Warn of the troubles of shards that are not `named` yet; returns the shards that are in trouble now."""
    for shard in sorted(troubles.keys() - named):
        text = troubles[shard]
        warnings.warn(f"{text[0].upper()}{text[1:].rstrip('.')}. {consequence}", RuntimeWarning, stacklevel=stacklevel)
    return {*troubles}
