"""An environment that keeps its own log: the oracle of everything that records environments.

Every observation says which environment, episode and step it is; rewards are exact in float32, and some are 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from buffers import Recorder, ReplayBuffer
from buffers.dataset import RingBufferDataset
from tests import tagged

ENDS = ("terminated", "truncated", "both")


def observation(env: int, episode: int, step: int, kind: str = "box") -> Any:
    """The observation of one environment at one time, in the form of a space."""
    vector = np.array([env, episode, step], np.float32)
    if kind == "discrete":
        return np.int64(env * 10_000 + episode * 100 + step)
    if kind == "dict":
        return {"vector": vector, "deep": {"image": np.full((2, 2, 3), (episode * 7 + step) % 256, np.uint8)}}
    if kind == "tuple":
        return vector, np.array([step], np.int64)
    return vector


class Game:
    """Episodes of lengths and endings drawn from a seed; `reuses` returns all observations in one array.

    `log` has one dict an episode: "obs" (T + 1 of them), "action", "reward", "terminated", "truncated" (T of each), and
    "ended" (T), which is not recorded: whether the episode ended by itself.
    """

    def __init__(self, env: int, kind: str = "box", reuses: bool = False) -> None:
        self.env, self.kind = env, kind
        self.rng = np.random.default_rng(100 + env)
        self.array = np.zeros(3, np.float32) if reuses else None
        self.episode = -1
        self.log: list[dict[str, list[Any]]] = []

    def reset(self) -> Any:
        if self.log and self.log[-1]["action"] and not self.is_over:
            # What a recorder makes of an episode that is left in its middle.
            self.log[-1]["truncated"][-1] = True
        self.episode, self.step_index, self.is_over = self.episode + 1, 0, False
        self.length = int(self.rng.integers(1, 6))
        self.end = ENDS[self.rng.integers(3)]
        self.log.append({"obs": [], "action": [], "reward": [], "terminated": [], "truncated": [], "ended": []})
        return self._observe()

    def step(self, action: Any) -> tuple[Any, float, bool, bool]:
        assert not self.is_over, "stepped after its end"
        self.step_index += 1
        self.is_over = self.step_index == self.length
        reward = 0.0 if self.rng.random() < 0.3 else float(self.episode * 64 + self.step_index) + 0.5
        terminated, truncated = (self.is_over and self.end in (flag, "both") for flag in ("terminated", "truncated"))
        episode = self.log[-1]
        values = {"action": action, "reward": reward, "terminated": terminated, "truncated": truncated}
        for name, value in {**values, "ended": self.is_over}.items():
            episode[name].append(value)
        return self._observe(), reward, terminated, truncated

    def _observe(self) -> Any:
        self.log[-1]["obs"].append(observation(self.env, self.episode, self.step_index, self.kind))
        if self.array is None:
            return observation(self.env, self.episode, self.step_index, self.kind)
        self.array[:] = self.env, self.episode, self.step_index
        return self.array


class Games:
    """N games that step together; under "next_step", an environment pays a reward on the call that resets it."""

    def __init__(self, num_envs: int, mode: str) -> None:
        self.games = [Game(env) for env in range(num_envs)]
        self.mode = mode
        self.is_over = np.zeros(num_envs, np.bool_)
        # One array for all calls, as simulators have: whoever keeps it without a copy keeps the newest.
        self.obs = np.zeros((num_envs, 3), np.float32)
        self.final: list[np.ndarray | None] = [None] * num_envs

    @property
    def logs(self) -> list[list[dict[str, list[Any]]]]:
        return [game.log for game in self.games]

    def reset(self, mask: np.ndarray | None = None) -> np.ndarray:
        for env, game in enumerate(self.games):
            if mask is None or mask[env]:
                self.obs[env], self.is_over[env] = game.reset(), False
        return self.obs

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        num_envs = len(self.games)
        rewards, terminated, truncated = np.zeros(num_envs, np.float32), *np.zeros((2, num_envs), np.bool_)
        self.final = [None] * num_envs
        for env, game in enumerate(self.games):
            if self.is_over[env] and self.mode == "next_step":
                self.obs[env], rewards[env], self.is_over[env] = game.reset(), -2.25, False
                continue
            self.obs[env], rewards[env], terminated[env], truncated[env] = game.step(actions[env].copy())
            self.is_over[env] = game.is_over
            if game.is_over and self.mode == "same_step":
                self.final[env], self.obs[env], self.is_over[env] = self.obs[env].copy(), game.reset(), False
        return self.obs, rewards, terminated, truncated

    def full_final(self) -> np.ndarray:
        """A full batch of final observations; of no meaning where there is none."""
        return np.stack([np.full(3, -1, np.float32) if item is None else item for item in self.final])


def final_as_gymnasium(games: Games) -> np.ndarray:
    array = np.full(len(games.games), None, object)
    for env, item in enumerate(games.final):
        array[env] = item
    return array


def as_gymnasium(games: Games, call: dict[str, Any]) -> dict[str, Any]:
    return {"infos": {"final_obs": final_as_gymnasium(games)}}


def play(
    games: Games,
    recorder: Recorder,
    num_steps: int = 60,
    reset_at: dict[int, np.ndarray | None] | None = None,
    ignored: type[Exception] | tuple[()] = (),
    returns: Callable[[Games, dict[str, Any]], dict[str, Any]] = as_gymnasium,
) -> None:
    """Step games and record them; reset before the steps in `reset_at` and at the end; go on after `ignored` errors.

    Of each call, `returns` gives what `Recorder.step` takes beside, or instead of, its arrays.
    """

    def reset(mask: np.ndarray | None = None) -> None:
        obs, lent = games.reset(mask), None if mask is None else mask.copy()
        with contextlib.suppress(ignored):
            recorder.reset(obs, lent)
        if lent is not None:
            lent[:] = ~lent  # As whoever uses the array again.

    reset()
    for step in range(num_steps):
        if step in (reset_at or {}):
            reset((reset_at or {})[step])
        taken = actions(len(games.games), step)
        values = (taken, *games.step(taken))
        call = dict(zip(("action", "obs", "reward", "terminated", "truncated"), values, strict=True))
        with contextlib.suppress(ignored):
            recorder.step(**{**call, **returns(games, call)})
        if games.mode == "disabled" and games.is_over.any():
            reset(games.is_over.copy())
    reset()


def actions(num_envs: int, step: int) -> np.ndarray:
    """Actions `(N, 2)` that are nowhere 0, the same for one step of one environment always."""
    return np.stack([np.full(num_envs, step + 1), np.arange(num_envs) + 1], -1).astype(np.float32)


def make_buffer(capacity: int = 20_000, **options: Any) -> ReplayBuffer:
    return ReplayBuffer(RingBufferDataset(capacity), batch_size=8, seed=0, **options)


def recorded(buffer: ReplayBuffer | RingBufferDataset) -> list[dict[str, Any]]:
    return list((buffer.dataset if isinstance(buffer, ReplayBuffer) else buffer).episodes())


class FlakyRing(RingBufferDataset):
    """A ring of which some additions fail, with the probability `rate` and at the calls `fails_at`."""

    def __init__(
        self, capacity: int, rng: np.random.Generator | None = None, rate: float = 0.0, fails_at: Container[int] = ()
    ) -> None:
        super().__init__(capacity)
        self.rng, self.rate, self.fails_at = rng, rate, fails_at
        self.num_calls = self.num_failed = 0

    def add(self, episode: dict[str, np.ndarray], cut: int = 0, info: Any = None) -> int:
        self.num_calls += 1
        if self.num_calls - 1 in self.fails_at or (self.rng is not None and self.rng.random() < self.rate):
            self.num_failed += 1
            raise OSError("disk full")
        return super().add(episode, cut, info)


def stored(dataset: RingBufferDataset) -> list[tuple[int, int, list[int]]]:
    """(environment, episode, steps) of every stored episode of `tagged` rows, each checked whole."""
    found = []
    for episode in dataset.episodes():
        env, number, first = (int(value) for value in episode["obs"]["state"][0])
        steps = list(range(first, first + len(episode["reward"])))
        tagged.assert_same_episode(episode, tagged.rows(env, number, np.array(steps)))
        found.append((env, number, steps))
    return found


def expected_rows(log: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    """The T + 1 rows that a log of T transitions shall become, `name/of/field -> (T + 1, *shape)`."""
    rows = {"is_first": np.arange(len(log["obs"])) == 0}
    for name in ("obs", "action", "reward", "terminated", "truncated"):
        values = [_leaves(name, value) for value in log[name]]
        if name != "obs":
            values.insert(0, {leaf: np.zeros_like(array) for leaf, array in values[0].items()})
        rows |= {leaf: np.stack([value[leaf] for value in values]) for leaf in values[0]}
    return rows


def _leaves(name: str, value: Any) -> dict[str, np.ndarray]:
    if isinstance(value, tuple):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return {name: np.asarray(value)}
    leaves = {}
    for key, item in value.items():
        leaves |= _leaves(f"{name}/{key}", item)
    return leaves


def assert_recorded(episodes: Sequence[dict[str, Any]], logs: Sequence[Sequence[dict[str, list[Any]]]]) -> None:
    """What was recorded is what the logs say, one an environment: no episode missing, doubled, mixed, or of one row."""
    expected = {
        (env, number): expected_rows(episode)
        for env, log in enumerate(logs)
        for number, episode in enumerate(log)
        if episode["action"]
    }
    found = {}
    for episode in episodes:
        key = _origin(episode["obs"])
        assert key not in found, f"episode {key} was recorded twice"
        found[key] = episode
    assert sorted(found) == sorted(expected)
    for key, rows in expected.items():
        flat = tagged.flatten(found[key])
        assert not [name for name in flat if "/" in name and name not in rows], key
        for name, value in rows.items():
            np.testing.assert_array_equal(flat[name].numpy(), value, err_msg=f"{name} of episode {key}")


def _origin(obs: Any) -> tuple[int, int]:
    """(environment, episode) of an episode's first row."""
    if isinstance(obs, dict):
        obs = obs["vector"] if "vector" in obs else obs["0"]
    if obs.ndim == 1:
        return int(obs[0]) // 10_000, int(obs[0]) % 10_000 // 100
    return int(obs[0, 0]), int(obs[0, 1])
