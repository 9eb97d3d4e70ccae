"""Checks of Stable-Baselines3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.checks.common import LENGTH, child_sees_additions, killed_after, tagged_env
from benchmarks.peers.sb3_buffer import SB3
from benchmarks.workloads import Store, tagged_rows


def live_data(folder: str) -> str:
    """A forked process."""
    return "yes" if child_sees_additions(SB3()) else "no"


def _write(folder: str) -> Any:
    contestant = SB3()
    contestant.fill(Store("state", 1_000, LENGTH, is_filled=False))
    contestant.episode_adder(tagged_rows("state", 0, 3, LENGTH), LENGTH)()
    save_to_pkl(Path(folder) / "saved.pkl", contestant._buffer)
    contestant.episode_adder(tagged_rows("state", 3, 2, LENGTH), LENGTH)()
    return contestant


def survives_kill(folder: str) -> str:
    """A process adds three episodes, saves, adds two more, and is killed."""
    killed_after(_write, folder)
    number = load_from_pkl(Path(folder) / "saved.pkl").size()
    return "what the last `save_replay_buffer` wrote" if number == 3 * (LENGTH - 1) else f"{number} transitions"


def final_observation(folder: str) -> str:
    """An agent that only collects, from two environments that reset by themselves."""
    envs = DummyVecEnv([lambda: tagged_env(7), lambda: tagged_env(4)])
    model = DQN("MlpPolicy", envs, buffer_size=200, learning_starts=10_000)
    model.learn(120)
    buffer = model.replay_buffer
    assert buffer is not None
    is_last = buffer.dones[: buffer.size()].astype(bool)
    lasts = buffer.next_observations[: buffer.size()][is_last].ravel()
    return "yes" if len(lasts) > 10 and set(np.unique(lasts)) == {4.0, 7.0} else "no"
