"""Write `datasets.zip`, directories that tensorflow-datasets has written, and `arm.npz`, what it reads of one of them.

Run with Python 3.11 from the root of the checkout, in an environment of its own (600 MB):

    python -m venv venv && venv/bin/pip install tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10 array-record==0.8.6
    PYTHONPATH=. venv/bin/python tests/data/interop/rlds/make.py

game          the game of `tests/interop/logged.py` in both file formats, as RLDS has it: the last step is the final
              observation. The log is the game's own.
arm           as many datasets of Open X-Embodiment are: the last step has a valid action and the only reward; one
              feature of each kind. `arm.npz` has `NUMBER/FEATURE` for each episode, as `as_dataset` gives it, except
              for JPEGs, which are decoded with `dct_method="INTEGER_ACCURATE"`.
"""

import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402
from tensorflow_datasets.rlds import rlds_base  # noqa: E402

from tests.interop.logged import PLAYED, play  # noqa: E402

HERE = Path(__file__).parent
F = tfds.features


class Game(tfds.core.GeneratorBasedBuilder):
    """Episodes of the game, and one that was only reset."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        config = rlds_base.DatasetConfig(
            name="game",
            observation_info={
                "obs": F.Tensor(shape=(3,), dtype=np.float64, encoding="bytes"),
                "image": F.Image(shape=(2, 2, 3), encoding_format="png"),
                "state": F.Tensor(shape=(1,), dtype=np.int64),
            },
            action_info=F.Tensor(shape=(2,), dtype=np.float32),
            reward_info=np.float32,
            discount_info=np.float32,
            episode_metadata_info={"episode_metadata": {"number": np.int32, "end": F.Text()}},
        )
        return rlds_base.build_info(config, self)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(0, 5), "val": self._generate_examples(5, 7)}

    def _generate_examples(self, first: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        played = [*PLAYED, (0, "reset")]
        for number, log in [*enumerate(play(played))][first:stop]:
            length, end = played[number]
            is_cut = end == "cut"
            steps = []
            for step in range(length if is_cut else length + 1):
                is_last = step == length
                steps.append(
                    {
                        "observation": {name: log[name][step] for name in ("obs", "image", "state")},
                        "action": np.zeros(2, np.float32) if is_last else log["action"][step],
                        "reward": np.float32(0 if is_last else log["reward"][step]),
                        "discount": np.float32(0 if is_last or log["terminated"][step] else 0.5),
                        "is_first": step == 0,
                        "is_last": is_last,
                        "is_terminal": is_last and end in ("terminated", "both"),
                    }
                )
            yield f"{number}", {"steps": steps, "episode_metadata": {"number": number, "end": end}}


class Arm(tfds.core.GeneratorBasedBuilder):
    """Episodes of 3, 1 and 2 steps with an action each."""

    VERSION = tfds.core.Version("0.1.0")

    def _info(self) -> tfds.core.DatasetInfo:
        observation = {
            "image": F.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "gray": F.Image(shape=(8, 6, 1), encoding_format="png"),
            "depth": F.Image(shape=(4, 5, 1), dtype=np.float32),
            "depth16": F.Image(shape=(4, 5, 1), dtype=np.uint16, encoding_format="png"),
            "state": F.Tensor(shape=(2, 3), dtype=np.float32),
            "packed": F.Tensor(shape=(2, 2), dtype=np.float64, encoding="zlib"),
            "touch": F.Tensor(shape=(3,), dtype=np.bool_, encoding="bytes"),
            "contact": F.Tensor(shape=(2,), dtype=np.bool_),
            "time": np.float64,
            "ticks": F.Scalar(np.uint64),
            "offsets": F.Tensor(shape=(2,), dtype=np.int8),
            "half": F.Tensor(shape=(2,), dtype=np.float16),
            "gripper": F.ClassLabel(num_classes=3),
            "box": F.BBoxFeature(),
            "deep": {"er": np.int32},
            "points": F.Sequence(np.int32),
            "shapes": F.Tensor(shape=(None, None), dtype=np.int16, encoding="zlib"),
            "clip": F.Video(shape=(None, 4, 4, 3)),
            "natural_language_instruction": F.Text(),
        }
        step = {
            "observation": observation,
            "action": {"world_vector": F.Tensor(shape=(3,), dtype=np.float32), "terminate": np.int32},
            "reward": F.Scalar(np.float32),
            "is_first": F.Scalar(np.bool_),
            "is_last": F.Scalar(np.bool_),
            "is_terminal": F.Scalar(np.bool_),
            "language_embedding": F.Tensor(shape=(4,), dtype=np.float32),
            "subtask": F.Text(),
        }
        metadata = {
            "number": np.int32,
            "success": np.bool_,
            "file_path": F.Text(),
            "seed": np.uint64,
            "score": F.Tensor(shape=(), dtype=np.float64),
            "rating": F.Scalar(np.int32, optional=True),
            "home": F.Tensor(shape=(2,), dtype=np.float32),
            "split": F.Text(),
            "blob": F.Tensor(shape=(), dtype=np.str_),
            "long": F.Text(),
        }
        features = F.FeaturesDict({"steps": F.Dataset(step), "episode_metadata": metadata})
        return tfds.core.DatasetInfo(builder=self, features=features, description="An arm.", citation="@misc{arm}")

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, length in enumerate((3, 1, 2)):
            steps = [arm_step(number, step, length) for step in range(length)]
            metadata = {
                "number": number,
                "success": number == 1,
                "file_path": f"/data/{number}.npy",
                "seed": 2**64 - 1 - number,
                "score": number / 4,
                "rating": None if number == 1 else 5 - number,
                "home": np.zeros(2, np.float32),
                "split": f"split of {number}",
                "blob": b"\xff\xfe" + bytes([number]),
                "long": "x" * 5000 if number == 2 else "short",
            }
            yield f"{number}", {"steps": steps, "episode_metadata": metadata}


def arm_step(number: int, step: int, length: int) -> dict[str, Any]:
    tag = 10 * number + step
    ramp = np.add.outer(7 * np.arange(16), 5 * np.arange(24))[..., None] + np.array([0, 40, 80])
    observation = {
        "image": (ramp + tag).astype(np.uint8),
        "gray": np.arange(48, dtype=np.uint8).reshape(8, 6, 1) + np.uint8(tag),
        "depth": np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5, 1) + np.float32(tag),
        "depth16": np.arange(20, dtype=np.uint16).reshape(4, 5, 1) + np.uint16(1000 * tag),
        "state": np.arange(6, dtype=np.float32).reshape(2, 3) / 7 + np.float32(tag),
        "packed": np.arange(4).reshape(2, 2) / 3 + tag,
        "touch": np.array([True, step % 2 == 0, False]),
        "contact": np.array([step % 2 == 1, number == 1]),
        "time": 1.7e9 + tag / 3,
        "ticks": 2**64 - 1 - tag,
        "offsets": np.array([-tag, tag], np.int8),
        "half": np.array([tag / 7, -1], np.float16),
        "gripper": tag % 3,
        "box": F.BBox(0.0, 0.25, 0.5, 1.0),
        "deep": {"er": -tag},
        "points": np.arange(step),
        "shapes": np.zeros((step, 2), np.int16),
        "clip": np.zeros((2, 4, 4, 3), np.uint8),
        "natural_language_instruction": f"pick up block {number}",
    }
    return {
        "observation": observation,
        "action": {"world_vector": np.array([number, step, 0.5], np.float32), "terminate": step == length - 1},
        "reward": float(step == length - 1),
        "is_first": step == 0,
        "is_last": step == length - 1,
        "is_terminal": step == length - 1 and number == 1,
        "language_embedding": np.full(4, tag, np.float32),
        "subtask": f"part {step}",
    }


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{path}/{key}" if path else key)
    else:
        yield path, tree


def read_by_library(directory: Path) -> dict[str, np.ndarray]:
    """What as_dataset gives, by `NUMBER/FEATURE`."""
    jpegs = {"steps": {"observation": {"image": tfds.decode.SkipDecoding()}}}
    found = {}
    for episode in tfds.builder_from_directory(directory).as_dataset(split="train", decoders=jpegs):
        number = int(episode["episode_metadata"]["number"])
        steps = [dict(flat(step)) for step in episode["steps"]]
        for name in steps[0]:
            values = [step[name] for step in steps]
            if name == "observation/image":
                values = [tf.io.decode_jpeg(value, dct_method="INTEGER_ACCURATE") for value in values]
            if name.rpartition("/")[2] not in ("points", "shapes", "clip") and values[0].dtype != tf.string:
                found[f"{number}/{name}"] = np.stack([value.numpy() for value in values])
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name, builder, file_format in (
            ("game_tfrecord", Game, "tfrecord"),
            ("game_array_record", Game, "array_record"),
            ("arm", Arm, "tfrecord"),
        ):
            made = builder(data_dir=root / name, file_format=file_format)
            config = tfds.download.DownloadConfig(num_shards=2 if builder is Game else 1)
            made.download_and_prepare(download_config=config)
        np.savez_compressed(HERE / "arm.npz", **read_by_library(root / "arm" / "arm" / "0.1.0"))
        with zipfile.ZipFile(HERE / "datasets.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(root))


if __name__ == "__main__":
    main()
