"""Datasets that LeRobot 0.6.1 (v3.0) and 0.3.3 (v2.1) have written are read row by row as they were logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from buffers.dataset import IndividualFileDataset
from buffers.interop import FormatError, import_episodes, lerobot
from buffers.interop.lerobot.frames import FrameReader
from tests.interop.lerobot_helpers import (
    CLOSE,
    EPISODES,
    FPS,
    LENGTHS,
    OPEN,
    ROWS,
    as_arrived,
    as_observed,
    change_feature,
    change_info,
    change_table,
    check_equal,
    leaves,
    log_of,
    unpacked,
    with_column,
    written,
)
from tests.interop.made_up import killed_before

# feature -> (field, how its frames become rows, whether (1,) becomes a scalar)
OBSERVED, ARRIVED = as_observed, as_arrived
FIELDS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], bool]] = {
    "observation.state": ("obs/state", OBSERVED, False),
    "observation.gripper": ("obs/gripper", OBSERVED, False),
    "observation.images.top": ("obs/images/top", OBSERVED, False),
    "observation.images.wrist": ("obs/images/wrist", OBSERVED, False),
    "observation.depth": ("obs/depth", OBSERVED, False),
    "observation.grid": ("obs/grid", OBSERVED, False),
    "observation.half": ("obs/half", OBSERVED, False),
    "action": ("action", ARRIVED, False),
    "next.reward": ("reward", ARRIVED, True),
    "next.done": ("done", ARRIVED, True),
    "next.success": ("success", ARRIVED, True),
    "aux": ("aux", ARRIVED, False),
}


def episodes_of(path: Path, **options: Any) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    with lerobot.read(path, **options) as reader:
        return [(dict(leaves(rows)), info) for rows, info in reader]


@pytest.mark.parametrize("name", ["images", "others", "video", "v21"])
def test_rows_are_those_that_lerobot_was_given(name: str, tmp_path: Path) -> None:
    log, found = log_of(name), episodes_of(unpacked(name, tmp_path))
    assert len(found) == len(log)
    for (rows, _), logged in zip(found, log, strict=True):
        expected = {}
        for feature, frames in logged.items():
            if feature == "observation.images.cam":
                expected["obs/images/cam"] = as_observed(frames.transpose(0, 2, 3, 1))
            elif feature in FIELDS:
                field, aligned, is_scalar = FIELDS[feature]
                expected[field] = aligned(frames[:, 0] if is_scalar else frames)
        for field, values in expected.items():
            check_equal(rows.pop(field), values, field)
        length = len(next(iter(logged.values())))
        assert rows.pop("is_first").tolist() == [True] + [False] * length
        assert rows.pop("final_obs_missing").tolist() == [False] * length + [True]
        assert list(rows) == ["task_index"]


def test_standard_fields_come_first_and_in_order(tmp_path: Path) -> None:
    (rows, _), *_ = episodes_of(unpacked("images", tmp_path))
    assert [name.partition("/")[0] for name in rows] == [
        *["obs"] * 4,
        *("action", "reward", "is_first", "final_obs_missing", "done", "success", "aux", "task_index"),
    ]


def test_a_task_is_found_by_its_text(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    assert [info["task"] for _, info in episodes_of(path)] == [OPEN, CLOSE, OPEN, OPEN]

    def swapped(table: pa.Table) -> pa.Table:
        return with_column(table, "task_index", pa.array([1, 0]))

    change_table(path, "meta/tasks.parquet", swapped)
    change_table(
        path, ROWS, lambda table: with_column(table, "task_index", pa.array(1 - table["task_index"].to_numpy()))
    )
    assert [info["task"] for _, info in episodes_of(path)] == [OPEN, CLOSE, OPEN, OPEN]


def test_a_task_that_changes_is_a_field_of_the_frames_own_time(tmp_path: Path) -> None:
    with lerobot.read(unpacked("images", tmp_path)) as reader:
        rows = [rows for rows, _ in reader]
        names = reader.metadata["tasks"]
    found = [names[str(number)] for number in rows[2]["task_index"].tolist()]
    assert found == [OPEN] * 7 + [CLOSE] * 6
    assert rows[2]["task_index"].shape == (13,) and [note for note in reader.notes if "task changes" in note]


def test_a_task_that_stays_is_no_field(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert all("task_index" not in rows for rows, _ in episodes_of(path))


def test_what_a_dataset_says_of_itself_is_its_metadata(tmp_path: Path) -> None:
    reader = lerobot.read(unpacked("images", tmp_path))
    assert (reader.num_episodes, reader.num_steps) == (4, sum(LENGTHS) + 4)
    found = reader.metadata
    assert (found["fps"], found["robot_type"], found["codebase_version"]) == (FPS, "arm", "v3.0")
    assert found["features"]["observation.state"]["names"] == ["episode", "frame"]
    assert found["tasks"] == {"0": OPEN, "1": CLOSE}
    json.dumps(found)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    notes = [*lerobot.read(unpacked("images", tmp_path)).notes]
    assert "`operator` is text, and is not read." in notes
    assert "`done` is kept as it is: it says that an episode ends, not why." in notes
    assert "There are no flags `terminated` and `truncated`." in notes
    assert any(note.startswith("There are no final observations") for note in notes)
    assert "There are no rewards." not in notes
    assert "There are no rewards." in [*lerobot.read(unpacked("others", tmp_path)).notes]


def test_reading_can_begin_at_any_episode(tmp_path: Path) -> None:
    for name in ("images", "video", "v21"):
        with lerobot.read(unpacked(name, tmp_path)) as reader:
            expected = [dict(leaves(rows)) for rows, _ in reader]
            for first in (3, 1, 2, 4, 0):
                found = [dict(leaves(rows)) for rows, _ in reader.episodes(first)]
                assert len(found) == 4 - first
                for rows, others in zip(found, expected[first:], strict=True):
                    assert all(np.array_equal(rows[field], others[field]) for field in others)


def test_only_the_wanted_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unpacked("images", tmp_path)
    columns: set[str] = set()
    chunks = FrameReader._chunks

    def counted(self: FrameReader, feature: Any, *rest: Any) -> Any:
        columns.add(feature.name)
        return chunks(self, feature, *rest)

    monkeypatch.setattr(FrameReader, "_chunks", counted)
    for rows, _ in episodes_of(path, fields=["obs/state", "reward"]):
        assert set(rows) == {"obs/state", "reward", "final_obs_missing"}
    assert columns == {"observation.state", "next.reward"}


@pytest.mark.parametrize(
    "fields", [["action"], ["is_first"], ["task_index"], ["obs/images/wrist", "final_obs_missing"]]
)
def test_any_choice_of_fields_can_be_read(fields: list[str], tmp_path: Path) -> None:
    for (rows, _), length in zip(episodes_of(unpacked("images", tmp_path), fields=fields), LENGTHS, strict=True):
        assert set(rows) == set(fields)
        assert {len(values) for values in rows.values()} == {length + 1}


def test_a_field_can_be_stored_with_another_dtype(tmp_path: Path) -> None:
    (rows, _), *_ = episodes_of(unpacked("images", tmp_path), dtypes={"obs/state": "float32"})
    assert rows["obs/state"].dtype == np.float32
    assert rows["reward"].dtype == np.float64


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no fields .'obs/left'."):
        episodes_of(unpacked("images", tmp_path), fields=["obs/left"])


def test_video_can_be_left_where_it_is(tmp_path: Path) -> None:
    for name, file in (("video", "videos/observation.images.cam/chunk-000/file-000.mp4"), ("v21", None)):
        path = unpacked(name, tmp_path)
        first = 0
        for number, (rows, info) in enumerate(episodes_of(path, video="reference")):
            length = LENGTHS[number]
            place = file or f"videos/chunk-000/observation.images.cam/episode_{number:06d}.mp4"
            assert info["obs/images/cam/path"] == place and (path / place).is_file()
            times = (np.arange(length) + (first if file else 0)) / FPS
            found = rows["obs/images/cam/timestamp"]
            assert found.dtype == np.float64 and np.allclose(found, as_observed(times), rtol=0, atol=1e-9)
            assert "obs/images/cam" not in rows
            first += length


def test_video_can_be_left_out_and_need_not_be_there(tmp_path: Path) -> None:
    path = unpacked("video", tmp_path)
    (path / "videos/observation.images.cam/chunk-000/file-000.mp4").unlink()
    (rows, info), *_ = episodes_of(path, video="skip")
    assert not [name for name in rows if "cam" in name] and list(info) == ["task"]
    assert "`obs/images/cam` is video, and is left out." in [*lerobot.read(path, video="skip").notes]
    assert episodes_of(path, fields=["action"])
    for video in ("decode", "reference"):
        with pytest.raises(FormatError, match="file-000.mp4: is not there"):
            lerobot.read(path, video=video)
    with pytest.raises(ValueError, match="`video` must be one of"):
        lerobot.read(path, video="no")


def test_video_of_depths_is_left_out_because_its_values_are_codes(tmp_path: Path) -> None:
    path = unpacked("video", tmp_path)
    change_feature(path, "observation.images.cam", info={"is_depth_map": True})
    assert "`obs/images/cam` is video of depths, and is left out." in [*lerobot.read(path).notes]
    assert "obs/images/cam" not in episodes_of(path)[0][0]
    assert "obs/images/cam/timestamp" in episodes_of(path, video="reference")[0][0]


def test_frames_of_an_episode_within_a_file_are_its_own(tmp_path: Path) -> None:
    # Frames are gray by episode and frame; the codec is off by a few.
    for number, (rows, _) in enumerate(episodes_of(unpacked("video", tmp_path))):
        expected = 20 + 60 * number + 4 * np.arange(LENGTHS[number])
        found = rows["obs/images/cam"][:-1].mean((1, 2, 3))
        assert np.abs(found - expected).max() < 2


def test_times_are_a_field_only_where_they_are_not_regular(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    assert all("timestamp" not in rows for rows, _ in episodes_of(path))

    def late(table: pa.Table) -> pa.Table:
        times = table["timestamp"].to_numpy().copy()
        times[10] += 0.01
        return with_column(table, "timestamp", pa.array(times))

    change_table(path, ROWS, late)
    found = [rows["timestamp"] for rows, _ in episodes_of(path)]
    expected = (np.arange(12) / FPS).astype(np.float32)
    expected[6] = np.float32(0.6) + np.float32(0.01)
    check_equal(found[2], as_observed(expected))
    check_equal(found[0], as_observed((np.arange(3) / FPS).astype(np.float32)))


def test_numbers_of_shape_one_may_be_stored_as_lists(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    before = [rows["obs/gripper"] for rows, _ in episodes_of(path)]

    def listed(table: pa.Table) -> pa.Table:
        return with_column(
            table, "observation.gripper", pa.array([[value] for value in table["observation.gripper"].to_pylist()])
        )

    change_table(path, ROWS, listed)
    for found, expected in zip((rows["obs/gripper"] for rows, _ in episodes_of(path)), before, strict=True):
        check_equal(found, expected)


def test_numbers_are_cast_to_the_declared_dtype_only_where_they_are_kept(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)

    def as_int64(table: pa.Table) -> pa.Table:
        return with_column(table, "aux", table["aux"].cast(pa.int64()).combine_chunks())

    def too_large(table: pa.Table) -> pa.Table:
        return with_column(table, "aux", pa.array(np.full(table.num_rows, 300)))

    change_table(path, ROWS, as_int64)
    assert {rows["aux"].dtype for rows, _ in episodes_of(path)} == {np.dtype(np.uint8)}
    change_table(path, ROWS, too_large)
    with pytest.raises(FormatError, match="300"):
        episodes_of(path)


def test_rows_in_one_large_row_group_are_found_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unpacked("images", tmp_path)
    before = [dict(leaves(rows)) for rows, _ in lerobot.read(path)]
    change_table(path, ROWS, lambda table: table)
    assert pq.ParquetFile(path / ROWS).metadata.num_row_groups == 1
    num_read = 0
    read = pq.ParquetFile.read_row_group

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal num_read
        num_read += 1
        return read(self, *args, **options)

    with lerobot.read(path) as reader:
        monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
        found = [dict(leaves(rows)) for rows, _ in reader]
    for rows, expected in zip(found, before, strict=True):
        assert all(np.array_equal(rows[name], expected[name]) for name in expected)
    assert num_read == len(reader.source.features)


def test_episodes_may_lie_in_many_files_and_groups(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    before = [dict(leaves(rows)) for rows, _ in lerobot.read(path)]
    table = pq.read_table(path / ROWS, partitioning=None)
    # Episodes 0 and 1 in one file, 2 and 3 in another chunk, in groups of three rows.
    (path / "data/chunk-001").mkdir()
    pq.write_table(table.slice(0, 4), path / ROWS, row_group_size=3)
    pq.write_table(table.slice(4), path / "data/chunk-001/file-007.parquet", row_group_size=3)

    def moved(table: pa.Table) -> pa.Table:
        table = with_column(table, "data/chunk_index", pa.array([0, 0, 1, 1]))
        return with_column(table, "data/file_index", pa.array([0, 0, 7, 7])).take([3, 1, 0, 2])

    change_table(path, EPISODES, moved)
    for rows, expected in zip((dict(leaves(rows)) for rows, _ in lerobot.read(path)), before, strict=True):
        assert all(np.array_equal(rows[name], expected[name]) for name in expected)


def test_fields_below_a_field_keep_their_whole_names(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    table = pq.read_table(path / ROWS, partitioning=None)
    pq.write_table(table.append_column("observation.state.left", pa.array(np.arange(21.0))), path / ROWS)
    change_feature(path, "observation.state.left", dtype="float64", shape=[1], names=None)
    (rows, _), *_ = episodes_of(path)
    assert {"obs/state", "obs/state.left", "obs/images.top"} <= rows.keys()


def test_columns_that_are_no_feature_are_named(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    change_table(path, ROWS, lambda table: table.append_column("extra", pa.array(np.arange(21))))
    assert "`extra` is in the files, but no feature, and is not read." in [*lerobot.read(path).notes]


def test_what_else_is_known_of_an_episode_is_its_info(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)

    def more(table: pa.Table) -> pa.Table:
        table = table.append_column("success", pa.array([True, False, None, True]))
        return table.append_column("points", pa.array([[1, 2]] * 4))

    change_table(path, EPISODES, more)
    assert [info.get("success") for _, info in episodes_of(path)] == [True, False, None, True]
    assert "`points of meta/episodes` is no number or text, and is not read." in [*lerobot.read(path).notes]
    assert set(episodes_of(unpacked("v21", tmp_path))[0][1]) == {"task"}


def test_a_long_task_is_left_out_of_the_info_and_said(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    change_table(path, "meta/tasks.parquet", lambda table: with_column(table, "task", pa.array(["a" * 5000, CLOSE])))
    with lerobot.read(path) as reader:
        assert [info.get("task") for _, info in reader] == [None, CLOSE, None, None]
    assert any(note.startswith("`task` of some episodes is left out") for note in reader.notes)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_images_may_be_jpeg_or_gray(version: str, tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    path = unpacked("images" if version == "v3.0" else "v21", tmp_path)
    name = "observation.images.top"
    expected = []

    def as_jpeg(table: pa.Table) -> pa.Table:
        images = []
        for value in table[name].to_pylist():
            content = BytesIO()
            Image.open(BytesIO(value["bytes"])).save(content, "JPEG", quality=90)
            images.append({"bytes": content.getvalue(), "path": None})
            expected.append(np.asarray(Image.open(content)))
        return with_column(table, name, pa.array(images, table.schema.field(name).type))

    files = [str(file.relative_to(path)) for file in sorted(path.glob("data/*/*.parquet"))]
    for file in files:
        change_table(path, file, as_jpeg)
    found = np.concatenate([rows["obs/images/top"][:-1] for rows, _ in episodes_of(path)])
    check_equal(found, np.stack(expected))


def test_an_import_gives_the_log_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    path, target = unpacked("images", tmp_path), tmp_path / "imported"
    with killed_before(2):
        import_episodes("lerobot", path, target, fields=["obs", "action"], limit=3)
    summary = import_episodes("lerobot", path, target, fields=["obs", "action"], limit=3)
    assert summary.num_episodes == 3 and summary.fields["obs/images/wrist"] == "uint8 (3, 4, 6)"
    with IndividualFileDataset(directory=target, mode="r") as dataset:
        for number, logged in zip(dataset.table.ids.tolist(), log_of("images"), strict=False):
            rows = dataset.arrays_of_id(number)
            assert rows is not None
            check_equal(rows["obs/images/top"], as_observed(logged["observation.images.top"]))
            check_equal(rows["action"], as_arrived(logged["action"]))
            assert "reward" not in rows
            assert dataset.episode_info(number)["task"] == [OPEN, CLOSE, OPEN][number]


def test_whole_numbers_that_pandas_made_floats_are_read(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    change_table(path, EPISODES, lambda table: with_column(table, "data/chunk_index", pa.array([0.0] * 4)))
    assert len(episodes_of(path)) == 4


def test_version_2_0_is_read_too(tmp_path: Path) -> None:
    path = unpacked("v21", tmp_path)
    before = episodes_of(path, video="skip")
    change_info(path, codebase_version="v2.0")
    assert [info for _, info in episodes_of(path, video="skip")] == [info for _, info in before]
