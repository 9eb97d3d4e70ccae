#!/usr/bin/env bash
# tensorflow-datasets 4.9.10, tensorflow-cpu 2.21.0: features of float64 in the steps of an RLDS dataset.
#
# One would guess: a feature that is declared float64, given as float64 and read as float64 has the values that were
# given.
#
# What happens: the files hold float32. Nothing is said when it is written or read, and the dtype is right: the values
# are rounded to 24 bits. With `encoding="bytes"` (or "zlib"), which is about size by its description, they are exact.
#
# Why it hurts: a time in seconds since 1970 is up to 64 s off, and all steps of two minutes have the same time, so that
# frames can no longer be matched, sorted or differentiated. Positions in a map's coordinates (4,000,000 m) are up to
# 0.12 m off.
# What helps: `Tensor(shape=..., dtype=np.float64, encoding="bytes")`, or int64 nanoseconds.
#
# Seen:
#   given                          float64 [1790000010.1, 1790000010.2, 1790000010.3]
#   float64                        float64 [1790000000.0, 1790000000.0, 1790000000.0]
#   float64, encoding="bytes"      float64 [1790000010.1, 1790000010.2, 1790000010.3]

set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10
cat > "$dir/see.py" <<'PY'
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.rlds import rlds_base

GIVEN = [1790000010.1, 1790000010.2, 1790000010.3]


class Robot(tfds.core.GeneratorBasedBuilder):
    """One episode, with the time of each step in two encodings."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        number = {"shape": (), "dtype": np.float64}
        times = {"time": tfds.features.Tensor(**number), "bytes": tfds.features.Tensor(**number, encoding="bytes")}
        config = rlds_base.DatasetConfig(name="robot", observation_info=times, action_info=np.float32)
        return rlds_base.build_info(config, self)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        flags = [{"is_first": t == 0, "is_last": t == 2, "is_terminal": False} for t in range(3)]
        observations = [{"observation": {"time": np.float64(time), "bytes": np.float64(time)}} for time in GIVEN]
        steps = [{"action": 0.0, **now, **flag} for now, flag in zip(observations, flags)]
        yield "0", {"steps": steps}


builder = Robot(data_dir="data")
builder.download_and_prepare()
(episode,) = builder.as_dataset(split="train")
steps = [step["observation"] for step in episode["steps"]]
read = {name: np.array([step[name].numpy() for step in steps]) for name in ("time", "bytes")}
print(f"{'given':30} float64 {GIVEN}")
for name, label in (("time", "float64"), ("bytes", 'float64, encoding="bytes"')):
    print(f"{label:30} {read[name].dtype} {read[name].tolist()}")
assert read["time"].dtype == np.float64 and read["time"].tolist() == [1790000000.0] * 3
assert read["bytes"].tolist() == GIVEN
PY
cd "$dir"
TF_CPP_MIN_LOG_LEVEL=3 "$dir/venv/bin/python" see.py 2>/dev/null | grep float64
