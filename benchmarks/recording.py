"""What recording adds to a step of 256 environments: `python -m benchmarks recording`.

The environments do next to nothing, and are timed in turn with and without the wrapper. The goal: under 100 us a step.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from benchmarks.timing import print_table
from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.wrappers import VectorRecordEpisodes

NUM_ENVS = 256
STEPS_A_ROUND = 40


class TrivialEnvs(VectorEnv):
    """Observations of 24 numbers that never change, actions of 6; episodes of one length, ending at different times."""

    def __init__(self, mode: AutoresetMode, episode_length: int) -> None:
        self.num_envs, self.metadata = NUM_ENVS, {"autoreset_mode": mode}
        self.single_observation_space = spaces.Box(-1, 1, (24,), np.float32)
        self.single_action_space = spaces.Box(-1, 1, (6,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, NUM_ENVS)
        self.action_space = batch_space(self.single_action_space, NUM_ENVS)
        self.gives_final_obs = mode is AutoresetMode.SAME_STEP
        self.episode_length = episode_length
        self.ages = np.arange(NUM_ENVS) * episode_length // NUM_ENVS
        self.obs = np.zeros((NUM_ENVS, 24), np.float32)
        self.rewards, self.no = np.ones(NUM_ENVS), np.zeros(NUM_ENVS, np.bool_)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        return self.obs, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self.ages += 1
        done = self.ages % self.episode_length == 0
        infos: dict[str, Any] = {}
        if self.gives_final_obs and done.any():
            final_obs = np.full(NUM_ENVS, None, object)
            for env in np.flatnonzero(done).tolist():
                final_obs[env] = self.obs[env]
            infos = {"final_obs": final_obs, "_final_obs": done}
        return self.obs, self.rewards, done, self.no, infos


def added_microseconds(mode: AutoresetMode, episode_length: int, rounds: int) -> tuple[float, float]:
    """Medians over the rounds: microseconds of a bare step, and what recording adds to it."""
    buffer = ReplayBuffer(RingBufferDataset(200_000), batch_size=1)
    bare: VectorEnv = TrivialEnvs(mode, episode_length)
    recording = VectorRecordEpisodes(TrivialEnvs(mode, episode_length), buffer)
    actions = np.zeros((NUM_ENVS, 6), np.float32)
    recording.reset()
    # Until the ring is full and its memory is there: that is how it will be for nearly all of a run.
    while not buffer.dataset.is_full:
        recording.step(actions)
    times: dict[str, list[float]] = {"bare": [], "recording": []}
    for _ in range(rounds):
        for name, envs in (("bare", bare), ("recording", recording)):
            begin = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                envs.step(actions)
            times[name].append((time.perf_counter() - begin) / STEPS_A_ROUND * 1e6)
    found = {name: float(np.median(values)) for name, values in times.items()}
    return found["bare"], found["recording"] - found["bare"]


def recording(rounds: int) -> None:
    """A table over the modes and the length of episodes."""
    torch.set_num_threads(1)
    table = []
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        for episode_length in (200, 1000):
            bare, added = added_microseconds(mode, episode_length, rounds)
            table.append((f"{mode.value}, {episode_length}", f"{bare:.1f}", f"{added:.1f}"))
    print_table(
        f"Recording a step of {NUM_ENVS} environments, microseconds",
        ("mode, steps an episode", "bare step", "added by VectorRecordEpisodes"),
        table,
    )
