#!/usr/bin/env bash
# LeRobot 0.6.1: StreamingLeRobotDataset and the choice of episodes.
#
# One would guess: `episodes=[1]` streams episode 1 alone, as LeRobotDataset reads it alone. Its docstring says so: "this
# will only load episodes specified by their episode_index in this list".
#
# What happens: the argument is kept and never looked at. All episodes come, without a warning, and `num_frames` and
# `num_episodes` count them all.
#
# Why it hurts: episodes that were held out are trained on, and an evaluation on them looks as good as training does.
# Episodes that were left out because they had failed are imitated.
# What helps: skip items by `item["episode_index"]`, or do not stream.
#
# Seen:
#   LeRobotDataset           episodes=[1] brings [1], 7 frames
#   StreamingLeRobotDataset  episodes=[1] brings [0, 1, 2], 16 frames

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.12 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet "lerobot[dataset]==0.6.1" torch==2.11.0 datasets==4.8.5 numpy==2.2.6
cat > "$dir/see.py" <<'PY'
import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset

root = sys.argv[1]
features = {"action": {"dtype": "float32", "shape": (2,), "names": None}}
written = LeRobotDataset.create("local/three", 10, features, root=root)
for episode, length in enumerate((5, 7, 4)):
    for frame in range(length):
        written.add_frame({"action": np.array([episode, frame], np.float32), "task": "none"})
    written.save_episode()
written.finalize()

plain = LeRobotDataset("local/three", root=root, episodes=[1])
streamed = StreamingLeRobotDataset("local/three", root=root, episodes=[1])
items = {"LeRobotDataset": [plain[i] for i in range(len(plain))], "StreamingLeRobotDataset": list(streamed)}
found = {name: (sorted({int(item["episode_index"]) for item in rows}), len(rows)) for name, rows in items.items()}
for name, (episodes, num_frames) in found.items():
    print(f"{name:24} episodes=[1] brings {episodes}, {num_frames} frames")
assert found == {"LeRobotDataset": ([1], 7), "StreamingLeRobotDataset": ([0, 1, 2], 16)}
assert (streamed.num_episodes, streamed.num_frames) == (3, 16)
PY
HF_HUB_OFFLINE=1 HF_HOME="$dir/cache" "$dir/venv/bin/python" "$dir/see.py" "$dir/three" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
