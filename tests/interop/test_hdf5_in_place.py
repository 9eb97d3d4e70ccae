"""A file of HDF5 that is opened in place gives the batches of its import, bit by bit."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.interop import FormatError, InPlaceDataset, hdf5, import_episodes
from buffers.interop.hdf5.file import HDF5File
from buffers.sampler import EpisodeFilter, PrioritizedSampler, UniformEpisodeSampler
from tests.interop.hdf5_files import unpacked
from tests.tagged import assert_same_episode, flatten

NAMES = ["robomimic", "robomimic_small", "isaaclab", "d4rl"]
each_file = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, and beside each a directory with its import."""
    folder = unpacked(tmp_path_factory.mktemp("files"))
    for name in NAMES:
        import_episodes("hdf5", folder / f"{name}.hdf5", folder / name)
    return folder


@pytest.fixture
def imported(files: Path, name: str) -> Iterator[IndividualFileDataset]:
    with IndividualFileDataset(directory=files / name, mode="r") as dataset:
        yield dataset


@pytest.fixture
def opened(files: Path, name: str) -> Iterator[InPlaceDataset]:
    with hdf5.open(files / f"{name}.hdf5") as dataset:
        yield dataset


def batches(dataset: Any, num: int = 8, **options: Any) -> list[Any]:
    loader = iter(dataset.get_loader(batch_size=8, seed=3, **options))
    return [next(loader) for _ in range(num)]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        flat, flat_expected = flatten(one), flatten(other)
        assert list(flat) == list(flat_expected)
        for name in flat:
            assert flat[name].dtype == flat_expected[name].dtype
            assert torch.equal(flat[name], flat_expected[name]), name


@each_file
@pytest.mark.parametrize(
    "options",
    [
        {"sequence_length": 2},
        {"sequence_length": 1, "include": ("index", "episode", "step", "is_last", "weight")},
        {"sequence_length": 5, "pad_before": 4, "pad_after": 4, "pad": "edge", "include": ("mask",)},
        {"sequence_length": None, "include": ("mask",)},
        {"sequence_length": 2, "sampler": UniformEpisodeSampler()},
        {"offsets": {"obs": (-1, 0), "action": range(0, 4)}},
    ],
)
def test_batches_are_those_of_the_import(options: dict[str, Any], opened: Any, imported: Any) -> None:
    assert_equal(batches(opened, **options), batches(imported, **options))


@each_file
def test_episodes_and_infos_are_those_of_the_import(opened: Any, imported: Any) -> None:
    for found, expected in zip(opened.episodes(), imported.episodes(), strict=True):
        assert_same_episode(found, {name: value.numpy() for name, value in flatten(expected).items()})
    assert opened.fields.conflict_with(imported.fields) is None and list(opened.fields) == list(imported.fields)
    assert [opened.episode_info(n) for n in range(6)] == [imported.episode_info(n) for n in range(6)]


@pytest.mark.parametrize(
    ("name", "context"), [("robomimic", "fork"), ("isaaclab", "fork"), ("robomimic_small", "spawn")]
)
def test_workers_open_the_file_themselves(context: str, opened: Any, imported: Any) -> None:
    batches(opened, 1, sequence_length=2)  # The parent has it open.
    options = {"num_workers": 2 if context == "fork" else 1, "multiprocessing_context": context}
    assert_equal(batches(opened, sequence_length=2, **options), batches(imported, sequence_length=2))


@each_file
def test_a_mixture_takes_it(opened: Any, imported: Any) -> None:
    ring = RingBufferDataset(100)
    for number, episode in enumerate(imported.episodes()):
        ring.add_episode(episode, imported.episode_info(number))
    for weights in ([0.5, 0.5], [0, 1]):
        found, expected = (MixtureDataset([ring, member], weights) for member in (opened, imported))
        assert_equal(batches(found, sequence_length=2), batches(expected, sequence_length=2))


@pytest.mark.parametrize("name", ["isaaclab"])
def test_samplers_and_late_fields_work(opened: Any, imported: Any) -> None:
    chosen = EpisodeFilter(UniformEpisodeSampler(), lambda info: bool(info["success"]))
    found = batches(opened, sequence_length=1, sampler=chosen, include=("episode",))
    assert {int(number) for batch in found for number in batch["episode"].flatten()} == {0, 3}
    results = []
    for dataset in (opened, imported):
        dataset.sampler = PrioritizedSampler()
        loader = dataset.get_loader(4, 2, sampler=dataset.sampler, seed=1, include=("index", "weight"))
        batch = next(iter(loader))
        dataset.update(batch["index"], {"priority": torch.arange(8.0).reshape(4, 2)})
        results.append(next(iter(loader)))
    assert_equal(results[:1], results[1:])


@pytest.mark.parametrize("name", ["d4rl"])
def test_a_buffer_draws_from_it_and_nothing_can_be_added(opened: Any) -> None:
    assert ReplayBuffer(opened, batch_size=4, sequence_length=2).sample()["obs"].shape == (4, 2, 3)
    with pytest.raises(RuntimeError, match="only to be read"):
        opened.add_episode({"obs": np.zeros((2, 3))})


def test_chosen_fields_a_mask_and_a_layout_are_those_of_read(files: Path) -> None:
    path = files / "robomimic.hdf5"
    with hdf5.open(path, layout="robomimic", mask="two", fields=["obs/image", "action"]) as dataset:
        assert list(dataset.fields) == ["obs/image", "action"] and dataset.num_episodes == 2
        expected = hdf5.read(path, mask="two", fields=["obs/image", "action"])
        for found, (rows, _) in zip(dataset.episodes(), expected, strict=True):
            assert_same_episode(found, rows)
    for opened in (hdf5.open, hdf5.read):
        with pytest.raises(
            ValueError, match=r"no fields \['actions'\]. It has .*'obs/image'.* Did you mean \['action'\]"
        ):
            opened(path, fields=["actions"])


def test_uncompressed_arrays_are_read_past_h5py(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = hdf5.open(files / "robomimic.hdf5")
    expected = batches(opened, sequence_length=2)
    opened.close()

    def fail(*_: Any) -> None:
        raise AssertionError("h5py was asked")

    monkeypatch.setattr(HDF5File, "_read_by_h5py", fail)
    monkeypatch.setattr(HDF5File, "handle", property(fail))
    assert_equal(batches(opened, sequence_length=2), expected)


@pytest.mark.parametrize("name", ["robomimic", "isaaclab"])
def test_a_block_before_the_file_is_skipped(name: str, opened: Any, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "block.hdf5"
    with h5py.File(path, "w", userblock_size=1024) as target, h5py.File(files / f"{name}.hdf5") as source:
        source.copy("data", target)
    assert_equal(batches(hdf5.open(path), sequence_length=2), batches(opened, sequence_length=2))


def test_a_file_that_changed_since_is_refused(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    path.write_bytes((files / "robomimic.hdf5").read_bytes())
    reader, opened = hdf5.read(path), hdf5.open(path)
    copy = pickle.loads(pickle.dumps(opened))
    os.utime(path, (1, 1))
    for use in (lambda: list(reader), lambda: batches(opened, 1, sequence_length=1), lambda: next(copy.episodes())):
        with pytest.raises(FormatError, match="a.hdf5: has changed since it was opened. Open it again"):
            use()


def test_a_copy_is_a_handle_and_closing_is_not_the_end(files: Path) -> None:
    with hdf5.open(files / "isaaclab.hdf5") as opened:
        expected = batches(opened, 2, sequence_length=1)
        assert_equal(batches(pickle.loads(pickle.dumps(opened)), 2, sequence_length=1), expected)
    assert_equal(batches(opened, 2, sequence_length=1), expected)
    assert "Read in place from" in repr(opened) and "6 episodes" in repr(opened)
    assert "There are no rewards." in opened.notes and opened.metadata["layout"] == "isaaclab"
