#!/usr/bin/env bash
# accelerate 1.15.0: where a prepared loader of an endless stream stands.
#
# One would guess: `prepare(loader)` in a single process hands on what the loader delivers, so a position that the
# stream counts is the number of batches delivered, and a `state_dict` of the loader's own class still answers.
#
# What happens: `prepare` makes a loader of its own over `loader.dataset`. It is always one batch ahead, and it looks
# for `state_dict` at a part that only torchdata's loaders have: an AttributeError that names an inner attribute.
#
# Why it hurts: a training script saves the position beside the weights. Resumed, it has skipped a batch each time, or
# it ends with an error at the first checkpoint.
# What helps: count the batches in the training loop, and save that number.
#
# Seen:
#   plain     delivered [1, 2, 3] position 3 state {'position': 3}
#   prepared  delivered [1, 2, 3] position 4 AttributeError 'DataLoader' object has no attribute 'dl_state_dict'

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet accelerate==1.15.0 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset


class Stream(IterableDataset):
    """Numbers without end; `position` is how many were taken."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while True:
            self.position += 1
            yield torch.tensor([self.position])


class Loader(DataLoader):
    """A loader that says where it stands."""

    def state_dict(self):
        return {"position": self.dataset.position}


def stand(loader):
    """What three batches were, the position of the stream after them, and what the loader says of it."""
    batches = iter(loader)
    delivered = [int(next(batches)) for _ in range(3)]
    try:
        state = f"state {loader.state_dict()}"
    except AttributeError as error:
        state = f"AttributeError {error}"
    return delivered, loader.dataset.position, state


plain = stand(Loader(Stream(), batch_size=None))
prepared = stand(Accelerator(cpu=True).prepare(Loader(Stream(), batch_size=None)))
for name, (delivered, position, state) in (("plain   ", plain), ("prepared", prepared)):
    print(name, "delivered", delivered, "position", position, state)
assert plain == ([1, 2, 3], 3, "state {'position': 3}")
assert prepared == ([1, 2, 3], 4, "AttributeError 'DataLoader' object has no attribute 'dl_state_dict'")
PY
"$dir/venv/bin/python" "$dir/see.py"
