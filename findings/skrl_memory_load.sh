#!/usr/bin/env bash
# skrl 2.1.1: Memory.save and Memory.load.
#
# One would guess: a memory that was loaded holds the rows that were saved, and samples them.
#
# What happens: load puts the tensors into attributes (`_tensor_states`) that nothing else reads. Sampling goes on with
# the tensors that were there before. The file does not hold the number of rows either, so the memory is as empty or as
# full as it was. There is no error and no warning.
#
# Why it hurts: a resumed run seems to continue with its experience. A new memory has no rows: sample returns empty
# batches, and the mean of a loss over them is NaN. A memory that was warmed up before load trains on the warm-up only.
# What helps: set_tensor_by_name(name, torch.load(path)[name]) for each tensor. Save memory_index and filled elsewhere,
# and set them too.
#
# Seen:
#   saved                len  8 states [0.0, 1.0, 2.0, 3.0]
#   loaded, pt           len  0 states []
#   loaded, npz          len  0 states []
#   loaded over other    len 12 states [-6.0, -5.0, -4.0, -3.0, -2.0, -1.0]
#   set_tensor_by_name   len  8 states [0.0, 1.0, 2.0, 3.0]

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet skrl==2.1.1 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import glob
import sys

import torch
from skrl.memories.torch import RandomMemory


def memory(*states):
    """Room for 6 steps of 2 environments; both environments have these states."""
    made = RandomMemory(memory_size=6, num_envs=2, device="cpu")
    made.create_tensor("states", size=1)
    for state in states:
        made.add_samples(states=torch.full((2, 1), float(state)))
    return made


def load(target, kind):
    saved.save(sys.argv[1], format=kind)
    (path,) = glob.glob(f"{sys.argv[1]}/memories/*.{kind}")
    target.load(path)
    return target


saved = memory(0, 1, 2, 3)
seen = {"saved": saved, "loaded, pt": load(memory(), "pt"), "loaded, npz": load(memory(), "npz")}
(path,) = glob.glob(f"{sys.argv[1]}/memories/*.pt")
seen["loaded over other"] = memory(-1, -2, -3, -4, -5, -6)
seen["loaded over other"].load(path)
seen["set_tensor_by_name"] = memory()
seen["set_tensor_by_name"].set_tensor_by_name("states", torch.load(path)["states"])
seen["set_tensor_by_name"].memory_index, seen["set_tensor_by_name"].filled = 4, False
for name, found in seen.items():
    ((states,),) = found.sample(["states"], batch_size=100)
    seen[name] = len(found), sorted(set(states.flatten().tolist()))
    print(f"{name:20} len {seen[name][0]:2} states {seen[name][1]}")
assert seen["saved"] == seen["set_tensor_by_name"] == (8, [0, 1, 2, 3])
assert seen["loaded, pt"] == seen["loaded, npz"] == (0, [])
assert seen["loaded over other"] == (12, [-6, -5, -4, -3, -2, -1])
PY
"$dir/venv/bin/python" "$dir/see.py" "$dir" 2>"$dir/log" || { cat "$dir/log"; exit 1; }
