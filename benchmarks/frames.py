"""Frames as an agent sees them, for what depends on what pixels show: `frames("breakout-84", 4_000)`.

    breakout, riverraid, asteroids   every 4th frame, the maximum of it and the one before
                                     -84: gray, resized by area to 84 x 84; -rgb: 210 x 160 RGB
    pendulum-64                      flat colours with smooth edges, resized by area from 500 x 500
    minigrid-64                      flat tiles
    mujoco-64                        `Ant-v5`: a checkered floor with shadows, and a camera that follows
    noise-64                         uniform noise, which nothing makes smaller

What makes them runs in a process of its own, in the environment of `benchmarks/requirements/frames.txt` where that is
installed, and in this one otherwise. `mujoco-64` is rendered by EGL, so it needs no display.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environments

GAMES = {"breakout": "Breakout", "riverraid": "Riverraid", "asteroids": "Asteroids"}
NAMES = (
    *(f"{game}-84" for game in GAMES),
    *(f"{game}-rgb" for game in GAMES),
    *("pendulum-64", "minigrid-64", "mujoco-64", "noise-64"),
)
# Steps of an episode that is cut from them.
_SHORTEST, _LONGEST = 200, 1_000
# How often the action before is repeated.
_STICKINESS = 0.25


def frames(name: str, num: int, folder: Path | None = None) -> np.ndarray:
    """Consecutive frames of episodes, the same ones each time; uint8 `(num, H, W)` if gray, else `(num, H, W, 3)`.

    Args:
        name: One of `NAMES`.
        num: How many.
        folder: Where they are kept once they are made; by default, a folder for temporary files.

    Raises:
        RuntimeError: They cannot be made here, usually for want of a package.
    """
    if name not in NAMES:
        raise ValueError(f"There are no frames {name!r}. Choose one of {', '.join(NAMES)}.")
    folder = folder or Path(tempfile.gettempdir()) / "buffers-frames"
    path = folder / f"{name}.npy"
    if not path.exists() or len(np.load(path, mmap_mode="r")) < num:
        _make(name, num, path)
    return np.array(np.load(path, mmap_mode="r")[:num])


def episodes(found: np.ndarray, num_steps: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Views of 200 to 1,000 frames each, from anywhere on, across the end to the first, until there are `num_steps`."""
    rng, repeated = np.random.default_rng(seed), np.concatenate([found, found[:_LONGEST]])
    while num_steps > 0:
        first, length = rng.integers(len(found)), rng.integers(_SHORTEST, _LONGEST + 1)
        yield repeated[first : first + length]
        num_steps -= length


def _make(name: str, num: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f"{name}-{os.getpid()}.making.npy")
    python = environments.python_of("frames") or sys.executable
    command = (str(python), "-m", "benchmarks.frames", name, str(num), str(making))
    variables = {"MUJOCO_GL": "egl", "SDL_VIDEODRIVER": "dummy", **os.environ}
    try:
        done = subprocess.run(command, cwd=environments.HERE.parent, env=variables, capture_output=True, text=True)
        if done.returncode:
            packages = ", ".join((environments.REQUIREMENTS / "frames.txt").read_text().split())
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RuntimeError(
                f"Frames {name!r} cannot be made: {why}. They need {packages}: `python -m benchmarks environments` "
                "installs these."
            )
        making.rename(path)
    finally:
        making.unlink(missing_ok=True)


# In the process that makes them.


def _played(env: Any, seen: Callable[[Any], np.ndarray]) -> Iterator[np.ndarray]:
    """What is seen of each observation of one episode after another, first ones included, under a random policy."""
    rng = np.random.default_rng(0)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    action = env.action_space.sample()
    while True:
        yield seen(obs)
        if rng.random() >= _STICKINESS:
            action = env.action_space.sample()
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            yield seen(obs)
            obs, _ = env.reset()


def _atari(name: str) -> Iterator[np.ndarray]:
    import ale_py
    import gymnasium
    from gymnasium.wrappers import AtariPreprocessing

    gymnasium.register_envs(ale_py)
    game, kind = name.split("-")
    env = gymnasium.make(f"ALE/{GAMES[game]}-v5", frameskip=1)
    form = {"screen_size": 84} if kind == "84" else {"screen_size": (160, 210), "grayscale_obs": False}
    return _played(AtariPreprocessing(env, **form), np.array)


def _pendulum() -> Iterator[np.ndarray]:
    import cv2
    import gymnasium

    env = gymnasium.make("Pendulum-v1", render_mode="rgb_array")
    return _played(env, lambda _: cv2.resize(env.render(), (64, 64), interpolation=cv2.INTER_AREA))


def _minigrid() -> Iterator[np.ndarray]:
    import gymnasium
    from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper

    return _played(ImgObsWrapper(RGBImgObsWrapper(gymnasium.make("MiniGrid-DoorKey-8x8-v0"), tile_size=8)), np.array)


def _mujoco() -> Iterator[np.ndarray]:
    import gymnasium

    env = gymnasium.make("Ant-v5", render_mode="rgb_array", width=64, height=64)
    # Without a GPU most of the time goes into the shadows, which need no more than this for 64 x 64.
    env.unwrapped.model.vis.quality.shadowsize = 1024
    return _played(env, lambda _: env.render())


def _noise() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, 256, (64, 64, 3), np.uint8)


def _write(name: str, num: int, path: str) -> None:
    others = {"pendulum-64": _pendulum, "minigrid-64": _minigrid, "mujoco-64": _mujoco, "noise-64": _noise}
    found = others[name]() if name in others else _atari(name)
    first = next(found)
    made = np.lib.format.open_memmap(path, "w+", np.uint8, (num, *first.shape))
    made[0] = first
    for number in range(1, num):
        made[number] = next(found)
    made.flush()


if __name__ == "__main__":
    _write(sys.argv[1], int(sys.argv[2]), sys.argv[3])
