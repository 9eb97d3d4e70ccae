"""Evictors that fail, disks that are full, and what reading and opening cost."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers.dataset import EpisodeDataset, IndividualFileDataset, directory, window_reader
from buffers.dataset.directory import EpisodeDirectory
from buffers.dataset.individual_file import (
    NumpyCompressedSerialization,
    SafetensorsSerialization,
    TorchSerialization,
)
from buffers.evictor import Evictor
from tests import tagged
from tests.file_helpers import add, files, numbers, numbers_drawn

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
    assert dataset.table.starts[-1] == 12
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
        (name,) = files(path)
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
        stream = dataset.get_loader(64, 2, seed=0).stream
        num_before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            tagged.origins(stream.take())
        assert len(os.listdir("/proc/self/fd")) <= num_before + 32
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(80):  # Some have been read ahead.
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
