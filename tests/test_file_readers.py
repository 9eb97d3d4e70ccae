"""Readers beside a writer, in other processes, and of files that vanish."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset
from buffers.dataset.files.directory import EpisodeDirectory
from tests import tagged
from tests.faults import as_nobody
from tests.file_helpers import add, files, numbers, numbers_drawn
from tests.reading import reader_of

# Readers.


def test_a_reader_follows_a_live_writer_and_cannot_write(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file.*mode='a' makes"):
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
        with pytest.raises(RuntimeError, match="This dataset only reads .* mode='r'"):
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


def test_a_directory_that_does_not_change_is_not_listed(tmp_path, monkeypatch) -> None:
    writer = IndividualFileDataset(9, directory=tmp_path, durability="rename")
    add(writer, [3])
    os.utime(tmp_path, ns=(10**18, 10**18))
    reader = IndividualFileDataset(9, directory=tmp_path, mode="r")
    reader.refresh()
    reader._directory._next_look = 0.0
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
    # A file with another name for the same episode means nothing, nor does its end.
    copy = tmp_path / f"0{hidden.name[1:10]}-000000000009-9.backup"
    copy.touch()
    reader.refresh()
    copy.unlink()
    reader.refresh()
    assert numbers(reader) == [(0, 3), (1, 4), (2, 5)]
    assert numbers_drawn(reader, 3) == {0, 1, 2}


@pytest.mark.skipif(os.getuid() != 0, reason="gives up root's rights in a child")
def test_a_read_only_directory_can_be_read() -> None:
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


@pytest.mark.parametrize("kind", ["reader", "copy", "copy of a reader", "copy of a ring"])
def test_readers_count_what_is_evicted_as_the_writer_does(tmp_path, kind) -> None:
    if kind == "copy of a ring":
        dataset: EpisodeDataset = RingBufferDataset(20)
    else:
        dataset = IndividualFileDataset(20, directory=tmp_path, durability="rename")
    add(dataset, [5, 5, 5])
    reader: Any = IndividualFileDataset(directory=tmp_path, mode="r") if "reader" in kind else dataset
    if "copy" in kind:
        reader = reader_of(reader)
    for lengths, num_evicted, is_full in (([4], 0, False), ([5], 1, True), ([8], 3, True), ([1, 1], 3, True)):
        add(dataset, lengths, dataset.table.next_id)
        for each in (dataset, reader):
            each.refresh() if isinstance(each, IndividualFileDataset) else each._refresh()
            assert (each.num_evicted, each.is_full) == (num_evicted, is_full)
    if not isinstance(dataset, IndividualFileDataset):
        return
    assert reader.capacity == 20
    # A file that is damaged was not evicted.
    for name in files(tmp_path)[-2:]:
        os.truncate(tmp_path / name, 10)
    for each in (reader, dataset):
        with pytest.warns(UserWarning, match="no whole episodes"):
            assert len(numbers(each)) == each.num_episodes == 3
    assert dataset.num_evicted == reader.num_evicted == 3
    dataset.close()
    dataset = IndividualFileDataset(20, directory=tmp_path)
    assert (dataset.num_evicted, dataset.is_full) == (0, False)


# Files that vanish.


def test_a_reader_whose_files_are_unlinked_draws_from_the_others(tmp_path) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path, durability="rename")
    add(dataset, [5] * 10)
    reader = IndividualFileDataset(100, directory=tmp_path, mode="r")
    reader._directory._next_look = float("inf")  # It does not look by itself.
    for name in files(tmp_path)[:9]:
        os.unlink(tmp_path / name)
    for each in (dataset, reader):
        for length in (3, None):
            batch = each.get_loader(64, length, chunk_size=8, seed=0).stream.take()
            assert {number for _, number, _, _ in tagged.origins(batch)} == {9}
        assert each.num_episodes == 1
    os.unlink(tmp_path / files(tmp_path)[-1])
    dataset._reader.close()  # An open file can be read after its name is gone.
    with pytest.raises(RuntimeError, match="Episode 9 is gone"):
        dataset.get_episode(0)


# Workers of a writer's process: by the log, exact.


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 1), ("fork", 2), ("spawn", 2), ("forkserver", 1)])
def test_workers_know_at_once_what_comes_and_goes(tmp_path, method, num_workers) -> None:
    dataset, rng = IndividualFileDataset(20_000, directory=tmp_path, durability="rename"), np.random.default_rng(0)
    add(dataset, [2] * 500)
    loader = dataset.get_loader(
        16, 2, include=("episode",), num_workers=num_workers, multiprocessing_context=method, persistent_workers=True
    )
    batches, ahead = iter(loader), 2 * num_workers + 1
    next(batches)
    for number in range(500, 506):
        add(dataset, [9], number)
        for num_others in range(dataset.num_episodes - 1, 0, -1):  # As a user's own evictor may, in any order.
            dataset.evict_episode(int(rng.integers(num_others)))
        drawn = [next(batches) for _ in range(ahead + 3)][ahead:]
        for batch in drawn:
            assert [n for _, n, _, _ in tagged.origins(batch)] == batch["episode"].tolist() == [number] * 16


def test_a_reader_whose_writer_is_killed_or_closes_goes_on_with_the_directory(tmp_path) -> None:
    for how in ("close", "kill"):
        path = tmp_path / how
        mine, theirs = multiprocessing.get_context("fork").Pipe()
        writer = multiprocessing.get_context("fork").Process(target=write_until_told, args=(path, theirs, how))
        writer.start()
        reader = pickle.loads(mine.recv())
        assert numbers(reader) == [(0, 4), (1, 4)]
        if how == "kill":
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            writer.join(30)
        else:
            mine.send("close")
            mine.recv()
        assert numbers_drawn(reader) == {0, 1}
        with IndividualFileDataset(100, directory=path, durability="rename") as other:
            other.evict_episode(0)
            add(other, [5], 2)
            reader.refresh()
            assert [number for number, _ in numbers(reader)] == [1, 2]
        if how == "close":
            mine.send("end")
        writer.join(30)


def write_until_told(path, connection, how) -> None:
    dataset = IndividualFileDataset(100, directory=path, durability="rename")
    add(dataset, [4, 4])
    connection.send(pickle.dumps(dataset))
    if how == "close":
        connection.recv()
        dataset.close()
        connection.send("closed")
    connection.recv()


def test_a_damaged_episode_that_a_worker_meets_stays_away_from_it_only(tmp_path) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path, durability="rename")
    add(dataset, [4] * 6)
    (damaged, *_) = files(tmp_path)
    os.truncate(tmp_path / damaged, 10)
    drawn = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The worker says so, too.
        for number, batch in zip(range(6, 30), dataset.get_loader(8, 3, num_workers=1, seed=0), strict=False):
            drawn |= {n for _, n, _, _ in tagged.origins(batch)}
            add(dataset, [4], number)
    assert 0 not in drawn and drawn >= {1, 2, 3, 4, 5}


def test_a_reader_of_an_empty_directory_starts_workers_once_there_is_something(tmp_path) -> None:
    with IndividualFileDataset(20, directory=tmp_path, durability="rename") as dataset:
        reader = IndividualFileDataset(directory=tmp_path, mode="r")
        add(dataset, [5])
        assert next(iter(reader.get_loader(2, 2, num_workers=1)))["reward"].shape == (2, 2)
