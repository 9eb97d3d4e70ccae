#!/usr/bin/env bash
# TorchRL 0.14.1: MultiStepTransform (in a replay buffer) and MultiStep (behind a collector).
#
# One would guess: an n-step transition that reaches a terminal state is terminal, so that the target is the
# summed reward alone.
#
# What happens: rewards are summed up to the end and the next observation is the terminal one, but the flags stay
# those of the transition's first step. Of the n transitions that end in the terminal state, only the last
# is terminated. The added key "nonterminal" says the same.
#
# Why it hurts: TorchRL's own TD(0) estimator bootstraps from the terminal state in n - 1 of n transitions. That
# state's value is trained nowhere, so whatever the network says there goes into the targets.
# What helps: add a copy of the flag under a name of its own, here ("next", "ended"). It is taken from the last of the
# n steps, as the next observation is. Point the estimator at it with set_keys(terminated="ended").
#
# Seen:
#   MultiStepTransform
#     observation      [0.0, 1.0, 2.0, 3.0, 4.0]
#     next observation [3.0, 4.0, 5.0, 5.0, 5.0]
#     summed reward    [1.75, 1.75, 1.75, 1.5, 1.0]
#     terminated       [0, 0, 0, 0, 1]
#     target           [14.25, 14.25, 14.25, 26.5, 1.0]
#     by the copy      [14.25, 14.25, 1.75, 1.5, 1.0]
#   MultiStep
#     observation      [0.0, 1.0, 2.0, 3.0, 4.0]
#     next observation [3.0, 4.0, 5.0, 5.0, 5.0]
#     summed reward    [1.75, 1.75, 1.75, 1.5, 1.0]
#     terminated       [0, 0, 0, 0, 1]
#     target           [14.25, 14.25, 14.25, 26.5, 1.0]
#     by the copy      [14.25, 14.25, 1.75, 1.5, 1.0]

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchrl==0.14.1 tensordict==0.14.3 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.postprocs import MultiStep
from torchrl.envs.transforms.rb_transforms import MultiStepTransform
from torchrl.objectives.value import TD0Estimator


def episode():
    """Five steps, reward 1 each, the fifth terminates."""
    observation = torch.arange(5.0)[:, None]
    end = torch.tensor([0, 0, 0, 0, 1], dtype=torch.bool)[:, None]
    step = {"observation": observation + 1, "reward": torch.ones(5, 1)}
    step |= {"terminated": end, "done": end.clone(), "truncated": torch.zeros_like(end)}
    step["ended"] = end.clone()
    return TensorDict({"observation": observation, "next": TensorDict(step, [5])}, [5])


class Hundred(torch.nn.Module):
    """A value of 100 everywhere, to make a bootstrap visible."""

    def forward(self, observation):
        return torch.full_like(observation, 100.0)


buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=4)
buffer.append_transform(MultiStepTransform(n_steps=3, gamma=0.5))
buffer.extend(episode())
buffer.extend(episode())  # the transform holds the newest rows back until more come
value = TensorDictModule(Hundred(), ["observation"], ["state_value"])
estimator = TD0Estimator(gamma=0.5, value_network=value)
corrected = TD0Estimator(gamma=0.5, value_network=value)
corrected.set_keys(terminated="ended")
for name, rows in (("MultiStepTransform", buffer[:][:5]), ("MultiStep", MultiStep(0.5, 3)(episode()[None])[0])):
    target = estimator.value_estimate(rows.clone()).flatten().tolist()
    right = corrected.value_estimate(rows.clone()).flatten().tolist()
    print(name)
    print("  observation     ", rows["observation"].flatten().tolist())
    print("  next observation", rows["next", "observation"].flatten().tolist())
    print("  summed reward   ", rows["next", "reward"].flatten().tolist())
    print("  terminated      ", rows["next", "terminated"].int().flatten().tolist())
    print("  target          ", target)
    print("  by the copy     ", right)
    assert rows["next", "observation"].flatten().tolist() == [3, 4, 5, 5, 5]
    assert rows["next", "terminated"].flatten().tolist() == [False, False, False, False, True]
    assert target == [14.25, 14.25, 14.25, 26.5, 1.0]
    assert right == [14.25, 14.25, 1.75, 1.5, 1.0]
PY
cd "$dir"
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" see.py
