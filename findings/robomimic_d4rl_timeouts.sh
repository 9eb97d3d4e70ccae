#!/usr/bin/env bash
# robomimic 0.3.0: `convert_d4rl.py`, the script that makes robomimic's datasets of D4RL's.
#
# One would guess: `dones` of the converted file are D4RL's `terminals`, and the last next observation of an episode
# that a timeout ends is left out, or is D4RL's.
#
# What happens: `dones` is 1 at timeouts, too, and the last row of `next_obs` is a copy of the last observation, also
# where the file has `next_observations`. Rows behind the last flag are left out.
#
# Why it hurts: robomimic's TD3-BC and IQL take `dones` for the end of the return (target: reward + (1 - done) *
# discount * value). In a task that never terminates, such as HalfCheetah, every time limit is learned as a death.
# What helps: write `terminals` as `dones`, and give the last transition of a timeout its true next observation, or
# leave it out.
#
# Seen (observations are 100 * episode + step; the first episode terminates, the second times out):
#   terminals  [0, 0, 1] [0, 0, 0]
#   dones      [0, 0, 1] [0, 0, 1]
#   next_obs   [1, 2, 2] [101, 102, 102]

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet numpy==1.26.4 h5py==3.16.0 gym==0.26.2 tqdm==4.70.1 termcolor==3.3.0
# Their other requirements are simulators and what draws figures, which are not needed here.
"$dir/venv/bin/pip" install --quiet --no-deps d4rl==1.1 robomimic==0.3.0
cat > "$dir/see.py" <<'PY'
import runpy
import sys
from pathlib import Path

import gym
import h5py
import numpy as np
from d4rl.offline_env import OfflineEnv


class Task(OfflineEnv):
    """A task whose dataset is in the folder, under the name that its address ends with."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))

    def __init__(self):
        super().__init__(dataset_url="http://example.org/task.hdf5")


folder = Path("d4rl")
folder.mkdir()
with h5py.File(folder / "task.hdf5", "w") as file:
    file["observations"] = np.array([[0], [1], [2], [100], [101], [102], [200]], np.float32)
    file["next_observations"] = np.array([[1], [2], [3], [101], [102], [103], [201]], np.float32)
    file["actions"] = np.zeros((7, 1), np.float32)
    file["rewards"] = np.zeros(7, np.float32)
    file["terminals"] = np.array([0, 0, 1, 0, 0, 0, 0], bool)
    file["timeouts"] = np.array([0, 0, 0, 0, 0, 1, 0], bool)

gym.register("Task-v0", entry_point=Task, max_episode_steps=3, disable_env_checker=True, order_enforce=False)
sys.argv = ["convert_d4rl.py", "--env", "Task-v0", "--folder", "."]
runpy.run_module("robomimic.scripts.conversion.convert_d4rl", run_name="__main__")

with h5py.File(folder / "converted" / "Task_v0.hdf5") as file:
    demos = [file[f"data/demo_{n}"] for n in range(len(file["data"]))]
    dones = [demo["dones"][()].tolist() for demo in demos]
    following = [demo["next_obs/flat"][:, 0].astype(int).tolist() for demo in demos]
print("terminals ", [0, 0, 1], [0, 0, 0])
print("dones     ", *dones)
print("next_obs  ", *following)
assert dones == [[0, 0, 1], [0, 0, 1]]
assert following == [[1, 2, 2], [101, 102, 102]]
PY
cd "$dir"
D4RL_SUPPRESS_IMPORT_ERROR=1 D4RL_DATASET_DIR="$dir/data" "$dir/venv/bin/python" -W ignore see.py
