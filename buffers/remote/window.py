"""Window: the episodes that a writer keeps until they need not be sent again.

    add -->  queue  -->  a lane for each shard                             forgotten
             (no         [ sent, not answered | stored, not saved ]  -->   saved (or stored, if the shard
             shard yet)    numbers ascend by 1                             makes no saves)

An episode gets its shard, and its number there, when it is sent for the first time, and never another: whoever does not
answer may have stored it. So a shard that hangs gets nothing new, and the others go on. What was sent and is not known
to be stored, because the shard died or an answer was lost, is sent again under the same numbers, once all calls before
have come to an end; the shard leaves out what it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from buffers.dataset.episode_info import EpisodeInfo
from buffers.fields import Fields
from buffers.remote.transport import RETRY_AFTER, Answer, ShardCalls, ShardLostError, Transport
from buffers.remote.wire import News, Pack, Receipt
from buffers.utils import format_bytes

__all__ = ["Kept", "Window"]

_MOST_CALLS = 2
#: Seconds between questions whether a save is over: of a lane that is half full, and of others.
_ASK_SOON, _ASK_LATER = 0.1, 1.0


class Kept(NamedTuple):
    """An episode: rows `name -> (L, *shape)`, contiguous and its own."""

    rows: dict[str, np.ndarray]
    length: int
    cut: int
    info: EpisodeInfo | None
    num_bytes: int


class _Lane:
    """The episodes of one shard. `episodes[0]` has the number `first`; those below `sent` were sent."""

    def __init__(self, calls: ShardCalls) -> None:
        self.calls = calls
        self.episodes: deque[Kept] = deque()
        self.first = self.sent = self.stored = 0
        self.num_bytes = 0
        # Bytes of all episodes that it was ever given.
        self.given = 0.0
        # Whether something has to be sent again.
        self.is_behind = False
        self.news: News | None = None
        self.refused: set[int] = set()
        # What the shard has raised, and when it may be sent something again.
        self.failure: str | None = None
        self.not_before = 0.0

    @property
    def end(self) -> int:
        """The number of the next episode."""
        return self.first + len(self.episodes)

    def take(self, queue: deque[Kept]) -> int:
        """Add the first episode of a queue at the end, and return its size."""
        size = queue[0].num_bytes
        # One call of C's, so that Ctrl-C does not come between and lose it.
        self.episodes.extend(map(deque.popleft, (queue,)))
        self.num_bytes += size
        self.given += size
        return size

    def forget(self, saved: int) -> None:
        """Forget the episodes with lower numbers."""
        while self.episodes and self.first < saved:
            self.num_bytes -= self.episodes.popleft().num_bytes
            self.first += 1
        self.sent = max(self.sent, self.first)
        self.stored = max(self.stored, self.first)


class Window:
    """Sends episodes to shards, and keeps them as long as necessary. Not for several threads at a time.

    Args:
        transport: Asks the shards.
        writer: The writer's name, of this process only.
        fields: Of the episodes; None before they are settled.
        num_bytes: That all episodes here may take.
        deadline: Seconds after which a shard that has not answered gets nothing new.
        pack_bytes: Small episodes travel together, in packs of about so many bytes.
    """

    def __init__(
        self,
        transport: Transport,
        writer: str,
        fields: Fields | None = None,
        num_bytes: int = 256_000_000,
        deadline: float = 10.0,
        pack_bytes: int = 1_000_000,
    ) -> None:
        self._transport, self._writer, self.fields = transport, writer, fields
        self._most_bytes, self._pack_bytes = num_bytes, pack_bytes
        self._share = num_bytes / transport.num_shards
        self._lanes = [_Lane(ShardCalls(transport, n, deadline)) for n in range(transport.num_shards)]
        self._queue: deque[Kept] = deque()
        self._queue_bytes = 0
        # The lane that is next to be given episodes.
        self._turn = 0
        #: Whether news of the shards are needed, also while nothing is added.
        self.is_listening = False
        #: Whether somebody waits until all is saved.
        self.wants_save = False
        # Whether an episode found no room.
        self._is_short = False
        #: Why shards can never store episodes that they were sent; the writer takes them out.
        self.refusals: list[str] = []

    def put(self, episode: Kept) -> None:
        """Take an episode; `has_room` was asked."""
        # In this order: Ctrl-C in between must not leave an episode that is owed to no shard.
        self._queue_bytes += episode.num_bytes
        self._queue.append(episode)

    def has_room(self, num_bytes: int) -> bool:
        """Whether an episode of this size may be put; one that is larger than the window has it to itself.

        If it may not, shards are asked to save, until there is room.
        """
        self._is_short = self.num_bytes > 0 and self.num_bytes + num_bytes > self._most_bytes
        return not self._is_short

    def advance(self, seconds: float = 0.0) -> None:
        """Take the answers that have come, waiting up to so many seconds for the first, and send what can be sent."""
        self.go_on(self._transport.done(self.pending, seconds))

    def go_on(self, done: set[Any]) -> None:
        """As `advance`, where it is known which calls have an answer."""
        for lane in self._lanes:
            for answer in lane.calls.answers(done):
                self._take(lane, answer)
        self.send()
        for lane in self._lanes:
            self._ask_if_due(lane)

    def send(self) -> None:
        """Send what can be sent, without a look at answers, which takes longer than all else here."""
        for lane in self._lanes:
            self._send_again(lane)
        self._deal()

    def _take(self, lane: _Lane, answer: Answer) -> None:
        lane.failure = None
        if answer.error is not None:
            # What is missing is found out by the next receipt.
            if not isinstance(answer.error, ShardLostError):
                lane.failure = f"{type(answer.error).__name__}: {answer.error}"
                lane.not_before = self._transport.now() + RETRY_AFTER
            return
        receipt: Receipt = answer.value
        end: int = answer.about
        lane.news = receipt.news
        for number, why in receipt.refused.items():
            if number not in lane.refused:
                lane.refused.add(number)
                self.refusals.append(f"Shard {lane.calls.shard} cannot store an episode: {why}")
        # Behind a restart, it may be less than before.
        lane.stored = min(receipt.next, lane.end)
        if receipt.next < end:
            lane.is_behind = True
            if receipt.news.trouble:
                lane.not_before = self._transport.now() + RETRY_AFTER
        lane.forget(min(receipt.saved, lane.end))

    def _send_again(self, lane: _Lane) -> None:
        """Send what has a number, and is not under way."""
        if lane.is_behind:
            if len(lane.calls):
                return
            lane.sent, lane.is_behind = max(lane.first, lane.stored), False
        while lane.sent < lane.end and self._may_send(lane):
            skipped = lane.sent - lane.first
            self._send(lane, [lane.episodes[n] for n in range(skipped, min(skipped + 1_000, len(lane.episodes)))])

    def _may_send(self, lane: _Lane) -> bool:
        return self._is_ready(lane) and len(lane.calls) < _MOST_CALLS

    def _is_ready(self, lane: _Lane) -> bool:
        """Whether a lane may be sent episodes; whether a shard is back is asked without."""
        return lane.calls.is_well and self._transport.now() >= lane.not_before

    def _deal(self) -> None:
        """Give the queue to the shards that are free, in turn, so that all have been given as much."""
        able = [lane for lane in self._lanes if self._queue and self._is_able(lane)]
        if not able:
            return
        share = (sum(lane.given for lane in able) + self._queue_bytes) / len(able)
        for lane in self._lanes:
            if lane not in able:
                lane.given = max(lane.given, share)  # Once it is back, it gets no more than others.
        passed = 0
        while self._queue and passed < len(self._lanes):
            lane = self._lanes[self._turn]
            self._turn = (self._turn + 1) % len(self._lanes)
            if not (self._takes(lane) and self._is_owed(lane, share)):
                passed += 1
                continue
            passed, size = 0, 0
            while self._queue and self._fits(lane) and self._is_owed(lane, share):
                if size and size + self._queue[0].num_bytes > self._pack_bytes:
                    break
                taken = lane.take(self._queue)
                self._queue_bytes -= taken
                size += taken
            self._send_again(lane)

    def _takes(self, lane: _Lane) -> bool:
        """Whether a lane may be given the next episode."""
        return self._may_send(lane) and not lane.is_behind and lane.sent == lane.end and self._fits(lane)

    def _is_able(self, lane: _Lane) -> bool:
        """Whether a lane can be given the next episode, once it has an answer to what it was given before."""
        return self._is_ready(lane) and self._fits(lane)

    def _is_owed(self, lane: _Lane, share: float) -> bool:
        """Whether it has been given less than its share, or others are so slow that more than a pack waits."""
        return lane.given < share or self._queue_bytes > self._pack_bytes

    def _fits(self, lane: _Lane) -> bool:
        """Whether a lane has room for it: no shard may use up the room of the others."""
        return not lane.num_bytes or lane.num_bytes + self._queue[0].num_bytes <= self._share

    def _send(self, lane: _Lane, episodes: list[Kept]) -> None:
        """Send the first of these, up to the size of a pack, as the next ones of a lane; none asks for a receipt."""
        size = 0
        chosen: list[Kept] = []
        for episode in episodes:
            if chosen and size + episode.num_bytes > self._pack_bytes:
                break
            chosen.append(episode)
            size += episode.num_bytes
        try:
            rows = _joined([episode.rows for episode in chosen])
        except MemoryError:
            lane.failure, lane.not_before = "MemoryError, of this process", self._transport.now() + RETRY_AFTER
            return
        pack = Pack(
            self._writer,
            lane.first,
            lane.sent,
            [episode.length for episode in chosen],
            [episode.cut for episode in chosen],
            [episode.info for episode in chosen],
            self.fields if chosen else None,
            rows,
            self._wants_save(lane),
        )
        lane.sent += len(chosen)
        lane.calls.ask(lane.sent, "add", pack)

    def _ask_if_due(self, lane: _Lane) -> None:
        """Ask what is stored and saved by now: also a shard that may be back."""
        calls = lane.calls
        if not calls.is_well:
            if calls.may_try:
                self._send(lane, [])
            return
        if len(calls) or not (lane.episodes or self.is_listening):
            return
        is_soon = self.is_listening or self._wants_save(lane)
        if self._transport.now() - calls.last_asked >= (_ASK_SOON if is_soon else _ASK_LATER):
            self._send(lane, [])

    def _wants_save(self, lane: _Lane) -> bool:
        # A large episode may have to wait for room that small ones take, however few they are.
        is_in_the_way = self._is_short or (bool(self._queue) and not self._fits(lane))
        return bool(lane.episodes) and (lane.num_bytes > self._share / 2 or self.wants_save or is_in_the_way)

    # What there is.

    @property
    def pending(self) -> list[Any]:
        """The calls without an answer, for `Transport.done`."""
        return [call for lane in self._lanes for call in lane.calls.pending]

    @property
    def num_bytes(self) -> int:
        """Of all episodes that are kept here."""
        return self._queue_bytes + sum(lane.num_bytes for lane in self._lanes)

    @property
    def num_unstored(self) -> int:
        """Episodes that are not known to be stored."""
        return len(self._queue) + sum(lane.end - lane.stored for lane in self._lanes)

    @property
    def num_unsaved(self) -> int:
        """Episodes that are kept here."""
        return len(self._queue) + sum(len(lane.episodes) for lane in self._lanes)

    @property
    def num_steps_unstored(self) -> int:
        """Their steps."""
        return sum(episode.length for episode in self._unstored())

    def _unstored(self) -> Iterator[Kept]:
        yield from self._queue
        for lane in self._lanes:
            yield from (lane.episodes[n] for n in range(lane.stored - lane.first, len(lane.episodes)))

    @property
    def news(self) -> list[News]:
        """The last of each shard."""
        return [lane.news for lane in self._lanes if lane.news is not None]

    @property
    def troubles(self) -> dict[int, str]:
        """What is wrong with shards, by number."""
        found = {}
        for number, lane in enumerate(self._lanes):
            told = lane.failure or (lane.news.trouble if lane.news is not None else None)
            trouble = lane.calls.trouble or (f"shard {number} says: {told}" if told else None)
            if trouble is not None:
                found[number] = trouble
        return found

    def why_full(self) -> str:
        """Who holds up what is kept here."""
        found = self.troubles
        lines = [
            (f"{found[n]}; " if n in found else "")
            + f"shard {n} has stored {lane.stored - lane.first} of {len(lane.episodes)} episodes "
            f"({format_bytes(lane.num_bytes)}) that are kept for it"
            for n, lane in enumerate(self._lanes)
            if lane.episodes or n in found
        ]
        return "; ".join([*lines, f"{len(self._queue)} episodes wait for a shard"])


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows end to end; those of a single part as they are."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
