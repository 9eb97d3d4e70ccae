"""Datasets that Minari's DataCollector has recorded, and the log of the games that were played.

    uv venv --python 3.11 venv
    uv pip install -p venv/bin/python minari==0.5.4 gymnasium==1.4.0 numpy==2.4.6 h5py==3.16.0 pyarrow==26.0.1 \
        pillow==13.0.0 jax==0.7.2
    venv/bin/python make.py

recorded.zip    hdf5/data, arrow/data: nested observations, infos, seeds; hdf5 has integers as rewards of its first
                episode. jpeg_FORMAT/data, exact_FORMAT/data: images, by default and with jpeg_encoding=False.
log.npz         the same, as the games have logged it.
"""

import os
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np

STORE = tempfile.mkdtemp()
os.environ["MINARI_DATASETS_PATH"] = STORE

import gymnasium as gym  # noqa: E402
import minari  # noqa: E402
from gymnasium import spaces  # noqa: E402

HERE = Path(__file__).parent
# Steps, terminated, truncated. The last is cut by the end of the recording.
GAMES = [(1, True, False), (3, True, False), (4, False, True), (2, True, True), (2, False, False)]
SEEDS = [7, None, 2**63 + 5, 0, 1]


class Game(gym.Env):
    """Observations, rewards and infos that say which episode and step they are of."""

    observation_space = spaces.Dict(
        {
            "state": spaces.Box(-1e6, 1e6, (3,), np.float32),
            "place": spaces.Tuple((spaces.Discrete(1000), spaces.Box(-np.inf, np.inf, (), np.float64))),
            "said": spaces.Text(20),
        }
    )
    action_space = spaces.Discrete(1000, start=-1)

    def __init__(self, integer_rewards=False):
        self.integer_rewards = integer_rewards
        self.episode, self.log = -1, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        self.log.append({})
        return self.seen()

    def step(self, action):
        self.step_number += 1
        length, terminated, truncated = GAMES[self.episode]
        is_last = self.step_number == length
        reward = 100 * self.episode + self.step_number
        if not (self.integer_rewards and self.episode == 0):
            reward += 0.5
        flags = terminated and is_last, truncated and is_last
        self.note(action=action, reward=float(reward), terminated=flags[0], truncated=flags[1])
        observation, info = self.seen()
        return observation, reward, *flags, info

    def seen(self):
        episode, step = self.episode, self.step_number
        state, number, real = [episode, step, step / 4], 100 * episode + step, episode + step / 3
        self.note(state=state, number=number, real=real, lives=9 - step, deep=[[episode, step]] * 2)
        observation = {
            "state": np.array(state, np.float32),
            "place": (np.int64(number), np.float64(real)),
            "said": f"step{step}",
        }
        info = {"lives": 9 - step, "inner": {"deep": np.array([[episode, step]] * 2)}, "words": f"at{step}"}
        return observation, info

    def note(self, **values):
        for name, value in values.items():
            self.log[-1].setdefault(name, []).append(value)


class Images(gym.Env):
    """Images that brighten with the episode and the step."""

    observation_space = spaces.Box(0, 255, (32, 40, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self):
        self.episode, self.log = -1, []

    def reset(self, *, seed=None, options=None):
        self.episode, self.step_number = self.episode + 1, 0
        return self.image(), {}

    def step(self, action):
        self.step_number += 1
        return self.image(), 1.0, self.step_number == 2, False, {}

    def image(self):
        y, x = np.mgrid[:32, :40]
        image = np.stack([x * 5 + self.step_number * 9, y * 6, y + x + self.episode * 40], -1).astype(np.uint8)
        self.log.append(image)
        return image


def record(name, env, actions, options, **how):
    collector = minari.DataCollector(env, **how)
    for episode, played in enumerate(actions):
        collector.reset(seed=SEEDS[episode], options=options[episode])
        for action in played:
            collector.step(action)
    collector.create_dataset(name, algorithm_name="scripted", author="tests", description="Logged games.")
    collector.close()


def main():
    warnings.simplefilter("ignore")
    log = {}
    actions = [[np.int64(100 * i + t) for t in range(length)] for i, (length, _, _) in enumerate(GAMES)]
    options = [{"level": {"speed": 2}}, {"minari_autoseed": False}, None, None, None]
    for data_format in ("hdf5", "arrow"):
        game = Game(integer_rewards=data_format == "hdf5")
        record(f"{data_format}-v0", game, actions, options, record_infos=True, data_format=data_format)
        log |= {f"{data_format}/{i}/{n}": np.array(v) for i, one in enumerate(game.log) for n, v in one.items()}
        for kind in ("jpeg", "exact"):
            images, moves = Images(), [[np.full(1, t / 10, np.float32) for t in range(2)] for _ in range(2)]
            how = {"jpeg_encoding": False} if kind == "exact" else {}
            record(f"{kind}_{data_format}-v0", images, moves, [None] * 2, data_format=data_format, **how)
            log["images"] = np.array(images.log).reshape(2, 3, 32, 40, 3)
    np.savez_compressed(HERE / "log.npz", **log)
    with zipfile.ZipFile(HERE / "recorded.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(Path(STORE).glob("*-v0/data/**/*")):
            if path.is_file():
                archive.write(path, str(path.relative_to(STORE)).replace("-v0/", "/"))


if __name__ == "__main__":
    main()
