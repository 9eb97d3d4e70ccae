"""A run that is killed at any moment and resumed in a new process goes on, bit by bit, as one that was not.

The run records eight environments, draws a batch after each step, and saves now and then. It is forked, so that a new
process costs no import.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from buffers import Recorder, ReplayBuffer
from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.sampler import (
    EpisodeFilter,
    MixedSampler,
    OnlineSampler,
    PrioritizedSampler,
    RecencySampler,
    Sampler,
    UniformEpisodeSampler,
    UniformSampler,
)
from buffers.saving import is_save_directory
from tests import tagged
from tests.faults import in_child, status_of
from tests.saving_helpers import contents

NUM_ENVS, CAPACITY, SEED = 8, 600, 5
FIRST_BATCH, SAVE_EVERY = 40, 25

SAMPLERS: dict[str, Callable[[], Sampler | None]] = {
    "uniform": lambda: None,
    "uniform episode": UniformEpisodeSampler,
    "recency": lambda: RecencySampler(half_life=50),
    "prioritized": lambda: PrioritizedSampler(alpha=0.7),
    "online": OnlineSampler,
    "mixed": lambda: MixedSampler({PrioritizedSampler(): 0.5, OnlineSampler(): 0.2, UniformSampler(): 0.3}),
    "filter": lambda: EpisodeFilter(PrioritizedSampler(), lambda info: True),
}


class Environments:
    """Eight that step together; a function of their state, which can be saved, and of the number of the call."""

    def __init__(self) -> None:
        self.episode, self.step_in_episode = np.zeros((2, NUM_ENVS), np.int64)
        self.was_done = np.zeros(NUM_ENVS, np.bool_)

    def obs(self) -> dict[str, Any]:
        return tagged.rows(np.arange(NUM_ENVS), self.episode, self.step_in_episode)["obs"]

    def step(self, number: int) -> tuple[Any, ...]:
        done = (np.random.default_rng(number).random(NUM_ENVS) < 0.1) & ~self.was_done
        self.episode = self.episode + self.was_done
        self.step_in_episode = np.where(self.was_done, 0, self.step_in_episode + 1)
        self.was_done = done
        reward = (self.episode * 100 + self.step_in_episode).astype(np.float32)
        return np.full(NUM_ENVS, number % 7), self.obs(), reward, done, np.zeros(NUM_ENVS, np.bool_)


class Run:
    """One process of a run: begins, or goes on where the last save was made."""

    def __init__(self, folder: Path, kind: str, sampler: str, num_workers: int) -> None:
        self.folder, self.saves, self.num_workers = folder, folder / "saves", num_workers
        self.environments, self.first = Environments(), 0
        source = self._source(kind)
        options = {
            "sampler": SAMPLERS[sampler](),
            "include": ("index", "episode", "weight"),
            "num_workers": num_workers,
        }
        is_mixture = kind == "mixture"
        self.collector: Any = ReplayBuffer(source.stores[0], 1, num_envs=NUM_ENVS) if is_mixture else None
        also = [self.collector] if is_mixture else []
        if is_save_directory(str(self.saves)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # Of files of what was killed.
                self.buffer = ReplayBuffer.load(self.saves, source, also=also, **options)
            self.first = self.buffer.extra["first"]
            for name, value in self.buffer.extra["environments"].items():
                setattr(self.environments, name, value)
        else:
            self.buffer = ReplayBuffer(source, 4, 3, num_envs=None if is_mixture else NUM_ENVS, seed=SEED, **options)
        self.also = also
        self.recorder = Recorder(self.buffer if self.collector is None else self.collector, NUM_ENVS, "next_step")
        if not self.first:
            self.recorder.reset(self.environments.obs())

    def _source(self, kind: str) -> Any:
        ring = RingBufferDataset(CAPACITY)
        if kind == "ring":
            return ring
        files = IndividualFileDataset(3 * CAPACITY, directory=self.folder / "episodes", durability="rename")
        if kind == "extended":
            ring.extend(files, other_batch_size=3, seed=SEED)
            return ring
        if not is_save_directory(str(self.saves)) and files.is_empty:
            for number in range(9):
                files.add_episode(self._episode(number))
        return MixtureDataset([ring, files], [0.6, 0.4])

    def _episode(self, number: int) -> dict[str, Any]:
        zeros, flags = np.zeros(9, np.float32), np.zeros(9, np.bool_)
        flat = {"action": np.zeros(9, np.int64), "reward": zeros, "terminated": flags, "truncated": flags}
        return {"obs": tagged.episode(9, number)["obs"], **flat, "is_first": flags}

    def go(self, end: int) -> None:
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in range(self.first, end):
            # Workers draw ahead: what they draw follows from the seed alone as long as nothing is added.
            if not self.num_workers or number < FIRST_BATCH:
                self.recorder.step(*self.environments.step(number))
            if number >= FIRST_BATCH:
                batch = self.buffer.sample()
                os.write(log, f"{number} {digest(tree_leaves(batch))}\n".encode())
                self._learn(batch, number)
            if number % SAVE_EVERY == SAVE_EVERY - 1:
                extra = {"first": number + 1, "environments": self.environments.__dict__}
                self.buffer.save(self.saves, keep=2, block=number % 2 == 0, also=self.also, extra=extra)
        for store in self.buffer.dataset.stores:
            store.wait_for_save()
        (self.folder / "contents").write_text(digest([contents(self.buffer.dataset)]))

    def _learn(self, batch: Any, number: int) -> None:
        leaves = self.buffer.dataset.leaves
        if not self.num_workers and len(leaves) == 1 and "priority" in leaves[0].late:
            values = torch.full(batch["index"].shape, 0.1 + number % 13)
            self.buffer.update_priorities(batch["index"], values)


def digest(values: Any) -> str:
    found = hashlib.sha1()
    for value in values:
        found.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return found.hexdigest()


def go(folder: Path, num_batches: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    Run(folder, *arguments).go(FIRST_BATCH + num_batches)


def log_of(folder: Path) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for line in (folder / "log").read_text().splitlines():
        number, text = line.split()
        found.setdefault(int(number), set()).add(text)
    return found


def assert_goes_on(folder: Path, num_kills: int, num_batches: int, *arguments: Any) -> None:
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    killed.mkdir()
    begin = time.monotonic()
    assert status_of(in_child(lambda: go(whole, num_batches, *arguments))) == 0
    seconds = time.monotonic() - begin
    choice, left = random.Random(repr(arguments)), num_kills
    while not (killed / "contents").exists():
        pid = in_child(lambda: go(killed, num_batches, *arguments))
        if left:
            # It has to get on between kills: it may have just begun.
            time.sleep(choice.uniform(0.02, max(0.5, 2 * seconds / num_kills)))
            os.kill(pid, signal.SIGKILL)
            left -= 1
        assert status_of(pid) in (0, -signal.SIGKILL)
    expected = log_of(whole)
    assert len(expected) == num_batches and all(len(found) == 1 for found in expected.values())
    assert log_of(killed) == expected
    assert (killed / "contents").read_text() == (whole / "contents").read_text()


CASES = [("ring", sampler, 0) for sampler in SAMPLERS]
CASES += [("extended", "uniform", 0), ("mixture", "prioritized", 0), ("mixture", "online", 0)]
CASES += [("ring", "prioritized", 2), ("ring", "online", 2), ("mixture", "uniform", 2)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: a disk would take most of the time, and only a power loss would tell the difference."""
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if os.access(in_memory, os.W_OK) else tmp_path) as found:
        yield Path(found)


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_a_run_that_is_killed_and_resumed_draws_the_same_batches_and_stores_the_same(case, folder) -> None:
    assert_goes_on(folder, 3, 250, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_hundreds_of_kills_change_nothing(case, folder) -> None:
    assert_goes_on(folder, 25, 1000, *case)
