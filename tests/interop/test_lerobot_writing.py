"""What is written as a LeRobot dataset is there again when it is read, and says what it could not hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.dataset.fields import ColorImage, Fields, Scalar, TensorType
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.interop import export_episodes, import_episodes, lerobot
from buffers.interop.alignment import FINAL_MISSING
from buffers.interop.lerobot import data_writer, meta_writer, video_writer, writing
from buffers.interop.lerobot.statistics import Statistics, of_images, of_numbers
from tests.interop.lerobot_helpers import (
    CLOSE,
    EPISODES,
    FPS,
    INFO,
    OPEN,
    ROWS,
    as_arrived,
    as_observed,
    change_feature,
    change_table,
    check_equal,
    dataset_of,
    leaves,
    rows_of,
    steps_of,
    unpacked,
    with_column,
    written,
)

LENGTHS = (3, 1, 4)


def read_again(path: Path, **options: Any) -> list[dict[str, np.ndarray]]:
    with lerobot.read(path, **options) as reader:
        return [dict(leaves(rows)) for rows, _ in reader]


def test_rows_come_back_but_the_final_observation(tmp_path: Path) -> None:
    found = read_again(written(tmp_path, *LENGTHS))
    assert len(found) == len(LENGTHS)
    for episode, (rows, length) in enumerate(zip(found, LENGTHS, strict=True)):
        steps = steps_of(episode, length)
        for name, values in leaves(steps["obs"], "obs/"):
            check_equal(rows.pop(name), as_observed(values[:-1]), name)
        for name in ("action", "reward", "terminated", "truncated", "grid"):
            check_equal(rows.pop(name), as_arrived(steps[name]), name)
        assert set(rows) == {"is_first", FINAL_MISSING}


def test_infos_come_back(tmp_path: Path) -> None:
    path = written(tmp_path, *LENGTHS)
    assert [info for _, info in lerobot.read(path)] == [
        {"number": i, "good": i % 2 == 0, "note": f"no. {i}", "score": i / 3, "task": OPEN} for i in range(3)
    ]


def test_the_summary_says_what_was_written_and_lost(tmp_path: Path) -> None:
    summary = lerobot.write(dataset_of(*LENGTHS), tmp_path / "target", fps=FPS)
    assert (summary.num_episodes, summary.num_steps) == (3, sum(LENGTHS) + 3)
    assert summary.lost == ["Final observations are left out: LeRobot has none."]
    assert summary.target == str(tmp_path / "target")


def test_an_imported_dataset_that_is_exported_is_equal_to_its_source(tmp_path: Path) -> None:
    for name in ("images", "others", "v21"):
        path, directory, target = unpacked(name, tmp_path), tmp_path / f"{name}.ours", tmp_path / f"{name}.again"
        import_episodes("lerobot", path, directory, video="skip")
        summary = export_episodes("lerobot", directory, target)
        assert summary.lost == []
        source, again = lerobot.read(path, video="skip"), lerobot.read(target)
        for (rows, info), (others, other_info) in zip(source, again, strict=True):
            assert info == other_info
            found, expected = dict(leaves(others)), dict(leaves(rows))
            assert found.keys() == expected.keys()
            for field in expected:
                check_equal(found[field], expected[field], field)
        features = source.metadata["features"]
        kept = {name: features[name] for name in features if name not in ("operator", "observation.images.cam")}
        assert again.metadata == {**source.metadata, "features": kept, "codebase_version": "v3.0"}


def test_irregular_times_come_back(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    times = (np.arange(21) * 0.11).astype(np.float32)
    change_table(path, ROWS, lambda table: with_column(table, "timestamp", pa.array(times)))
    import_episodes("lerobot", path, tmp_path / "ours")
    assert export_episodes("lerobot", tmp_path / "ours", tmp_path / "again").lost == []
    for rows, others in zip(read_again(path), read_again(tmp_path / "again"), strict=True):
        check_equal(rows["timestamp"], others["timestamp"])


FIELD = st.tuples(
    st.sampled_from(["float32", "float64", "float16", "int8", "uint8", "int64", "uint16", "bool"]),
    st.sampled_from([(), (1,), (3,), (2, 3), (1, 1), (4, 5, 3), (3, 4, 5), (2, 3, 2, 2)]),
)


def test_frames_of_video_are_found_although_the_times_were_irregular(tmp_path: Path) -> None:
    dataset = RingBufferDataset(100)
    for episode in range(2):
        image = np.zeros((7, 64, 64, 3), np.uint8)
        image[..., 0], image[..., 1] = 30 * np.arange(7)[:, None, None], 100 * episode
        dataset.add_episode({"obs": {"cam": image}, "action": np.arange(7)}, {"task": OPEN})
    lerobot.write(dataset, tmp_path / "images", fps=FPS)
    times = np.concatenate([np.arange(6) / 5, np.arange(6) / 5]).astype(np.float32)  # Half as many as `fps` says.
    change_table(tmp_path / "images", ROWS, lambda table: with_column(table, "timestamp", pa.array(times)))
    import_episodes("lerobot", tmp_path / "images", tmp_path / "ours")
    summary = export_episodes("lerobot", tmp_path / "ours", tmp_path / "video", video=True)
    assert any("`timestamp` is `frame_index / fps`, and not the field" in text for text in summary.lost)
    for rows, expected in zip(read_again(tmp_path / "video"), read_again(tmp_path / "images"), strict=True):
        difference = rows["obs/cam"].astype(int) - expected["obs/cam"]
        assert np.abs(difference.mean((1, 2))).max() < 9
        assert "timestamp" not in rows


def test_times_that_float32_changes_are_said(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    times = pa.array(1.7e9 + np.arange(21) * 0.1)
    change_table(path, ROWS, lambda table: with_column(table, "timestamp", times))
    change_feature(path, "timestamp", dtype="float64")
    import_episodes("lerobot", path, tmp_path / "ours")
    summary = export_episodes("lerobot", tmp_path / "ours", tmp_path / "again")
    assert summary.lost == ["`timestamp` is float32 in LeRobot, which has changed some."]


def test_tasks_keep_their_numbers(tmp_path: Path) -> None:
    dataset = dataset_of(2)
    dataset.add_episode(rows_of(1, 3), {"task": CLOSE})
    lerobot.write(dataset, tmp_path / "first", fps=FPS)
    indexes = pa.array([1, 1, 1, 0, 0])
    change_table(tmp_path / "first", ROWS, lambda table: with_column(table, "task_index", indexes))
    import_episodes("lerobot", tmp_path / "first", tmp_path / "ours")
    assert export_episodes("lerobot", tmp_path / "ours", tmp_path / "again").lost == []
    assert pq.read_table(tmp_path / "again" / ROWS, partitioning=None)["task_index"].to_pylist() == indexes.to_pylist()
    assert lerobot.read(tmp_path / "again").metadata["tasks"] == {"0": OPEN, "1": CLOSE}


def test_numbers_of_tasks_that_are_not_kept_are_said(tmp_path: Path) -> None:
    dataset = dataset_of(2)
    dataset.add_episode(rows_of(1, 3), {"task": CLOSE})
    lerobot.write(dataset, tmp_path / "first", fps=FPS)
    indexes = pa.array([7, 7, 7, 0, 0])
    change_table(tmp_path / "first", ROWS, lambda table: with_column(table, "task_index", indexes))
    change_table(
        tmp_path / "first", "meta/tasks.parquet", lambda table: with_column(table, "task_index", pa.array([0, 7]))
    )
    import_episodes("lerobot", tmp_path / "first", tmp_path / "ours")
    summary = export_episodes("lerobot", tmp_path / "ours", tmp_path / "again")
    assert summary.lost == ["Tasks get other numbers: `task_index` changes, and not their texts."]


def test_a_task_that_is_a_number_becomes_text(tmp_path: Path) -> None:
    dataset = dataset_of(2, task=None)
    dataset.add_episode(rows_of(1, 2), {"task": 3})
    assert any("that is a number becomes text" in text for text in lerobot.write(dataset, tmp_path / "a", fps=1).lost)
    assert [info["task"] for _, info in lerobot.read(tmp_path / "a")] == ["", "3"]


PATHS = ["obs", "action", "reward", "done", "timestamp", "task_index", "index", "next.x", "x.y", "a/b", "observation.z"]


@settings(max_examples=15)
@given(
    names=st.lists(st.sampled_from(PATHS), unique=True, max_size=5),
    kinds=st.lists(FIELD, min_size=9, max_size=9),
    nesting=st.sampled_from(["none", "dict", "deep"]),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_any_fields_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    kinds: list[tuple[str, tuple[int, ...]]],
    nesting: str,
    lengths: list[int],
) -> None:
    rng = np.random.default_rng(0)

    def values(number: int, num_rows: int) -> np.ndarray:
        dtype, shape = kinds[number]
        return rng.integers(0, 2 if dtype == "bool" else 100, (num_rows, *shape)).astype(dtype)

    def episode(length: int) -> dict[str, Any]:
        rows: dict[str, Any] = {name: values(i, length + 1) for i, name in enumerate(names)}
        leaf = values(8, length + 1)
        obs = {"none": leaf, "dict": {"state": leaf, "a.b": values(7, length + 1)}, "deep": {"x": {"y": {"z": leaf}}}}
        rows["obs"] = obs[nesting]
        if nesting == "deep":
            rows["info"] = {"p": values(6, length + 1), "q": {"r": values(7, length + 1)}}
        for name in rows:
            if name != "obs":
                for _, array in leaves({name: rows[name]}):
                    array[0] = 0
        return rows

    directory = tmp_path_factory.mktemp("any")
    dataset, episodes = RingBufferDataset(100), [episode(length) for length in lengths]
    for rows in episodes:
        dataset.add_episode(rows)
    lerobot.write(dataset, directory / "written", fps=2.5, task="any")
    for found, rows in zip(read_again(directory / "written"), episodes, strict=True):
        expected = dict(leaves(rows))
        assert found.keys() == expected.keys() | {"is_first", FINAL_MISSING}
        for name, array in expected.items():
            is_obs = name.partition("/")[0] == "obs"
            check_equal(found[name], as_observed(array[:-1]) if is_obs else array, name)


def test_flags_are_also_written_as_lerobot_reads_them(tmp_path: Path) -> None:
    path = written(tmp_path, *LENGTHS)
    table = pq.read_table(path / ROWS, partitioning=None)
    expected = np.concatenate(
        [steps_of(i, n)["terminated"] | steps_of(i, n)["truncated"] for i, n in enumerate(LENGTHS)]
    )
    assert table["next.done"].to_pylist() == expected.tolist()
    assert "done" not in read_again(path)[0]


def test_done_of_the_dataset_itself_is_kept(tmp_path: Path) -> None:
    dataset = RingBufferDataset(100)
    rows = rows_of(0, 3)
    dataset.add_episode({**rows, "done": np.array([False, True, False, False])})
    lerobot.write(dataset, tmp_path / "target", fps=1)
    assert read_again(tmp_path / "target")[0]["done"].tolist() == [False, True, False, False]


def test_what_lerobot_cannot_hold_is_said(tmp_path: Path) -> None:
    dataset = RingBufferDataset(100)
    rows = rows_of(0, 3)
    rows |= {"z": np.zeros((4, 2), np.complex64), "none": np.ones((4, 0))}
    rows |= {"many": np.zeros((4, 1, 1, 1, 1, 1, 2)), "value": np.arange(1.0, 5)}
    dataset.add_episode(rows, {"score": 1})
    dataset.add_episode(rows, {"score": "good"})
    dataset.add_episode({name: value for name, value in rows.items()}, {"score": 2.5})
    summary = lerobot.write(dataset, tmp_path / "target", fps=1)
    assert set(summary.lost) == {
        "`z` is left out: LeRobot holds no complex64.",
        "`none` is left out: LeRobot holds no empty arrays.",
        "`many` is left out: LeRobot holds no arrays of more than 5 axes.",
        "`value` of first rows, which belong to no transition, is left out where it is not zero.",
        "Final observations are left out: LeRobot has none.",
        "Episodes without a `task` in their info have an empty one.",
    }


def test_episodes_without_a_transition_are_left_out(tmp_path: Path) -> None:
    dataset = dataset_of(3)
    dataset.add_episode({name: _first(value) for name, value in rows_of(1, 1).items()})
    dataset.add_episode(rows_of(2, 2))
    summary = lerobot.write(dataset, tmp_path / "target", fps=1)
    assert summary.num_episodes == 2 and "Episodes of one row, without a transition, are left out." in summary.lost
    assert [rows["action"][-1, 0] for rows in read_again(tmp_path / "target")] == [2, 201]
    lonely = RingBufferDataset(100)
    lonely.add_episode({name: _first(value) for name, value in rows_of(1, 1).items()})
    with pytest.raises(ValueError, match="no episode with a transition"):
        lerobot.write(lonely, tmp_path / "other", fps=1)
    assert not [*tmp_path.glob("other*")]


def _first(value: Any) -> Any:
    return {key: _first(item) for key, item in value.items()} if isinstance(value, dict) else value[:1]


def test_tasks_are_those_of_the_infos(tmp_path: Path) -> None:
    dataset = dataset_of(2)
    dataset.add_episode(rows_of(1, 2), {"task": CLOSE})
    dataset.add_episode(rows_of(2, 2))
    lerobot.write(dataset, tmp_path / "target", fps=1, task="wait")
    assert [info["task"] for _, info in lerobot.read(tmp_path / "target")] == [OPEN, CLOSE, "wait"]
    table = pq.read_table(tmp_path / "target" / EPISODES, partitioning=None)
    assert table["tasks"].to_pylist() == [[OPEN], [CLOSE], ["wait"]]


def test_frames_a_second_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LeRobot needs `fps`"):
        lerobot.write(dataset_of(2), tmp_path / "target")
    with pytest.raises(ValueError, match="`fps` must be finite"):
        lerobot.write(dataset_of(2), tmp_path / "target", fps=0)
    assert not [*tmp_path.iterdir()]
    lerobot.write(dataset_of(2), tmp_path / "target", fps=2.5, robot_type="arm")
    info = json.loads((tmp_path / "target" / INFO).read_text())
    assert (info["fps"], info["robot_type"]) == (2.5, "arm")
    times = pq.read_table(tmp_path / "target" / ROWS, partitioning=None)["timestamp"].to_numpy()
    check_equal(times, (np.arange(2) / 2.5).astype(np.float32))


def test_fields_and_episodes_can_be_chosen(tmp_path: Path) -> None:
    path = written(tmp_path, *LENGTHS, fields=["obs/state", "action"], limit=2)
    found = read_again(path)
    assert len(found) == 2 and {"obs/state", "action"} == set(found[0]) - {"is_first", FINAL_MISSING}
    with pytest.raises(ValueError, match="Formats need the field `obs`"):
        lerobot.write(dataset_of(2), tmp_path / "other", fps=1, fields=["action"])


def test_nothing_is_left_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(3, 2)
    arrays = RingBufferDataset.arrays_of_id

    def failing(self: RingBufferDataset, episode_id: int) -> Any:
        if episode_id == dataset.table.ids[1]:
            raise OSError(28, "No space left on device")
        return arrays(self, episode_id)

    monkeypatch.setattr(RingBufferDataset, "arrays_of_id", failing)
    with pytest.raises(OSError, match="No space"):
        lerobot.write(dataset, tmp_path / "target", fps=1)
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    lerobot.write(dataset, tmp_path / "target", fps=1)
    with pytest.raises(ValueError, match="exists. Choose another path"):
        lerobot.write(dataset, tmp_path / "target", fps=1)


def test_long_episodes_and_datasets_take_several_groups_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_writer, "_MOST_GROUP_BYTES", 1000)
    monkeypatch.setattr(writing, "_DATA_MB", 1e-3)
    monkeypatch.setattr(writing, "_FILES_A_CHUNK", 2)
    lengths = (9, 1, 2, 5)
    path = written(tmp_path, *lengths)
    files = sorted(str(file.relative_to(path)) for file in path.glob("data/*/*"))
    assert files == [f"data/chunk-00{n // 2}/file-00{n % 2}.parquet" for n in range(4)]
    assert pq.ParquetFile(path / files[0]).metadata.num_row_groups > 2
    for episode, (rows, length) in enumerate(zip(read_again(path), lengths, strict=True)):
        check_equal(rows["obs/images/top"], as_observed(steps_of(episode, length)["obs"]["images"]["top"][:-1]))


def test_many_episodes_have_their_statistics_in_many_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_writer, "_A_GROUP", 2)
    path = written(tmp_path, 2, 1, 3, 1, 2)
    table = pq.read_table(path / EPISODES, partitioning=None)
    assert table["stats/action/count"].to_pylist() == [[2], [1], [3], [1], [2]]
    assert len(read_again(path)) == 5


def test_images_are_images_however_their_field_is_declared(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), np.uint8)
    for number, kind in enumerate((TensorType((8, 8, 3), torch.uint8), ColorImage((8, 8, 3)))):
        dataset = RingBufferDataset(100, EpisodeDatasetInfo(Fields(obs=kind, action=Scalar())))
        dataset.add_episode({"obs": images, "action": np.zeros(4, np.float32)})
        lerobot.write(dataset, tmp_path / str(number), fps=FPS, task="see")
        features = json.loads((tmp_path / str(number) / INFO).read_text())["features"]
        assert features["observation.image"]["dtype"] == "image"
        (rows,) = read_again(tmp_path / str(number))
        check_equal(rows["obs"][:-1], images[:-1])


def test_video_is_written_on_request(tmp_path: Path) -> None:
    dataset = RingBufferDataset(1000)
    gray = [20 + 60 * episode + 4 * np.arange(length + 1) for episode, length in enumerate((3, 1, 6))]
    for values in gray:
        image = np.broadcast_to(values[:, None, None, None], (len(values), 64, 66, 3)).astype(np.uint8)
        rows = {"obs": {"cam": image, "chw": image.transpose(0, 3, 1, 2), "small": image[..., :1]}}
        dataset.add_episode({**rows, "action": np.arange(len(values))})
    lerobot.write(dataset, tmp_path / "target", fps=FPS, task="see", video=True)
    info = json.loads((tmp_path / "target" / INFO).read_text())
    kinds = {name: feature["dtype"] for name, feature in info["features"].items() if name.startswith("observation")}
    assert kinds == {"observation.cam": "video", "observation.chw": "video", "observation.small": "image"}
    for rows, values in zip(read_again(tmp_path / "target"), gray, strict=True):
        assert rows["obs/cam"].shape[1:] == (64, 66, 3) and rows["obs/chw"].shape[1:] == (3, 64, 66)
        for name in ("obs/cam", "obs/chw"):
            assert np.abs(rows[name].mean((1, 2, 3))[:-1] - values[:-1]).max() < 2
        check_equal(rows["obs/small"][:-1, 0, 0, 0], values[:-1].astype(np.uint8))


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="Linux only")
def test_encoding_leaves_the_priority_of_the_process_alone(tmp_path: Path) -> None:
    # As root, the encoder makes the thread that calls it a real-time one. Others cannot see the difference.
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    lerobot.write(dataset_of_images(), tmp_path / "target", fps=FPS, task="see", video=True)
    try:
        assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before
    finally:
        os.sched_setscheduler(0, *before)


def dataset_of_images() -> RingBufferDataset:
    dataset = RingBufferDataset(10)
    dataset.add_episode({"obs": {"cam": np.zeros((3, 64, 64, 3), np.uint8)}, "action": np.arange(3)})
    return dataset


def test_what_the_codec_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_writer, "_CODEC", "none")
    with pytest.raises(ValueError, match="cannot be encoded as video .*leave out `video`"):
        lerobot.write(dataset_of(2), tmp_path / "target", fps=1, video=True)
    assert not [*tmp_path.iterdir()]


def test_statistics_are_those_of_all_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    episodes = [rng.normal(3, 2, (length, 2, 3)) for length in (4, 1, 7)]
    images = [rng.integers(0, 256, (length, 5, 4, 3), np.uint8) for length in (4, 1, 7)]
    found = Statistics()
    for numbers, pictures in zip(episodes, images, strict=True):
        found.add("numbers", of_numbers(numbers))
        found.add("images", of_images(pictures))
    whole = {"numbers": np.concatenate(episodes), "images": np.concatenate(images) / 255}
    for name, axes in (("numbers", (0, 1)), ("images", (0, 1, 2))):
        for key in ("min", "max", "mean", "std"):
            expected = getattr(np, key)(whole[name], axis=axes)
            shape = (3, 1, 1) if name == "images" else (3,)
            assert np.allclose(found.as_json()[name][key], expected.reshape(shape), rtol=1e-9, atol=1e-9), (name, key)
        assert found.as_json()[name]["count"] == [12]
    assert np.allclose(of_numbers(episodes[2])["q10"], np.quantile(episodes[2].reshape(-1, 3), 0.1, 0))
    expected = np.quantile(images[2].reshape(-1, 3), 0.9, 0, method="inverted_cdf") / 255
    assert np.allclose(of_images(images[2])["q90"][:, 0, 0], expected)
    constant = of_images(np.full((2, 3, 3, 1), 77, np.uint8))
    assert constant["std"].item() < 1e-6 and constant["min"] == constant["max"]


def test_an_export_of_a_directory_is_the_same(tmp_path: Path) -> None:
    with IndividualFileDataset(100, directory=tmp_path / "ours") as dataset:
        for episode, length in enumerate(LENGTHS):
            dataset.add_episode(rows_of(episode, length), {"task": OPEN})
    export_episodes("lerobot", tmp_path / "ours", tmp_path / "target", fps=FPS)
    for found, expected in zip(read_again(tmp_path / "target"), read_again(written(tmp_path, *LENGTHS)), strict=True):
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
