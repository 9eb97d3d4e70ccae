#!/usr/bin/env bash
# LeRobot 0.6.1: an episode of one frame, in a dataset with a feature that is a matrix.
#
# One would guess: an episode of one frame is saved as any other. A dataset of vectors takes it; so does one with a
# matrix, if all of its episodes have one frame.
#
# What happens: `save_episode` of the short episode raises ValueError, because the statistics of a (2, 3) matrix have the
# shape (2, 3) for one frame and (3,) for more. By then its rows are written and counted in meta/info.json. From there
# on, `finalize` raises ArrowInvalid, and what it had to write is lost: meta/episodes of the episodes before.
#
# Why it hurts: a recording in which one episode ends at once cannot be loaded, the whole episodes before it included,
# and nothing that can be called afterwards saves it.
# What helps: store matrices as vectors, flattened; or do not save episodes of one frame.
#
# Seen, for episodes of 3, 4 and 1 frames:
#   vector (6,)
#     info.json counts 3
#     loaded: 3 episodes, 8 frames
#   matrix (2, 3)
#     save_episode: ValueError: all input arrays must have the same shape
#     finalize: ArrowInvalid
#     info.json counts 3
#     not loaded

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.12 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet "lerobot[dataset]==0.6.1" torch==2.11.0 datasets==4.8.5 numpy==2.2.6
cat > "$dir/see.py" <<'PY'
import json
import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def see(shape):
    """What happened to episodes of 3, 4 and 1 frames, each with one feature of a shape."""
    root = f"{sys.argv[1]}/{len(shape)}"
    features = {"action": {"dtype": "float32", "shape": shape, "names": None}}
    written = LeRobotDataset.create("local/grids", 10, features, root=root)
    found = []
    for length in (3, 4, 1):
        for frame in range(length):
            written.add_frame({"action": np.full(shape, frame, np.float32), "task": "none"})
        try:
            written.save_episode()
        except ValueError as error:
            found.append(f"save_episode: {type(error).__name__}: {error}")
    try:
        written.finalize()
    except Exception as error:
        found.append(f"finalize: {type(error).__name__}")
    with open(f"{root}/meta/info.json") as file:
        found.append(f"info.json counts {json.load(file)['total_episodes']}")
    try:
        read = LeRobotDataset("local/grids", root=root)
        found.append(f"loaded: {read.num_episodes} episodes, {len(read)} frames")
    except Exception:
        found.append("not loaded")
    return found


vector, matrix = see((6,)), see((2, 3))
print("vector (6,)", *vector, sep="\n  ")
print("matrix (2, 3)", *matrix, sep="\n  ")
assert vector == ["info.json counts 3", "loaded: 3 episodes, 8 frames"]
assert matrix == [
    "save_episode: ValueError: all input arrays must have the same shape",
    "finalize: ArrowInvalid",
    "info.json counts 3",
    "not loaded",
]
PY
HF_HUB_OFFLINE=1 HF_HOME="$dir/cache" "$dir/venv/bin/python" "$dir/see.py" "$dir/data" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
