#!/usr/bin/env bash
# dreamerv3 1.5.0: what its replay saves while it runs, and what it loads from that.
#
# One would guess: a chunk saved before it is full has as many rows as were added. A run that saves twice and is resumed
# has each step once, as `len(replay)` said before.
#
# What happens: each array of a chunk has as many rows as a full one; those behind the length in the file's name were
# never written, so they hold whatever was in memory. And when the chunk is full, it is saved again under another name, beside
# the earlier file. Loading reads both: steps come twice, and the replay is larger after resuming than it was before.
#
# Why it hurts: whoever reads the files by numpy.load, for offline training for example, trains on noise with plausible
# shapes and types. A resumed run draws the steps before each checkpoint more often than others.
# What helps: take only the rows that the name counts, and of files with the same id only the longest.
#
# Seen (the rows of noise differ):
#   7 steps of an 8-row chunk saved: name says 7, arrays have 8 rows
#   12 steps saved again: files of [7, 8, 4] rows by their names
#   sequences of 2 steps: 11 before, 17 after loading; steps that are in more than one row: [0, 1, 2, 3, 4, 5, 6]

set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet numpy==2.4.6 cloudpickle==3.1.3 setuptools==75.8.0
# Its requirements are for training; the replay needs none of them.
"$dir/venv/bin/pip" install --quiet --no-deps dreamerv3==1.5.0
cat > "$dir/see.py" <<'PY'
import importlib.util
import pathlib
import sys
import tempfile
from collections import Counter

import numpy as np

sys.path.insert(0, importlib.util.find_spec("dreamerv3").submodule_search_locations[0])
import embodied


def add(replay, numbers):
    """Steps that say which they are."""
    for number in numbers:
        replay.add({"step": np.int32(number), "is_first": np.bool_(number == 0), "is_last": np.bool_(False)})


def length(path):
    """The rows of a chunk by its name."""
    return int(path.stem.split("-")[3])


with tempfile.TemporaryDirectory() as path:
    directory = pathlib.Path(path)
    replay = embodied.replay.Uniform(length=2, directory=directory, chunks=8)
    add(replay, range(7))
    replay.save(wait=True)
    file = next(directory.iterdir())
    with np.load(file) as chunk:
        print(f"7 steps of an 8-row chunk saved: name says {length(file)}, arrays have {len(chunk['step'])} rows")
        assert length(file) == 7 and {len(chunk[key]) for key in chunk} == {8}
    add(replay, range(7, 12))
    replay.save(wait=True)
    lengths = [length(file) for file in sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime_ns)]
    print(f"12 steps saved again: files of {lengths} rows by their names")
    assert sorted(lengths) == [4, 7, 8]
    loaded = embodied.replay.Uniform(length=2, directory=directory, chunks=8)
    first_rows = Counter(int(sequence[0]["step"]) for sequence in loaded.table.values())
    twice = sorted(step for step, count in first_rows.items() if count > 1)
    print(f"sequences of 2 steps: {len(replay)} before, {len(loaded)} after loading;", end=" ")
    print(f"steps that are in more than one row: {twice}")
    assert len(replay) == 11 and len(loaded) > 11 and twice
PY
"$dir/venv/bin/python" "$dir/see.py" | grep -v "^Saved chunk"
