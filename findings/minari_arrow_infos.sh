#!/usr/bin/env bash
# Minari 0.5.4: infos that were recorded, read back from Arrow and from HDF5.
#
# One would guess: the storage is a choice of format, and an array of infos comes back from either as it was given.
#
# What happens: from HDF5 it does. From Arrow, an array within a dict of infos comes back as an object array of dicts,
# one for each step, with the arrays in them flattened. Infos that are an array of single numbers can be written and
# never read: each episode of the dataset raises, observations included. (Lists of numbers can be read.)
#
# Why it hurts: infos nest in most environments, and code that was tried with the default, HDF5, fails or sees other
# shapes. A dataset made by `create_dataset_from_buffers(..., data_format="arrow")` with arrays as infos is lost to
# Minari. What helps: HDF5; flat infos, numbers as lists; or reading the record batches, in which all of it is right.
#
# Seen:
#   hdf5    (3, 2, 2) float64
#   arrow   dict with (4,) object
#   arrow   an array of numbers ValueError: invalid literal for int() with base 10: b''

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet minari==0.5.4 gymnasium==1.4.0 numpy==2.4.6 h5py==3.16.0 pyarrow==26.0.1 \
    pillow==13.0.0
cat > "$dir/see.py" <<'PY'
import warnings

import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

warnings.simplefilter("ignore")
POSES = np.arange(12.0).reshape(3, 2, 2)


def stored(name, data_format, infos):
    """Write an episode of two steps, and open what was written."""
    episode = EpisodeBuffer(
        observations=np.zeros((3, 1), np.float32),
        actions=np.array([0, 1]),
        rewards=[0.0, 1.0],
        terminations=[False, True],
        truncations=[False, False],
        infos=infos,
    )
    minari.create_dataset_from_buffers(
        name,
        [episode],
        observation_space=spaces.Box(-1, 1, (1,)),
        action_space=spaces.Discrete(2),
        data_format=data_format,
    )
    return minari.load_dataset(name)


found = stored("nested-hdf5-v0", "hdf5", {"robot": {"pose": POSES}})[0].infos["robot"]["pose"]
print("hdf5   ", found.shape, found.dtype)
assert np.array_equal(found, POSES)

found = stored("nested-arrow-v0", "arrow", {"robot": {"pose": POSES}})[0].infos["robot"]
print("arrow  ", type(found[0]).__name__, "with", found[0]["pose"].shape, found.dtype)
assert found.dtype == object and found.shape == (3,)
assert all(np.array_equal(row["pose"], pose.reshape(4)) for row, pose in zip(found, POSES))

numbers = stored("numbers-arrow-v0", "arrow", {"lives": np.array([3, 2, 1])})
try:
    numbers[0]
except ValueError as error:
    print("arrow   an array of numbers", f"ValueError: {error}")
else:
    raise AssertionError("it was read")
assert stored("numbers-hdf5-v0", "hdf5", {"lives": np.array([3, 2, 1])})[0].infos["lives"].tolist() == [3, 2, 1]
assert stored("list-arrow-v0", "arrow", {"lives": [3, 2, 1]})[0].infos["lives"].tolist() == [3, 2, 1]
PY
cd "$dir"
MINARI_DATASETS_PATH="$dir/store" "$dir/venv/bin/python" see.py
