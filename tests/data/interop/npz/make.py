"""Writes the directories beside it: the replay of DreamerV2 2.2.0, DreamerV3 1.5.0, DrQ-v2 and ExoRL.

Needs none of `buffers`. In the root of the repository:

    python3.11 -m venv venv && venv/bin/pip install numpy==2.4.6 cloudpickle==3.1.3 torch==2.13.0
    venv/bin/pip install --no-deps dreamerv2==2.2.0 dreamerv3==1.5.0  # Their other requirements are for training.
    PYTHONPATH=. venv/bin/python tests/data/interop/npz/make.py

DrQ-v2 is no package: `replay_buffer.py` of facebookresearch/drqv2 at commit d6dbadce is read from a path that is given
as an argument; without one, `drqv2_replay` is left alone. What a wrapper adds to time steps (rewards and discounts of
first rows, `physics`) is done here as in `dmc.py` of denisyarats/exorl at commit 9cb4334f.

Which games are played is said below, and again in `test_npz.py`, which plays them anew: they are the oracle.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.interop.logged import PLAYED, Game

HERE = Path(__file__).parent
FINISHED = PLAYED[:-1]
STREAMS = {0: PLAYED[:3], 10: [(1, "terminated"), (3, "truncated"), (2, "both"), (9, "cut")]}
ROWS_OF_A_STREAM = 13


def module_at(path: Path) -> Any:
    """A module alone, without the package around it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emptied(name: str) -> Path:
    """A new directory."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    return HERE / name


class DreamerGame:
    """The game with the interface of Dreamer's environments, those of V3 with `reset` as an action."""

    def __init__(self, played: list[tuple[int, str]], before: int = 0) -> None:
        self.game, self.is_over = Game(played, before), True

    @property
    def act_space(self) -> dict[str, Any]:
        """With the shape of the action, which the driver needs for first rows."""
        return {"action": np.zeros(2, np.float32)}

    def reset(self) -> dict[str, Any]:
        """As DreamerV2 calls it."""
        self.is_over = False
        return self._found(self.game.reset(), 0.0, True, False, False)

    def step(self, action: dict[str, Any]) -> dict[str, Any]:
        """As both call it."""
        if action.get("reset", False) or self.is_over:
            return self.reset()
        seen, reward, terminated, truncated = self.game.step(action["action"])
        self.is_over = terminated or truncated
        return self._found(seen, reward, False, self.is_over, terminated)

    def _found(self, seen: dict[str, Any], reward: Any, *flags: bool) -> dict[str, Any]:
        names = ("is_first", "is_last", "is_terminal")
        return {
            "image": seen["image"],
            "vector": seen["obs"],
            "reward": np.float32(reward),
            **dict(zip(names, flags, strict=True)),
        }


def dreamerv2() -> None:
    """Episodes that its driver plays and its replay saves."""
    sys.modules["tensorflow"] = types.ModuleType("tensorflow")
    root = Path(importlib.util.find_spec("dreamerv2").submodule_search_locations[0]) / "common"
    replay = module_at(root / "replay.py").Replay(emptied("dreamerv2_replay"))
    driver = module_at(root / "driver.py").Driver([DreamerGame(FINISHED)])
    driver.on_step(replay.add_step)
    driver.on_reset(replay.add_step)
    driver(lambda obs, state: ({"action": actions(obs["vector"])}, None), episodes=len(FINISHED))


def dreamerv3() -> None:
    """Two streams, which are saved once in the middle and once at the end."""
    sys.path.insert(0, importlib.util.find_spec("dreamerv3").submodule_search_locations[0])
    import embodied

    class V3Game(DreamerGame, embodied.Env):
        obs_space = {name: None for name in ("image", "vector", "reward", "is_first", "is_last", "is_terminal")}
        act_space = {"action": embodied.Space(np.float32, (2,)), "reset": embodied.Space(bool)}

    env = embodied.BatchEnv([V3Game(played, before) for before, played in STREAMS.items()], parallel=False)
    replay = embodied.replay.Uniform(length=2, directory=emptied("dreamerv3_replay"), chunks=5)
    driver = embodied.Driver(env)
    driver.on_step(replay.add)
    for num_rows in (8, ROWS_OF_A_STREAM - 8):
        driver(lambda obs, state: ({"action": actions(obs["vector"])}, None), steps=num_rows * len(STREAMS))
        replay.save(wait=True)


def actions(observations: np.ndarray) -> np.ndarray:
    """`Game.action` from what the player sees."""
    return np.stack([observations[:, 0], -observations[:, 1] - 1], 1).astype(np.float32)


class Spec(NamedTuple):
    """Of dm_env."""

    name: str
    shape: tuple[int, ...]
    dtype: type


class TimeStep(dict):
    """Of dm_env, extended."""

    def last(self) -> bool:
        """Whether the episode is over."""
        return self["is_last"]


def drqv2(path: Path) -> None:
    """Episodes that its storage saves."""
    specs = [
        Spec("observation", (3,), np.float32),
        Spec("action", (2,), np.float32),
        Spec("reward", (1,), np.float32),
        Spec("discount", (1,), np.float32),
        Spec("physics", (1,), np.float64),
    ]
    storage = module_at(path).ReplayBufferStorage(specs, emptied("drqv2_replay"))
    game = Game(FINISHED)
    for length, _ in FINISHED:
        storage.add(time_step(game.reset(), np.zeros(2, np.float32)))
        for _ in range(length):
            action = game.action()
            seen, reward, terminated, truncated = game.step(action)
            storage.add(time_step(seen, action, float(reward), float(not terminated), terminated or truncated))


def time_step(
    seen: dict[str, Any], action: np.ndarray, reward: float = 0.0, discount: float = 1.0, is_last: bool = False
) -> TimeStep:
    """As ExoRL's `ExtendedTimeStepWrapper` makes them."""
    state = {"observation": seen["obs"].astype(np.float32), "physics": seen["state"].astype(np.float64)}
    return TimeStep(state, action=action, reward=reward, discount=discount, is_last=is_last)


if __name__ == "__main__":
    dreamerv2()
    dreamerv3()
    if len(sys.argv) > 1:
        drqv2(Path(sys.argv[1]))
