#!/usr/bin/env bash
# PyAV 18.1.0 with the encoder SVT-AV1 that it brings, as root (in most containers, that is): who is real-time afterwards.
#
# One would guess: encoding a frame leaves the process as it was.
#
# What happens: with the first frame, the thread that calls the encoder gets the scheduling policy SCHED_FIFO at priority
# 99, and keeps it when the encoder is closed. Processes that it starts later inherit it. Nothing is said.
#
# Why it hurts: whoever records frames as video (LeRobot encodes by libsvtav1) and trains in the same process has DataLoader
# workers, environments and threads that ordinary processes cannot interrupt. Two that compute without end stop everything
# else on two processors, a test suite or a container's own health check included.
# What helps: `os.sched_setscheduler(0, policy, parameters)` with what they were before, behind each first frame; encoding in
# a process of its own; not being root, without CAP_SYS_NICE.
#
# Seen (SCHED_OTHER is 0, SCHED_FIFO is 1):
#   before            policy 0, priority 0
#   after a frame     policy 1, priority 99
#   after closing     policy 1, priority 99
#   a child           policy 1, priority 99

set -eu
[ "$(id -u)" = 0 ] || { echo "Run it as root, in a container for example."; exit 1; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import io
import os
import subprocess
import sys

import av
import numpy as np

CHILD = "import os; print(os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)"


def see():
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


found = {"before": see()}
with av.open(io.BytesIO(), "w", format="mp4") as file:
    stream = file.add_stream("libsvtav1", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
    file.mux(stream.encode(frame))
    found["after a frame"] = see()
    file.mux(stream.encode(None))
found["after closing"] = see()
found["a child"] = tuple(map(int, subprocess.check_output([sys.executable, "-c", CHILD]).split()))
for name, (policy, priority) in found.items():
    print(f"{name:16}  policy {policy}, priority {priority}")
assert [*found.values()] == [(0, 0), (1, 99), (1, 99), (1, 99)]
PY
"$dir/venv/bin/python" "$dir/see.py" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
