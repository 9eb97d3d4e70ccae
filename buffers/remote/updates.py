"""Updates: new values of late fields, sent back to the shards whose batches they belong to."""

from __future__ import annotations

from typing import Any

import numpy as np

from buffers.conversion import as_array
from buffers.remote.transport import ShardCalls, ShardLostError, Transport

__all__ = ["Updates", "sources_of"]

#: Updates that a shard has not answered; more are not sent, as it hangs.
_MOST_PENDING = 64


class Updates:
    """Sends each update once: what is lost with a shard, or by one that hangs, is counted and not sent again.

    Attributes:
        num_ignored: Step ids of rows that were gone.
        num_lost: Updates that were lost, or of which that is not known.
        error: What a shard has raised.
    """

    def __init__(self, transport: Transport, deadline: float) -> None:
        self._transport = transport
        self._calls = [ShardCalls(transport, n, deadline) for n in range(transport.num_shards)]
        self.num_ignored = self.num_lost = 0
        self.error: Exception | None = None

    def send(self, shard: int, index: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Send values `(n, ...)` for step ids `(n, ...)`; does not wait."""
        calls = self._calls[shard]
        if len(calls) >= _MOST_PENDING:
            self.num_lost += 1
        else:
            calls.ask(None, "update", index, values)

    def advance(self) -> None:
        """Take the answers that have come."""
        pending = [call for calls in self._calls for call in calls.pending]
        done = self._transport.done(pending, 0.0) if pending else set()
        for calls in self._calls:
            for answer in calls.answers(done):
                if answer.error is None:
                    self.num_ignored += answer.value
                elif isinstance(answer.error, ShardLostError):
                    self.num_lost += 1
                else:
                    self.error = answer.error


def sources_of(ids: np.ndarray, source: Any, num_shards: int) -> np.ndarray:
    """The shard of each row of step ids, `(B,)`; errors are those of `RemoteLoader.update`."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"`index` must be step ids, which are integers, found {ids.dtype}.")
    if source is None and num_shards > 1:
        raise ValueError("Several shards have step ids of their own: pass `source`, with `include=('source',)`.")
    given = as_array("source", 0 if source is None else source)
    if given.ndim > 1 or (given.ndim == 1 and given.shape != ids.shape[:1]):
        raise ValueError(f"`source` has shape {given.shape}, expected a number or {ids.shape[:1]}.")
    if given.dtype.kind not in "iu" or given.size and not 0 <= given.min() <= given.max() < num_shards:
        raise ValueError(f"`source` must be numbers of shards, 0 to {num_shards - 1}, found {source!r:.60}.")
    return np.broadcast_to(given, ids.shape[:1])
