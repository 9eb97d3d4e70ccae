#!/usr/bin/env bash
# cpprb 11.0.0: the order of a batch from a PrioritizedReplayBuffer.
#
# One would guess: the rows of a batch are in random order, as those of a ReplayBuffer are. Its docstring says that
# rows are drawn by priority, and nothing of an order.
#
# What happens: one row is drawn from each of batch_size equal shares of the sum of priorities, in the order of the
# storage (the paper on prioritized replay suggests such shares). So every batch is sorted by slot. Until the buffer is full, that is by age.
#
# Why it hurts: whoever splits a batch, over devices or into microbatches, gets parts of different age: here the first
# half always comes from the first half of the buffer. Rows that are taken B x T at a time as groups are of one age
# each, and statistics over part of a batch are not those of the whole.
# What helps: shuffle the batch, its weights and its indexes alike, before it is split.
#
# Seen, for 100 batches of 256 of 10,000 rows with equal priorities:
#   ReplayBuffer: 0 of 100 batches are sorted, first halves hold rows 0 to 9999, second halves 0 to 9999
#   PrioritizedReplayBuffer: 100 of 100 batches are sorted, first halves hold rows 0 to 4999, second halves 5000 to 9998

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet cpprb==11.0.0 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import cpprb
import numpy as np

for kind in (cpprb.ReplayBuffer, cpprb.PrioritizedReplayBuffer):
    buffer = kind(10_000, {"row": {"dtype": np.int64}})
    buffer.add(row=np.arange(10_000))
    batches = np.stack([buffer.sample(256)["row"].ravel() for _ in range(100)])
    num_sorted = int((np.diff(batches, axis=1) >= 0).all(1).sum())
    first, second = batches[:, :128], batches[:, 128:]
    print(f"{kind.__name__}: {num_sorted} of 100 batches are sorted,", end=" ")
    print(f"first halves hold rows {first.min()} to {first.max()}, second halves {second.min()} to {second.max()}")
    if kind is cpprb.ReplayBuffer:
        assert num_sorted == 0 and first.max() > 9_000 and second.min() < 1_000
    else:
        assert num_sorted == 100 and first.max() <= 5_000 <= second.min() + 1
PY
cd "$dir"
"$dir/venv/bin/python" see.py
