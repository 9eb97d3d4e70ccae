"""What to expect of more actors, shards and learners, from costs that were measured: `python -m benchmarks scaling`.

    actors --episodes--> [link] shard [processor] --batches--> [link] ==> [link] learner [processor]

Each thing in brackets serves one after the other. An episode takes a shard's link and processor for a while, and a
batch a shard's processor and link, then a learner's link and processor. A learner keeps a few requests under way, deals
them over the shards in turn, and works for a while on each batch, in order. Nothing is drawn: actors differ in when
they begin. Half of the simulated time warms up, and the rest is counted.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.timing import print_table

# Measured by `python -m benchmarks remote` on two cores: small episodes in packs, 2 MB ones, a call by itself, batches
# of 12.6 MB less such a call. A learner's copy takes what `docs/workers.md` says. The link is a common one of clouds.
SECONDS_AN_EPISODE, SECONDS_A_BYTE_ADDED = 1 / 19_519, 1 / 661e6
SECONDS_A_REQUEST, SECONDS_A_BYTE_DRAWN = 1 / 981, 1 / 3.3e9
SECONDS_A_BYTE_COPIED = 1 / 14e9
LINK_BYTES_A_SECOND = 25e9 / 8
IN_FLIGHT, SECONDS_A_STEP = 3, 0.010
PIXELS, STATE = 12_321, 126  # Bytes of a row.


@dataclass(frozen=True)
class Setting:
    """How many there are, and what they do."""

    num_actors: int
    num_shards: int
    num_learners: int
    row_bytes: int
    steps_a_second: float = 200.0  # Of each actor.
    episode_length: int = 200
    batch_rows: int = 16 * 64

    @property
    def batch_bytes(self) -> int:
        return self.batch_rows * self.row_bytes

    @property
    def episode_bytes(self) -> int:
        return self.episode_length * self.row_bytes


class Server:
    """Serves one after the other."""

    def __init__(self) -> None:
        self.free_at = self.busy = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When what comes now is done."""
        self.free_at = max(now, self.free_at) + seconds
        self.busy += seconds
        return self.free_at

    def busy_until(self, now: float) -> float:
        """Seconds that it was busy, without what is promised for later."""
        return self.busy - max(0.0, self.free_at - now)


@dataclass
class Found:
    """Rates over the counted half; shares of the time that things are busy, of the busiest one of each kind."""

    episodes_a_second: float
    batches_a_second: float
    batch_seconds: float  # From a request to the batch, the slowest of a hundred.
    busy: dict[str, float]


class _Shard:
    def __init__(self) -> None:
        self.link, self.processor, self.link_out = Server(), Server(), Server()


class _Learner:
    def __init__(self, number: int, shards: list[_Shard]) -> None:
        self.link, self.processor = Server(), Server()
        self.next_shard: Iterator[_Shard] = itertools.islice(itertools.cycle(shards), number % len(shards), None)
        self.ready: dict[int, float] = {}
        self.num_asked = self.num_taken = 0


def simulate(setting: Setting, seconds: float = 8.0) -> Found:
    """Run a setting for so many seconds of its own time."""
    shards = [_Shard() for _ in range(setting.num_shards)]
    learners = [_Learner(n, shards) for n in range(setting.num_learners)]
    every = setting.episode_length / setting.steps_a_second
    count = itertools.count()  # Ties are broken by who came first.
    # (time, order, kind, who, number)
    events = [(every * n / setting.num_actors, next(count), "episode", n, 0) for n in range(setting.num_actors)]
    events += [(0.0, next(count), "step", n, 0) for n in range(setting.num_learners)]
    heapq.heapify(events)
    stored: list[float] = []
    batches: list[tuple[float, float]] = []  # When, and how long after the request.
    half, busy_before = seconds / 2, None
    servers = _servers(shards, learners)
    while events:
        now, _, kind, who, number = heapq.heappop(events)
        if now > seconds:
            break
        if busy_before is None and now >= half:
            busy_before = [server.busy_until(half) for _, server in servers]
        if kind == "episode":
            stored.append(_add(setting, shards[(who + number) % len(shards)], now))
            heapq.heappush(events, (now + every, next(count), "episode", who, number + 1))
        else:
            batches += _step(setting, learners[who], now)
            learner = learners[who]
            begins = max(now, learner.ready.pop(learner.num_taken))
            learner.num_taken += 1
            heapq.heappush(events, (begins + SECONDS_A_STEP, next(count), "step", who, 0))
    return _found(stored, batches, half, seconds, servers, busy_before or [0.0] * len(servers))


def _add(setting: Setting, shard: _Shard, now: float) -> float:
    arrived = shard.link.serve(now, setting.episode_bytes / LINK_BYTES_A_SECOND)
    return shard.processor.serve(arrived, SECONDS_AN_EPISODE + setting.episode_bytes * SECONDS_A_BYTE_ADDED)


def _step(setting: Setting, learner: _Learner, now: float) -> Iterator[tuple[float, float]]:
    """Ask for batches until enough are under way."""
    size = setting.batch_bytes
    while learner.num_asked < learner.num_taken + IN_FLIGHT:
        shard = next(learner.next_shard)
        drawn = shard.processor.serve(now, SECONDS_A_REQUEST + size * SECONDS_A_BYTE_DRAWN)
        sent = shard.link_out.serve(drawn, size / LINK_BYTES_A_SECOND)
        # It comes in while it goes out.
        arrived = learner.link.serve(sent - size / LINK_BYTES_A_SECOND, size / LINK_BYTES_A_SECOND)
        ready = learner.processor.serve(arrived, size * SECONDS_A_BYTE_COPIED)
        learner.ready[learner.num_asked] = ready
        learner.num_asked += 1
        yield ready, ready - now


def _servers(shards: list[_Shard], learners: list[_Learner]) -> list[tuple[str, Server]]:
    found = [("shards' processors", shard.processor) for shard in shards]
    found += [("shards' links, in", shard.link) for shard in shards]
    found += [("shards' links, out", shard.link_out) for shard in shards]
    found += [("learners' links", learner.link) for learner in learners]
    return found


def _found(
    stored: list[float],
    batches: list[tuple[float, float]],
    half: float,
    seconds: float,
    servers: list[tuple[str, Server]],
    before: list[float],
) -> Found:
    def rate(times: list[float]) -> float:
        return sum(half <= time < seconds for time in times) / (seconds - half)

    busy: dict[str, float] = {}
    for (name, server), was in zip(servers, before, strict=True):
        busy[name] = max(busy.get(name, 0.0), (server.busy_until(seconds) - was) / (seconds - half))
    waited = [wait for time, wait in batches if half <= time < seconds]
    slow = float(np.quantile(waited, 0.99)) if waited else 0.0
    return Found(rate(stored), rate([time for time, _ in batches]), slow, busy)


SETTINGS = {
    "2 actors, 1 shard, 1 learner, pixels": Setting(2, 1, 1, PIXELS),
    "32 actors, 4 shards, 1 learner, pixels": Setting(32, 4, 1, PIXELS),
    "256 actors, 16 shards, 8 learners, pixels": Setting(256, 16, 8, PIXELS),
    "1,000 actors, 64 shards, 64 learners, pixels": Setting(1_000, 64, 64, PIXELS),
    "1,000 actors, 16 shards, 64 learners, pixels": Setting(1_000, 16, 64, PIXELS),
    "1,000 actors, 64 shards, 64 learners, state": Setting(1_000, 64, 64, STATE),
    "1,000 actors, 4 shards, 4 learners, state": Setting(1_000, 4, 4, STATE, steps_a_second=2_000.0),
}


def scaling(rounds: int = 1) -> None:
    """A row for each setting."""
    table = []
    for name, setting in SETTINGS.items():
        found = simulate(setting)
        first = max(found.busy, key=lambda kind: found.busy[kind])
        wanted = setting.num_learners / SECONDS_A_STEP
        table.append(
            (
                name,
                f"{found.episodes_a_second:,.0f}",
                f"{found.episodes_a_second * setting.episode_bytes / 1e6:,.0f}",
                f"{found.batches_a_second:,.0f}",
                f"{found.batches_a_second * setting.batch_bytes / 1e6:,.0f}",
                f"{found.batches_a_second / wanted:.2f}",
                f"{1e3 * found.batch_seconds:.0f}",
                f"{first} {found.busy[first]:.0%}",
            )
        )
    header = (
        *("", "episodes a second", "MB a second in", "batches a second", "MB a second out"),
        *("of what learners could take", "slowest of 100 batches, ms", "busiest"),
    )
    print_table("Actors, shards and learners: a simulation from measured costs", header, table)


if __name__ == "__main__":
    scaling()
