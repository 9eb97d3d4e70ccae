"""What `write` writes is read by robomimic 0.3.0 and Isaac Lab 3.0.0, and is the log.

They are not among the project's requirements, so that these tests are skipped without them. In the environment of
`tests/data/interop/hdf5/make.py`, with pytest and hypothesis:

    PYTHONPATH=.:lab venv/bin/python -m pytest -p no:cacheprovider -W default tests/interop/test_hdf5_readers.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers.dataset import RingBufferDataset
from buffers.interop import hdf5
from buffers.interop.alignment import rows_on_arrival
from tests.data.interop.hdf5.make import import_isaaclab
from tests.interop.hdf5_files import flattened
from tests.interop.logged import play

has_isaaclab = any((Path(folder) / "isaaclab" / "utils" / "datasets").is_dir() for folder in sys.path)


def played() -> RingBufferDataset:
    ring = RingBufferDataset(1000)
    # robomimic reads demos by their numbers: more than ten.
    for number, log in enumerate(2 * play()):
        steps = {name: log[name] for name in ("action", "reward", "terminated", "truncated")}
        rows = rows_on_arrival({"image": log["image"], "vector": log["obs"]}, steps)
        states = {"rigid_object": {"cube": {"count": log["state"]}}}
        ring.add_episode(
            {**rows, "states": states}, {"mask/even": number % 2 == 0, "seed": number, "success": number > 3}
        )
    return ring


@pytest.mark.parametrize("cache", [None, "low_dim", "all"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_robomimic_reads_the_log(cache: str | None, compression: str | None, tmp_path: Path) -> None:
    pytest.importorskip("robomimic")
    import robomimic.utils.file_utils as file_utils
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.utils.dataset import SequenceDataset

    path = str(tmp_path / "a.hdf5")
    environment = {"env_name": "Game", "type": 2, "env_kwargs": {}}
    hdf5.write(played(), path, compression=compression, env_args=environment)
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ["vector"], "rgb": ["image"]}})
    assert file_utils.get_env_metadata_from_dataset(path) == environment
    shapes = file_utils.get_shape_metadata_from_dataset(path, all_obs_keys=["vector"])
    assert shapes["ac_dim"] == 2 and shapes["all_shapes"]["vector"] == [3]
    assert file_utils.get_demos_for_filter_key(path, "even") == [f"demo_{n}" for n in range(0, 12, 2)]

    keys = ("actions", "rewards", "dones")
    dataset = SequenceDataset(path, ("vector", "image"), keys, hdf5_cache_mode=cache)
    assert dataset.demos == [f"demo_{n}" for n in range(12)]
    if cache != "all":
        for number, log in enumerate(2 * play()):
            found = dataset.get_trajectory_at_index(number)
            np.testing.assert_array_equal(found["obs"]["vector"], log["obs"][:-1])
            np.testing.assert_array_equal(found["next_obs"]["vector"], log["obs"][1:])
            np.testing.assert_array_equal(found["obs"]["image"], log["image"][:-1])
            np.testing.assert_array_equal(found["actions"], log["action"])
            np.testing.assert_array_equal(found["rewards"], log["reward"])
            np.testing.assert_array_equal(found["dones"], log["terminated"] | log["truncated"])
    items = [dataset[index] for index in range(len(dataset))]
    logs = 2 * play()
    np.testing.assert_array_equal(
        np.concatenate([item["obs"]["vector"] for item in items]), np.concatenate([log["obs"][:-1] for log in logs])
    )
    np.testing.assert_array_equal(
        np.concatenate([item["actions"] for item in items]), np.concatenate([log["action"] for log in logs])
    )
    even = SequenceDataset(path, ("vector",), keys, hdf5_cache_mode=cache, filter_by_attribute="even")
    assert len(even) == sum(len(log["action"]) for log in logs[::2])


@pytest.mark.skipif(not has_isaaclab, reason="isaaclab is not on the path")
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_isaac_lab_reads_the_log(compression: str | None, tmp_path: Path) -> None:
    _, handler_class, _ = import_isaaclab()
    path = str(tmp_path / "a.hdf5")
    hdf5.write(played(), path, layout="isaaclab", compression=compression, env_args={"env_name": "Game", "type": 2})
    handler = handler_class()
    handler.open(path)
    assert handler.get_num_episodes() == 12 and handler.get_env_name() == "Game"
    assert not handler.is_legacy_quaternion_format()
    for number, log in enumerate(2 * play()):
        episode = handler.load_episode(f"demo_{number}", "cpu")
        assert (episode.seed, bool(episode.success)) == (number, number > 3)
        expected: dict[str, Any] = {
            "obs": {"image": log["image"][:-1], "vector": log["obs"][:-1]},
            "actions": log["action"],
            "initial_state": {"rigid_object": {"cube": {"count": log["state"][:1]}}},
            "states": {"rigid_object": {"cube": {"count": log["state"][1:]}}},
            "rewards": log["reward"],
        }
        found = flattened(episode.data)
        for name, values in flattened(expected).items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)
        for step in range(len(log["action"])):
            np.testing.assert_array_equal(episode.get_next_action(), log["action"][step])
            state = episode.get_next_state()["rigid_object"]["cube"]["count"]
            np.testing.assert_array_equal(state[0], log["state"][step + 1])
    handler.close()
