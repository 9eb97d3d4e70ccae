from __future__ import annotations

import copy
import errno
import itertools
import os
import pickle
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import EpisodeDataset, IndividualFileDataset, directory, window_reader
from buffers.dataset.directory import EpisodeDirectory
from buffers.dataset.fields import Fields, Scalar
from buffers.dataset.individual_file import (
    EpisodeSerializationStrategy,
    NumpyCompressedSerialization,
    SafetensorsSerialization,
    TorchSerialization,
)
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.evictor import Evictor
from buffers.sampler import Sampler
from tests import tagged
from tests.contract import DatasetContract


def files(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if not name.startswith("."))


def numbers(dataset: EpisodeDataset) -> list[tuple[int, int]]:
    """(number, length) of all episodes, each checked whole."""
    return [tagged.number_and_length(episode) for episode in dataset.episodes()]


def add(dataset: EpisodeDataset, lengths: list[int], first: int = 0) -> list[int]:
    return [dataset.add_episode(tagged.episode(length, first + i)) for i, length in enumerate(lengths)]


def numbers_drawn(dataset: EpisodeDataset, length: int = 1, num: int = 64, seed: int = 0) -> set[int]:
    batch = dataset.get_loader(num, length, seed=seed).stream.take()
    return {number for _, number, _, _ in tagged.origins(batch)}


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
        with pytest.raises(RuntimeError, match="mode='r', which only reads"):
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
            return IndividualFileDataset(capacity, None, evictor, folder, durability="rename")

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
                    dataset.evict_episode(dataset.index.position(number))
                else:
                    os.unlink(Path(folder) / f"{number:010d}-{start:012d}-{rows}.safetensors")
                    list(dataset.episodes())  # It is found to be gone when it is read.
            assert list(zip(dataset.index.ids, dataset.index.starts, dataset.index.lengths, strict=True)) == live
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


def test_ids_and_step_ids_go_on_after_opening_again_even_if_the_newest_are_gone(tmp_path) -> None:
    for round_ in range(3):
        with IndividualFileDataset(100, directory=tmp_path) as dataset:
            assert add(dataset, [5, 3], 2 * round_) == [2 * round_, 2 * round_ + 1]
            assert dataset.index.starts.tolist()[-2:] == [8 * round_, 8 * round_ + 5]
            for _ in range(2):
                dataset.evict_episode(-1)
            assert dataset.num_episodes == 0
    assert files(tmp_path) == ["0000000006-000000000024.next"]


def test_a_smaller_capacity_is_enforced_on_opening_by_the_evictor(tmp_path) -> None:
    with IndividualFileDataset(100, directory=tmp_path) as dataset:
        add(dataset, [5, 3, 9, 4])
    with IndividualFileDataset(13, evictor=Chosen([1]), directory=tmp_path) as dataset:
        assert numbers(dataset) == [(0, 5), (3, 4)]
        assert dataset.is_full
    with IndividualFileDataset(7, directory=tmp_path) as dataset:
        assert numbers(dataset) == [(3, 4)]
        assert add(dataset, [2], 4) == [4]


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


def test_the_format_of_a_directory_is_found_out_and_another_one_is_refused(tmp_path) -> None:
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


class Raw(EpisodeSerializationStrategy):
    """A user's own format, of as little as it takes."""

    suffix = ".raw"

    def save(self, episode, fields, file):
        for tensor in episode.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy().tobytes())

    def load(self, file, fields, length):
        episode = {}
        for name, field in fields.items():
            data = bytearray(file.read(length * field.nbytes))
            episode[name] = torch.frombuffer(data, dtype=field.dtype).view(length, *field.shape)
        return episode


class RawRanges(Raw):
    """Which also says where its rows are."""

    def load(self, file, fields, length):
        raise AssertionError("ranges are enough")

    def row_offsets(self, file, fields, length):
        offsets = np.cumsum([0, *(length * field.nbytes for field in fields.values())]).tolist()
        return dict(zip(fields, offsets, strict=False))


@pytest.mark.parametrize("strategy", [Raw(), RawRanges()])
def test_a_format_of_ones_own_works_and_asks_for_the_fields_it_does_not_keep(tmp_path, strategy) -> None:
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
    for arguments, error, message in (
        ({"durability": "maybe"}, ValueError, r"`durability` must be one of \['fsync', 'rename'\], found 'maybe'"),
        ({"mode": "w"}, ValueError, r"`mode` must be one of \['a', 'r'\]"),
        ({"verify": True}, ValueError, r"`verify` must be one of \['size', 'header', 'full'\]"),
        ({"serialization_strategy": ".npz"}, TypeError, "must be an EpisodeSerializationStrategy, found str"),
        ({"max_sampling_attempts": 0}, ValueError, "`max_sampling_attempts` must be at least 1"),
        ({"capacity": 0}, ValueError, "`capacity` must be at least 1"),
    ):
        with pytest.raises(error, match=message):
            IndividualFileDataset(**{"capacity": 9, "directory": tmp_path / "new", **arguments})
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="Episodes need a directory"):
        IndividualFileDataset(9, directory=tmp_path / "file")


def test_after_closing_everything_says_so_and_the_directory_is_free(tmp_path) -> None:
    dataset = IndividualFileDataset(30, directory=tmp_path)
    add(dataset, [4])
    batches = iter(dataset.get_loader(2, 1))
    next(batches)
    num_open = len(os.listdir("/proc/self/fd"))
    dataset.close()
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) == num_open - 3  # The lock, the directory, the episode.
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
    # So it is when the dataset is merely dropped.
    dropped = IndividualFileDataset(30, directory=tmp_path)
    del dropped
    IndividualFileDataset(30, directory=tmp_path).close()


# Readers.


def test_a_reader_follows_a_live_writer_and_cannot_write(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no directory to read; mode='a' makes one"):
        IndividualFileDataset(9, directory=tmp_path / "none", mode="r")
    reader = IndividualFileDataset(9, directory=tmp_path, mode="r")
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError, match="The dataset is empty"):
        numbers_drawn(reader)
    writer = IndividualFileDataset(9, directory=tmp_path, durability="rename")
    for number in range(20):
        writer.add_episode(tagged.episode(3, number))
        reader.refresh()
        live = {(n, 3) for n in range(max(0, number - 2), number + 1)}
        assert set(numbers(reader)) == live == set(numbers(writer))
        assert numbers_drawn(reader) <= {n for n, _ in live}
    for action in (lambda: add(reader, [3]), lambda: reader.evict_episode(0)):
        with pytest.raises(RuntimeError, match="mode='r', which only reads"):
            action()
    assert reader.num_episodes == 3


def test_a_reader_finds_new_episodes_by_drawing_alone(tmp_path) -> None:
    writer = IndividualFileDataset(9, directory=tmp_path, durability="rename")
    add(writer, [3])
    stream = IndividualFileDataset(9, directory=tmp_path, mode="r").get_loader(64, 1, seed=0).stream
    stream.take()
    add(writer, [3, 3, 3], 1)
    for _ in range(100_000):
        if {number for _, number, _, _ in tagged.origins(stream.take())} == {1, 2, 3}:
            return
    raise AssertionError("never found")


def test_a_reader_looks_at_a_directory_that_does_not_change_no_more(tmp_path, monkeypatch) -> None:
    writer = IndividualFileDataset(9, directory=tmp_path, durability="rename")
    add(writer, [3])
    os.utime(tmp_path, ns=(10**18, 10**18))
    reader = IndividualFileDataset(9, directory=tmp_path, mode="r")
    reader.refresh()
    reader._next_scan = 0.0
    monkeypatch.setattr(EpisodeDirectory, "list", None)
    numbers_drawn(reader)
    os.utime(tmp_path, ns=(10**18 + 1, 10**18 + 1))
    with pytest.raises(TypeError):
        numbers_drawn(reader)


def test_a_late_sight_of_an_older_episode_finds_its_place(tmp_path) -> None:
    # A directory that is read while it changes may show a newer file before an older one.
    writer = IndividualFileDataset(30, directory=tmp_path, durability="rename")
    add(writer, [3, 4, 5])
    hidden = sorted(tmp_path.glob("*.safetensors"))[1]
    hidden.rename(tmp_path / "hidden")
    reader = IndividualFileDataset(30, directory=tmp_path, mode="r")
    assert numbers(reader) == [(0, 3), (2, 5)]
    numbers_drawn(reader, 3)
    (tmp_path / "hidden").rename(hidden)
    reader.refresh()
    assert numbers(reader) == [(0, 3), (1, 4), (2, 5)]
    assert numbers_drawn(reader, 3) == {0, 1, 2}


def as_nobody(action) -> int:
    """Run it in a process that has no rights of its own; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            action()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    return os.waitpid(pid, 0)[1]


@pytest.mark.skipif(os.getuid() != 0, reason="gives up root's rights in a child")
def test_a_directory_that_must_not_be_written_to_can_be_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "episodes"
        IndividualFileDataset(9, directory=path, durability="rename").add_episode(tagged.episode(3, 0))
        path.chmod(0o555)

        def action() -> None:
            with pytest.raises(PermissionError, match="cannot be written to .*mode='r' reads it"):
                IndividualFileDataset(9, directory=path)
            with pytest.raises(PermissionError, match="Choose another `directory`"):
                IndividualFileDataset(9, directory=Path(folder) / "other")
            reader = IndividualFileDataset(9, directory=path, mode="r")
            assert numbers(reader) == [(0, 3)] and numbers_drawn(reader) == {0}

        assert as_nobody(action) == 0


def test_a_pickle_is_small_whatever_is_stored_and_opens_as_a_reader(tmp_path) -> None:
    dataset = IndividualFileDataset(10_000, directory=tmp_path, durability="rename")
    add(dataset, [3])
    small = len(pickle.dumps(dataset))
    add(dataset, [1] * 300, 1)
    data = pickle.dumps(dataset)
    assert len(data) <= small + 8 and len(data) < 4096
    other = pickle.loads(data)
    assert (other.mode, other.num_episodes, other.fields.names) == ("r", 301, dataset.fields.names)
    add(dataset, [2], 301)
    other.refresh()
    assert numbers(other)[-1] == (301, 2)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_draw_the_same_batches_as_the_process_itself(tmp_path, method) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path, durability="rename")
    add(dataset, [5, 3, 9, 4])
    alone = list(itertools.islice(dataset.get_loader(8, 2, seed=1), 4))
    loader = dataset.get_loader(8, 2, seed=1, num_workers=2, multiprocessing_context=method)
    for one, other in zip(alone, loader, strict=False):
        assert torch.equal(one["code"], other["code"])
        tagged.origins(other)


# Files that vanish.


def test_a_reader_whose_files_are_unlinked_draws_from_the_others(tmp_path) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path, durability="rename")
    add(dataset, [5] * 10)
    reader = IndividualFileDataset(100, directory=tmp_path, mode="r")
    reader._next_scan = float("inf")  # It does not look by itself.
    for name in files(tmp_path)[:9]:
        os.unlink(tmp_path / name)
    for each in (dataset, reader):
        for length in (3, None):
            batch = each.get_loader(64, length, chunk_size=8, seed=0).stream.take()
            assert {number for _, number, _, _ in tagged.origins(batch)} == {9}
        assert each.num_episodes == 1
    os.unlink(tmp_path / files(tmp_path)[-1])
    with pytest.raises(RuntimeError, match="Episode 9 is gone"):
        IndividualFileDataset.get_episode(pickle_free_copy(dataset), 0)


def pickle_free_copy(dataset: IndividualFileDataset) -> IndividualFileDataset:
    """The dataset with its files closed: an open file can be read after its name is gone."""
    assert dataset._reader is not None
    dataset._reader.close()
    return dataset


def test_an_open_file_outlives_its_name_for_who_reads_it(tmp_path) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path, durability="rename")
    add(dataset, [5, 5])
    numbers_drawn(dataset)
    os.unlink(tmp_path / files(tmp_path)[0])
    assert numbers_drawn(dataset) == {0, 1}


class Gone(Sampler):
    """Draws what is not there."""

    def __init__(self) -> None:
        self.num_draws = 0

    def draw(self, index, num_windows, length, rng):
        self.num_draws += 1
        windows = index.windows(np.zeros(num_windows, np.int64), np.zeros(num_windows, np.int64), length)
        windows.episode[:] = 77
        return windows


def test_max_sampling_attempts_bounds_the_draws(tmp_path) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path, max_sampling_attempts=7)
    add(dataset, [5])
    sampler = Gone()
    with pytest.raises(RuntimeError, match=r"4 of 4 windows were gone before they could be read, 7 times over"):
        dataset.get_loader(4, 2, sampler=sampler).stream.take()
    assert sampler.num_draws in (7, 8)


# Evictors.


class Failing(Evictor):
    def evict(self, dataset: EpisodeDataset) -> int:
        raise KeyError("not today")


class OutOfRange(Evictor):
    def evict(self, dataset: EpisodeDataset) -> int:
        return 17


@pytest.mark.parametrize(("evictor", "error"), [(Failing(), KeyError), (OutOfRange(), ValueError)])
def test_an_evictor_that_fails_leaves_everything_as_it_was(tmp_path, evictor, error) -> None:
    dataset = IndividualFileDataset(10, evictor=evictor, directory=tmp_path)
    add(dataset, [5, 4])
    before = files(tmp_path)
    with pytest.raises(error):
        add(dataset, [3], 2)
    assert files(tmp_path) == before and numbers(dataset) == [(0, 5), (1, 4)]
    assert add(dataset, [1], 2) == [2]
    dataset.close()
    with IndividualFileDataset(10, directory=tmp_path) as dataset:
        assert numbers(dataset) == [(0, 5), (1, 4), (2, 1)]


def test_after_a_failure_that_cannot_be_undone_no_number_is_given_twice(tmp_path, monkeypatch) -> None:
    dataset = IndividualFileDataset(10, evictor=Failing(), directory=tmp_path)
    add(dataset, [5, 4])

    def refuse(*arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "no")

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeDirectory, "remove", refuse)
        with pytest.raises(KeyError):
            add(dataset, [3], 2)
    assert add(dataset, [1], 3) == [3]
    assert dataset.index.starts[-1] == 12
    dataset.close()
    with IndividualFileDataset(20, directory=tmp_path) as dataset:
        assert numbers(dataset) == [(0, 5), (1, 4), (2, 3), (3, 1)]


def test_a_file_that_cannot_be_removed_keeps_its_episode(tmp_path, monkeypatch) -> None:
    dataset = IndividualFileDataset(10, directory=tmp_path)
    add(dataset, [5, 4])

    def refuse(*arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeDirectory, "remove", refuse)
        with pytest.raises(PermissionError, match="Episode 0 could not be evicted: Permission denied"):
            dataset.evict_episode(0)
    assert numbers(dataset) == [(0, 5), (1, 4)]


# No room, no permission, no luck.


def assert_as_before(
    dataset: IndividualFileDataset, path: Path, before: list[str], live: list[tuple[int, int]]
) -> None:
    assert sorted(os.listdir(path)) == before
    assert numbers(dataset) == live
    assert numbers_drawn(dataset, 1, 200) == {number for number, _ in live}


@pytest.mark.parametrize("strategy", [SafetensorsSerialization(), NumpyCompressedSerialization(), TorchSerialization()])
def test_a_file_size_limit_is_a_clear_error_and_adding_works_again(tmp_path, strategy) -> None:
    dataset = IndividualFileDataset(3000, None, None, tmp_path, strategy)
    add(dataset, [5, 4])
    before = sorted(os.listdir(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"An episode of 2900 steps \(142.1 kB\) could not be written.*Make room"
        ) as e:
            add(dataset, [2900], 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.errno == errno.EFBIG
    assert_as_before(dataset, tmp_path, before, [(0, 5), (1, 4)])
    assert add(dataset, [2900], 2) == [2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_a_clear_error_and_adding_works_again_once_there_is_room(small_disk) -> None:
    with IndividualFileDataset(100_000, directory=small_disk) as dataset:
        live = []
        with pytest.raises(OSError, match="could not be written, those before it are kept: No space left") as e:
            for number in range(1000):
                dataset.add_episode(tagged.episode(100, number))
                live.append((number, 100))
        assert e.value.errno == errno.ENOSPC and len(live) > 10
        assert_as_before(dataset, small_disk, sorted(os.listdir(small_disk)), live)
        assert not any(name.startswith(".tmp") for name in os.listdir(small_disk))
        dataset.evict_episode(0)
        assert add(dataset, [50], len(live)) == [len(live)]
        assert numbers(dataset) == [*live[1:], (len(live), 50)]


@pytest.mark.parametrize("which", ["the file", "the directory"])
def test_a_failed_fsync_is_an_error_that_is_not_retried(tmp_path, monkeypatch, which) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path)
    add(dataset, [5, 4])
    before = sorted(os.listdir(tmp_path))
    synced = []

    def fail(descriptor: int) -> None:
        synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))
        if synced[-1] == (which == "the directory"):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(directory.os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error") as e:
            add(dataset, [3], 2)
    assert e.value.errno == errno.EIO
    assert synced.count(which == "the directory") == 1
    assert_as_before(dataset, tmp_path, before, [(0, 5), (1, 4)])
    assert add(dataset, [3], 2) == [2]


def test_a_first_episode_that_cannot_be_written_settles_nothing(tmp_path, monkeypatch) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(directory.os, "rename", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
        with pytest.raises(OSError, match="Read-only"):
            dataset.add_episode({"other": np.zeros(3)})
    assert dataset.fields is None and files(tmp_path) == []
    assert add(dataset, [3]) == [0]


# What it costs.


def rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("episode_length", [20, 200, 3000])
@pytest.mark.parametrize(("batch_size", "length"), [(16, 16), (128, 3)])
def test_a_batch_reads_little_more_than_its_own_bytes(tmp_path, episode_length, batch_size, length) -> None:
    dataset = IndividualFileDataset(40 * episode_length, directory=tmp_path, durability="rename")
    episode = {
        "obs": np.zeros((episode_length, 24, 24, 3), np.uint8),
        "action": np.zeros((episode_length, 6), np.float32),
        "reward": np.zeros(episode_length, np.float32),
        "terminated": np.zeros(episode_length, np.bool_),
        "truncated": np.zeros(episode_length, np.bool_),
    }
    for _ in range(40):
        dataset.add_episode(episode)
    assert dataset.fields is not None
    dataset._reader._max_open_files = 16  # type: ignore[union-attr]  # Files are opened again and again.
    list(dataset.episodes())
    stream = dataset.get_loader(batch_size, length, seed=0).stream
    stream.take()
    before = rchar()
    overhead = rchar() - before
    for _ in range(10):
        stream.take()
    num_read = rchar() - before - 2 * overhead
    num_bytes = 10 * batch_size * length * dataset.fields.nbytes
    assert num_bytes <= num_read <= 1.2 * num_bytes


def make_many(path: Path, num: int) -> None:
    """So many episodes of 10 steps, of which only names and sizes are as they should be."""
    with IndividualFileDataset(10 * num, directory=path, durability="rename") as dataset:
        dataset.add_episode({"x": np.zeros((10, 4), np.float32)})
        (name,) = dataset._names.values()
    content = (path / name).read_bytes()
    for number in range(1, num):
        (path / f"{number:010d}-{10 * number:012d}-10.safetensors").write_bytes(content)


@pytest.mark.parametrize("num", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_episodes_are_opened_without_reading_them_and_evicted_without_a_rescan(tmp_path, monkeypatch, num) -> None:
    make_many(tmp_path, num)
    opened = []
    real_open = EpisodeDirectory.open

    def counted(self: EpisodeDirectory, name: str) -> int:
        opened.append(name)
        return real_open(self, name)

    monkeypatch.setattr(EpisodeDirectory, "open", counted)
    with IndividualFileDataset(10 * num, directory=tmp_path, durability="rename") as dataset:
        assert dataset.num_episodes == num and len(opened) == 1  # Of which the fields are known.
        monkeypatch.setattr(EpisodeDirectory, "list", None)
        for i in range(1000):
            dataset.evict_episode(0 if i % 2 else -1 - i)
        assert dataset.num_episodes == num - 1000
        assert dataset.add_episode({"x": np.zeros((10, 4), np.float32)}) == num
        dataset.get_loader(8, 4).stream.take()
    assert len(list(tmp_path.glob("*.safetensors"))) == num - 999


def test_few_descriptors_are_used_and_fewer_when_there_are_none_left(tmp_path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    held = []
    try:
        dataset = IndividualFileDataset(1000, directory=tmp_path, durability="rename")
        add(dataset, [2] * 200)
        num_before = len(os.listdir("/proc/self/fd"))
        stream = dataset.get_loader(64, 2, seed=0).stream
        for _ in range(50):
            tagged.origins(stream.take())
        assert len(os.listdir("/proc/self/fd")) <= num_before + 32
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(10):
            stream.take()
        assert dataset._reader is not None and dataset._reader._max_open_files < 32
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_decoded_episodes_are_kept_up_to_a_bound(tmp_path, monkeypatch) -> None:
    dataset = IndividualFileDataset(1000, None, None, tmp_path, NumpyCompressedSerialization(), durability="rename")
    add(dataset, [10] * 8)
    one = 10 * dataset.fields.nbytes  # type: ignore[union-attr]
    loads = []
    real = NumpyCompressedSerialization.load
    monkeypatch.setattr(NumpyCompressedSerialization, "load", lambda self, *a: loads.append(1) or real(self, *a))
    reader = dataset._reader
    assert reader is not None
    for bound, num_loads in ((8 * one, 8), (3 * one, 8 * 5), (one - 1, 8 * 5)):
        monkeypatch.setattr(window_reader, "MAX_DECODED_BYTES", bound)
        reader.close()
        loads.clear()
        for _ in range(5):
            assert len(numbers(dataset)) == 8
            assert reader._decoded_bytes == sum(one for _ in reader._decoded) <= bound
        assert len(loads) == num_loads
