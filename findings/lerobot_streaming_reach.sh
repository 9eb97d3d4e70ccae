#!/usr/bin/env bash
# LeRobot 0.6.1: delta_timestamps of a StreamingLeRobotDataset.
#
# One would guess: they read the rows that they read in a LeRobotDataset: those of the episode, and beyond its ends the
# nearest row, with `<field>_is_pad` set.
#
# What happens: a stream looks 99 frames back and 100 ahead, whatever was asked for. A frame further off is replaced by
# the last of the asked-for frames that was found, and called padding, in the middle of an episode too. Nothing is said.
# Where deltas skip frames, padding at an episode's ends is another row than a LeRobotDataset's, too.
#
# Why it hurts: at 50 frames a second an action chunk may reach two seconds. The rest is one action, repeated. A loss that
# leaves out padding never trains it; one that does not, such as the diffusion policy's by default, trains it wrongly.
# What helps: deltas within 99 frames, or no streaming.
#
# Seen, at frame 110 of an episode of 230 frames, deltas in frames:
#   deltas            -110  -100   -99     0   100   101   110
#   LeRobotDataset       0    10    11   110   210   211   220
#   is_pad               0     0     0     0     0     0     0
#   streamed            11    11    11   110   210   210   210
#   is_pad               1     1     0     0     0     1     1
# At frame 1 of an episode of 5 frames, deltas 0, 2, 4: LeRobotDataset 1, 3, 4, streamed 1, 3, 3.

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

FPS = 10


def see(length, frame, deltas):
    """What both read at a frame of an episode of so many: (frames, is_pad) of each."""
    root = f"{sys.argv[1]}/{length}"
    features = {"action": {"dtype": "float32", "shape": (2,), "names": None}}
    written = LeRobotDataset.create("local/one", FPS, features, root=root)
    for i in range(length):
        written.add_frame({"action": np.array([i, 0], np.float32), "task": "none"})
    written.save_episode()
    written.finalize()
    seconds = {"action": [delta / FPS for delta in deltas]}
    plain = LeRobotDataset("local/one", root=root, delta_timestamps=seconds)[frame]
    stream = StreamingLeRobotDataset("local/one", root=root, delta_timestamps=seconds)
    streamed = next(item for item in stream if int(item["frame_index"]) == frame)
    return [([int(v) for v in item["action"][:, 0]], item["action_is_pad"].int().tolist()) for item in (plain, streamed)]


deltas = [-110, -100, -99, 0, 100, 101, 110]
found = see(230, 110, deltas)
print("deltas        ", "".join(f"{value:6}" for value in deltas))
for name, (frames, is_pad) in zip(("LeRobotDataset", "streamed"), found, strict=True):
    print(f"{name:14} " + "".join(f"{value:6}" for value in frames))
    print(f"{'is_pad':14} " + "".join(f"{value:6}" for value in is_pad))
assert found[0] == ([0, 10, 11, 110, 210, 211, 220], [0] * 7)
assert found[1] == ([11, 11, 11, 110, 210, 210, 210], [1, 1, 0, 0, 0, 1, 1])
plain, streamed = see(5, 1, [0, 2, 4])
print("At frame 1 of an episode of 5 frames, deltas 0, 2, 4:", plain, streamed)
assert plain == ([1, 3, 4], [0, 0, 1]) and streamed == ([1, 3, 3], [0, 0, 1])
PY
HF_HUB_OFFLINE=1 HF_HOME="$dir/cache" "$dir/venv/bin/python" "$dir/see.py" "$dir/data" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
