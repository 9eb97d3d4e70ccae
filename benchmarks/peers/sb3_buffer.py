"""Stable-Baselines3: loose transitions, B * T of them where others draw B sequences of T, each with its `next_obs`.

One flag says that an episode is over, and what is drawn are `observations`, `actions`, `next_observations`, `dones` and
`rewards`. Its storage is filled by writing its arrays, as `add` takes one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from benchmarks.contestant import Contestant, Rows
from benchmarks.workloads import Store, TaggedEnvs, transitions_of

assert stable_baselines3


class SB3(Contestant):
    """`ReplayBuffer` as it comes."""

    draws_sequences = False

    def make(self, store: Store) -> None:
        self._buffer: Any = None
        self._made = store
        shape, dtype = store.fields["obs"]
        high = 255 if dtype == "uint8" else np.inf
        obs_space = spaces.Box(-high if dtype != "uint8" else 0, high, shape, np.dtype(dtype).type)
        action_space = spaces.Box(-1, 1, store.fields["action"][0], np.float32)
        self._buffer = ReplayBuffer(store.num_steps, obs_space, action_space, device="cpu", n_envs=store.num_envs)

    def add_rows(self, rows: Rows, length: int) -> None:
        data, buffer = _transitions(rows, length), self._buffer
        begin, end = buffer.pos, min(buffer.pos + len(data["reward"]), buffer.buffer_size)
        for array, name in _arrays(buffer):
            array[begin:end, 0] = data[name][: end - begin]
        buffer.pos, buffer.full = end % buffer.buffer_size, buffer.full or end == buffer.buffer_size

    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        data, buffer = _transitions(rows, length), self._buffer
        names = ("obs", "next_obs", "action", "reward", "terminated")
        steps = list(zip(*(list(data[name][:, None]) for name in names), strict=True))
        infos: list[dict[str, Any]] = [{}]

        def add() -> None:
            for step in steps:
                buffer.add(*step, infos)

        return add

    def step_adder(self, envs: TaggedEnvs) -> Callable[[], Any]:
        buffer, rows, previous = self._buffer, envs.rows, envs.previous_obs
        infos: list[dict[str, Any]] = [{} for _ in envs.was_done]
        obs, action, reward, done = (rows[name] for name in ("obs", "action", "reward", "terminated"))
        return lambda: buffer.add(previous, obs, action, reward, done, infos)

    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        buffer, num_rows = self._buffer, batch_size * length
        return lambda: buffer.sample(num_rows)

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        shape = self._made.fields["obs"][0]
        names = {"obs": batch.observations, "next_obs": batch.next_observations}
        return {n: values.numpy().reshape(batch_size, length, *shape) for n, values in names.items()}

    def set_threads(self, number: int) -> None:
        torch.set_num_threads(number)


def _arrays(buffer: Any) -> list[tuple[np.ndarray, str]]:
    return [
        (buffer.observations, "obs"),
        (buffer.next_observations, "next_obs"),
        (buffer.actions, "action"),
        (buffer.rewards, "reward"),
        (buffer.dones, "terminated"),
    ]


def _transitions(rows: Rows, length: int) -> Rows:
    """Of each episode; one of a single row has none, so its row is repeated."""
    return transitions_of(rows, length) if length > 1 else {**rows, "next_obs": rows["obs"]}
