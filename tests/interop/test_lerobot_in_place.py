"""A LeRobot dataset that is read in place gives the batches of its import, and reads no more than it must."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from buffers.dataset import RingBufferDataset
from buffers.interop import FormatError, lerobot
from buffers.interop.lerobot.images import ImageDecoder
from tests.interop.lerobot_helpers import FPS, LENGTHS, ROWS, change_table, unpacked, with_column, written


def imported(path: Path, **options: Any) -> RingBufferDataset:
    ring = RingBufferDataset(1000)
    for rows, info in lerobot.read(path, **options):
        ring.add_episode(rows, info)
    return ring


def flat(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in tree.items():
        found.update(flat(value, f"{path}{key}/") if isinstance(value, dict) else {path + key: value})
    return found


def check_batches(found: Any, expected: Any, num: int = 2, **options: Any) -> None:
    iterators = [iter(dataset.get_loader(batch_size=4, seed=3, **options)) for dataset in (found, expected)]
    for _ in range(num):
        one, other = (flat(next(iterator)) for iterator in iterators)
        assert list(one) == list(other)
        for name in one:
            assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("cache_bytes", [0, 1 << 28])
@pytest.mark.parametrize(("name", "video"), [("images", None), ("others", None), ("v21", "reference")])
def test_batches_are_those_of_the_import(name: str, video: str | None, cache_bytes: int, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    opened = lerobot.open(path, video=video, cache_bytes=cache_bytes)
    ring = imported(path, video=video or "decode")
    assert opened.fields == ring.fields
    for options in ({"sequence_length": 2}, {"sequence_length": None}):
        check_batches(opened, ring, **options)
    check_batches(opened, ring, offsets={"obs": (-1, 0), "action": range(0, 3)})
    assert [opened.episode_info(i) for i in opened.table.ids] == [ring.episode_info(i) for i in ring.table.ids]


def test_every_window_of_every_length_is_right(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    opened, whole = lerobot.open(path), imported(path)
    assert opened.fields is not None
    for episode, length in enumerate(LENGTHS):
        rows = whole.arrays_of_id(episode)
        for start in range(length + 1):
            for stop in range(start + 1, length + 2):
                kinds = opened.fields.items()
                out = {name: np.empty((stop - start, *kind.shape), kind.numpy_dtype) for name, kind in kinds}
                opened._read_rows(opened._opened(), episode, start, stop, out)
                assert rows is not None
                for name, values in out.items():
                    assert np.array_equal(values, rows[name][start:stop]), (name, start, stop)


def test_irregular_times_are_read(tmp_path: Path) -> None:
    path = unpacked("v21", tmp_path)
    file = "data/chunk-000/episode_000002.parquet"
    change_table(path, file, lambda table: with_column(table, "timestamp", pa.array(np.arange(12.0, dtype=np.float32))))
    opened = lerobot.open(path, video="reference")
    assert opened.fields is not None and "timestamp" in opened.fields
    check_batches(opened, imported(path, video="reference"), sequence_length=2)


def test_only_frames_of_the_window_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = lerobot.open(unpacked("images", tmp_path), fields=["obs/images/top", "action"])
    decoded = []
    decode = ImageDecoder.decode

    def counted(self: ImageDecoder, *args: Any) -> None:
        decoded.append(args)
        decode(self, *args)

    monkeypatch.setattr(ImageDecoder, "decode", counted)
    next(iter(opened.get_loader(batch_size=4, sequence_length=2, seed=0)))
    assert 4 <= len(decoded) <= 8  # 8 rows, but final ones repeat another.


def test_only_row_groups_of_the_window_are_read_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unpacked("images", tmp_path)
    opened = lerobot.open(path, fields=["obs/images"])
    groups: list[tuple[int, str]] = []
    read = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, columns: list[str], **options: Any) -> Any:
        groups.append((group, columns[0]))
        return read(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    out = {"obs/images/top": np.empty((3, 8, 8, 3), np.uint8)}
    opened._read_rows(opened._opened(), 2, 4, 7, out)
    assert groups == [(2, "observation.images.top")]
    opened._read_rows(opened._opened(), 2, 0, 3, out)
    assert len(groups) == 1


def test_what_is_kept_in_memory_is_bounded(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    for cache_bytes in (0, 6_000, 1 << 28):
        opened = lerobot.open(path, cache_bytes=cache_bytes)
        list(zip(range(9), opened.get_loader(batch_size=4, sequence_length=2, seed=0), strict=False))
        files = opened._opened()._frames._files
        kept = [values.nbytes for values in files._columns.values()]
        assert files._bytes == sum(kept)
        # The row group in use is kept in any case.
        assert sum(kept) <= cache_bytes + 12 * 1000 and bool(opened._opened()._numbers) == (cache_bytes > 0)


def test_it_can_be_sent_to_another_process_and_opened_again(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    opened = lerobot.open(path)
    ring = imported(path)
    check_batches(opened, ring, 2, sequence_length=2)
    check_batches(pickle.loads(pickle.dumps(opened)), ring, 2, sequence_length=2)
    opened.close()
    check_batches(opened, ring, 2, sequence_length=2)


def test_it_reads_the_same_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    ring = imported(written(tmp_path / "here", 3, 1, 4))
    monkeypatch.chdir(tmp_path / "here")
    opened = lerobot.open("written")
    monkeypatch.chdir(tmp_path / "there")
    check_batches(opened, ring, 2, sequence_length=2)


def test_a_choice_of_fields_is_made_as_for_read(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)
    opened = lerobot.open(path, fields=["obs/images", "reward"])
    assert list(opened.fields or ()) == ["obs/images/top", "obs/images/wrist", "reward", "final_obs_missing"]
    with pytest.raises(ValueError, match="no fields .'left'.. It has .*'action'.*'reward'"):
        lerobot.open(path, fields=["left"])


def test_video_is_not_decoded_in_place(tmp_path: Path) -> None:
    path = unpacked("video", tmp_path)
    with pytest.raises(FormatError, match="has video, .'obs/images/cam'., which is not read in place. Import it"):
        lerobot.open(path)
    assert "obs/images/cam/timestamp" in (lerobot.open(path, video="reference").fields or ())
    assert "action" in (lerobot.open(path, fields=["action"]).fields or ())
    with pytest.raises(ValueError, match="`video` must be one of"):
        lerobot.open(path, video="decode")


def test_it_says_what_it_does_not_have(tmp_path: Path) -> None:
    opened = lerobot.open(written(tmp_path))
    assert opened.metadata["fps"] == FPS and any("final observations" in note for note in opened.notes)
    with pytest.raises(RuntimeError, match="only to be read"):
        opened.evict_episode(0)


def test_an_image_that_is_damaged_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = unpacked("images", tmp_path)

    def damaged(table: pa.Table) -> pa.Table:
        name = "observation.images.top"
        images = table[name].to_pylist()
        content = bytearray(images[9]["bytes"])
        content[60] ^= 1
        images[9]["bytes"] = bytes(content)
        return with_column(table, name, pa.array(images, table.schema.field(name).type))

    change_table(path, ROWS, damaged)
    opened = lerobot.open(path)
    with pytest.raises(FormatError, match="observation.images.top. has an image that cannot be read"):
        opened.get_loader(batch_size=1, sequence_length=None, seed=0)
        [opened.arrays_of_id(number) for number in opened.table.ids.tolist()]
