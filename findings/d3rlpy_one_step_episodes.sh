#!/usr/bin/env bash
# d3rlpy 2.8.1: episodes of one step that are recorded into a ReplayBuffer (`append`, `clip_episode`, as `fit_online` and
# `collect` do).
#
# One would guess: an episode that ends after its first step is an episode of one transition, with a terminal flag if it
# was terminated.
#
# What happens: `clip_episode` does nothing for it. Its step becomes the first of the next episode. Two such episodes in
# a row make one of two steps, whose first is not terminal and has the other episode's observation as its next one. An
# episode of one step at the end is not in the buffer.
#
# Why it hurts: values are bootstrapped from an observation of another episode instead of ending: in contextual bandits
# for every second step, and wherever an episode can fail at once. Numbers of transitions and shapes look right.
# What helps: build `Episode(observations, actions, rewards, terminated=True)` by hand and give it to `append_episode`.
#
# Seen: observations are (episode, step), four episodes of 3, 1, 1 and 2 steps, all terminated:
#   stored     [[0, 0], [0, 1], [0, 2]] terminated
#   stored     [[1, 0], [2, 0]] terminated
#   stored     [[3, 0], [3, 1]] terminated
#   transition [1, 0] -> [2, 0] terminal 0.0

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet d3rlpy==2.8.1
cat > "$dir/see.py" <<'PY'
import numpy as np
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import BasicTransitionPicker, InfiniteBuffer, ReplayBuffer, Signature

buffer = ReplayBuffer(
    InfiniteBuffer(),
    observation_signature=Signature([np.dtype(np.float32)], [(2,)]),
    action_signature=Signature([np.dtype(np.int32)], [(1,)]),
    reward_signature=Signature([np.dtype(np.float32)], [(1,)]),
    action_space=ActionSpace.DISCRETE,
    action_size=2,
)
for episode, length in enumerate((3, 1, 1, 2)):
    for step in range(length):
        buffer.append(np.array([episode, step], np.float32), 0, 1.0)
    buffer.clip_episode(True)

stored = [(found.observations.astype(int).tolist(), bool(found.terminated)) for found in buffer.episodes]
for observations, terminated in stored:
    print("stored    ", observations, "terminated" if terminated else "not terminated")
transition = BasicTransitionPicker()(buffer.episodes[1], 0)
now, after = (value.astype(int).tolist() for value in (transition.observation, transition.next_observation))
print("transition", now, "->", after, "terminal", transition.terminal)
assert stored == [
    ([[0, 0], [0, 1], [0, 2]], True),
    ([[1, 0], [2, 0]], True),
    ([[3, 0], [3, 1]], True),
]
assert (now, after, transition.terminal) == ([1, 0], [2, 0], 0.0)
PY
cd "$dir"
"$dir/venv/bin/python" see.py 2>/dev/null
