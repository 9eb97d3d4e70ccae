#!/usr/bin/env bash
# TorchRL 0.14.1: SamplerWithoutReplacement and a pass that was stopped early.
#
# One would guess: after extend has replaced every row, `for batch in buffer` goes over all the new rows.
#
# What happens: it visits only the slots that the stopped pass had not reached. A new order is drawn only when the old
# one is used up or the number of rows changes, and a full buffer's number does not change. The documentation does
# say that the rows should stay the same between two calls, and that this is not checked.
#
# Why it hurts: PPO refills a buffer of fixed size and leaves an epoch when the KL divergence is too large. From then
# on the first epoch on new data is short: here 4 of 12 rows.
# What helps: buffer.empty() before extend.
#
# Seen:
#   after a whole pass:             [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111]
#   after a pass stopped at 2 of 3: [101, 103, 106, 111]
#   the same, with empty():         [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111]

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchrl==0.14.1 tensordict==0.14.3 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer


def rows_of_second_pass(stop_early, empty):
    """Fill, pass over the rows, replace them all, and return what the next pass gives."""
    torch.manual_seed(0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(12), sampler=SamplerWithoutReplacement(), batch_size=4)
    buffer.extend(TensorDict({"x": torch.arange(12)}, [12]))
    for number, _ in enumerate(buffer):
        if stop_early and number == 1:
            break
    if empty:
        buffer.empty()
    buffer.extend(TensorDict({"x": torch.arange(100, 112)}, [12]))
    return sorted(value for batch in buffer for value in batch["x"].tolist())


whole = rows_of_second_pass(stop_early=False, empty=False)
stopped = rows_of_second_pass(stop_early=True, empty=False)
emptied = rows_of_second_pass(stop_early=True, empty=True)
print("after a whole pass:            ", whole)
print("after a pass stopped at 2 of 3:", stopped)
print("the same, with empty():        ", emptied)
assert whole == emptied == list(range(100, 112))
assert len(stopped) == 4 and set(stopped) < set(whole)
PY
cd "$dir"
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" see.py
