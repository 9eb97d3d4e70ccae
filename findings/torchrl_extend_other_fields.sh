#!/usr/bin/env bash
# TorchRL 0.14.1: ReplayBuffer.extend with rows that do not have the fields of the stored ones.
#
# One would guess: an error, as from a table with fixed columns. A different dtype does raise one.
#
# What happens: a field that the new rows lack keeps the values of the rows they overwrite, or uninitialized memory
# where nothing was written yet. A field of shape (2, 1) is broadcast where (2, 3) is stored. Both are silent.
#
# Why it hurts: a second collector that forgets a field (a reward from a learned model, a log-probability) pairs new
# observations with the old rows' values. The batch has every key, the right shape and plausible numbers.
# What helps: compare keys, shapes and dtypes with the first batch yourself before extend.
#
# Seen:
#   x, y stored, then two rows of x alone
#     x [100.0, 101.0, 2.0, 3.0]
#     y [0.0, 10.0, 20.0, 30.0]
#   rows of 3 stored, then two rows of 1
#     x [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [7.0, 7.0, 7.0], [8.0, 8.0, 8.0]]
#   a different dtype is refused

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchrl==0.14.1 tensordict==0.14.3 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

buffer = ReplayBuffer(storage=LazyTensorStorage(4))
buffer.extend(TensorDict({"x": torch.arange(4.0), "y": torch.arange(4.0) * 10}, [4]))
buffer.extend(TensorDict({"x": torch.tensor([100.0, 101.0])}, [2]))
x, y = buffer[:]["x"].tolist(), buffer[:]["y"].tolist()
print("x, y stored, then two rows of x alone")
print("  x", x)
print("  y", y)
assert x == [100, 101, 2, 3]
assert y == [0, 10, 20, 30]

buffer = ReplayBuffer(storage=LazyTensorStorage(4))
buffer.extend(TensorDict({"x": torch.arange(6.0).reshape(2, 3)}, [2]))
buffer.extend(TensorDict({"x": torch.tensor([[7.0], [8.0]])}, [2]))
print("rows of 3 stored, then two rows of 1")
print("  x", buffer[:]["x"].tolist())
assert buffer[:]["x"].tolist() == [[0, 1, 2], [3, 4, 5], [7, 7, 7], [8, 8, 8]]

try:
    buffer.extend(TensorDict({"x": torch.zeros(2, 3, dtype=torch.float64)}, [2]))
except RuntimeError:
    print("a different dtype is refused")
else:
    raise AssertionError("a different dtype was accepted")
PY
cd "$dir"
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" see.py
