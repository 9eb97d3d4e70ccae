#!/usr/bin/env bash
# torchdata 0.11.0: random draws of a dataset in the workers of a resumed StatefulDataLoader.
#
# One would guess: a dataset that draws at random (the start of a window, an augmentation) continues its draws or makes
# new ones, as in the workers of a torch DataLoader, which get a new seed each time.
#
# What happens: the seed of the workers is saved, but not how much they have drawn. The workers of a resumed loader
# repeat the draws from the start of the epoch, and do so again at each restart. The documentation says that a dataset
# can save the state of its own generator. It does not say that draws are repeated otherwise.
#
# Why it hurts: a loader of random windows has no natural end, so its epochs are long. A job that is stopped and resumed
# every hour trains on the windows of its first hour again and again, and the loss falls as it overfits.
# What helps: seed the workers differently in each run, by worker_init_fn, or use num_workers=0.
#
# Seen, six draws of each run, from 0 to 9999, sorted:
#   run 1                  [1890, 2063, 2562, 3841, 5646, 6494]
#   run 2, resumed         [1890, 2063, 2562, 3841, 5646, 6494]
#   run 3, resumed         [1890, 2063, 2562, 3841, 5646, 6494]
#   run 2, worker_init_fn  [712, 2526, 3078, 3652, 3910, 9168]
#   run 1, DataLoader      [1890, 2063, 2562, 3841, 5646, 6494]
#   run 2, DataLoader      [209, 2878, 3883, 7524, 8613, 8828]

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchdata==0.11.0 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import torch
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader


class Windows(Dataset):
    """Starts of random windows of 10,000 rows; which item is asked for makes no difference."""

    def __len__(self):
        return 1_000_000

    def __getitem__(self, _):
        return torch.randint(10_000, ())


def run(number, kind=StatefulDataLoader, state=None, **options):
    """Six draws of a run with a seed of its own, sorted, and the state after them."""
    torch.manual_seed(number)
    loader = kind(Windows(), batch_size=3, num_workers=2, **options)
    if state is not None:
        loader.load_state_dict(state)
    batches = iter(loader)
    draws = torch.cat([next(batches) for _ in range(2)]).sort().values.tolist()
    return draws, loader.state_dict() if kind is StatefulDataLoader else None


seen = {}
seen["run 1"], state = run(1)
seen["run 2, resumed"], later = run(2, state=state)
seen["run 3, resumed"], _ = run(3, state=later)
seen["run 2, worker_init_fn"], _ = run(2, state=state, worker_init_fn=lambda worker: torch.manual_seed(2000 + worker))
seen["run 1, DataLoader"], _ = run(1, DataLoader)
seen["run 2, DataLoader"], _ = run(2, DataLoader)
for name, draws in seen.items():
    print(f"{name:22} {draws}")
assert seen["run 1"] == seen["run 2, resumed"] == seen["run 3, resumed"]
assert seen["run 1"] != seen["run 2, worker_init_fn"]
assert seen["run 1, DataLoader"] != seen["run 2, DataLoader"]
PY
"$dir/venv/bin/python" -W ignore "$dir/see.py"
