#!/usr/bin/env bash
# D4RL 1.1: episodes of files that have no `timeouts`, and rows that are terminal at the time limit.
#
# One would guess: where a file has no `timeouts`, an episode ends after `_max_episode_steps` rows; a row with
# `terminals` is in the data of Q-learning, whatever else is true of it.
#
# What happens: behind an end, the count of steps begins at 1, not 0. `sequence_dataset` cuts every episode but the
# first one row short, so that the following ones mix rows of two. `qlearning_dataset` does so behind a terminal: the
# last but one row of the next episode is dropped, and its last row becomes a transition to the first observation of
# another episode, not done. With `timeouts`, a row that is terminal and timeout is dropped: its reward is never seen.
#
# Why it hurts: sequences mix two episodes, values are bootstrapped from a state that the action did not lead to, and
# a goal reached at the limit is lost. Shapes are right, so training runs.
# What helps: count the rows of each episode from 0, and write `timeouts` into the file.
#
# Seen (observations are 100 * episode + step; the limit is 3):
#   sequences, no timeouts   [[0, 1, 2], [100, 101], [102, 200], [201, 202]]
#   Q-learning, no timeouts  (0, 1) (1, 100 done) (100, 101) (102, 200) (200, 201)
#   Q-learning, both flags   (0, 1) (1, 2) (100, 101) (101, 102)

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet numpy==1.26.4 h5py==3.16.0 gym==0.26.2 tqdm==4.70.1
# Its other requirements are simulators, which are not run here.
"$dir/venv/bin/pip" install --quiet --no-deps d4rl==1.1
cat > "$dir/see.py" <<'PY'
from types import SimpleNamespace

import d4rl
import numpy as np

LIMIT = SimpleNamespace(_max_episode_steps=3)


def recorded(lengths, terminal, timeout=()):
    """Episodes one after the other; `terminal` and `timeout` are those that end so."""
    rows = [(e, s, s == n - 1) for e, n in enumerate(lengths) for s in range(n)]
    flags = {"terminals": terminal} | ({"timeouts": timeout} if timeout else {})
    return {
        "observations": np.array([[100 * e + s] for e, s, _ in rows], np.float32),
        "actions": np.zeros((len(rows), 1), np.float32),
        "rewards": np.zeros(len(rows), np.float32),
        **{name: np.array([last and e in ends for e, _, last in rows]) for name, ends in flags.items()},
    }


def transitions(dataset):
    """(observation, next observation, done) for Q-learning."""
    found = d4rl.qlearning_dataset(LIMIT, dataset)
    keys = "observations", "next_observations"
    return [(*(int(found[k][n, 0]) for k in keys), bool(found["terminals"][n])) for n in range(len(found["rewards"]))]


episodes = d4rl.sequence_dataset(LIMIT, recorded([3, 3, 3], terminal=[]))
sequences = [episode["observations"][:, 0].astype(int).tolist() for episode in episodes]
print("sequences, no timeouts  ", sequences)
behind_a_terminal = transitions(recorded([2, 3, 3], terminal=[0]))
print("Q-learning, no timeouts ", *(f"({a}, {b}{' done' * done})" for a, b, done in behind_a_terminal))
both = transitions(recorded([3, 3], terminal=[0], timeout=[0, 1]))
print("Q-learning, both flags  ", *(f"({a}, {b}{' done' * done})" for a, b, done in both))

assert sequences == [[0, 1, 2], [100, 101], [102, 200], [201, 202]]
# (101, 102) is missing, and 102 does not lead to 200.
assert behind_a_terminal == [(0, 1, False), (1, 100, True), (100, 101, False), (102, 200, False), (200, 201, False)]
# The transition from 2, which reached the terminal, is missing.
assert both == [(0, 1, False), (1, 2, False), (100, 101, False), (101, 102, False)]
PY
cd "$dir"
D4RL_SUPPRESS_IMPORT_ERROR=1 D4RL_DATASET_DIR="$dir/data" "$dir/venv/bin/python" -W ignore see.py
