"""A game that keeps its own log, which every file of a test is compared with. Needs numpy only.

Every value says which episode and step it is of, so that a shift by one row is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: (transitions, how it ends): "cut" is a recording that stops in its middle.
PLAYED = [(4, "terminated"), (1, "truncated"), (6, "both"), (1, "terminated"), (3, "truncated"), (2, "cut")]


@dataclass
class Log:
    """An episode: T + 1 observations and states, T of the rest."""

    obs: list[Any] = field(default_factory=list)
    image: list[Any] = field(default_factory=list)
    state: list[Any] = field(default_factory=list)
    action: list[Any] = field(default_factory=list)
    reward: list[Any] = field(default_factory=list)
    terminated: list[bool] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays."""
        return {name: np.array(values) for name, values in vars(self).items()}


class Game:
    """Episodes of stated lengths and ends, whose numbers follow `before`."""

    def __init__(self, played: list[tuple[int, str]] = PLAYED, before: int = 0) -> None:
        self.played, self.before = played, before
        self.log: list[Log] = []

    def reset(self) -> dict[str, Any]:
        self.log.append(Log())
        self.step_index = 0
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], np.float32, bool, bool]:
        length, end = self.played[len(self.log) - 1]
        assert self.step_index < length, "stepped after its end"
        self.step_index += 1
        is_over = self.step_index == length
        reward = np.float32(self.episode * 100 + self.step_index + 0.5)
        terminated, truncated = is_over and end in ("terminated", "both"), is_over and end in ("truncated", "both")
        log = self.log[-1]
        log.action.append(action.copy())
        log.reward.append(reward)
        log.terminated.append(terminated)
        log.truncated.append(truncated)
        return self._observe(), reward, terminated, truncated

    def action(self) -> np.ndarray:
        """What the player does next."""
        return np.array([self.episode, -self.step_index - 1], np.float32)

    @property
    def episode(self) -> int:
        """The number of the episode that is played, from 1 on."""
        return self.before + len(self.log)

    def _observe(self) -> dict[str, Any]:
        episode, step = self.episode, self.step_index
        now = {
            "obs": np.array([episode, step, 0.1 * step], np.float64),
            "image": np.full((2, 2, 3), 10 * episode + step, np.uint8),
            "state": np.array([episode * 1000 + step], np.int64),
        }
        for name, value in now.items():
            getattr(self.log[-1], name).append(value)
        return now


def play(played: list[tuple[int, str]] = PLAYED, before: int = 0) -> list[dict[str, np.ndarray]]:
    """The logs of episodes that are played through."""
    game = Game(played, before)
    for length, _ in played:
        game.reset()
        for _ in range(length):
            game.step(game.action())
    return [log.arrays() for log in game.log]


def on_arrival(values: np.ndarray) -> np.ndarray:
    """T values of transitions as T + 1 rows, in which they arrive one row later."""
    return np.concatenate([np.zeros_like(values[:1]), values])
