#!/usr/bin/env bash
# RLlib (Ray) 2.60.0: store_buffer_in_checkpoints=True.
#
# One would guess: the checkpoint contains the replay buffer, and an algorithm restored from it has its rows. The
# option's documentation says so, and promises a warning if a checkpoint without buffer data is restored.
#
# What happens: the default API stack does not read the option. The checkpoint has no buffer and the restored algorithm
# starts with an empty one, after save_to_path as after save. There is no warning.
#
# Why it hurts: after each preemption, an off-policy run has a trained policy and no experience. It continues to train
# on the few rows that come first. What was collected before is gone with the process.
# What helps: pickle algo.local_replay_buffer.get_state() beside the checkpoint, and pass it to set_state of the
# restored buffer while that is empty (a buffer with episodes keeps its own).
#
# Seen, rows in the buffer:
#   saved              3000
#   from_checkpoint    0
#   restore_from_path  0
#   save, restore      0
#   set_state          3000

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet "ray[rllib]==2.60.0" gymnasium==1.2.2 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import pickle
import sys

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.dqn import DQNConfig

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=f"{sys.argv[1]}/ray")
config = DQNConfig().environment("CartPole-v1").env_runners(num_env_runners=0)
config.training(store_buffer_in_checkpoints=True, num_steps_sampled_before_learning_starts=1_000_000)
saved = config.build_algo()
for _ in range(3):
    saved.train()
path = saved.save_to_path(f"{sys.argv[1]}/checkpoint")
by_path, by_save = config.build_algo(), config.build_algo()
by_path.restore_from_path(path)
by_save.restore(saved.save(f"{sys.argv[1]}/save"))
algorithms = {
    "saved": saved,
    "from_checkpoint": Algorithm.from_checkpoint(path),
    "restore_from_path": by_path,
    "save, restore": by_save,
}
seen = {name: algorithm.local_replay_buffer.get_num_timesteps() for name, algorithm in algorithms.items()}
state = pickle.dumps(saved.local_replay_buffer.get_state())
by_path.local_replay_buffer.set_state(pickle.loads(state))
seen["set_state"] = by_path.local_replay_buffer.get_num_timesteps()
for name, num_rows in seen.items():
    print(f"{name:18} {num_rows}")
assert algorithms["from_checkpoint"].config.store_buffer_in_checkpoints
assert seen["saved"] == seen["set_state"] > 0
assert seen["from_checkpoint"] == seen["restore_from_path"] == seen["save, restore"] == 0
PY
cd "$dir"
RAY_USAGE_STATS_ENABLED=0 "$dir/venv/bin/python" -W ignore see.py "$dir" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
