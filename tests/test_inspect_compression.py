"""`python -m buffers inspect --compression`: what it tries, what it advises, and how it fails."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers.compression import CODECS, whole_blocks
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.individual_file import NumpyCompressedSerialization
from buffers.fields import TensorType
from buffers.viewing import compression
from buffers.viewing.commands import main
from tests.file_helpers import files
from tests.test_inspect import Inspect, inspect, state

__all__ = ["inspect"]  # The fixture.

LENGTHS = (40, 7, 100)


def episode(length: int, number: int) -> dict[str, Any]:
    """An image that hardly changes, noise, and what is too small to try."""
    image = np.zeros((length, 12, 10), np.uint8)
    image[:, 3, 4] = np.arange(length)
    noise = np.random.default_rng(number).integers(0, 256, (length, 64), np.uint8)
    return {"obs": {"image": image, "noise": noise}, "reward": np.full(length, number, np.float32)}


def add(dataset: EpisodeDataset) -> EpisodeDataset:
    for number, length in enumerate(LENGTHS):
        dataset.add_episode(episode(length, number))
    return dataset


def cells(out: str, field: str, codec: str) -> list[str]:
    (row,) = [line.split() for line in out.splitlines() if line.split()[:2] == [field, codec]]
    return row[2:]


def advice(out: str) -> Any:
    (line,) = [line for line in out.splitlines() if line.startswith("compress=")]
    return ast.literal_eval(line.removeprefix("compress="))


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    with IndividualFileDataset(1000, directory=tmp_path / "episodes", durability="rename") as dataset:
        add(dataset)
    return tmp_path / "episodes"


def test_sizes_are_those_that_the_codecs_make(episodes: Path, inspect: Inspect) -> None:
    before = state(episodes)
    status, out, err = inspect("--compression", episodes)
    assert (status, err) == (0, "") and state(episodes) == before
    assert "Tried on 147 steps of 3 episodes, 27.0 kB; " in out and "reward" not in out
    for name in ("lz4", "zstd"):
        codec, num_bytes = CODECS[name]("obs/image", TensorType((12, 10), torch.uint8)), 0
        for number, length in enumerate(LENGTHS):
            rows = episode(length, number)["obs"]["image"]
            num_bytes += sum(map(len, whole_blocks(codec, "obs/image", {"obs/image": rows})))
        assert cells(out, "obs/image", name)[:3] == ["120", f"{num_bytes / 147:.1f}", f"{120 * 147 / num_bytes:.1f}"]
        assert cells(out, "obs/noise", name)[:3] == ["64", "64.0", "1.0"]
        assert all(float(cell) > 0 for cell in cells(out, "obs/image", name)[3:])


def test_the_advice_is_an_argument_of_a_ring(episodes: Path, inspect: Inspect) -> None:
    found = advice(inspect("--compression", episodes)[1])
    assert found == {"obs/image": "lz4"}
    assert add(RingBufferDataset(1000, compress=found)).codecs["obs/image"].name == "lz4"


def test_zstd_is_advised_where_lz4_does_not_pay(tmp_path: Path, inspect: Inspect) -> None:
    # Digits: each takes a byte, and none repeats what was before.
    digits = np.random.default_rng(0).integers(0, 10, (64, 100), np.uint8)
    with IndividualFileDataset(1000, directory=tmp_path) as dataset:
        dataset.add_episode({"digits": digits, "tiny": np.zeros((64, 15), np.float32)})
    out = inspect("--compression", tmp_path)[1]
    assert advice(out) == {"digits": "zstd"} and "tiny" not in out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.random.default_rng(0).integers(0, 256, (50, 64), np.uint8), "No field becomes 1.5 times smaller"),
        (np.zeros((50, 15), np.float32), "No field has 64 bytes a step"),
    ],
)
def test_without_a_field_that_pays_it_says_so(rows: np.ndarray, message: str, tmp_path: Path, inspect: Inspect) -> None:
    with IndividualFileDataset(1000, directory=tmp_path) as dataset:
        dataset.add_episode({"obs": rows})
    status, out, _ = inspect("--compression", tmp_path)
    assert status == 0 and message in out and "compress=" not in out


def test_the_sample_is_bounded(episodes: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    read = IndividualFileDataset.read
    num_rows = []

    def noting(dataset: IndividualFileDataset, windows: Any, *args: Any, **options: Any) -> Any:
        num_rows.append(windows.length)
        return read(dataset, windows, *args, **options)

    monkeypatch.setattr(IndividualFileDataset, "read", noting)
    monkeypatch.setattr(compression, "_MOST_BYTES", 184 * 100)
    assert "Tried on 71 steps of 3 episodes" in inspect("--compression", episodes)[1]
    # A third of 100 rows each, in whole blocks of 16.
    assert num_rows == [32, 7, 32]
    monkeypatch.setattr(compression, "_MOST_EPISODES", 2)
    assert "Tried on 88 steps of 2 episodes" in inspect("--compression", episodes)[1]
    monkeypatch.setattr(compression, "_MOST_BYTES", 1)
    assert "Tried on 16 steps of 1 episodes" in inspect("--compression", episodes)[1]


@pytest.mark.parametrize("options", [{}, {"compress": {"obs": "zstd"}}, {"half_precision": True}])
def test_saves_of_rings_are_tried_as_what_was_added(options: Any, tmp_path: Path, inspect: Inspect) -> None:
    add(RingBufferDataset(1000, **options)).save(tmp_path)
    before = state(tmp_path)
    status, out, err = inspect("--compression", tmp_path)
    assert (status, err) == (0, "") and state(tmp_path) == before
    assert "0: RingBufferDataset\nTried on 147 steps of 3 episodes, 27.0 kB" in out
    assert advice(out) == {"obs/image": "lz4"}


def test_each_store_of_a_save_is_tried(episodes: Path, tmp_path: Path, inspect: Inspect) -> None:
    with (
        IndividualFileDataset(1000, directory=tmp_path / "linked", durability="rename") as linked,
        IndividualFileDataset(directory=episodes, mode="r") as reader,
    ):
        fields = reader.fields
        add(linked)
        empty = RingBufferDataset(1000)
        MixtureDataset([reader, linked, empty], [1, 1, 1], fields=fields).save(tmp_path / "saves")
    status, out, err = inspect("--compression", tmp_path / "saves")
    assert (status, err) == (0, "")
    assert f"0: IndividualFileDataset, read only: inspect {episodes}\n" in out
    assert "1: IndividualFileDataset\nTried on 147 steps of 3 episodes, 27.0 kB" in out
    assert "2: RingBufferDataset, without episodes\n" in out


def test_every_format_of_files_is_tried(tmp_path: Path, inspect: Inspect) -> None:
    with IndividualFileDataset(1000, directory=tmp_path, serialization_strategy=NumpyCompressedSerialization()) as made:
        add(made)
    assert advice(inspect("--compression", tmp_path)[1]) == {"obs/image": "lz4"}


def test_damaged_episodes_are_left_out(episodes: Path, inspect: Inspect) -> None:
    for name in files(episodes)[1:]:
        with open(episodes / name, "r+b") as file:
            file.seek(20)
            file.write(b"\0\0\0")
    assert "Tried on 40 steps of 1 episodes" in inspect("--compression", episodes)[1]


def test_what_is_missing_is_named(episodes: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cramjam", None)
    status, out, err = inspect("--compression", episodes)
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert "`compress` needs cramjam" in err and "episode-buffers[compress]" in err


def test_what_cannot_be_tried_fails_in_one_line(episodes: Path, tmp_path: Path, inspect: Inspect) -> None:
    for options in (["--verify"], ["--episode", "0"], ["--output", tmp_path / "a.png"]):
        message = "--compression goes without --episode, --output and --verify.\n"
        assert inspect("--compression", episodes, *options) == (1, "", message)
    (tmp_path / "empty").mkdir()
    status, out, err = inspect("--compression", tmp_path / "empty")
    assert (status, out) == (1, "") and "holds no whole episode" in err
    add(RingBufferDataset(1000)).save(tmp_path / "saves")
    path = tmp_path / "saves" / "save-0000000000.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    status, out, err = inspect("--compression", tmp_path / "saves")
    assert (status, out) == (1, "") and "save-0000000000.safetensors" in err and err.count("\n") == 1


def test_it_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert "--compression" in capsys.readouterr().out
