#!/usr/bin/env bash
# torchdata 0.11.0: a StatefulDataLoader with a sampler from torch.utils.data, resumed within an epoch.
#
# One would guess: a resumed loader delivers the rest of the epoch. The project's tutorial says that torch's
# RandomSampler is patched on import and needs no replacement. If it could not be resumed, there would be an error, or a
# warning as for iterable datasets.
#
# What happens: only the number of rows is saved. The resumed loader asks the sampler for a new order and skips that
# many rows of it, even if the sampler has a seeded generator. There is no warning. In the first epoch of a run with the
# same seed, the new order equals the old one, so a short test passes. shuffle=True works, because it uses torchdata's
# own sampler.
#
# Why it hurts: after each restart, some rows come twice in an epoch and others do not come at all: a quarter of them on
# average if it is stopped half-way. WeightedRandomSampler has the same fault.
# What helps: shuffle=True, or torchdata.stateful_dataloader.sampler.RandomSampler.
#
# Seen, 24 rows, stopped after 12 of an epoch and resumed; how many different rows the epoch had:
#   shuffle=True               first epoch 24 second epoch 24
#   RandomSampler              first epoch 24 second epoch 17
#   WeightedRandomSampler      first epoch 24 second epoch 17
#   torchdata's RandomSampler  first epoch 24 second epoch 24

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet torchdata==0.11.0 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import torch
from torch.utils.data import RandomSampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler as Stateful

ROWS = list(range(24))


def seeded():
    return torch.Generator().manual_seed(0)


def loader(kind):
    options = {
        "shuffle=True": lambda: {"shuffle": True, "generator": seeded()},
        "RandomSampler": lambda: {"sampler": RandomSampler(ROWS, generator=seeded())},
        "WeightedRandomSampler": lambda: {
            "sampler": WeightedRandomSampler([1.0] * 24, 24, replacement=False, generator=seeded())
        },
        "torchdata's RandomSampler": lambda: {"sampler": Stateful(ROWS, generator=seeded())},
    }
    return StatefulDataLoader(ROWS, batch_size=4, **options[kind]())


def rows_of_epoch(kind, num_epochs_before):
    """The rows of an epoch that is stopped half-way and resumed by a new loader."""
    first = loader(kind)
    for _ in range(num_epochs_before):
        assert sorted(torch.cat(list(first)).tolist()) == ROWS
    batches = iter(first)
    rows = [next(batches) for _ in range(3)]
    second = loader(kind)
    second.load_state_dict(first.state_dict())
    return torch.cat(rows + list(second)).tolist()


for kind in ("shuffle=True", "RandomSampler", "WeightedRandomSampler", "torchdata's RandomSampler"):
    epochs = [rows_of_epoch(kind, before) for before in (0, 1)]
    num_rows = [len(set(rows)) for rows in epochs]
    print(f"{kind:26} first epoch {num_rows[0]} second epoch {num_rows[1]}")
    assert [len(rows) for rows in epochs] == [24, 24]
    assert num_rows[0] == 24 and (num_rows[1] < 24) == (kind in ("RandomSampler", "WeightedRandomSampler"))
PY
"$dir/venv/bin/python" -W ignore "$dir/see.py"
