#!/usr/bin/env bash
# TorchRL 0.14.1: slices from a buffer that was full when it was saved.
#
# One would guess: a loaded buffer returns the same slices as the saved one. No slice crosses the write position, where
# the newest row is followed by the oldest.
#
# What happens: the storage remembers that position from its last write. Neither dumps nor state_dict saves it, although
# both save the writer's cursor. Until something is added, a SliceSampler that uses end_key returns slices that start
# with the newest rows and continue with the oldest, in the middle of an episode. Nothing marks them.
#
# Why it hurts: offline training on a saved buffer never adds anything. A recurrent network or a world model is then
# trained on jumps that never happened, for the whole run: here in one slice of eight. A resumed online run gets them
# until its first new rows arrive.
# What helps: store an episode number with each row and use traj_key instead of end_key.
#
# Seen, slices of 4 from 20 rows with episodes of 7:
#   saved                  0 of 1000 slices have a gap
#   dumps, loads           121 of 1000 slices have a gap, such as [23, 24, 25, 6]
#   state_dict             121 of 1000 slices have a gap, such as [23, 24, 25, 6]
#   dumps, loads, extend   0 of 1000 slices have a gap
#   dumps, loads, traj_key 0 of 1000 slices have a gap

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
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer


def rows(start, stop):
    """Numbered rows of episodes of 7."""
    row = torch.arange(start, stop)
    end = (row % 7 == 6)[:, None]
    flags = {"terminated": end, "done": end.clone(), "truncated": torch.zeros_like(end)}
    return TensorDict({"row": row, "episode": row // 7, "next": TensorDict(flags, [len(row)])}, [len(row)])


def make(**key):
    sampler = SliceSampler(slice_len=4, truncated_key=None, **key)
    return TensorDictReplayBuffer(storage=LazyTensorStorage(20), sampler=sampler, batch_size=4000)


def gaps(buffer):
    torch.manual_seed(0)
    slices = buffer.sample()["row"].reshape(1000, 4)
    return slices[(slices.diff(dim=1) != 1).any(1)].tolist()


by_end = {"end_key": ("next", "done")}
saved = make(**by_end)
for start in range(0, 26, 2):  # the newest row is number 25, the oldest number 6
    saved.extend(rows(start, start + 2))
seen = {"saved": gaps(saved)}
loaded, by_number = make(**by_end), make(traj_key="episode")
with tempfile.TemporaryDirectory() as path:
    saved.dumps(path)
    loaded.loads(path)
    by_number.loads(path)
seen["dumps, loads"] = gaps(loaded)
from_state = make(**by_end)
from_state.load_state_dict(saved.state_dict())
seen["state_dict"] = gaps(from_state)
assert loaded[:]["row"].tolist() == from_state[:]["row"].tolist() == saved[:]["row"].tolist()
loaded.extend(rows(26, 28))
seen["dumps, loads, extend"] = gaps(loaded)
seen["dumps, loads, traj_key"] = gaps(by_number)
for name, found in seen.items():
    example = f", such as {found[0]}" if found else ""
    print(f"{name:22} {len(found)} of 1000 slices have a gap{example}")
assert not seen["saved"] and not seen["dumps, loads, extend"] and not seen["dumps, loads, traj_key"]
for name in ("dumps, loads", "state_dict"):
    assert len(seen[name]) > 50
    assert all([25, 6] in (gap[:2], gap[1:3], gap[2:]) for gap in seen[name])
PY
cd "$dir"
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" see.py
