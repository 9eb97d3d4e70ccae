#!/usr/bin/env bash
# TorchRL 0.14.1 (Ray 2.60.0): one row added to a RayReplayBuffer with transport="distributed".
#
# One would guess: `add(row)` stores one row, and `extend(rows)` as many as it is given, as with the default transport.
#
# What happens: the first `extend` of a client fixes how many rows each later one has. A single row, of `add` or of
# `extend`, is spread over all of them: after an `extend` of 8, each `add` stores 8 copies, and returns their 8 indices.
# Other numbers of rows are an error about sizes.
#
# Why it hurts: who extends with a first block, and then adds step by step, fills the storage with copies eight times as
# fast, evicts eight times as much, and draws later rows eight times as often. Nothing is said.
# What helps: transport="ray" (the default); or blocks of one size only, in each client.
#
# Seen (rows 0 to 7 in one `extend`, then row 8 by `add`):
#   ray           add returned 8; 9 rows are stored; row 8 is 11.0 % of 6400 drawn rows
#   distributed   add returned [8, 9, 10, 11, 12, 13, 14, 15]; 16 rows are stored; row 8 is 51.0 % of 6400 drawn rows

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchrl==0.14.1 tensordict==0.14.3 numpy==2.4.6 ray==2.60.0
cat > "$dir/see.py" <<'PY'
from functools import partial

import ray
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, RayReplayBuffer

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
rows = TensorDict({"row": torch.arange(9)}, [9])
seen = {}
for transport in ("ray", "distributed"):
    buffer = RayReplayBuffer(
        storage=partial(LazyTensorStorage, 100), batch_size=64, remote_config={"num_cpus": 0}, transport=transport
    )
    buffer.extend(rows[:8])
    added = torch.as_tensor(buffer.add(rows[8])).tolist()
    drawn = torch.cat([buffer.sample()["row"] for _ in range(100)])
    share = (drawn == 8).float().mean().item()
    print(f"{transport:13} add returned {added}; {len(buffer)} rows are stored;", end=" ")
    print(f"row 8 is {100 * share:.1f} % of {len(drawn)} drawn rows", flush=True)
    seen[transport] = len(buffer), share
    buffer.close()
ray.shutdown()
assert seen["ray"][0] == 9 and seen["ray"][1] < 0.2
assert seen["distributed"][0] == 16 and seen["distributed"][1] > 0.4
PY
cd "$dir"
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" see.py
