"""Files with compressed fields are episodes like others, and a damaged block is never served."""

from __future__ import annotations

import copy
import io
import itertools
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from buffers import ReplayBuffer
from buffers.compression import whole_blocks
from buffers.dataset import EpisodeDataset, IndividualFileDataset
from buffers.dataset.fields import TensorType
from buffers.dataset.files.directory import EpisodeDirectory
from buffers.dataset.files.serialization import UnknownVersionError, parse_schema
from buffers.dataset.individual_file import NumpyCompressedSerialization
from buffers.dataset.info import EpisodeDatasetInfo
from tests import tagged
from tests.compression.test_ring import ALL, WINDOWS
from tests.contract import assert_same_batch
from tests.test_individual_file import FileContract

cramjam = pytest.importorskip("cramjam")


class TestLz4(FileContract):
    def make(self, capacity: int, info: EpisodeDatasetInfo | None = None) -> EpisodeDataset:
        path = self.factory.mktemp("episodes")
        return IndividualFileDataset(capacity, info, None, path, durability="rename", compress=ALL)


class TestZstd(FileContract):
    def make(self, capacity: int, info: EpisodeDatasetInfo | None = None) -> EpisodeDataset:
        path = self.factory.mktemp("episodes")
        return IndividualFileDataset(capacity, info, None, path, durability="rename", compress={TensorType: "zstd"})


def filled(path: Path, compress: Any = ALL, numbers: range = range(30)) -> IndividualFileDataset:
    dataset = IndividualFileDataset(2_000, directory=path, durability="rename", compress=compress)
    for number in numbers:
        dataset.add_episode(tagged.episode(1 + number * 7 % 50, number), {"number": number})
    return dataset


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_files_that_are_not_compressed(window, num_workers, tmp_path) -> None:
    # Half of the second directory is compressed by one codec, the rest by another, or not at all.
    plain = filled(tmp_path / "plain", None)
    filled(tmp_path / "mixed", ALL, range(15)).close()
    filled(tmp_path / "mixed", {"obs": "zstd"}, range(15, 25)).close()
    mixed = filled(tmp_path / "mixed", None, range(25, 30))
    options = {**window, "seed": 3, "include": ("index", "mask") if "pack" not in window else ("index",)}
    loaders = [files.get_loader(24, num_workers=num_workers, **options) for files in (plain, mixed)]
    for expected, found in itertools.islice(zip(*loaders, strict=True), 4):
        assert_same_batch(found, expected)


@pytest.mark.parametrize("verify", ["size", "header", "full"])
def test_a_directory_opens_again(verify, tmp_path) -> None:
    filled(tmp_path).close()
    reader = IndividualFileDataset(directory=tmp_path, mode="r", verify=verify)
    assert tagged.numbers(reader) == list(range(30)) and not reader.damaged_files
    assert [reader.episode_info(number) for number in range(30)] == [{"number": number} for number in range(30)]
    assert tagged.numbers(copy.deepcopy(reader)) == list(range(30))


def test_print_and_stats_say_what_it_saves(tmp_path) -> None:
    with IndividualFileDataset(2_000, directory=tmp_path, compress={"image": "lz4"}) as files:
        files.add_episode({"image": np.zeros((500, 64, 64), np.uint8), "reward": np.zeros(500)})
        stats = ReplayBuffer(files, 4, 4).stats()
        assert 0 < stats["compressed_bytes"] < 500 * 64 * 64 / 50 and stats["compression_ratio"] > 50
        assert "times smaller" in repr(files)


def test_a_directory_goes_on_as_its_newest_episode(tmp_path) -> None:
    def codecs(compress: Any) -> dict[str, str]:
        with IndividualFileDataset(1_000, directory=tmp_path, durability="rename", compress=compress) as files:
            files.add_episode(tagged.episode(30, 0))
            return {name: codec.name for name, codec in files.codecs.items()}

    assert codecs(None) == {}
    assert codecs({"obs": "zstd"}) == codecs(None) == {"obs/state": "zstd", "obs/pixels": "zstd"}
    assert codecs({}) == codecs(None) == {}
    with IndividualFileDataset(directory=tmp_path, mode="r") as files:
        sizes = files.compressed_bytes()
        # Three of five are not compressed.
        assert sizes.keys() == {"obs/state", "obs/pixels"} and sizes["obs/pixels"] > 3 * 30 * 24


def one_file(path: Path) -> Path:
    with IndividualFileDataset(1_000, directory=path, compress={"image": "lz4"}) as files:
        rng = np.random.default_rng(0)
        image = np.repeat(rng.integers(0, 256, (100, 32, 4), dtype=np.uint8), 16, 2)
        files.add_episode({"image": image, "reward": np.arange(100.0)})
    return next(path.glob("*.safetensors"))


def test_others_can_read_the_blocks(tmp_path) -> None:
    file = one_file(tmp_path)
    episode = IndividualFileDataset(directory=tmp_path, mode="r").get_episode(0)
    tensors, rows = load_file(file), []
    begin = 0
    for size, _ in tensors["__blocks__/image"].tolist():
        block = tensors["image"][begin : begin + size].numpy().tobytes()
        once = int.from_bytes(block[:4], "little")
        inner = bytes(cramjam.lz4.decompress_block(block[4:], output_len=once)) if once else block[4:]
        num_rows = min(16, 100 - 16 * len(rows))
        rows.append(bytes(cramjam.lz4.decompress_block(inner, output_len=num_rows * 32 * 64)))
        begin += size
    assert b"".join(rows) == episode["image"].numpy().tobytes()


@pytest.mark.parametrize("seed", range(12))
def test_a_byte_that_has_changed_is_never_served(seed, tmp_path) -> None:
    file = one_file(tmp_path)
    good = IndividualFileDataset(directory=tmp_path, mode="r").get_episode(0)
    data, rng = bytearray(file.read_bytes()), np.random.default_rng(seed)
    header = 8 + int.from_bytes(data[:8], "little")
    place = int(rng.integers(header + 100 * 8, len(data)))  # Behind the rewards, which are not compressed.
    data[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
    files = IndividualFileDataset(1_000, directory=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="The dataset is empty"):
            for batch in files.get_loader(16, 9, include=("step",), seed=0):
                for n, sequence in enumerate(batch["image"]):
                    first = int(batch["step"][n, 0])
                    assert torch.equal(sequence, good["image"][first : first + 9])
    assert [reason for _, reason in files.damaged_files] and not files.num_episodes
    assert (tmp_path / "damaged").is_dir()


def test_a_truncated_file_is_set_aside(tmp_path) -> None:
    file = one_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="its header says"):
        assert IndividualFileDataset(1_000, directory=tmp_path).is_empty


@pytest.mark.parametrize(
    "change", [{"codec": None}, {"rows_per_block": 0}, {"rows_per_block": 2**40}, {"rows_per_block": "16"}]
)
def test_a_header_that_describes_no_codec_is_damage(change, tmp_path) -> None:
    change_schema(one_file(tmp_path), lambda schema: schema["compress"]["image"].update(change))
    with pytest.warns(UserWarning, match="are no whole episodes"):
        assert IndividualFileDataset(1_000, directory=tmp_path).is_empty


def change_schema(file: Path, change: Any) -> None:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    schema = json.loads(header["__metadata__"]["buffers"])
    change(schema)
    header["__metadata__"]["buffers"] = json.dumps(schema, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize("position", [0, 1, -1])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda schema: schema.update(version=3), "is of version 3 of the format; this library knows 2"),
        (
            lambda schema: schema["compress"]["obs/state"].update(codec="gzip"),
            "compressed by 'gzip', which this library",
        ),
    ],
)
def test_files_of_later_versions_are_not_set_aside(position, change, text, tmp_path) -> None:
    filled(tmp_path, {"obs": "lz4"}, range(5)).close()
    files = sorted(tmp_path.glob("*.safetensors"))
    change_schema(files[position], change)
    with pytest.raises(ValueError, match=f"{files[position].name} .*{text}"):
        IndividualFileDataset(2_000, directory=tmp_path)
    with pytest.warns(UserWarning, match=f"left out.*{text}"), IndividualFileDataset(directory=tmp_path, mode="r") as r:
        assert r.num_episodes == 4
    assert sorted(tmp_path.glob("*.safetensors")) == files and not (tmp_path / "damaged").exists()


def test_a_file_of_a_later_version_that_is_found_by_reading_is_not_set_aside(tmp_path) -> None:
    filled(tmp_path, {}, range(3)).close()
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    change_schema(file, lambda schema: schema.update(version=2))
    with IndividualFileDataset(2_000, directory=tmp_path) as dataset:
        with pytest.raises(ValueError, match=f"{file.name} is of version 2 of the format; this library knows 1"):
            dataset.get_episode(1)
        with pytest.raises(ValueError, match=f"{file.name} is of version 2 of the format; this library knows 1"):
            dataset.episode_info(1)
        assert file.exists() and dataset.num_episodes == 3


def test_earlier_versions_know_that_they_cannot_read_it(tmp_path) -> None:
    text = json.loads(_header(one_file(tmp_path)))["__metadata__"]["buffers"]
    assert json.loads(text)["version"] == 2
    with pytest.raises(UnknownVersionError, match="version 3"):
        parse_schema(text.replace('"version":2', '"version":3'))
    filled(tmp_path / "plain", None).close()
    text = json.loads(_header(next((tmp_path / "plain").glob("*.safetensors"))))["__metadata__"]["buffers"]
    assert json.loads(text)["version"] == 1


def _header(file: Path) -> bytes:
    data = io.BytesIO(file.read_bytes())
    return data.read(int.from_bytes(data.read(8), "little"))


def test_only_the_default_format_has_compressed_fields(tmp_path) -> None:
    with pytest.raises(ValueError, match="Only the default format has compressed fields, found NumpyCompressed"):
        IndividualFileDataset(10, None, None, tmp_path, NumpyCompressedSerialization(), compress=ALL)
    with IndividualFileDataset(100, None, None, tmp_path, NumpyCompressedSerialization()) as dataset:
        dataset.add_episode(tagged.episode(10, 0))
    # Without a strategy, the format is that of the files.
    with pytest.raises(ValueError, match="Only the default format has compressed fields, found NumpyCompressed"):
        IndividualFileDataset(100, directory=tmp_path, compress=ALL)
    with IndividualFileDataset(100, directory=tmp_path) as dataset:
        assert dataset.num_episodes == 1


def test_whole_blocks_uses_what_another_codec_has_made_no_more(tmp_path) -> None:
    """A ring before a directory: each has a codec of its own, and the rows are those that were added."""
    from buffers.dataset import RingBufferDataset

    ring = RingBufferDataset(300, compress={"obs": "lz4"})
    files = IndividualFileDataset(3_000, directory=tmp_path, durability="rename", compress={"obs": "zstd"})
    ring.extend(files)
    buffer = ReplayBuffer(ring, 4, 4, num_envs=1)
    for number in range(8):
        for step in range(50):
            buffer.add_step(tagged.rows(0, number, step), step == 49)
    assert tagged.numbers(files) == list(range(8))
    codecs = ring.codecs["obs/pixels"], files.codecs["obs/pixels"]
    assert len(whole_blocks(codecs[0], "x", {"x": np.zeros((50, 4, 2, 3), np.uint8)})) == 4
    assert {codec.name for codec in codecs} == {"lz4", "zstd"}


def rewritten(file: Path, rows_per_block: int, length: int) -> None:
    """Let a file, whose only field `x` is compressed, say that its first block is of so many rows, and all are."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    schema = json.loads(header["__metadata__"]["buffers"])
    schema["length"], schema["compress"]["x"]["rows_per_block"] = length, rows_per_block
    header["__metadata__"]["buffers"] = json.dumps(schema)
    begin, end = header["x"]["data_offsets"]
    blocks, index = body[begin:end], np.zeros((-(-length // rows_per_block), 2), np.uint32)
    index[0] = len(blocks), zlib.crc32(blocks)
    header["__blocks__/x"] |= {"shape": list(index.shape), "data_offsets": [0, index.nbytes]}
    header["x"]["data_offsets"] = [index.nbytes, index.nbytes + len(blocks)]
    text = json.dumps(header).encode()
    file.with_name(file.name.replace("-40.", f"-{length}.")).write_bytes(
        len(text).to_bytes(8, "little") + text + index.tobytes() + blocks
    )
    file.unlink()


@pytest.mark.parametrize(("rows_per_block", "length"), [(1 << 28, 1 << 28), (1 << 11, 1 << 11), (16, 1 << 25)])
def test_a_file_that_claims_more_than_it_can_hold_is_set_aside(rows_per_block, length, tmp_path) -> None:
    with IndividualFileDataset(100, directory=tmp_path, compress={"x": "lz4"}) as dataset:
        dataset.add_episode({"x": np.zeros((40, 100), np.uint8)})
    (file,) = tmp_path.glob("*.safetensors")
    rewritten(file, rows_per_block, length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        reader = IndividualFileDataset(directory=tmp_path, mode="r")
    assert reader.is_empty or rows_per_block == 16
    if not reader.is_empty:
        with pytest.warns(UserWarning, match="bytes of blocks"), pytest.raises(RuntimeError, match="gone"):
            reader.get_episode(0)


def test_open_files_keep_little_of_their_indices(tmp_path) -> None:
    dataset = IndividualFileDataset(10_000, directory=tmp_path, compress={"x": "lz4"})
    dataset.add_episode({"x": np.random.default_rng(0).integers(0, 256, (10_000, 10), dtype=np.uint8)})
    next(iter(dataset.get_loader(8, 1)))
    ((_, _, indices),) = dataset._reader._files.values()
    assert sum(column.nbytes for column in indices["x"]) == 12 * 625


def test_print_looks_into_few_files_and_not_again(tmp_path, monkeypatch) -> None:
    files, opened = filled(tmp_path), []
    real_open = EpisodeDirectory.open

    def counted(self: EpisodeDirectory, name: str) -> Any:
        opened.append(name)
        return real_open(self, name)

    monkeypatch.setattr(EpisodeDirectory, "open", counted)
    for _ in range(3):
        assert "times smaller" in repr(files) and ReplayBuffer(files, 4, 4).stats()["compression_ratio"] > 0
    assert 0 < len(opened) <= 16
    files.close()
    assert "times smaller" in repr(files) and len(opened) <= 16
