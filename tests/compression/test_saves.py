"""Saves of rings with compressed fields: they come back as they were, compressed in the same way or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.dataset.fields import TensorType
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.saving import DamagedSaveError
from tests import tagged
from tests.compression.test_ring import ALL
from tests.contract import assert_same_batch

pytest.importorskip("cramjam")
CHOICES: list[Any] = [None, ALL, {TensorType: "zstd"}, {"obs": "lz4", "code": "zstd"}]


def filled(compress: Any, numbers: range = range(60), ring: RingBufferDataset | None = None) -> RingBufferDataset:
    ring = RingBufferDataset(1_000, compress=compress) if ring is None else ring
    for number in numbers:
        ring.add_episode(tagged.episode(1 + number * 7 % 50, number), {"number": number})
    return ring


def assert_same(found: Any, expected: Any) -> None:
    for own, other in zip(found.episodes(), expected.episodes(), strict=True):
        assert_same_batch(own, other)
    assert found.table.rows.tolist() == expected.table.rows.tolist()
    newest = int(expected.table.ids[-1])
    assert found.episode_info(newest) == expected.episode_info(newest)


@pytest.mark.parametrize("into", CHOICES, ids=str)
@pytest.mark.parametrize("compress", CHOICES, ids=str)
def test_a_save_loads_into_any_ring(compress, into, tmp_path) -> None:
    ring = filled(compress)
    ring.save(tmp_path)
    assert_same(RingBufferDataset.load(tmp_path, RingBufferDataset(1_000, compress=into)), ring)
    filled(compress, range(60, 75), ring)
    ring.save(tmp_path)
    loaded = RingBufferDataset.load(tmp_path, RingBufferDataset(1_000, compress=into))
    assert_same(loaded, ring)
    filled(compress, range(75, 99), ring)
    filled(compress, range(75, 99), loaded)
    loaded.save(tmp_path)
    assert_same(RingBufferDataset.load(tmp_path), ring)


@pytest.mark.parametrize("compress", CHOICES[1:], ids=str)
def test_a_save_is_made_again_as_it_was(compress, tmp_path) -> None:
    ring = filled(compress)
    ring.save(tmp_path)
    loaded = RingBufferDataset.load(tmp_path)
    assert {n: codec.key for n, codec in loaded.codecs.items()} == {n: c.key for n, c in ring.codecs.items()}
    assert loaded.compressed_bytes() == ring.compressed_bytes()


def test_a_save_has_the_bytes_of_the_ring(tmp_path) -> None:
    ring = RingBufferDataset(10_000, compress={"image": "lz4"})
    for _ in range(20):
        ring.add_episode({"image": np.zeros((200, 64, 64), np.uint8)})
    ring.save(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < ring.compressed_bytes()["image"] + 20_000


def test_old_files_are_packed_as_their_rows_leave(tmp_path) -> None:
    ring = RingBufferDataset(1_000, compress=ALL)
    for number in range(30):
        filled(ALL, range(number * 10, number * 10 + 10), ring)
        ring.save(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size < 6 * sum(ring.compressed_bytes().values()) + 200_000
    assert_same(RingBufferDataset.load(tmp_path), ring)


def test_less_room_keeps_the_newest(tmp_path) -> None:
    ring = filled(ALL)
    ring.save(tmp_path)
    total = sum(ring.compressed_bytes().values())
    smaller = RingBufferDataset(1_000, compress=ALL, capacity_bytes=total // 2)
    with pytest.warns(UserWarning, match=r"\d+ of the \d+ episodes that were saved, the newest, fit `capacity_bytes`="):
        loaded = RingBufferDataset.load(tmp_path, smaller)
    assert 0 < loaded.num_episodes < ring.num_episodes
    assert tagged.numbers(loaded) == tagged.numbers(ring)[-loaded.num_episodes :]


def test_a_ring_goes_into_files_and_back(tmp_path: Path) -> None:
    ring = filled(ALL)
    ring.save(tmp_path / "ring")
    files = IndividualFileDataset(1_000, directory=tmp_path / "files", durability="rename", compress={"obs": "lz4"})
    IndividualFileDataset.load(tmp_path / "ring", files)
    assert_same(files, ring)
    files.save(tmp_path / "links")
    files.close()
    assert_same(RingBufferDataset.load(tmp_path / "links", RingBufferDataset(10_000, compress=ALL)), ring)


def test_a_buffer_resumes_with_open_episodes(tmp_path) -> None:
    rings = [RingBufferDataset(1_000, compress=choice) for choice in (None, ALL)]
    buffers = [ReplayBuffer(ring, 8, 4, num_envs=2, seed=0) for ring in rings]
    steps = [(tagged.rows(np.arange(2), n // 30, n % 30), np.full(2, n % 30 == 0 and n > 0)) for n in range(200)]
    for step in steps[:110]:
        for buffer in buffers:
            buffer.add_step(*step)
    buffers[1].save(tmp_path)
    resumed = ReplayBuffer.load(tmp_path, RingBufferDataset(1_000, compress=ALL), batch_size=8, sequence_length=4)
    for step in steps[110:]:
        for buffer in (buffers[0], resumed):
            buffer.add_step(*step)
    for expected, found in zip(rings[0].episodes(), resumed.dataset.episodes(), strict=True):
        assert_same_batch(found, expected)


def test_what_has_changed_in_a_save_is_damage(tmp_path) -> None:
    filled({"obs": "lz4"}).save(tmp_path)
    file = next(tmp_path.glob("save-*.safetensors"))
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    size = 8 + int.from_bytes(data[:8], "little")
    for place in rng.integers(size, len(data), 30).tolist():
        changed = bytearray(data)
        changed[place] ^= 4
        file.write_bytes(changed)
        with pytest.raises(DamagedSaveError):
            RingBufferDataset.load(tmp_path)


@pytest.mark.parametrize("compress", [{"x": "lz4"}, {TensorType: "zstd"}, {TensorType: "lz4", "x": "zstd"}], ids=str)
def test_a_save_of_an_empty_ring_says_what_is_to_be_compressed(compress: Any, tmp_path: Path) -> None:
    empty = RingBufferDataset(1_000, compress=compress, capacity_bytes=5_000)
    with pytest.raises(ValueError, match="does not fit `capacity_bytes`"):
        # Its fields are not those of the ring.
        empty.add_episode({"x": np.random.default_rng(0).random((100, 50)), "y": np.zeros(100)})
    ReplayBuffer(empty, 4, num_envs=1).save(tmp_path)
    ring = ReplayBuffer.load(tmp_path).dataset
    assert isinstance(ring, RingBufferDataset)
    assert ring.compress == compress and ring.capacity_bytes == 5_000
    ring.add_episode({"x": np.zeros((100, 50))})
    assert ring.codecs["x"].name == compress.get("x", "zstd")


@pytest.mark.parametrize("before", [None, {"x": "lz4"}], ids=str)
@pytest.mark.parametrize("compress", [{"x": "zstd"}, {}], ids=str)
def test_a_save_of_files_says_how_new_ones_are_written(before: Any, compress: Any, tmp_path: Path) -> None:
    files = tmp_path / "files"
    if before is not None:
        with IndividualFileDataset(1_000, directory=files, compress=before) as dataset:
            dataset.add_episode({"x": np.zeros((100, 50))})
    with IndividualFileDataset(1_000, directory=files, compress=compress) as dataset:
        ReplayBuffer(dataset, 4, num_envs=1).save(tmp_path / "save")
    loaded = ReplayBuffer.load(tmp_path / "save")
    with loaded, loaded.dataset as dataset:
        assert dataset.compress == compress


def test_files_whose_info_chooses_nothing_are_written_as_they_are(tmp_path: Path) -> None:
    with IndividualFileDataset(1_000, directory=tmp_path, compress={"x": "lz4"}) as dataset:
        dataset.add_episode({"x": np.zeros((100, 50))})
    with IndividualFileDataset(1_000, EpisodeDatasetInfo(compress={}), directory=tmp_path) as dataset:
        dataset.add_episode({"x": np.zeros((100, 50))})
        assert [len(dataset._places_in(dataset.table.episode(position))) for position in range(2)] == [1, 0]


@pytest.mark.parametrize(("compress", "expected"), [(None, {"x": "lz4"}), ({}, {})], ids=str)
def test_files_that_take_saved_ones_go_on_as_these_were_written(compress: Any, expected: Any, tmp_path: Path) -> None:
    with IndividualFileDataset(1_000, directory=tmp_path / "old", compress={"x": "lz4"}) as dataset:
        dataset.add_episode({"x": np.zeros((100, 50))})
        dataset.save(tmp_path / "save")
    with IndividualFileDataset(1_000, directory=tmp_path / "new", compress=compress) as dataset:
        IndividualFileDataset.load(tmp_path / "save", dataset)
        dataset.add_episode({"x": np.zeros((100, 50))})
        places = [dataset._places_in(dataset.table.episode(position)) for position in range(2)]
        assert places[0].keys() == {"x"} and places[1].keys() == expected.keys()
