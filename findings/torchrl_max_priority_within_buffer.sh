#!/usr/bin/env bash
# TorchRL 0.14.1: PrioritizedSampler(max_priority_within_buffer=True) and the priority of new rows.
#
# One would guess: new rows get the largest priority that is in the buffer, so that they are drawn soon.
#
# What happens: once the row with the largest priority has been overwritten, that maximum is forgotten, and not looked
# for among the rows that are left. The next rows get priority 1, whatever the others have. With False, the default,
# they get the largest priority ever.
#
# Why it hurts: the option is there so that one outlier does not stay the maximum for ever. Where priorities are well
# above 1, as with rewards that are not scaled, episode after episode is hardly ever drawn, though it was never learned
# from. Where they are well below 1, the same rows are drawn far too often.
# What helps: leave the option off, or give new rows their priority by update_priority after extend.
#
# Seen, priorities of 12 rows, and how much of 1,000 drawn rows is the newest episode:
#   max_priority_within_buffer=False
#     [100.0, 80.0, 60.0, 50.0, 100.0, 80.0, 60.0, 50.0, 100.0, 80.0, 60.0, 50.0]
#     episode 3 added: [100.0, 100.0, 100.0, 100.0, 100.0, 80.0, 60.0, 50.0, 100.0, 80.0, 60.0, 50.0] 43 %
#     episode 4 added: [100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 80.0, 60.0, 50.0] 34 %
#   max_priority_within_buffer=True
#     [100.0, 80.0, 60.0, 50.0, 100.0, 80.0, 60.0, 50.0, 100.0, 80.0, 60.0, 50.0]
#     episode 3 added: [100.0, 100.0, 100.0, 100.0, 100.0, 80.0, 60.0, 50.0, 100.0, 80.0, 60.0, 50.0] 43 %
#     episode 4 added: [100.0, 100.0, 100.0, 100.0, 1.0, 1.0, 1.0, 1.0, 100.0, 80.0, 60.0, 50.0] 0 %
#
# The wheel's extension, which the sampler needs, does not fit this torch, so it is built from the sources in the wheel:
# this script needs a C++ compiler, too.

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchrl==0.14.1 tensordict==0.14.3 numpy==2.4.6 ninja==1.13.0
cat > "$dir/build.py" <<'PY'
import importlib.util
import shutil
import sysconfig
from pathlib import Path

from torch.utils.cpp_extension import load

package = Path(importlib.util.find_spec("torchrl").origin).parent
sources = [str(package / "csrc" / name) for name in ("pybind.cpp", "utils.cpp")]
load("_torchrl", sources, extra_cflags=["-O2"], build_directory=".", is_python_module=False)
shutil.copy("_torchrl.so", package / f"_torchrl{sysconfig.get_config_var('EXT_SUFFIX')}")
PY
cat > "$dir/see.py" <<'PY'
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, PrioritizedSampler, ReplayBuffer

NUM_ROWS = 12
ALL = torch.arange(NUM_ROWS)


def episode(number):
    return TensorDict({"episode": torch.full((4,), number)}, [4])


def priorities_of(sampler):
    # With alpha = 1, the tree holds the priorities themselves.
    return [round(value, 2) for value in sampler._sum_tree[ALL].tolist()]


shares = {}
for within_buffer in (False, True):
    np.random.seed(0)
    sampler = PrioritizedSampler(NUM_ROWS, alpha=1.0, beta=1.0, max_priority_within_buffer=within_buffer)
    buffer = ReplayBuffer(storage=LazyTensorStorage(NUM_ROWS), sampler=sampler, batch_size=1000)
    for number in range(3):
        buffer.extend(episode(number))
    buffer.update_priority(ALL, torch.tensor([100.0, 80, 60, 50] * 3))
    print(f"max_priority_within_buffer={within_buffer}")
    print(" ", priorities_of(sampler))
    for number in (3, 4):
        buffer.extend(episode(number))
        share = float((buffer.sample()["episode"] == number).float().mean())
        print(f"  episode {number} added:", priorities_of(sampler), f"{100 * share:.0f} %")
        shares[within_buffer, number] = share

assert min(shares[False, 3], shares[False, 4], shares[True, 3]) > 0.25
assert shares[True, 4] < 0.02
PY
cd "$dir"
PATH="$dir/venv/bin:$PATH" "$dir/venv/bin/python" build.py
RL_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" see.py
