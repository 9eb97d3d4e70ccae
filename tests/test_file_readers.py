"""Readers beside a writer, in other processes, and of files that vanish."""

from __future__ import annotations

import itertools
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from buffers.dataset import IndividualFileDataset
from buffers.dataset.directory import EpisodeDirectory
from buffers.sampler import Sampler
from tests import tagged
from tests.file_helpers import add, files, numbers, numbers_drawn

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
