"""Writes `files.zip` beside it by robomimic 0.3.0, D4RL 1.1 and Isaac Lab 3.0.0. Needs none of `buffers`.

In the root of the repository:

    python3.11 -m venv venv
    venv/bin/pip install h5py==3.16.0 numpy==1.26.4 torch==2.13.0 torchvision tqdm termcolor psutil six imageio \
        tensorboardX
    venv/bin/pip install --no-deps robomimic==0.3.0 d4rl==1.1 gym==0.26.2 gym-notices cloudpickle
    venv/bin/pip install --no-deps --python-version 3.12 --only-binary=:all: --target lab isaaclab==3.0.0
    PYTHONPATH=.:lab venv/bin/python tests/data/interop/hdf5/make.py

Other requirements of the three are simulators, which are not run: the game of `tests.interop.logged` takes their place.
Its log, which is the oracle, is not stored here.

robomimic_raw       what robosuite records, after robomimic's `convert_robosuite.py`: states and actions, two masks
robomimic           robomimic's `dataset_states_to_obs.py` of it, with `next_obs`; dones at successes and ends
robomimic_small     the same, compressed, without `next_obs`; dones at successes
d4rl                laid out as D4RL says (nothing in the package writes files); the game's episodes one after another
d4rl.npz            what `d4rl.sequence_dataset` makes of `d4rl` (it drops the cut recording)
robomimic_d4rl      robomimic's `convert_d4rl.py` of `d4rl`
isaaclab            the recorder terms, `EpisodeData` and `HDF5DatasetFileHandler` of Isaac Lab, called in the order of
                    `ManagerBasedRLEnv.step` and `reset`
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np

from tests.interop.logged import PLAYED, Game, play

HERE = Path(__file__).parent
#: The last demo would be the third by its text.
NUMBERS = [0, 1, 2, 3, 4, 10]


def run(module: str, *arguments: str) -> None:
    """Run a script of a package as a user does."""
    with mock.patch.object(sys, "argv", [module, *arguments]):
        runpy.run_module(module, run_name="__main__")


def make_robomimic() -> None:
    raw = HERE / "robomimic_raw.hdf5"
    with h5py.File(raw, "w") as file:
        data = file.create_group("data")
        data.attrs.update(env="Game", env_info=json.dumps({"size": 2}), repository_version="1.0", date="today")
        for number, log in zip(NUMBERS, play(), strict=True):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["model_file"] = "<mujoco/>" if number else "<mujoco>" + 5000 * " " + "</mujoco>"
            demo["states"] = log["state"][:-1].astype(np.float64)
            demo["actions"] = log["action"]
    run("robomimic.scripts.conversion.convert_robosuite", "--dataset", str(raw))

    import robomimic.envs.env_base as env_base
    import robomimic.utils.env_utils as env_utils
    import robomimic.utils.file_utils as file_utils

    class GameEnv(env_base.EnvBase):
        """Plays the game from a state on."""

        def _at(self, episode: int, step: int) -> dict[str, np.ndarray]:
            self._episode, self._step = episode, step
            log = play()[episode - 1]
            self._reward = 0.0 if step == 0 else float(log["reward"][step - 1])
            self._success = step > 0 and bool(log["terminated"][step - 1])
            return {"vector": log["obs"][step], "image": log["image"][step]}

        def reset(self) -> dict[str, np.ndarray]:
            return self._at(1, 0)

        def reset_to(self, state: dict[str, Any]) -> dict[str, np.ndarray]:
            return self._at(*divmod(int(state["states"][0]), 1000))

        def step(self, action: np.ndarray) -> tuple[Any, float, bool, dict]:
            assert action.tolist() == [self._episode, -self._step - 1]
            return self._at(self._episode, self._step + 1), self._reward, False, {}

        def get_reward(self) -> float:
            return self._reward

        def is_success(self) -> dict[str, bool]:
            return {"task": self._success}

        def serialize(self) -> dict[str, Any]:
            return {"env_name": "Game", "type": 1, "env_kwargs": {"size": 2}}

    GameEnv.__abstractmethods__ = frozenset()
    with (
        mock.patch.object(GameEnv, "__init__", lambda self: None),
        mock.patch.object(env_utils, "create_env_for_data_processing", lambda **_: GameEnv()),
    ):
        script = "robomimic.scripts.dataset_states_to_obs"
        run(script, "--dataset", str(raw), "--output_name", "robomimic.hdf5", "--done_mode", "2")
        options = ["--compress", "--exclude-next-obs"]
        run(script, "--dataset", str(raw), "--output_name", "robomimic_small.hdf5", *options)
    file_utils.create_hdf5_filter_key(str(HERE / "robomimic.hdf5"), ["demo_10", "demo_2"], "two")


def make_d4rl() -> None:
    logs = play()
    with h5py.File(HERE / "d4rl.hdf5", "w") as file:
        keys = {"observations": "obs", "actions": "action", "rewards": "reward", "infos/qpos": "state"}
        for path, key in keys.items():
            parts = [log[key][:-1] if key in ("obs", "state") else log[key] for log in logs]
            file[path] = np.concatenate(parts).astype(np.float32)
        file["terminals"] = np.concatenate([log["terminated"] for log in logs])
        file["timeouts"] = np.concatenate([log["truncated"] for log in logs])
        file["metadata/algorithm"] = "SAC"
        file["metadata/iteration"] = 7
        file["metadata/policy/weight"] = np.eye(2)
        file["infos/name"] = np.array(["x"] * len(file["actions"]), "S")

    import d4rl
    import gym
    from d4rl.offline_env import OfflineEnv

    class GameEnv(OfflineEnv):
        """Its files are here."""

        observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
        action_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        _max_episode_steps = 6

        def __init__(self) -> None:
            super().__init__(dataset_url="http://nowhere/d4rl.hdf5")

    d4rl.set_dataset_path(str(HERE))
    found = GameEnv().get_dataset()
    rows = {key: value for key, value in found.items() if not key.startswith("metadata")}
    episodes = list(d4rl.sequence_dataset(GameEnv(), rows))
    keys = ["observations", "actions", "rewards", "terminals", "timeouts", "infos/qpos"]
    np.savez(HERE / "d4rl.npz", **{f"{n}:{k}": e[k] for n, e in enumerate(episodes) for k in keys})

    folder = HERE / "d4rl"
    folder.mkdir()
    os.link(HERE / "d4rl.hdf5", folder / "d4rl.hdf5")
    gym.register("Game-v0", entry_point=GameEnv, disable_env_checker=True, order_enforce=False, max_episode_steps=6)
    try:
        run("robomimic.scripts.conversion.convert_d4rl", "--env", "Game-v0", "--folder", str(HERE))
        os.replace(folder / "converted" / "Game_v0.hdf5", HERE / "robomimic_d4rl.hdf5")
    finally:
        shutil.rmtree(folder)


def import_isaaclab() -> tuple[Any, Any, Any]:
    """`EpisodeData`, the file handler and the module of recorder terms, without the packages around them."""
    import importlib

    [root] = [Path(folder) / "isaaclab" for folder in sys.path if (Path(folder) / "isaaclab").is_dir()]
    for name in ["", "utils", "utils.datasets", "envs", "envs.mdp", "envs.mdp.recorders", "managers"]:
        module = types.ModuleType(f"isaaclab.{name}".rstrip("."))
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[module.__name__] = module
    manager = types.ModuleType("isaaclab.managers.recorder_manager")
    manager.RecorderTerm = type("RecorderTerm", (), {})
    sys.modules[manager.__name__] = manager
    data = importlib.import_module("isaaclab.utils.datasets.episode_data")
    handler = importlib.import_module("isaaclab.utils.datasets.hdf5_dataset_file_handler")
    recorders = importlib.import_module("isaaclab.envs.mdp.recorders.recorders")
    return data.EpisodeData, handler.HDF5DatasetFileHandler, recorders


def make_isaaclab() -> None:
    import torch

    EpisodeData, HDF5DatasetFileHandler, recorders = import_isaaclab()
    game = Game()
    tensor = lambda value: torch.as_tensor(np.asarray(value))[None]  # noqa: E731

    def see(now: dict[str, Any]) -> None:
        policy = {"vector": tensor(now["obs"]), "camera": {"rgb": tensor(now["image"])}}
        env.obs_buf = {"policy": policy}
        pose = torch.cat([tensor(now["state"]).float(), torch.zeros(1, 6)], 1)
        cube = {"count": tensor(now["state"])}
        state = {"articulation": {"robot": {"root_pose": pose}}, "rigid_object": {"cube": cube}}
        env.scene = types.SimpleNamespace(get_state=lambda is_relative: state)

    def add(pair: tuple[str, Any]) -> None:
        episode.add(pair[0], first(pair[1]))

    def export(episode: Any, success: bool = False) -> None:
        episode.success = success
        episode.pre_export()
        handler.write_episode(episode)

    def first(value: Any) -> Any:
        return {key: first(item) for key, item in value.items()} if isinstance(value, dict) else value[0]

    env = types.SimpleNamespace(action_manager=types.SimpleNamespace(active_terms=["arm"]))
    names = [
        "InitialState",
        "PostStepStates",
        "PreStepActions",
        "PreStepFlatPolicyObservations",
        "PostStepProcessedActions",
    ]
    terms = [object.__new__(getattr(recorders, f"{name}Recorder")) for name in names]
    for term in terms:
        term._env = env
    handler = HDF5DatasetFileHandler()
    handler.create(str(HERE / "isaaclab.hdf5"), env_name="Game")
    handler.add_env_args({"sim_args": {"dt": 0.01, "decimation": 2}})
    for number, (length, end) in enumerate(PLAYED):
        episode = EpisodeData()
        see(game.reset())
        add(terms[0].record_post_reset([0]))
        if number == 3:
            # Reset once more: a demo that has the initial state alone.
            export(episode)
            episode = EpisodeData()
            add(terms[0].record_post_reset([0]))
        for _ in range(length):
            action = game.action()
            env.action_manager.action = tensor(action)
            arm = types.SimpleNamespace(processed_actions=tensor(2 * action))
            env.action_manager.get_term = lambda name, arm=arm: arm
            for term in terms:
                if hasattr(term, "record_pre_step"):
                    add(term.record_pre_step())
            see(game.step(action)[0])
            for term in terms:
                if hasattr(term, "record_post_step"):
                    add(term.record_post_step())
        episode.seed = 100 + number
        export(episode, end == "terminated")
    handler.close()


def main() -> None:
    global HERE
    target = HERE / "files.zip"
    with tempfile.TemporaryDirectory() as folder:
        HERE = Path(folder)
        make_robomimic()
        make_d4rl()
        make_isaaclab()
        with zipfile.ZipFile(target, "w") as archive:
            for path in sorted(HERE.iterdir()):
                member = zipfile.ZipInfo(path.name, (1980, 1, 1, 0, 0, 0))
                archive.writestr(member, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main()
