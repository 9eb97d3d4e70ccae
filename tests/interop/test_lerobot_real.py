"""What we write is loaded by LeRobot itself, which gives the log. Skipped where LeRobot is not installed.

It needs Python 3.12, so it has an environment of its own:

    python3.12 -m venv v30
    v30/bin/pip install "lerobot[dataset]==0.6.1" torch==2.11.0 datasets==4.8.5 numpy==2.2.6 pytest hypothesis
    v30/bin/python -m pytest tests/interop/test_lerobot_real.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers.dataset import RingBufferDataset
from buffers.interop import export_episodes, import_episodes, lerobot
from tests.interop.lerobot_helpers import CLOSE, FPS, OPEN, dataset_of, leaves, log_of, rows_of, steps_of, unpacked

pytest.importorskip("lerobot")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (3, 1, 6)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No connection, no cache outside of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert os.environ.get("HF_HUB_OFFLINE", "1") == "1"
    yield


def loaded(path: Path, **options: Any) -> Any:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/ours", root=path, video_backend="pyav", **options)


def uint8(image: torch.Tensor) -> np.ndarray:
    """(C, H, W) in [0, 1] as (H, W, C)."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_lerobot_gives_the_log(tmp_path: Path) -> None:
    lerobot.write(dataset_of(*LENGTHS), tmp_path / "ours", fps=FPS, robot_type="arm")
    dataset = loaded(tmp_path / "ours")
    assert (len(dataset), dataset.num_episodes, dataset.fps) == (sum(LENGTHS), len(LENGTHS), FPS)
    assert dataset.meta.robot_type == "arm"
    position = 0
    for episode, length in enumerate(LENGTHS):
        steps = steps_of(episode, length)
        obs = dict(leaves(steps["obs"]))
        for frame in range(length):
            item = dataset[position]
            where = (int(item["episode_index"]), int(item["frame_index"]), int(item["index"]), item["task"])
            assert where == (episode, frame, position, OPEN)
            assert float(item["timestamp"]) == np.float32(frame / FPS)
            for name in ("state", "speed"):
                assert item[f"observation.{name}"].numpy().tolist() == obs[name][frame].astype(np.float32).tolist()
            for name in ("action", "grid"):
                assert np.array_equal(item[name].numpy(), steps[name][frame])
            assert float(item["next.reward"]) == np.float32(steps["reward"][frame])
            flags = [bool(steps[name][frame]) for name in ("terminated", "truncated")]
            assert [bool(item[f"next.{name}"]) for name in ("terminated", "truncated", "done")] == [*flags, any(flags)]
            assert np.array_equal(uint8(item["observation.images.top"]), obs["images/top"][frame])
            assert np.array_equal(
                uint8(item["observation.images.wrist"]), obs["images/wrist"][frame].transpose(1, 2, 0)
            )
            assert np.array_equal(uint8(item["observation.images.gray"]), obs["images/gray"][frame])
            position += 1


def test_lerobot_reads_windows_within_episodes(tmp_path: Path) -> None:
    lerobot.write(dataset_of(*LENGTHS), tmp_path / "ours", fps=FPS)
    deltas = {"action": [0.0, 0.1, 0.2], "observation.images.top": [-0.1, 0.0]}
    dataset = loaded(tmp_path / "ours", delta_timestamps=deltas)
    item = dataset[5]  # Frame 1 of episode 2, of 6 frames.
    assert item["action"][:, 0].tolist() == [201, 202, 203] and item["observation.images.top"].shape[0] == 2
    item = dataset[2]
    assert item["action"][:, 0].tolist() == [2, 2, 2] and item["action_is_pad"].tolist() == [False, True, True]
    assert [int(value) for value in dataset.meta.episodes["dataset_to_index"]] == [3, 4, 10]


def test_lerobot_finds_the_statistics_of_all_frames(tmp_path: Path) -> None:
    lerobot.write(dataset_of(*LENGTHS), tmp_path / "ours", fps=FPS)
    dataset = loaded(tmp_path / "ours")
    actions = np.concatenate([steps_of(episode, length)["action"] for episode, length in enumerate(LENGTHS)])
    found = dataset.meta.stats["action"]
    assert np.allclose(found["mean"], actions.mean(0)) and np.allclose(found["std"], actions.std(0), rtol=1e-5)
    assert found["count"].tolist() == [sum(LENGTHS)]
    assert dataset.meta.stats["observation.images.top"]["mean"].shape == (3, 1, 1)


def test_lerobot_finds_several_tasks(tmp_path: Path) -> None:
    dataset = RingBufferDataset(100)
    for episode, task in enumerate((OPEN, CLOSE, OPEN)):
        dataset.add_episode(rows_of(episode, 2), {"task": task})
    lerobot.write(dataset, tmp_path / "ours", fps=FPS)
    found = loaded(tmp_path / "ours")
    assert [found[i]["task"] for i in range(6)] == [OPEN, OPEN, CLOSE, CLOSE, OPEN, OPEN]
    assert found.meta.total_tasks == 2 and found.meta.episodes["tasks"] == [[OPEN], [CLOSE], [OPEN]]


@pytest.mark.parametrize("name", ["images", "others", "v21"])
def test_a_dataset_that_went_through_ours_is_loaded_as_before(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    import_episodes("lerobot", path, tmp_path / "ours", video="skip")
    export_episodes("lerobot", tmp_path / "ours", tmp_path / "again")
    again = loaded(tmp_path / "again")
    tasks = [again[i]["task"] for i in range(len(again))]
    if name != "v21":  # Which LeRobot 0.6.1 does not load.
        before = loaded(path)
        for i in range(len(before)):
            expected, found = before[i], again[i]
            for feature in found:
                same = torch.equal if isinstance(found[feature], torch.Tensor) else lambda a, b: a == b
                if feature != "task_index":
                    assert same(found[feature], expected[feature]), feature
    lengths = [len(log["action"]) for log in log_of(name)]
    assert len(tasks) == sum(lengths)
    assert tasks[-11:-5] == [OPEN] + [CLOSE] * 5 if name != "others" else True
    found = np.concatenate([again[i]["action"].numpy()[None] for i in range(len(again))])
    assert np.array_equal(found, np.concatenate([log["action"] for log in log_of(name)]))


def test_lerobot_decodes_the_video(tmp_path: Path) -> None:
    dataset = RingBufferDataset(1000)
    gray = [20 + 60 * episode + 4 * np.arange(length + 1) for episode, length in enumerate(LENGTHS)]
    for values in gray:
        image = np.broadcast_to(values[:, None, None, None], (len(values), 64, 64, 3)).astype(np.uint8)
        dataset.add_episode({"obs": {"cam": image}, "action": np.arange(len(values), dtype=np.float32)})
    lerobot.write(dataset, tmp_path / "ours", fps=FPS, task="see", video=True)
    found = loaded(tmp_path / "ours")
    expected = np.concatenate([values[:-1] for values in gray])
    ours = np.concatenate([rows["obs"]["cam"][:-1] for rows, _ in lerobot.read(tmp_path / "ours")])
    for i in range(len(found)):
        image = uint8(found[i]["observation.cam"])
        assert abs(float(image.mean()) - expected[i]) < 2
        assert np.array_equal(image, ours[i])


def test_lerobot_merges_datasets(tmp_path: Path) -> None:
    from lerobot.datasets.aggregate import aggregate_datasets

    # It does not merge features that are matrices, its own included.
    fields = ["obs/images/top", "obs/state", "action", "reward", "terminated"]
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        lerobot.write(dataset_of(*LENGTHS), root, fps=FPS, fields=fields)
    aggregate_datasets(["local/one", "local/two"], "local/both", roots=roots, aggr_root=tmp_path / "both")
    assert len(loaded(tmp_path / "both")) == 2 * sum(LENGTHS)
    # And it is read again.
    found = [rows["action"][-1, 0] for rows, _ in lerobot.read(tmp_path / "both")]
    assert found == [2, 100, 205, 2, 100, 205]


def test_lerobot_records_on(tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    lerobot.write(
        dataset_of(*LENGTHS),
        tmp_path / "ours",
        fps=FPS,
        fields=["obs/state", "obs/speed", "obs/images/top", "obs/images/wrist", "action"],
    )
    dataset = LeRobotDataset.resume("local/ours", root=tmp_path / "ours")
    for frame in range(2):
        steps = steps_of(3, 2)
        row = {
            "observation.state": steps["obs"]["state"][frame],
            "observation.speed": steps["obs"]["speed"][frame : frame + 1],
            **{f"observation.images.{name}": steps["obs"]["images"][name][frame] for name in ("top", "wrist")},
        }
        dataset.add_frame({**row, "action": steps["action"][frame], "task": CLOSE})
    dataset.save_episode()
    dataset.finalize()
    assert len(loaded(tmp_path / "ours")) == sum(LENGTHS) + 2
    with lerobot.read(tmp_path / "ours") as reader:
        found = [(rows["action"][-1, 0], info["task"], info.get("number")) for rows, info in reader]
    assert found == [(2, OPEN, 0), (100, OPEN, 1), (205, OPEN, 2), (301, CLOSE, None)]
