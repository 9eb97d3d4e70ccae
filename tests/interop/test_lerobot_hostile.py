"""Damaged, foreign, half-written and lying LeRobot datasets are errors that name the path; nothing is left of them."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from buffers.interop import FormatError, import_episodes, lerobot
from buffers.interop.lerobot.images import ImageDecoder, image_type
from tests.interop.lerobot_helpers import (
    EPISODES,
    INFO,
    LENGTHS,
    ROWS,
    change_feature,
    change_info,
    change_table,
    unpacked,
    with_column,
    written,
)

TOP = "observation.images.top"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return unpacked("images", tmp_path)


def refused(path: Path, match: str, where: str | Path | None = None, **options: Any) -> str:
    """Reading raises a FormatError that names the path."""
    with pytest.raises(FormatError, match=match) as caught, lerobot.read(path, **options) as reader:
        for _ in reader:
            pass
    assert str(caught.value.path) == str(path if where is None else path / where)
    return str(caught.value)


def test_a_recording_that_was_not_finalized_is_told(tmp_path: Path) -> None:
    path = unpacked("open", tmp_path)
    text = refused(path, "was not finalized: meta/info.json counts 4 episodes, and meta/episodes is not there")
    assert "file-000.parquet has no footer" in text and "finalize()" in text


def test_nothing_is_left_of_an_import_that_fails_in_its_middle(path: Path) -> None:
    change_table(path, ROWS, changed(TOP, 9, {"bytes": b"hello", "path": None}))
    with pytest.raises(FormatError, match="has an image that cannot be read"):
        import_episodes("lerobot", path, path.parent / "imported")
    assert not [*path.parent.glob("imported*")]
    # But what precedes it can be imported.
    assert import_episodes("lerobot", path, path.parent / "imported", limit=2).num_episodes == 2


def test_metadata_without_footer_is_told(path: Path) -> None:
    content = (path / EPISODES).read_bytes()
    (path / EPISODES).write_bytes(content[:-100])
    refused(path, "has no footer: the dataset was not finalized", EPISODES)


def test_rows_without_footer_are_told(path: Path) -> None:
    content = (path / ROWS).read_bytes()
    (path / ROWS).write_bytes(content[:-8])
    refused(path, "has no footer: the dataset was not finalized", ROWS)


def test_metadata_that_is_not_there_though_rows_are_whole_is_a_part_of_a_copy(path: Path) -> None:
    (path / EPISODES).unlink()
    text = refused(path, "meta/info.json counts 4 episodes, and meta/episodes is not there. Get the whole dataset")
    assert "finalized" not in text


@pytest.mark.parametrize("version", ["images", "v21"])
def test_every_file_is_needed(version: str, tmp_path: Path) -> None:
    path = unpacked(version, tmp_path)
    names = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    for name in names:
        if "stats" in name:
            continue
        os.rename(path / name, tmp_path / "away")
        with pytest.raises(FormatError, match="not there|no meta/info.json"):
            lerobot.read(path)
        os.rename(tmp_path / "away", path / name)


@pytest.mark.parametrize("version", ["images", "video", "v21"])
@pytest.mark.parametrize("share", [0, 0.6, 0.95])
def test_a_file_that_is_cut_is_an_error_wherever(version: str, share: float, tmp_path: Path) -> None:
    path = unpacked(version, tmp_path)
    whole = [rows["obs"]["images"].get("cam") for rows, _ in lerobot.read(path)]
    for file in sorted(file for file in path.rglob("*") if file.is_file() and "stats" not in file.name):
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        try:
            found = [rows["obs"]["images"]["cam"] for rows, _ in lerobot.read(path)]
            # The last bytes of video are no frames.
            assert file.suffix == ".mp4" and share == 0.95 and all(map(np.array_equal, found, whole))
        except FormatError as error:
            assert str(error).startswith(str(path))
        file.write_bytes(content)


def test_changed_bytes_of_rows_are_an_error_or_other_values_but_no_crash(path: Path) -> None:
    content = (path / ROWS).read_bytes()
    rng = np.random.default_rng(0)
    num_errors = 0
    for position in rng.integers(4, len(content) - 8, 15):
        changed = bytearray(content)
        changed[position] ^= 0x41
        (path / ROWS).write_bytes(bytes(changed))
        try:
            [*lerobot.read(path)]
        except FormatError:
            num_errors += 1
    assert num_errors > 1


def test_other_directories_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not there"):
        lerobot.read(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="is no directory"):
        lerobot.read(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="has no meta/info.json"):
        lerobot.read(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1]", "is no dict"),
        ("[" * 200_000, "nests too deeply|cannot be read"),
        ("{}", "has the version None"),
        ('{"codebase_version": "v1.6"}', "has the version 'v1.6'.*Convert it"),
        ('{"codebase_version": "v4.0"}', "has the version 'v4.0'"),
        ('{"codebase_version": 3}', "has the version 3"),
    ],
)
def test_an_info_that_is_none_is_refused(content: str, match: str, path: Path) -> None:
    (path / INFO).write_text(content)
    refused(path, match, INFO)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"fps": 0}, "has 0 frames a second"),
        ({"fps": None}, "has None frames a second"),
        ({"fps": True}, "has True frames a second"),
        ({"fps": float("nan")}, "has nan frames a second"),
        ({"features": None}, "has the features None"),
        ({"features": {"a": 3}}, "has the features"),
        ({"total_frames": 22}, "says that there are 22 frames, where its episodes have 21"),
        ({"total_episodes": 5}, "says that there are 5 episodes, where its episodes have 4"),
        ({"data_path": None}, "names files by None"),
        ({"data_path": "data/{unknown}"}, "names files by"),
        ({"data_path": "../{chunk_index}/{file_index}"}, "names the file '../0/0'. Files lie below"),
        ({"data_path": "/etc/{chunk_index}"}, "names the file '/etc/0'"),
        ({"data_path": "data/./{chunk_index}"}, "names the file"),
        ({"data_path": "data/{chunk_index.__class__}"}, "names the file"),
        ({"data_path": "data/{chunk_index:999999999d}"}, "names the file"),
        ({"data_path": "data/\0{chunk_index}"}, "names the file"),
    ],
)
def test_an_info_that_lies_is_refused(values: dict[str, Any], match: str, path: Path) -> None:
    change_info(path, **values)
    refused(path, match, INFO)


def test_names_of_features_are_no_way_out_of_the_directory(tmp_path: Path) -> None:
    path = unpacked("v21", tmp_path)
    change_feature(path, "../../x", dtype="video", shape=[64, 64, 3], names=None)
    refused(path, re.escape("names the file 'videos/chunk-000/../../x/episode"), INFO)


@pytest.mark.parametrize(
    ("values", "match", "where"),
    [
        ({"shape": [10**9]}, "has rows of another shape than .1000000000,", ROWS),
        ({"shape": [3]}, "has rows of another shape than .3,", ROWS),
        ({"shape": [2, 2]}, "has `observation.state` as fixed_size_list.*says float64 .2, 2.", ROWS),
        ({"shape": [2**50]}, "has the feature `observation.state` of shape", INFO),
        ({"shape": [-2]}, "of shape", INFO),
        ({"shape": [True]}, "of shape", INFO),
        ({"shape": []}, "of shape", INFO),
        ({"shape": None}, "of shape None", INFO),
        ({"shape": [1] * 9}, "of shape", INFO),
        ({"dtype": "image", "shape": [8, 8, 3]}, "as fixed_size_list.*says encoded images", ROWS),
        ({"dtype": "image"}, "has the images `observation.state` of shape .2,", INFO),
        (
            {"dtype": "video", "shape": [64, 64, 3]},
            "has None as the time",
            EPISODES,
        ),
        ({"buffers": 3}, "has 3 at the feature", INFO),
        ({"buffers": {"path": []}}, "for the field ..", INFO),
        ({"buffers": {"path": ["obs", 3]}}, "for the field", INFO),
        ({"buffers": {"path": ["is_first"]}}, "for the field", INFO),
        ({"buffers": {"path": ["a"] * 21}}, "for the field", INFO),
        ({"buffers": {"path": ["action"]}}, "has two features for the field `action`", INFO),
        ({"buffers": {"path": ["action", "x"]}}, "has a field above the one of `observation.state`", INFO),
        ({"buffers": {"shape": []}}, "for a field of shape", INFO),
    ],
)
def test_a_feature_that_lies_is_refused(values: dict[str, Any], match: str, where: str, path: Path) -> None:
    change_feature(path, "observation.state", **values)
    refused(path, match, where)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(TOP, [8, 9, 3]), (TOP, [10**6, 10**6, 3]), ("observation.images.wrist", [3, 6, 4])],
)
def test_images_of_another_shape_than_declared_are_refused_before_any_is_decoded(
    name: str, shape: list[int], path: Path
) -> None:
    change_feature(path, name, shape=shape, names=None)
    with pytest.raises(FormatError, match=f"has `{name}` of shape .*, where frames are|of shape"):
        lerobot.read(path)


def changed(column: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        return with_column(table, column, pa.array(values, table.schema.field(column).type))

    return change


@pytest.mark.parametrize(
    ("column", "row", "value", "match"),
    [
        (
            "frame_index",
            7,
            2,
            "has `frame_index` 2 in row 7, where 3 is expected. Frames are missing",
        ),
        ("episode_index", 3, 0, "has `episode_index` 0 in row 3, where 1 is expected"),
        ("index", 20, 0, "has `index` 0 in row 20, where 20 is expected"),
        ("task_index", 5, 9, "has the tasks .9., which meta/tasks does not have"),
        ("frame_index", 5, None, "`frame_index` has no value in 1 rows"),
        ("observation.state", 5, None, "`observation.state` has no value in 1 rows"),
        ("next.reward", 5, None, "`next.reward` has no value in 1 rows"),
        (TOP, 5, None, "has images outside of the file, or none"),
        (TOP, 5, {"bytes": None, "path": "/etc/passwd"}, "has images outside of the file, or none"),
        (TOP, 5, {"bytes": b"", "path": None}, "has an image that cannot be read"),
        (TOP, 5, {"bytes": b"\x89PNG\r\n\x1a\n", "path": None}, "has an image that cannot be read"),
        (TOP, 5, {"bytes": b"hello", "path": None}, "has an image that cannot be read"),
    ],
)
def test_a_row_that_is_wrong_is_refused(column: str, row: int, value: Any, match: str, path: Path) -> None:
    change_table(path, ROWS, changed(column, row, value))
    refused(path, match, ROWS)


def test_times_that_are_no_number_are_kept_as_they_are(path: Path) -> None:
    change_table(path, ROWS, changed("timestamp", 5, float("nan")))
    assert [np.isnan(rows["timestamp"]).sum() for rows, _ in lerobot.read(path)] == [0, 0, 1, 0]


def test_rows_in_another_order_are_refused(path: Path) -> None:
    change_table(path, ROWS, lambda table: table.take([*range(10, 21), *range(10)]))
    refused(path, "Frames are missing or in another order", ROWS)


@pytest.mark.parametrize(("first", "last"), [(0, 20), (1, 21)])
def test_rows_that_are_missing_are_refused(first: int, last: int, path: Path) -> None:
    change_table(path, ROWS, lambda table: table.slice(first, last - first))
    refused(path, "has 20 rows, where its episodes have 21", ROWS)


def test_a_column_that_is_missing_or_of_another_type_is_refused(path: Path) -> None:
    table = pq.read_table(path / ROWS, partitioning=None)
    pq.write_table(table.drop_columns(["action"]), path / ROWS)
    refused(path, "has no column `action`", ROWS)
    pq.write_table(with_column(table, "action", pa.array(["a"] * 21)), path / ROWS)
    refused(path, "has `action` as string, where meta/info.json says float32 .2,", ROWS)
    pq.write_table(with_column(table, "index", pa.array(["a"] * 21)), path / ROWS)
    refused(path, "has `index` as string", ROWS)


@pytest.mark.parametrize(
    ("column", "row", "value", "match"),
    [
        ("episode_index", 3, 2, "has the episode 2 where 3 is expected: one is missing, or there twice"),
        ("episode_index", 3, 9, "has the episode 9 where 3 is expected"),
        ("episode_index", 3, -1, "has -1 as `episode_index`"),
        ("length", 1, 2, "has the episode 1 of 2 frames, from 3 to 4"),
        ("length", 0, 2**62, "has 4611686018427387904 as `length`"),
        ("dataset_to_index", 0, 2**61, "has the episode 0 of 3 frames"),
        ("data/file_index", 2, 7, "as the first of episode 3|has 21 rows|is not there"),
        ("data/chunk_index", 0, None, "has None as `data/chunk_index`"),
    ],
)
def test_metadata_of_episodes_that_lies_is_refused(column: str, row: int, value: Any, match: str, path: Path) -> None:
    change_table(path, EPISODES, changed(column, row, value))
    with pytest.raises(FormatError, match=match):
        lerobot.read(path)


def test_episodes_that_overlap_are_refused(path: Path) -> None:
    def moved(table: pa.Table) -> pa.Table:
        table = with_column(table, "dataset_from_index", pa.array([0, 3, 3, 15]))
        return with_column(table, "dataset_to_index", pa.array([3, 4, 15, 20]))

    change_table(path, EPISODES, moved)
    with pytest.raises(FormatError, match="has frame 3 as the first of episode 2, not 4"):
        lerobot.read(path)


def test_an_enormous_number_of_rows_is_refused_before_anything_is_allocated(path: Path) -> None:
    num = 2**60

    def lying(table: pa.Table) -> pa.Table:
        table = with_column(table, "length", pa.array([3, 1, 12, num]))
        return with_column(table, "dataset_to_index", pa.array([3, 4, 16, 16 + num]))

    change_table(path, EPISODES, lying)
    change_info(path, total_frames=16 + num)
    refused(path, f"has 21 rows, where its episodes have {16 + num}", ROWS)


def test_lists_of_other_lengths_are_refused(path: Path) -> None:
    values = [[1.0, 2.0]] * 21
    values[4], values[5] = [1.0], [1.0, 2.0, 3.0]
    change_table(path, ROWS, lambda table: with_column(table, "action", pa.array(values, pa.list_(pa.float32()))))
    refused(path, "`action` has rows of another shape than .2,", ROWS)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("[]", "has a line that is no dict"),
        ("{", "cannot be read"),
        ('{"episode_index": 4, "length": 3}', "has the tasks None"),
        ('{"episode_index": 3, "length": 5, "tasks": []}', "has the episode 3 where 4 is expected"),
        ('{"episode_index": 4, "length": 0, "tasks": []}', "has the episode 4 of no frame"),
        ('{"episode_index": "4", "length": 3, "tasks": []}', "has '4' as `episode_index`"),
    ],
)
def test_lines_of_v21_that_are_wrong_are_refused(line: str, match: str, tmp_path: Path) -> None:
    path = unpacked("v21", tmp_path)
    with open(path / "meta/episodes.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    change_info(path, total_episodes=5)
    refused(path, match, "meta/episodes.jsonl")


def test_tasks_that_are_there_twice_are_refused(path: Path) -> None:
    change_table(path, "meta/tasks.parquet", lambda table: with_column(table, "task_index", pa.array([0, 0])))
    refused(path, "has the task 'close it' as number 0", "meta/tasks.parquet")


def test_an_empty_dataset_is_refused(path: Path) -> None:
    change_table(path, EPISODES, lambda table: table.slice(0, 0))
    change_info(path, total_episodes=0, total_frames=0)
    refused(path, "says that there is no episode", INFO)


def test_a_pipe_is_no_file(path: Path) -> None:
    (path / ROWS).unlink()
    os.mkfifo(path / ROWS)
    refused(path, "is no file", ROWS)


def test_video_that_is_damaged_or_of_another_size_is_refused(tmp_path: Path) -> None:
    path = unpacked("video", tmp_path)
    name = "videos/observation.images.cam/chunk-000/file-000.mp4"
    content = (path / name).read_bytes()
    (path / name).write_bytes(b"no video" * 100)
    assert "video='skip'" in refused(path, "cannot be decoded", name)
    (path / name).write_bytes(content)
    change_feature(path, "observation.images.cam", shape=[64, 10**6, 3])
    refused(path, "has frames of 64 x 64, where meta/info.json says", name)
    change_feature(path, "observation.images.cam", shape=[64, 64, 1])
    with pytest.raises(FormatError, match="has `observation.images.cam` of shape"):
        lerobot.read(path)


def test_video_that_names_other_files_is_refused(tmp_path: Path) -> None:
    path = unpacked("video", tmp_path)
    name = "videos/observation.images.cam/chunk-000/file-000.mp4"
    os.rename(path / name, (path / name).with_name("other.mp4"))
    (path / name).write_text("ffconcat version 1.0\nfile other.mp4\n")
    refused(path, "cannot be decoded", name)


def test_room_is_made_only_for_frames_of_the_declared_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enormous = 10**8
    path = unpacked("video", tmp_path)
    change_feature(path, "observation.images.cam", shape=[enormous, enormous, 3])
    with pytest.raises(FormatError, match="has the feature|has frames of 64 x 64"):
        [*lerobot.read(path)]
    path = unpacked("images", tmp_path)
    change_feature(path, "observation.state", shape=[enormous])
    for call in (lerobot.read, lerobot.open):
        with pytest.raises(FormatError, match="has rows of another shape"):
            call(path)


def test_two_episodes_in_the_same_rows_are_refused(tmp_path: Path) -> None:
    path = unpacked("v21", tmp_path)
    name = "data/chunk-000/episode_000000.parquet"
    change_info(path, data_path=name)
    with pytest.raises(FormatError, match="is the file of two episodes at once"):
        lerobot.read(path)


@pytest.mark.parametrize("dtype", [[], {}, None, 3, "complex64", "language", "string"])
def test_features_of_other_types_are_named_and_not_read(dtype: Any, path: Path) -> None:
    change_feature(path, "aux", dtype=dtype)
    with lerobot.read(path) as reader:
        assert all("aux" not in rows for rows, _ in reader)
    assert any(note.startswith("`aux` is ") for note in reader.notes)


def test_video_that_ends_early_or_has_other_times_is_refused(tmp_path: Path) -> None:
    path = unpacked("video", tmp_path)
    name = "videos/observation.images.cam/chunk-000/file-000.mp4"
    begin = "videos/observation.images.cam/from_timestamp"
    change_table(path, EPISODES, changed(begin, 3, 1.9))
    refused(path, "has no frame at 2.1000 s, which is frame 2 of an episode", name)
    change_table(path, EPISODES, changed(begin, 3, 1.6))
    change_info(path, fps=20)
    times = np.concatenate([np.arange(length) / 20 for length in LENGTHS]).astype(np.float32)
    change_table(path, ROWS, lambda table: with_column(table, "timestamp", pa.array(times)))
    refused(path, "has no frame at 0.0500 s, which is frame 1 of an episode", name)
    change_table(path, EPISODES, changed(begin, 3, -1.0))
    refused(path, "as the time at which `observation.images.cam` begins", EPISODES)
    change_table(path, EPISODES, changed(begin, 3, float("nan")))
    refused(path, "has nan as the time", EPISODES)


def png(width: int, height: int, content: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def test_an_image_is_compared_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.arange(3 * 13, dtype=np.uint8).tobytes()
    good = b"".join(b"\0" + content[row * 12 : row * 12 + 12] for row in range(3))
    out = np.empty((3, 4, 3), np.uint8)
    decoder = ImageDecoder()
    decoder.decode("p", "n", png(4, 3, good), out)
    assert out.tobytes() == content[:36]
    monkeypatch.setattr(ImageDecoder, "_decode_png", None)
    with pytest.raises(FormatError, match="has an image of uint8 .5, 4, 3., where others have uint8 .3, 4, 3."):
        decoder.decode("p", "n", png(4, 5, good), out)
    with pytest.raises(FormatError, match="bytes that says it has the shape .1073741824, 1073741824, 3."):
        image_type("p", "n", png(2**30, 2**30, good))


def test_no_image_is_decoded_to_something_else_after_a_change() -> None:
    content = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    good = png(4, 3, b"".join(b"\0" + row.tobytes() for row in content))
    decoder, out = ImageDecoder(), np.empty((3, 4, 3), np.uint8)
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x55
        with pytest.raises(FormatError):
            decoder.decode("p", "n", bytes(bad), out)
        decoder.decode("p", "n", good, out)
        assert np.array_equal(out, content)


def test_images_one_after_the_other_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 3, 4, 3), np.uint8)
    decoder, out = ImageDecoder(), np.empty((3, 4, 3), np.uint8)
    for image in images:
        decoder.decode("p", "n", png(4, 3, b"".join(b"\0" + row.tobytes() for row in image)), out)
        assert np.array_equal(out, image)


def test_modes_of_images_that_are_no_colors_are_refused(path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    content = BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).convert("P").save(content, "PNG")
    change_table(path, ROWS, changed(TOP, 0, {"bytes": content.getvalue(), "path": None}))
    refused(path, "has an image of Pillow's mode 'P'. Convert the images to RGB", ROWS)


def test_numbers_beyond_the_declared_dtype_are_refused(path: Path) -> None:
    values = np.full((21, 2), 0.1)
    values[0] = np.inf, np.nan
    for largest in (0.1, 1e300):
        values[7, 1] = largest
        column = pa.array(values.tolist(), pa.list_(pa.float64()))
        change_table(path, ROWS, lambda table: with_column(table, "action", column))  # noqa: B023
        if largest < 1:
            assert next(iter(lerobot.read(path))).rows["action"].dtype == np.float32
        else:
            refused(path, "`action` has numbers beyond the declared float32", ROWS)


def test_a_missing_library_names_the_extra(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for call in (lambda: lerobot.read(path), lambda: lerobot.open(path)):
        with pytest.raises(ImportError, match=r"needs pyarrow .*\[lerobot\]"):
            call()


def test_what_we_write_can_be_damaged_too(tmp_path: Path) -> None:
    path = written(tmp_path)
    info = json.loads((path / INFO).read_text())
    assert info["features"]["next.done"]["buffers"] == {"is_derived": True}
    (path / ROWS).write_bytes((path / ROWS).read_bytes()[:-20])
    refused(path, "has no footer", ROWS)
