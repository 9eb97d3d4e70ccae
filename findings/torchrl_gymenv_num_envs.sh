#!/usr/bin/env bash
# TorchRL 0.14.1 with Gymnasium 1.4.0: GymEnv(name, num_envs=N).
#
# One would guess: the same transitions as from N single environments. The last row of an episode has the
# final observation as its next observation, and the row after it starts from a reset.
#
# What happens: the next observation of every last row is zeros. Unless all environments end together, the episode
# is followed by a row that is not a step: from the final to the reset observation, reward 0, no flag.
# GymEnv makes an AsyncVectorEnv in Gymnasium's default mode, NEXT_STEP, and treats it as SAME_STEP. GymWrapper
# raises for a vector environment in that mode; GymEnv does not check.
#
# Why it hurts: at a time limit, targets bootstrap from an observation of zeros. A dynamics model learns that episodes
# end in zeros and that a fallen pole jumps upright. Nothing warns.
# What helps: GymWrapper around make_vec(..., vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}).
#
# Seen:
#   GymWrapper, SAME_STEP: 36 ends, 0 with a next observation of zeros, 0 rows that are no step
#   GymEnv, num_envs=4: 30 ends, 30 with a next observation of zeros, 29 rows that are no step
#   row 19: pole angle +0.187 -> +0.202, reward 1, done False
#   row 20: pole angle +0.202 -> +0.000, reward 1, done True
#   row 21: pole angle +0.213 -> +0.032, reward 0, done False
#   row 22: pole angle +0.032 -> +0.031, reward 1, done False

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchrl==0.14.1 tensordict==0.14.3 numpy==2.4.6 gymnasium==1.4.0
cat > "$dir/see.py" <<'PY'
import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode
from torchrl.envs import GymEnv, GymWrapper


def count(env):
    """Step at random; CartPole's reward is 1 on every real step."""
    torch.manual_seed(0)
    env.set_seed(0)
    rows = env.rollout(200, break_when_any_done=False)
    env.close()
    ends = rows["next", "done"].squeeze(-1)
    zero_next = (rows["next", "observation"][ends] == 0).all(-1)
    no_step = rows["next", "reward"].squeeze(-1) == 0
    return rows, int(ends.sum()), int(zero_next.sum()), int(no_step.sum())


if __name__ == "__main__":
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    wrapped = GymWrapper(gym.make_vec("CartPole-v1", num_envs=4, vectorization_mode="sync", vector_kwargs=same_step))
    seen = {}
    for name, env in (("GymWrapper, SAME_STEP", wrapped), ("GymEnv, num_envs=4", GymEnv("CartPole-v1", num_envs=4))):
        rows, ends, zero_next, no_step = seen[name] = count(env)
        print(f"{name}: {ends} ends, {zero_next} with a next observation of zeros, {no_step} rows that are no step")

    end = int(rows["next", "done"][0].squeeze(-1).nonzero()[0])
    for t in range(end - 1, end + 3):
        row = rows[0, t]
        angles = f"{row['observation'][2]:+.3f} -> {row['next', 'observation'][2]:+.3f}"
        reward, done = row["next", "reward"].item(), row["next", "done"].item()
        print(f"row {t}: pole angle {angles}, reward {reward:.0f}, done {done}")

    _, ends, zero_next, no_step = seen["GymWrapper, SAME_STEP"]
    assert ends > 0 and zero_next == 0 and no_step == 0
    _, ends, zero_next, no_step = seen["GymEnv, num_envs=4"]
    assert zero_next == ends > 0 and no_step > 0
PY
cd "$dir"
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" see.py
