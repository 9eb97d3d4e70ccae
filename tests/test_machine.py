"""A state machine: whatever is done to a buffer, it agrees with a list of episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from buffers import ReplayBuffer
from tests import tagged
from tests.list_dataset import ListDataset


class BufferMachine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(5, 30), num_envs=st.integers(1, 3), cut=st.one_of(st.none(), st.integers(1, 5)))
    def begin(self, capacity: int, num_envs: int, cut: int | None) -> None:
        self.capacity, self.num_envs, self.cut = capacity, num_envs, cut
        self.buffer = ReplayBuffer(
            ListDataset(capacity), 8, 2, num_envs=num_envs, seed=0, max_episode_length=cut, include=("is_last",)
        )
        self.live: list[tuple[int, int, int, int]] = []  # environment, episode, first step, rows
        self.open = [0] * num_envs
        self.episode = [0] * num_envs
        self.step = [0] * num_envs
        self.num_added = 0

    def store(self, env: int, number: int, first: int, rows: int) -> None:
        while sum(episode[3] for episode in self.live) + rows > self.capacity:
            self.live.pop(0)
        self.live.append((env, number, first, rows))

    def close(self, env: int) -> None:
        if self.open[env]:
            self.store(env, self.episode[env], self.step[env] - self.open[env], self.open[env])
            self.open[env] = 0

    @rule(data=st.data())
    def add_step(self, data: Any) -> None:
        done = data.draw(st.lists(st.booleans(), min_size=self.num_envs, max_size=self.num_envs))
        row = tagged.rows(
            np.arange(self.num_envs),
            [number + is_done for number, is_done in zip(self.episode, done, strict=True)],
            [0 if is_done else step for step, is_done in zip(self.step, done, strict=True)],
        )
        if any(rows == self.capacity and not is_done for rows, is_done in zip(self.open, done, strict=True)):
            with pytest.raises(ValueError, match="reached"):
                self.buffer.add_step(row, np.array(done))
            return
        for env in np.flatnonzero(done).tolist():
            self.close(env)
            self.episode[env], self.step[env] = self.episode[env] + 1, 0
        for env in range(self.num_envs):
            self.open[env] += 1
            self.step[env] += 1
        for env in range(self.num_envs):
            if self.open[env] == self.cut:
                self.close(env)
        self.buffer.add_step(row, np.array(done))

    @rule(rows=st.integers(1, 40))
    def add_episode(self, rows: int) -> None:
        number = 1000 + self.num_added
        if rows > self.capacity:
            with pytest.raises(ValueError, match="does not fit"):
                self.buffer.add_episode(tagged.episode(rows, number))
            return
        self.num_added += 1
        self.store(0, number, 0, rows)
        self.buffer.add_episode(tagged.episode(rows, number))

    @rule()
    def flush(self) -> None:
        for env in range(self.num_envs):
            self.close(env)
        self.buffer.flush()

    @rule()
    def evict_the_oldest(self) -> None:
        if self.live:
            self.live.pop(0)
            self.buffer.dataset.evict_episode(0)

    @rule(spoil=st.sampled_from(["missing", "shape", "dtype", "string", "done"]))
    def bad_input(self, spoil: str) -> None:
        row = tagged.rows(np.arange(self.num_envs), 0, 0)
        if self.buffer.fields is None:
            return  # A first step cannot differ from what was before.
        done = np.ones(self.num_envs, bool)
        if spoil == "missing":
            del row["reward"]
        elif spoil == "shape":
            row["reward"] = np.zeros(self.num_envs + 1, np.float32)
        elif spoil == "dtype":
            row["reward"] = np.zeros(self.num_envs, np.float64)
        elif spoil == "string":
            row["reward"] = "a"
        else:
            done = np.ones(self.num_envs + 1, bool)
        with pytest.raises((ValueError, TypeError)):
            self.buffer.add_step(row, done)

    @rule()
    def sample(self) -> None:
        windows = {(env, number, first + step, 2) for env, number, first, rows in self.live for step in range(rows - 1)}
        if not windows:
            with pytest.raises(RuntimeError):
                self.buffer.sample()
            return
        batch = self.buffer.sample()
        assert set(tagged.origins(batch)) <= windows

    @invariant()
    def agrees_with_the_list(self) -> None:
        if not hasattr(self, "buffer"):
            return
        dataset = self.buffer.dataset
        assert dataset.episode_lengths == [rows for _, _, _, rows in self.live]
        assert dataset.num_timesteps == sum(dataset.episode_lengths) <= self.capacity
        for episode, (env, number, first, rows) in zip(dataset.episodes(), self.live, strict=True):
            tagged.assert_same_episode(episode, tagged.rows(env, number, np.arange(first, first + rows)))


TestMachine = BufferMachine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
