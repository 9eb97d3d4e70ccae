#!/usr/bin/env bash
# TorchRL 0.14.1 and tensordict 0.14.3: strings in a LazyMemmapStorage, and after dumps and loads.
#
# One would guess: a string stored beside the rows (a task, an instruction) stays with its rows, as it does
# in a LazyTensorStorage.
#
# What happens: every row has the first string that was added: in a LazyMemmapStorage always, in a LazyTensorStorage
# after dumps and loads. Tensors are right.
#
# Why it hurts: a policy conditioned on the task is trained with the same task for every row. Shapes and types are
# right, so training runs. Moving a working buffer to disk, or resuming from a saved one, is enough.
# What helps: store an integer id, and keep the list of strings elsewhere.
#
# Seen:
#   LazyTensorStorage  [0, 0, 1, 1, 2, 2] ['pick', 'pick', 'place', 'place', 'push', 'push']
#   LazyMemmapStorage  [0, 0, 1, 1, 2, 2] ['pick', 'pick', 'pick', 'pick', 'pick', 'pick']
#   dumps, loads       [0, 0, 1, 1, 2, 2] ['pick', 'pick', 'pick', 'pick', 'pick', 'pick']

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchrl==0.14.1 tensordict==0.14.3 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import tempfile

import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer


def fill(storage):
    """Add two rows for each of three tasks."""
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=2)
    for number, task in enumerate(["pick", "place", "push"]):
        rows = TensorDict({"number": torch.full((2,), number)}, [2])
        rows["task"] = task
        buffer.extend(rows)
    return buffer


in_memory = fill(LazyTensorStorage(6))
on_disk = fill(LazyMemmapStorage(6))
loaded = TensorDictReplayBuffer(storage=LazyTensorStorage(6), batch_size=2)
with tempfile.TemporaryDirectory() as path:
    in_memory.dumps(path)
    loaded.loads(path)

seen = {}
for name, buffer in (("LazyTensorStorage", in_memory), ("LazyMemmapStorage", on_disk), ("dumps, loads", loaded)):
    rows = buffer[:]
    seen[name] = list(rows["task"])
    print(f"{name:18}", rows["number"].tolist(), seen[name])
    assert rows["number"].tolist() == [0, 0, 1, 1, 2, 2]
assert seen["LazyTensorStorage"] == ["pick", "pick", "place", "place", "push", "push"]
assert seen["LazyMemmapStorage"] == seen["dumps, loads"] == ["pick"] * 6
PY
cd "$dir"
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" see.py
