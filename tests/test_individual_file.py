from __future__ import annotations

import copy
import gc
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset
from buffers.dataset.fields import Fields, Scalar, as_tensor
from buffers.dataset.individual_file import (
    EpisodeSerializationStrategy,
    NumpyCompressedSerialization,
    TorchSerialization,
)
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.evictor import Evictor
from tests import tagged
from tests.contract import DatasetContract
from tests.file_helpers import add, files, numbers, numbers_drawn, open_files


class FileContract(DatasetContract):
    strategy: EpisodeSerializationStrategy | None = None

    @pytest.fixture(autouse=True)
    def _factory(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.factory = tmp_path_factory

    def make(self, capacity: int, info: EpisodeDatasetInfo | None = None) -> EpisodeDataset:
        path = self.factory.mktemp("episodes")
        return IndividualFileDataset(capacity, info, None, path, self.strategy, durability="rename")

    def test_a_copy_goes_on_by_itself(self) -> None:
        dataset = self.filled([5, 3], 8)
        copied = copy.deepcopy(dataset)
        with pytest.raises(RuntimeError, match="This dataset only reads .* mode='r'"):
            copied.add_episode(tagged.episode(4, 2))
        dataset.add_episode(tagged.episode(4, 2))
        assert numbers_drawn(copied) == {1, 2}


class TestSafetensors(FileContract):
    pass


class TestNumpyCompressed(FileContract):
    strategy = NumpyCompressedSerialization()


class TestTorch(FileContract):
    strategy = TorchSerialization()


# The reference model: a list of episodes, whatever is done, and however often the directory is opened.


class Chosen(Evictor):
    """A user's own: the episode that a sequence of integers says."""

    def __init__(self, choices: list[int]) -> None:
        self.choices = itertools.cycle(choices)

    def evict(self, dataset: EpisodeDataset) -> int:
        return next(self.choices) % dataset.num_episodes


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 9)),
        st.tuples(st.just("evict"), st.integers(0, 9)),
        st.tuples(st.just("unlink"), st.integers(0, 9)),
        st.tuples(st.just("reopen"), st.integers(9, 30)),
    ),
    max_size=30,
)


@given(OPERATIONS, st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from(["a", "r"]))
@settings(max_examples=60, deadline=None)
def test_it_agrees_with_a_list_of_episodes(operations, choices, read_by) -> None:
    with tempfile.TemporaryDirectory() as folder:
        capacity, live, next_id, next_start = 30, [], 0, 0
        evictor, in_model = Chosen(choices), Chosen(choices)

        def make_room(length: int) -> None:
            while sum(rows for *_, rows in live) + length > capacity:
                live.pop(next(in_model.choices) % len(live))

        def opened() -> IndividualFileDataset:
            return IndividualFileDataset(capacity, None, evictor, folder, durability="rename", shrink=True)

        dataset = opened()
        reader = IndividualFileDataset(30, directory=folder, mode="r")
        for operation, value in operations:
            if operation == "add":
                make_room(value)
                assert dataset.add_episode(tagged.episode(value, next_id)) == next_id
                live.append((next_id, next_start, value))
                next_id, next_start = next_id + 1, next_start + value
            elif operation == "reopen":
                dataset.close()
                capacity = value
                dataset = opened()
                make_room(0)
            elif live:
                number, start, rows = live.pop(value % len(live))
                if operation == "evict":
                    dataset.evict_episode(dataset.table.position(number))
                else:
                    os.unlink(Path(folder) / f"{number:010d}-{start:012d}-{rows}.safetensors")
                    # It is found to be gone when it is opened; while it is open it can still be read.
                    dataset._reader.close()
                    list(dataset.episodes())
            assert list(zip(dataset.table.ids, dataset.table.starts, dataset.table.lengths, strict=True)) == live
        reader.refresh()
        for each in (dataset, reader) if read_by == "r" else (dataset,):
            assert numbers(each) == [(number, rows) for number, _, rows in live]
            if live:
                batch = each.get_loader(64, 1, include=("index", "episode"), seed=0).stream.take()
                starts = {number: start for number, start, _ in live}
                for (_, number, step, _), index in zip(tagged.origins(batch), batch["index"][:, 0], strict=True):
                    assert int(index) == starts[number] + step
        assert len([name for name in os.listdir(folder) if name.endswith(".safetensors")]) == len(live)


# Opening again.


def test_a_smaller_capacity_deletes_episodes_only_if_told_to(tmp_path) -> None:
    with IndividualFileDataset(1000, directory=tmp_path) as dataset:
        add(dataset, [100] * 10)
    newest_first = Chosen([-1])
    for capacity, evictor, gone in (
        (950, None, r"1 of its 10 .*\(100 steps, ids \[0\]\)"),
        (250, newest_first, r"8 of its 10 .*\(800 steps, ids \[2, 3, .*9\]\)"),
        (50, None, r"10 of its 10 .*, ids \[0, .*8, \.\.\.\]\)"),
    ):
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"holds 1000 steps, more than `capacity`={capacity}: {gone}.*shrink=True"
            ):
                IndividualFileDataset(capacity, None, evictor, tmp_path)
    assert len(files(tmp_path)) == 10
    with IndividualFileDataset(250, None, newest_first, tmp_path, shrink=True) as dataset:
        assert numbers(dataset) == [(0, 100), (1, 100)]
    # From now on, this is its capacity.
    IndividualFileDataset(250, directory=tmp_path).close()


def test_a_directory_that_nobody_has_signed_is_not_shrunk_either(tmp_path) -> None:
    with IndividualFileDataset(30, directory=tmp_path) as dataset:
        add(dataset, [10] * 3)
    (tmp_path / ".lock").unlink()
    with pytest.raises(ValueError, match="2 of its 3 episodes would be deleted"):
        IndividualFileDataset(10, directory=tmp_path)
    # This much may also be left by an addition that was killed before it evicted.
    with IndividualFileDataset(20, directory=tmp_path) as dataset:
        assert numbers(dataset) == [(1, 10), (2, 10)]


def test_a_reader_needs_no_capacity(tmp_path) -> None:
    with pytest.raises(TypeError, match="`capacity` is missing. Only with mode='r'"):
        IndividualFileDataset(directory=tmp_path)
    with IndividualFileDataset(30, directory=tmp_path) as dataset:
        reader = IndividualFileDataset(directory=tmp_path, mode="r")
        assert (reader.capacity, reader.is_full, len(reader)) == (30, False, 0)
        small = IndividualFileDataset(1, directory=tmp_path, mode="r")
        add(dataset, [15, 15])
        for each, is_full in ((reader, True), (small, True)):
            each.refresh()
            assert "2 episodes, 30 steps (read-only)" in repr(each) and each.is_full is is_full
            assert ReplayBuffer(each, 2).stats()["fill"] == 1
    (tmp_path / ".lock").unlink()
    assert "30 steps (read-only)" in repr(IndividualFileDataset(directory=tmp_path, mode="r"))


def test_a_reader_draws_sequences_longer_than_its_capacity(tmp_path) -> None:
    with IndividualFileDataset(30, directory=tmp_path) as dataset:
        dataset.add_episode(tagged.episode(20, 0))
    reader = IndividualFileDataset(1, directory=tmp_path, mode="r")
    for source in (reader, MixtureDataset([reader], [1.0])):
        assert next(iter(source.get_loader(4, 15)))["reward"].shape == (4, 15)
        with pytest.raises(RuntimeError, match="longer than every stored episode"):
            source.get_loader(4, 21).stream.take()


def test_the_fields_of_a_directory_bind_and_keep_their_types(tmp_path) -> None:
    fields = Fields(obs=Scalar(dtype=torch.bfloat16), z={"b": Scalar(), "a/b": Scalar()})
    episode = {
        "obs": torch.ones(3, dtype=torch.bfloat16),
        "z": {"b": np.ones(3, np.float32), "a/b": np.ones(3, np.float32)},
    }
    with IndividualFileDataset(9, EpisodeDatasetInfo(fields), directory=tmp_path) as dataset:
        dataset.add_episode(episode)
    with IndividualFileDataset(9, directory=tmp_path) as dataset:
        assert dataset.fields is not None
        assert list(dataset.fields.items()) == list(fields.items()) and dataset.fields.paths == fields.paths
        with pytest.raises(ValueError, match=r"missing \['z/b', 'z/a/b'\].*Expected \['obs', 'z/b', 'z/a/b'\]"):
            dataset.add_episode({"obs": torch.ones(3, dtype=torch.bfloat16)})
        with pytest.raises(ValueError, match="`obs` has dtype float32 .* expected"):
            dataset.add_episode({**episode, "obs": np.ones(3, np.float32)})
    other = Fields(obs=Scalar(dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"missing .* The directory has Fields\(obs: bfloat16.*`info` has Fields\(obs: "
    ):
        IndividualFileDataset(9, EpisodeDatasetInfo(other), directory=tmp_path)
    # The one that was refused has not kept the lock, nor moved anything.
    with IndividualFileDataset(9, directory=tmp_path) as dataset:
        assert dataset.num_episodes == 1


def test_the_format_of_a_directory_is_found_out(tmp_path) -> None:
    with IndividualFileDataset(30, None, None, tmp_path, NumpyCompressedSerialization()) as dataset:
        add(dataset, [4])
    reader = IndividualFileDataset(30, directory=tmp_path, mode="r")
    with IndividualFileDataset(30, directory=tmp_path) as dataset:
        add(dataset, [5], 1)
        assert numbers(dataset) == [(0, 4), (1, 5)]
    reader.refresh()
    assert numbers(reader) == [(0, 4), (1, 5)]
    with pytest.raises(ValueError, match=r"episodes in the format \['.npz'\], not only in `.pt`. Give"):
        IndividualFileDataset(30, None, None, tmp_path, TorchSerialization())
    assert len(files(tmp_path)) == 2
    # A backup that someone has made is not another format.
    (tmp_path / (files(tmp_path)[0] + ".bak")).write_text("")
    with IndividualFileDataset(30, directory=tmp_path) as dataset:
        assert numbers(dataset) == [(0, 4), (1, 5)]


class Raw(EpisodeSerializationStrategy):
    """A user's own format, of as little as it takes."""

    suffix = ".raw"

    def save(self, episode, fields, file):
        for tensor in episode.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy().tobytes())

    def load(self, file, fields, length):
        episode = {}
        for name, field in fields.items():
            data = np.frombuffer(file.read(length * field.nbytes), field.numpy_dtype)
            episode[name] = as_tensor(data.reshape(length, *field.shape).copy(), field)
        return episode


class RawRanges(Raw):
    """Which also says where its rows are."""

    def load(self, file, fields, length):
        raise AssertionError("ranges are enough")

    def row_offsets(self, file, fields, length):
        offsets = np.cumsum([0, *(length * field.nbytes for field in fields.values())]).tolist()
        return dict(zip(fields, offsets, strict=False))


@pytest.mark.parametrize("strategy", [Raw(), RawRanges()])
def test_a_format_of_ones_own_works(tmp_path, strategy) -> None:
    with IndividualFileDataset(30, None, None, tmp_path, strategy) as dataset:
        add(dataset, [4, 6])
        assert numbers(dataset) == [(0, 4), (1, 6)]
        fields = dataset.fields
    with pytest.raises(ValueError, match="format `.raw`, which does not keep their fields. State them with `info="):
        IndividualFileDataset(30, None, None, tmp_path, strategy)
    with IndividualFileDataset(30, EpisodeDatasetInfo(fields), None, tmp_path, strategy) as dataset:
        add(dataset, [3], 2)
        assert numbers(dataset) == [(0, 4), (1, 6), (2, 3)]


def test_arguments_are_checked(tmp_path) -> None:
    for argument, value, message in (
        ("durability", "maybe", r"`durability` must be one of \['fsync', 'rename'\], found 'maybe'"),
        ("mode", "w", r"`mode` must be one of \['a', 'r'\]"),
        ("verify", True, r"`verify` must be one of \['size', 'header', 'full'\]"),
        ("serialization_strategy", ".npz", "must be an EpisodeSerializationStrategy, found str"),
        ("max_sampling_attempts", 0, "`max_sampling_attempts` must be at least 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            IndividualFileDataset(9, directory=tmp_path / "new", **{argument: value})
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(NotADirectoryError, match="cannot be opened .*Choose another `directory`"):
            IndividualFileDataset(9, directory=tmp_path / name)
    with pytest.raises(FileNotFoundError, match="cannot be opened .*Choose another"):
        IndividualFileDataset(9, directory="/proc/no/such")


def test_after_closing_the_directory_is_free(tmp_path) -> None:
    dataset = IndividualFileDataset(30, directory=tmp_path)
    add(dataset, [4])
    batches = iter(dataset.get_loader(2, 1))
    next(batches)
    assert open_files(tmp_path) != []
    dataset.close()
    dataset.close()
    assert open_files(tmp_path) == []
    for action in (
        lambda: add(dataset, [4]),
        lambda: next(batches),
        lambda: dataset.get_episode(0),
        lambda: dataset.evict_episode(0),
        dataset.refresh,
    ):
        with pytest.raises(RuntimeError, match="is closed"):
            action()
    IndividualFileDataset(30, directory=tmp_path).close()
    # So it is when the dataset is merely dropped, with files open; and that raises no warning.
    for mode in ("a", "r"):
        dropped = IndividualFileDataset(30, directory=tmp_path, mode=mode)
        next(iter(dropped.get_loader(2, 1)))
        assert open_files(tmp_path) != []
        del dropped
        gc.collect()
        assert open_files(tmp_path) == []
    IndividualFileDataset(30, directory=tmp_path).close()


def test_the_first_episode_binds_a_newer_stranger(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for directory, episode in ((mine, {"obs": np.zeros((10, 3))}), (other, {"speed": np.zeros((10, 9))})):
        with IndividualFileDataset(1000, directory=directory) as dataset:
            dataset.add_episode(episode)
    (stranger,) = other.glob("*.safetensors")
    stranger.rename(mine / "0000000900-000000090000-10.safetensors")
    with (
        pytest.warns(UserWarning, match="1 files .* 0000000900"),
        IndividualFileDataset(1000, directory=mine) as dataset,
    ):
        assert dataset.num_episodes == 1 and list(dataset.fields or ()) == ["obs"]


@pytest.mark.parametrize("suffix", ["half", "", ".lock", ".next", ".a/b", None, 5, "."])
def test_a_suffix_that_could_not_be_found_again_is_refused(tmp_path: Path, suffix: Any) -> None:
    class Odd(Raw):
        pass

    Odd.suffix = suffix
    with pytest.raises(ValueError, match="`suffix`"):
        IndividualFileDataset(10, directory=tmp_path, serialization_strategy=Odd())
