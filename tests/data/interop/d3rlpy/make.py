"""Write the `.h5` files beside this script with d3rlpy, and `log.npz`, what the environments saw themselves.

Run with Python 3.11, in an environment of its own, because d3rlpy pins gymnasium 1.0:

    python -m venv venv && venv/bin/pip install torch==2.13.0 && venv/bin/pip install d3rlpy==2.8.1 h5py==3.16.0
    venv/bin/python tests/data/interop/d3rlpy/make.py

`log.npz` has `FILE/EPISODE/NAME` for the observations (T + 1 of them, the final one included), actions, rewards and
`ends` (terminated, truncated) of each episode.
"""

from pathlib import Path

import gymnasium
import numpy as np
from d3rlpy.algos import DiscreteRandomPolicyConfig
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import (
    Episode,
    InfiniteBuffer,
    LastFrameWriterPreprocess,
    ReplayBuffer,
    Signature,
    create_infinite_replay_buffer,
)

HERE = Path(__file__).parent
LOG: dict[str, np.ndarray] = {}


class Tagged(gymnasium.Env):
    """Observations are (environment, episode, step). `ends` has (steps, terminated, truncated) of each episode."""

    observation_space = gymnasium.spaces.Box(0, 255, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(5)

    def __init__(self, name: str, number: int, ends: list[tuple[int, bool, bool]]) -> None:
        self.name, self.number, self.ends, self.episode = name, number, ends, -1

    def observe(self) -> np.ndarray:
        return np.array([self.number, self.episode, self.step_number], np.float32)

    def log(self, name: str, value: object) -> None:
        key = f"{self.name}/{self.episode}/{name}"
        LOG[key] = np.concatenate([LOG[key], [value]]) if key in LOG else np.array([value])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.episode, self.step_number = self.episode + 1, 0
        self.log("observations", self.observe())
        return self.observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.step_number += 1
        steps, terminated, truncated = self.ends[self.episode]
        is_last = self.step_number == steps
        reward = float(100 * self.episode + self.step_number)
        self.log("actions", int(action))
        self.log("rewards", reward)
        self.log("observations", self.observe())
        self.log("ends", (is_last and terminated, is_last and truncated))
        return self.observe(), reward, is_last and terminated, is_last and truncated, {}


def collected() -> None:
    """Recorded by d3rlpy: terminated, truncated, both, terminated, and one that the end of the recording cuts."""
    env = Tagged(
        "collected", 7, [(5, True, False), (3, False, True), (4, True, True), (12, True, False), (9, True, True)]
    )
    buffer = create_infinite_replay_buffer(env=env)
    DiscreteRandomPolicyConfig().create().collect(env, buffer, n_steps=5 + 3 + 4 + 12 + 2)
    with open(HERE / "collected.h5", "w+b") as file:
        buffer.dump(file)


def unfinished() -> None:
    """Dumped in the middle of an episode, frames of stacks: only the newest frame is stored."""
    pixels, index = Signature([np.dtype(np.uint8)], [(3, 4, 4)]), Signature([np.dtype(np.int32)], [(1,)])
    number = Signature([np.dtype(np.float32)], [(1,)])
    buffer = ReplayBuffer(
        InfiniteBuffer(),
        writer_preprocessor=LastFrameWriterPreprocess(),
        observation_signature=pixels,
        action_signature=index,
        reward_signature=number,
        action_space=ActionSpace.DISCRETE,
        action_size=5,
    )
    for episode, steps in enumerate((3, 4)):
        frames = np.stack([np.full((4, 4), 50 * episode + step, np.uint8) for step in range(steps + 1)])
        stacks = np.stack([frames[[max(step - 2, 0), max(step - 1, 0), step]] for step in range(steps + 1)])
        actions, rewards = np.arange(steps) % 5, 10.0 * episode + np.arange(steps)
        for stack, action, reward in zip(stacks, actions, rewards, strict=False):
            buffer.append(stack, int(action), float(reward))
        if episode == 0:
            buffer.clip_episode(True)
        ends = [(episode == 0 and step == steps - 1, False) for step in range(steps)]
        log_episode("frames", episode, frames[:, None], actions, rewards, ends)
    with open(HERE / "frames.h5", "w+b") as file:
        buffer.dump(file)


def given() -> None:
    """Episodes given as arrays: of one step, terminated and not; observations of two parts; actions of floats."""
    episodes = []
    for episode, (steps, terminated) in enumerate([(1, True), (2, False), (1, False), (4, True)]):
        pixels = np.stack([np.full((1, 3, 3), 20 * episode + step, np.uint8) for step in range(steps + 1)])
        state = np.stack([np.array([3, episode, step], np.float64) for step in range(steps + 1)])
        actions = np.stack([np.array([episode, step + 0.5], np.float32) for step in range(steps)])
        rewards = np.arange(steps, dtype=np.float32)[:, None] + 10 * episode
        episodes.append(Episode((pixels[:-1], state[:-1]), actions, rewards, terminated))
        ends = [(terminated and step == steps - 1, not terminated and step == steps - 1) for step in range(steps)]
        log_episode("given", episode, pixels, actions, rewards[:, 0], ends)
        LOG[f"given/{episode}/state"] = state
    buffer = ReplayBuffer(InfiniteBuffer(), episodes=episodes)
    with open(HERE / "given.h5", "w+b") as file:
        buffer.dump(file)


def log_episode(name: str, episode: int, observations: object, actions: object, rewards: object, ends: object) -> None:
    values = {"observations": observations, "actions": actions, "rewards": rewards, "ends": ends}
    LOG.update({f"{name}/{episode}/{key}": np.asarray(value) for key, value in values.items()})


if __name__ == "__main__":
    collected()
    unfinished()
    given()
    np.savez_compressed(HERE / "log.npz", **LOG)
