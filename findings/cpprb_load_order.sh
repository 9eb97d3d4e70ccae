#!/usr/bin/env bash
# cpprb 11.0.0: what a buffer overwrites after load_transitions, if it was full when it was saved.
#
# One would guess: a loaded buffer continues where the saved one stopped, so that new rows replace the oldest.
#
# What happens: rows are saved in the order of their slots, and the position of the next write is not saved. A full
# buffer that was loaded continues at slot 0. If the saved buffer had already wrapped around, its newest rows are there.
#
# Why it hurts: a resumed run first overwrites its newest rows, which its best policy collected, and keeps rows that
# should have been replaced long ago. With a million rows it takes up to a million steps until the oldest are gone.
# What helps: sort the rows by age before they are saved, as below.
#
# Seen, rows in a buffer of 20 that got 26 rows one by one, and then 6 more:
#   never saved     12 to 31
#   saved, loaded   6 to 19 and 26 to 31
#   saved in order  12 to 31

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet cpprb==11.0.0 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import cpprb
import numpy as np


def make():
    return cpprb.ReplayBuffer(20, {"row": {"dtype": np.int64}})


def add(buffer, numbers):
    for number in numbers:
        buffer.add(row=number)


def runs(buffer):
    """The numbers of the rows, as first and last of each run."""
    rows = np.sort(buffer.get_all_transitions()["row"].ravel())
    parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return [(int(part[0]), int(part[-1])) for part in parts]


kept = make()
add(kept, range(26))
kept.save_transitions("file.npz")
loaded, ordered = make(), make()
loaded.load_transitions("file.npz")
rows = {name: np.roll(values, -kept.get_next_index(), axis=0) for name, values in kept.get_all_transitions().items()}
in_order = make()
in_order.add(**rows)
in_order.save_transitions("ordered.npz")
ordered.load_transitions("ordered.npz")
assert runs(kept) == runs(loaded) == runs(ordered) == [(6, 25)]
seen = {}
for name, buffer in (("never saved", kept), ("saved, loaded", loaded), ("saved in order", ordered)):
    add(buffer, range(26, 32))
    seen[name] = runs(buffer)
    print(f"{name:15}", " and ".join(f"{first} to {last}" for first, last in seen[name]))
assert seen["never saved"] == seen["saved in order"] == [(12, 31)]
assert seen["saved, loaded"] == [(6, 19), (26, 31)]
PY
cd "$dir"
"$dir/venv/bin/python" see.py
