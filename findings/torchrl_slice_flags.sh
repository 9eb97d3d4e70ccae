#!/usr/bin/env bash
# TorchRL 0.14.1: the end flags of slices from a SliceSampler.
#
# One would guess: ("next", "done") and ("next", "truncated") of a sampled row are those that were stored.
#
# What happens: in a TensorDictReplayBuffer, the last row of every slice is truncated and done, also in the middle of
# an episode. A row that terminated is truncated as well. A plain ReplayBuffer with the same sampler returns the
# stored flags. The documentation mentions "truncated", for value estimators, but not "done".
#
# Why it hurts: a model that learns from "done" whether an episode goes on (as Dreamer does) learns that one step
# in slice_len is the last. Counting episode ends in a batch goes wrong too.
# What helps: SliceSampler(truncated_key=None).
#
# Seen:
#   ReplayBuffer
#     rows [0, 1, 8, 9, 8, 9, 3, 4] done [0, 0, 0, 1, 0, 1, 0, 1]
#     done of 0 of 1000 rows is not the stored one, 0 rows are terminated and truncated
#   TensorDictReplayBuffer
#     rows [0, 1, 8, 9, 8, 9, 3, 4] done [0, 1, 0, 1, 0, 1, 0, 1]
#     done of 370 of 1000 rows is not the stored one, 130 rows are terminated and truncated
#   TensorDictReplayBuffer, truncated_key=None
#     rows [0, 1, 8, 9, 8, 9, 3, 4] done [0, 0, 0, 1, 0, 1, 0, 1]
#     done of 0 of 1000 rows is not the stored one, 0 rows are terminated and truncated

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchrl==0.14.1 tensordict==0.14.3 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler, TensorDictReplayBuffer

# Two episodes of five rows; both terminate.
row = torch.arange(10)
terminated = (row % 5 == 4)[:, None]
flags = {"terminated": terminated, "done": terminated.clone(), "truncated": torch.zeros_like(terminated)}
rows = TensorDict({"row": row, "next": TensorDict(flags, [10])}, [10])


def sample(kind, **options):
    """Draw 500 slices of two rows."""
    torch.manual_seed(0)
    sampler = SliceSampler(slice_len=2, end_key=("next", "done"), **options)
    buffer = kind(storage=LazyTensorStorage(10), sampler=sampler, batch_size=1000)
    buffer.extend(rows)
    return buffer.sample()


seen = {}
for name, batch in (
    ("ReplayBuffer", sample(ReplayBuffer)),
    ("TensorDictReplayBuffer", sample(TensorDictReplayBuffer)),
    ("TensorDictReplayBuffer, truncated_key=None", sample(TensorDictReplayBuffer, truncated_key=None)),
):
    stored = rows[batch["row"]]
    wrong_done = batch["next", "done"] != stored["next", "done"]
    both = batch["next", "terminated"] & batch["next", "truncated"]
    print(name)
    print("  rows", batch["row"][:8].tolist(), "done", batch["next", "done"][:8].int().flatten().tolist())
    print(f"  done of {int(wrong_done.sum())} of 1000 rows is not the stored one,", end=" ")
    print(f"{int(both.sum())} rows are terminated and truncated")
    seen[name] = batch, int(wrong_done.sum()), int(both.sum())

assert seen["ReplayBuffer"][1:] == (0, 0)
assert seen["TensorDictReplayBuffer, truncated_key=None"][1:] == (0, 0)
batch, wrong_done, both = seen["TensorDictReplayBuffer"]
assert batch["next", "done"].reshape(500, 2)[:, 1].all()
assert wrong_done > 300 and both > 50
PY
cd "$dir"
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" see.py
