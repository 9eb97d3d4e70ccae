#!/usr/bin/env bash
# TorchRL 0.14.1: rollout(break_when_all_done=True) over several environments.
#
# One would guess: an environment that has ended adds nothing while the others go on. Its rewards add up to its return,
# and what follows its end is marked, or zero.
#
# What happens: its last row is repeated until all have ended, with the reward, and with next/done. No key marks the
# copies; `is_init` of InitTracker and `step_count` of StepCounter are copied, too.
#
# Why it hurts: the sum of rewards, as evaluation computes it, counts the last reward again and again: the shorter the
# episode, the more. Split at next/done, as split_trajectories does it, each copy is an episode of one step that was
# never played.
# What helps: drop the rows behind the first next/done of each environment.
#
# Seen, CartPole, a reward of 1 for each step, ended after 2 and after 5 steps:
#   steps played          [2, 5]
#   sum of rewards        [5.0, 5.0]
#   next/done             [[0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
#   split_trajectories    5 trajectories, of [2, 1, 1, 1, 5] steps

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchrl==0.14.1 tensordict==0.14.3 "gymnasium[classic-control]==1.4.0" numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import torch
from torchrl.collectors.utils import split_trajectories
from torchrl.envs import Compose, GymEnv, InitTracker, SerialEnv, StepCounter, TransformedEnv


def make(max_steps):
    return TransformedEnv(GymEnv("CartPole-v1"), Compose(InitTracker(), StepCounter(max_steps)))


if __name__ == "__main__":
    torch.manual_seed(0)
    envs = SerialEnv(2, [lambda: make(2), lambda: make(5)])
    rollout = envs.rollout(20, break_when_any_done=False, break_when_all_done=True)
    played = rollout["next", "step_count"].amax((1, 2)).tolist()
    returns = rollout["next", "reward"].sum((1, 2)).tolist()
    done = rollout["next", "done"].squeeze(-1).int().tolist()
    pieces = split_trajectories(rollout, done_key="done")["mask"].sum(-1).tolist()
    print("steps played         ", played)
    print("sum of rewards       ", returns)
    print("next/done            ", done)
    print(f"split_trajectories    {len(pieces)} trajectories, of {pieces} steps")
    copies = rollout[0, 2:]
    assert (copies == rollout[0, 1].expand(3)).all() and set(rollout.keys()) == set(rollout[0, 1].keys())
    assert played == [2, 5] and returns == [5.0, 5.0]
    assert pieces == [2, 1, 1, 1, 5]
PY
cd "$dir"
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" -W ignore see.py
