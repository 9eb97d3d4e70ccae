#!/usr/bin/env bash
# Minari 0.5.4: a dataset with images that Minari 0.5.1 has written.
#
# One would guess: it is read. 0.5.4 counts 0.5.1 among its `supported_dataset_versions`, loads the dataset, and gives
# its spaces and its number of steps.
#
# What happens: no episode can be read, from HDF5 and from Arrow. 0.5.1 stored images as arrays and did not say so, and
# 0.5.4 takes images of which nothing is said for JPEG. Observations that are no images are read.
#
# Why it hurts: after an upgrade, pixel datasets that were made before are closed to Minari, and the error is about an
# image file. What helps: "jpeg_encoding": false in data/metadata.json, which must not be put into those of 0.5.3, whose
# images are JPEG; or a reader that looks at the shape of what is stored.
#
# Seen:
#   0.5.1 writes        hdf5   supported True, 2 steps
#   0.5.4 reads         hdf5   UnidentifiedImageError
#   with false added    hdf5   equal
#   0.5.1 writes        arrow  supported True, 2 steps
#   0.5.4 reads         arrow  TypeError
#   with false added    arrow  equal

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for version in 0.5.1 0.5.4; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install --quiet "minari==$version" gymnasium==1.2.3 numpy==2.4.6 h5py==3.16.0 pyarrow==26.0.1 \
        pillow==13.0.0
done
cat > "$dir/write.py" <<'PY'
import warnings

import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

warnings.simplefilter("ignore")
images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
for data_format in ("hdf5", "arrow"):
    episode = EpisodeBuffer(
        observations=images,
        actions=np.array([0, 1]),
        rewards=[0.0, 1.0],
        terminations=[False, True],
        truncations=[False, False],
    )
    dataset = minari.create_dataset_from_buffers(
        f"{data_format}-v0",
        [episode],
        observation_space=spaces.Box(0, 255, (64, 64, 3), np.uint8),
        action_space=spaces.Discrete(2),
        data_format=data_format,
    )
    assert np.array_equal(dataset[0].observations, images)
PY
cat > "$dir/see.py" <<'PY'
import json
import os
import pathlib

import minari
import numpy as np

images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
for data_format in ("hdf5", "arrow"):
    dataset = minari.load_dataset(f"{data_format}-v0")
    is_supported = dataset.minari_version in minari.supported_dataset_versions
    print(dataset.minari_version, "writes       ", f"{data_format:6} supported {is_supported}, {dataset.total_steps} steps")
    assert (dataset.minari_version, is_supported, dataset.total_steps) == ("0.5.1", True, 2)
    try:
        dataset[0]
    except (OSError, TypeError) as error:
        print(minari.__version__, "reads        ", f"{data_format:6} {type(error).__name__}")
    else:
        raise AssertionError("it was read")
    path = pathlib.Path(os.environ["MINARI_DATASETS_PATH"], f"{data_format}-v0", "data", "metadata.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "jpeg_encoding": False}))
    assert np.array_equal(minari.load_dataset(f"{data_format}-v0")[0].observations, images)
    print("with false added   ", f"{data_format:6} equal")
PY
cd "$dir"
export MINARI_DATASETS_PATH="$dir/store"
"$dir/0.5.1/bin/python" write.py
"$dir/0.5.4/bin/python" see.py
