"""Shards: the handle by which writers and learners reach all shards."""

from __future__ import annotations

from typing import Any

from buffers.remote.limits import Limits
from buffers.remote.transport import ShardLostError, Transport
from buffers.remote.wire import Description

__all__ = ["Shards", "ask_all"]

_SECONDS_TO_SAVE = 600.0


class Shards:
    """All shards, as `start_shards` returns them. Pass it to the actors and tasks that write and draw.

    A copy, in another process, reaches the same shards; Ray ends them with the process that started them, or with
    `close`.

    Args:
        transport: Asks them.
        description: Of one of them; they are alike.
        limits: Of all who add and draw, None if there are none.
    """

    def __init__(self, transport: Transport, description: Description, limits: Limits | None = None) -> None:
        self.transport, self.description, self.limits = transport, description, limits

    def __len__(self) -> int:
        return self.transport.num_shards

    def stats(self, timeout: float = 10.0) -> dict[str, float]:
        """Sums over the shards that answer within the timeout.

        Returns:
            `num_shards` that have answered; `num_episodes`, `num_timesteps` and `capacity`; `num_evicted` episodes;
            `num_added`, steps that were ever stored; `num_missing`, episodes that their writers do not keep any more,
            and that a shard has lost (it makes no saves, or the newest was damaged); `num_refused` episodes;
            `num_saves`.
        """
        found = ask_all(self.transport, "stats", seconds=timeout)
        answers = [value for value in found if not isinstance(value, Exception)]
        sums: dict[str, float] = {"num_shards": len(answers)}
        for answer in answers:
            for name, value in answer.items():
                sums[name] = sums.get(name, 0) + value
        return sums

    def save(self, timeout: float = _SECONDS_TO_SAVE) -> None:
        """Let all shards save now, and wait for it.

        Raises:
            RuntimeError: They have no `directory`, or some did not save; names them.
        """
        _raise_failures("save", ask_all(self.transport, "save", seconds=timeout))

    def close(self, timeout: float = _SECONDS_TO_SAVE) -> None:
        """Let all shards save, if they do, and end them. What a shard raises is raised once all have ended."""
        try:
            _raise_failures("close", ask_all(self.transport, "close", seconds=timeout))
        finally:
            self.transport.end()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Shards: {len(self)}, each of up to {self.description.episode_capacity:,} steps an episode"


def ask_all(transport: Transport, method: str, *arguments: Any, seconds: float) -> list[Any]:
    """What each shard answers within so many seconds: its value, or an exception, ShardLostError if nothing came."""
    calls = [transport.submit(shard, method, *arguments) for shard in range(transport.num_shards)]
    end = transport.now() + seconds
    found: dict[int, Any] = {}
    while len(found) < len(calls):
        waiting = [call for n, call in enumerate(calls) if n not in found]
        done = transport.done(waiting, max(0.0, end - transport.now()))
        if not done:
            break
        for n, call in enumerate(calls):
            if n not in found and call in done:
                try:
                    found[n] = transport.result(call)
                except Exception as error:
                    found[n] = error
    late = ShardLostError(f"it has not answered within {seconds:g} s")
    return [found.get(n, late) for n in range(len(calls))]


def _raise_failures(what: str, answers: list[Any]) -> None:
    failures = {n: answer for n, answer in enumerate(answers) if isinstance(answer, Exception)}
    if failures:
        texts = "; ".join(f"shard {n}: {error}" for n, error in failures.items())
        raise RuntimeError(f"`{what}` failed for {len(failures)} of {len(answers)} shards: {texts}")
