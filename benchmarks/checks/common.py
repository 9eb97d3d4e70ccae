"""What several checks need. numpy alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contestant import Contestant
from benchmarks.workloads import Store, tagged_rows, tags_of

LENGTH = 10
NUM_EPISODES = 20
# Of a number that memory which was never written cannot have from anything that was measured before.
_NEW = 7_654_321
_SECONDS = 60.0


def small_store(contestant: Contestant) -> None:
    """Room for 40 episodes, and 20 in it."""
    contestant.fill(Store("state", 2 * NUM_EPISODES * LENGTH, LENGTH, is_filled=False))
    contestant.add_rows(tagged_rows("state", 0, NUM_EPISODES, LENGTH), LENGTH)


def child_sees_additions(contestant: Contestant) -> bool:
    """Whether a process that was forked before episodes were added, as a worker is, draws them."""
    small_store(contestant)
    begin, answer = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # Whatever happens, it does not stay.
        try:
            os.close(begin[1])
            os.read(begin[0], 1)
            os.write(answer[1], b"y" if _draws_new(contestant) else b"n")
        finally:
            os._exit(0)
    os.close(answer[1])
    contestant.add_rows(tagged_rows("state", _NEW, NUM_EPISODES, LENGTH), LENGTH)
    if not _draws_new(contestant):
        raise RuntimeError("Not even the process that added episodes draws them.")
    os.write(begin[1], b"b")
    seen = os.read(answer[0], 1)
    os.waitpid(child, 0)
    if not seen:
        raise RuntimeError("The forked process has failed.")
    return seen == b"y"


def _draws_new(contestant: Contestant) -> bool:
    """Half of what is stored is new: 200 sequences would miss it once in 2 ** 200 times."""
    draw = contestant.drawer(200, 1)
    episodes = tags_of(contestant.arrays(draw(), 200, 1)["obs"])[0]
    return bool(((episodes >= _NEW) & (episodes < _NEW + NUM_EPISODES)).any())


def killed_after(work: Callable[[str], Any], folder: str) -> None:
    """Run `work(folder)` in a fresh process, and kill that as soon as it is done, before it can tidy up."""
    mark = Path(folder) / "done"
    mark.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_work_and_wait, args=(work, folder, str(mark)))
    process.start()
    end = time.monotonic() + _SECONDS
    while not mark.exists():
        if not process.is_alive() or time.monotonic() > end:
            process.kill()
            raise RuntimeError("The process that was to be killed ended by itself.")
        time.sleep(0.02)
    process.kill()
    process.join()


def _work_and_wait(work: Callable[[str], Any], folder: str, mark: str) -> None:
    kept = work(folder)
    Path(mark).touch()
    time.sleep(2 * _SECONDS)
    del kept


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def tagged_env(length: int) -> Any:
    """A Gymnasium environment whose observation is its step; an episode has `length` observations after the first."""
    import gymnasium

    class TaggedEnv(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1e6, 1e6, (1,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.now = 0
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> Any:
            self.now += 1
            return np.full(1, self.now, np.float32), 1.0, self.now == length, False, {}

    return TaggedEnv()
