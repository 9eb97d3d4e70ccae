"""Writers and learners that log what they were promised and what they drew, in files that outlive their SIGKILL."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from buffers.remote import RemoteLoader, RemoteWriter, Shards

NUM_ENVS, LENGTH, BATCH_SIZE = 16, 4, 8
#: Calls of `add` between two waits of a writer; every third time, it waits for a save.
CALLS_PER_WAIT = 60
#: Seconds after which nothing will come any more.
PATIENCE = 300.0
_PAUSE = 0.02


class Promised(NamedTuple):
    """What a writer was promised, by numbers of its episodes.

    Attributes:
        acknowledged: The calls that completed them have returned.
        stored: `wait_until_stored` has returned since.
        saved: `wait_until_saved` has returned since.
        num_waits: How often either has returned.
    """

    acknowledged: set[int]
    stored: set[int]
    saved: set[int]
    num_waits: int


def length_of(writer: int, episode: int) -> int:
    return LENGTH + (31 * writer + 17 * episode) % 64


def rows_of(writer: int, episode: np.ndarray, step: np.ndarray) -> dict[str, np.ndarray]:
    """Rows whose every value says which they are."""
    numbers = (writer * 1_000_003 + episode * 10_007 + step * 101) % 1_000_081
    return {
        "writer": np.full(len(step), writer, np.int32),
        "episode": episode.astype(np.int32),
        "step": step.astype(np.int32),
        "value": np.sqrt(numbers.astype(np.float64)),
        "image": (numbers[:, None] * np.arange(1, 9)).astype(np.uint8),
    }


def episode_of(writer: int, episode: int) -> dict[str, np.ndarray]:
    """A whole episode, `name -> (L, *shape)`."""
    length = length_of(writer, episode)
    return rows_of(writer, np.full(length, episode), np.arange(length))


def is_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    """Whether names, dtypes, shapes and bytes are the same."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == rows.dtype and found[name].shape == rows.shape and found[name].tobytes() == rows.tobytes()
        for name, rows in expected.items()
    )


class _Log:
    """Lines of a file, each there as soon as it was written. The first says which process writes it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.write("process", os.getpid())

    def write(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


def _lines(path: Path) -> list[list[str]]:
    """The words of each line that is whole."""
    text = path.read_text() if path.exists() else ""
    return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]


def process_that_writes(path: Path) -> int:
    return int(_lines(path)[0][1])


class LoggingWriter:
    """Steps `NUM_ENVS` environments until there is enough, so many steps a second on average."""

    def __init__(self, shards: Shards, log: Path) -> None:
        warnings.simplefilter("ignore", RuntimeWarning)
        self.number, self.log, self.enough = int(log.name), _Log(log), log.parent / "enough"
        self.writer = RemoteWriter(shards, num_envs=NUM_ENVS, deadline=5.0)

    def run(self, steps_per_second: float) -> None:
        """When it returns, the complete episodes are saved."""
        episode, step = np.arange(NUM_ENVS), np.zeros(NUM_ENVS, np.int64)
        begin, num_calls = time.monotonic(), 0
        while not self.enough.exists():
            is_last = step + 1 == [length_of(self.number, number) for number in episode.tolist()]
            self.writer.add(rows_of(self.number, episode, step), is_last=is_last)
            num_calls, step = num_calls + 1, step + 1
            if is_last.any():
                self.log.write("acknowledged", *episode[is_last].tolist())
                episode[is_last] = episode.max() + 1 + np.arange(is_last.sum())
                step[is_last] = 0
            if num_calls % CALLS_PER_WAIT == 0:
                self._wait(until_saved=num_calls % (3 * CALLS_PER_WAIT) == 0)
            time.sleep(max(0.0, begin + num_calls * NUM_ENVS / steps_per_second - time.monotonic()))
        self._wait(until_saved=True)

    def _wait(self, until_saved: bool) -> None:
        if until_saved:
            self.writer.wait_until_saved(PATIENCE)
        else:
            self.writer.wait_until_stored(PATIENCE)
        self.log.write("saved" if until_saved else "stored")


def promised(log: Path) -> Promised:
    """What the log of a writer says."""
    acknowledged: set[int] = set()
    stored: set[int] = set()
    saved: set[int] = set()
    num_waits = 0
    for what, *words in _lines(log)[1:]:
        if what == "acknowledged":
            acknowledged.update(map(int, words))
        else:
            stored, num_waits = {*acknowledged}, num_waits + 1
            saved = stored if what == "saved" else saved
    return Promised(acknowledged, stored, saved, num_waits)


class LoggingLearner:
    """Draws batches until it is ended, and logs what is wrong with them."""

    def __init__(self, shards: Shards, log: Path) -> None:
        warnings.simplefilter("ignore", RuntimeWarning)
        self.log = _Log(log)
        self.loader = RemoteLoader(shards, BATCH_SIZE, LENGTH, include=("source",), deadline=3.0, timeout=PATIENCE)

    def run(self) -> None:
        while True:
            batch = next(self.loader)
            source = int(batch.pop("source")[0])
            self.log.write(*(("batch", source) if is_whole(batch) else ("wrong", source, repr(batch).split())))
            time.sleep(_PAUSE)


def is_whole(batch: Mapping[str, Any]) -> bool:
    """Whether each sequence is of one episode, contiguous, with the values that were added."""
    if {name: values.shape[:2] for name, values in batch.items()} != dict.fromkeys(batch, (BATCH_SIZE, LENGTH)):
        return False
    for n in range(BATCH_SIZE):
        found = {name: values[n].numpy() for name, values in batch.items()}
        writer, episode, first = (int(found[name][0]) for name in ("writer", "episode", "step"))
        expected = rows_of(writer, np.full(LENGTH, episode), np.arange(first, first + LENGTH))
        if first + LENGTH > length_of(writer, episode) or not is_equal(found, expected):
            return False
    return True


def drawn(log: Path) -> int:
    """How many batches a learner has drawn, all of which must be whole."""
    lines = _lines(log)[1:]
    wrong = [line for line in lines if line[0] != "batch"]
    assert not wrong, wrong[:3]
    return len(lines)
