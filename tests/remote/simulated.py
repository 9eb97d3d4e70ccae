"""Shards in this process, and a transport that loses, doubles, delays and reorders calls, and kills and stops shards.

Time passes only when somebody waits. What happens to a call is drawn from a seed, so a run can be repeated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from buffers.dataset import EpisodeDataset, RingBufferDataset
from buffers.remote.shard import Shard
from buffers.remote.transport import ShardLostError

TICK = 0.05


def make_ring(number: int) -> EpisodeDataset:
    return RingBufferDataset(capacity=100_000)


class Simulated:
    """A transport, and the world behind it.

    Args:
        num_shards: How many shards there are.
        directory: Where they save, None if they don't.
        seed: Of what goes wrong.
        make_dataset: As for shards.
        save_every: As for shards.
        drop: The probability that an answer is lost: the call was executed, and never comes to an end.
        double: That a call is executed twice, the second time a while later.
        delay: That a call is executed after others that were submitted later.
        fail: That a call fails, though it was executed, or was not.
    """

    def __init__(
        self,
        num_shards: int,
        directory: Path | None = None,
        seed: int = 0,
        make_dataset: Callable[[int], EpisodeDataset] = make_ring,
        save_every: float = 1.0,
        drop: float = 0.0,
        double: float = 0.0,
        delay: float = 0.0,
        fail: float = 0.0,
    ) -> None:
        self.num_shards, self.random, self.time = num_shards, random.Random(seed), 0.0
        self.directory, self.make_dataset, self.save_every = directory, make_dataset, save_every
        self.drop, self.double, self.delay, self.fail = drop, double, delay, fail
        self.shards: list[Shard | None] = [None] * num_shards
        self.stopped: set[int] = set()
        # Executed at a time: (time, call or None, shard, method, arguments).
        self.waiting: list[tuple[float, int | None, int, str, tuple[Any, ...]]] = []
        self.results: dict[int, Any] = {}
        self.num_calls = 0
        self.log: list[tuple[int, str]] = []
        for number in range(num_shards):
            self.start(number)

    # The transport.

    def submit(self, shard: int, method: str, *arguments: Any) -> int:
        self.num_calls += 1
        self.log.append((shard, method))
        wait = 0.01 + (self.random.random() * 0.5 if self.random.random() < self.delay else 0.0)
        self.waiting.append((self.time + wait, self.num_calls, shard, method, arguments))
        if self.random.random() < self.double:
            self.waiting.append((self.time + wait + self.random.random(), None, shard, method, arguments))
        return self.num_calls

    def done(self, calls: Collection[Any], seconds: float) -> set[Any]:
        end = self.time + seconds
        while True:
            self.run()
            found = {call for call in calls if call in self.results}
            if found or self.time >= end:
                return found
            self.time = min(end, self.time + TICK)
            self.finish_saves()

    def result(self, call: Any) -> Any:
        found = self.results.pop(call)
        if isinstance(found, Exception):
            raise found
        return found

    def now(self) -> float:
        return self.time

    def end(self) -> None:
        pass

    # The world.

    def start(self, number: int) -> None:
        directory = None if self.directory is None else str(self.directory)
        self.shards[number] = Shard(number, self.make_dataset, directory, self.save_every, self.now)

    def kill(self, number: int) -> None:
        """What waits fails, and may have been executed or not; a save that was not finished is not there."""
        self.forget(number)
        self.stopped.discard(number)
        for entry in [entry for entry in self.waiting if entry[2] == number]:
            self.waiting.remove(entry)
            if entry[1] is not None:
                self.results[entry[1]] = ShardLostError("it died")

    def forget(self, number: int) -> None:
        """Forget a shard, once no thread of it writes any more."""
        shard, self.shards[number] = self.shards[number], None
        if shard is not None:
            shard._settle_save(block=True)

    def finish_saves(self) -> None:
        """Threads that save have done so as time goes by."""
        for shard in self.shards:
            if shard is not None and shard._saving is not None:
                shard._saving[0].exception()

    def close(self) -> None:
        for number in range(self.num_shards):
            self.forget(number)

    def stop(self, number: int) -> None:
        self.stopped.add(number)

    def go_on(self, number: int) -> None:
        self.stopped.discard(number)

    def run(self) -> None:
        """Execute what is due."""
        due = sorted((e for e in self.waiting if e[0] <= self.time and e[2] not in self.stopped), key=lambda e: e[0])
        for entry in due:
            self.waiting.remove(entry)
            self.execute(*entry[1:])

    def execute(self, call: int | None, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        shard = self.shards[number]
        answer: Any = ShardLostError("it is not there")
        if shard is not None:
            is_failing = self.random.random() < self.fail
            if not is_failing or self.random.random() < 0.5:
                try:
                    answer = getattr(shard, method)(*arguments)
                except Exception as error:
                    answer = error
            if is_failing:
                answer = ShardLostError("it failed")
            if self.random.random() < self.drop:
                return
        if call is not None:
            self.results[call] = answer

    # What is stored.

    def numbers(self) -> list[list[int]]:
        """For each shard that lives, the numbers of its episodes, each of which is checked to be whole."""
        return [[] if shard is None else [number_of(rows) for rows in shard.episodes()] for shard in self.shards]


def episode(number: int) -> dict[str, np.ndarray]:
    """A small episode that says which it is in each row."""
    length = 1 + number % 5
    steps = np.arange(length, dtype=np.int64)
    return {"number": np.full(length, number, np.int64), "step": steps, "last": steps == length - 1}


def number_of(rows: dict[str, np.ndarray]) -> int:
    number = int(rows["number"][0])
    expected = episode(number)
    assert rows.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(rows[name], values, strict=True)
    return number
