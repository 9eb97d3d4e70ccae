"""Evictors that fail, disks that are full, and what reading and opening cost."""

from __future__ import annotations

import errno
import gc
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.files import window_reader
from buffers.dataset.files.directory import EpisodeDirectory
from buffers.dataset.individual_file import NumpyCompressedSerialization
from buffers.evictor import Evictor
from tests import tagged
from tests.faults import failing_calls, limited, small_disk
from tests.file_helpers import add, files, numbers, numbers_drawn
from tests.format_helpers import each_strategy

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


def test_a_failed_addition_whose_file_stays_is_removed_by_the_next(tmp_path) -> None:
    dataset = IndividualFileDataset(10, evictor=Failing(), directory=tmp_path)
    add(dataset, [5, 4])
    with failing_calls("unlink", PermissionError(errno.EACCES, "no"), lambda name, **_: name.startswith("0")):
        with pytest.raises(KeyError):
            add(dataset, [3], 2)
        # Its numbers must not be given to a second file beside it.
        with pytest.raises(PermissionError):
            add(dataset, [1], 3)
    assert add(dataset, [1], 3) == [2]
    assert dataset.table.starts[-1] == 9
    dataset.close()
    with IndividualFileDataset(20, directory=tmp_path) as dataset:
        assert numbers(dataset) == [(0, 5), (1, 4), (3, 1)]


def test_a_file_that_cannot_be_removed_keeps_its_episode(tmp_path) -> None:
    dataset = IndividualFileDataset(10, directory=tmp_path)
    add(dataset, [5, 4])
    message = "Episode 0 could not be evicted: Permission denied"
    error = PermissionError(errno.EACCES, "Permission denied")
    with failing_calls("unlink", error), pytest.raises(PermissionError, match=message):
        dataset.evict_episode(0)
    assert numbers(dataset) == [(0, 5), (1, 4)]


# No room, no permission, no luck.


def assert_as_before(
    dataset: IndividualFileDataset, path: Path, before: list[str], live: list[tuple[int, int]]
) -> None:
    assert sorted(os.listdir(path)) == before
    assert numbers(dataset) == live
    assert numbers_drawn(dataset, 1, 200) == {number for number, _ in live}


@each_strategy
def test_after_a_file_size_limit_adding_works_again(tmp_path, strategy) -> None:
    dataset = IndividualFileDataset(3000, None, None, tmp_path, strategy)
    add(dataset, [5, 4])
    before = sorted(os.listdir(tmp_path))
    message = r"An episode of 2900 steps \(142.1 kB\) could not be written.*Make room"
    with limited(resource.RLIMIT_FSIZE, 10_000), pytest.raises(OSError, match=message) as e:
        add(dataset, [2900], 2)
    assert e.value.errno == errno.EFBIG
    assert_as_before(dataset, tmp_path, before, [(0, 5), (1, 4)])
    assert add(dataset, [2900], 2) == [2]


def test_after_a_full_disk_adding_works_again(tmp_path) -> None:
    with small_disk(tmp_path / "disk") as path, IndividualFileDataset(100_000, directory=path) as dataset:
        live = []
        with pytest.raises(OSError, match="could not be written, those before it are kept: No space left") as e:
            for number in range(1000):
                dataset.add_episode(tagged.episode(100, number))
                live.append((number, 100))
        assert e.value.errno == errno.ENOSPC and len(live) > 10
        assert_as_before(dataset, path, sorted(os.listdir(path)), live)
        assert not any(name.startswith(".tmp") for name in os.listdir(path))
        dataset.evict_episode(0)
        assert add(dataset, [50], len(live)) == [len(live)]
        assert numbers(dataset) == [*live[1:], (len(live), 50)]


@pytest.mark.parametrize("which", ["the file", "the directory"])
def test_a_failed_fsync_is_an_error_and_not_retried(tmp_path, which) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path)
    add(dataset, [5, 4])
    before = sorted(os.listdir(tmp_path))

    def is_meant(descriptor: int) -> bool:
        return os.path.isdir(f"/proc/self/fd/{descriptor}") == (which == "the directory")

    error = OSError(errno.EIO, "Input/output error")
    with failing_calls("fsync", error, is_meant) as failed, pytest.raises(OSError, match="Input/output error") as e:
        add(dataset, [3], 2)
    assert e.value.errno == errno.EIO and failed.count(True) == 1
    assert_as_before(dataset, tmp_path, before, [(0, 5), (1, 4)])
    assert add(dataset, [3], 2) == [2]


def test_a_first_episode_that_cannot_be_written_settles_nothing(tmp_path) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path)
    with failing_calls("rename", OSError(errno.EROFS, "Read-only")), pytest.raises(OSError, match="Read-only"):
        dataset.add_episode({"other": np.zeros(3)})
    assert dataset.fields is None and files(tmp_path) == []
    assert add(dataset, [3]) == [0]


@pytest.mark.parametrize("name", ["open", "rename", "fsync"])
def test_an_addition_that_ctrl_c_cuts_off_harms_no_other(tmp_path, name) -> None:
    dataset = IndividualFileDataset(10, directory=tmp_path)
    add(dataset, [5])

    def is_meant(*arguments: object) -> bool:
        return name != "fsync" or os.path.isdir(f"/proc/self/fd/{arguments[0]}")  # The file has its name by then.

    with failing_calls(name, KeyboardInterrupt(), is_meant), pytest.raises(KeyboardInterrupt):
        add(dataset, [2], 1)
    assert add(dataset, [3, 1], 1) == [1, 2]
    dataset.close()
    with IndividualFileDataset(10, directory=tmp_path) as dataset:
        assert numbers(dataset) == [(0, 5), (1, 3), (2, 1)]


# What it costs.


@pytest.mark.parametrize("episode_length", [20, 3000])
@pytest.mark.parametrize(("batch_size", "length"), [(16, 16), (128, 3)])
def test_a_batch_reads_its_own_bytes_by_few_calls(tmp_path, monkeypatch, episode_length, batch_size, length) -> None:
    dataset = IndividualFileDataset(40 * episode_length, directory=tmp_path, durability="rename")
    episode = {
        "obs": np.zeros((episode_length, 24, 24, 3), np.uint8),
        "action": np.zeros((episode_length, 6), np.float32),
        "reward": np.zeros(episode_length, np.float32),
    }
    for _ in range(40):
        dataset.add_episode(episode)
    assert dataset.fields is not None
    stream = dataset.get_loader(batch_size, length, seed=0).stream
    stream.take()
    num_read, preadv = [], os.preadv

    def counted(*arguments: Any) -> int:
        num_read.append(preadv(*arguments))
        return num_read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    for _ in range(10):
        stream.take()
    # A window is one range of each field at most; ranges that lie together are read at once.
    assert 10 * batch_size <= len(num_read) <= 10 * batch_size * len(episode)
    num_bytes = 10 * batch_size * length * dataset.fields.nbytes
    assert num_bytes <= sum(num_read) <= 1.2 * num_bytes


def make_many(path: Path, num: int) -> None:
    """So many episodes of 10 steps, of which only names and sizes are as they should be."""
    with IndividualFileDataset(10 * num, directory=path, durability="rename") as dataset:
        dataset.add_episode({"x": np.zeros((10, 4), np.float32)})
        (name,) = files(path)
    content = (path / name).read_bytes()
    for number in range(1, num):
        (path / f"{number:010d}-{10 * number:012d}-10.safetensors").write_bytes(content)


@pytest.mark.parametrize("num", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_episodes_are_opened_without_reading_them(tmp_path, monkeypatch, num) -> None:
    make_many(tmp_path, num)
    opened = []
    real_open = EpisodeDirectory.open

    def counted(self: EpisodeDirectory, name: str) -> int:
        opened.append(name)
        return real_open(self, name)

    monkeypatch.setattr(EpisodeDirectory, "open", counted)
    with IndividualFileDataset(10 * num, directory=tmp_path, durability="rename") as dataset:
        assert dataset.num_episodes == num and set(opened) == {files(tmp_path)[0], files(tmp_path)[-1]}
        # The first tells the fields, the last what is compressed.
        monkeypatch.setattr(EpisodeDirectory, "list", None)
        for i in range(1000):
            dataset.evict_episode(0 if i % 2 else -1 - i)
        assert dataset.num_episodes == num - 1000
        assert dataset.add_episode({"x": np.zeros((10, 4), np.float32)}) == num
        dataset.get_loader(8, 4).stream.take()
    assert len(list(tmp_path.glob("*.safetensors"))) == num - 999


def test_a_quarter_of_the_descriptors_is_used_at_most(tmp_path) -> None:
    gc.collect()  # Rings of other tests have descriptors.
    with limited(resource.RLIMIT_NOFILE, 128):
        dataset = IndividualFileDataset(1000, directory=tmp_path, durability="rename")
        add(dataset, [2] * 200)
        stream = dataset.get_loader(64, 2, seed=0).stream
        num_before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            tagged.origins(stream.take())
        assert len(os.listdir("/proc/self/fd")) <= num_before + 32


def test_decoded_episodes_are_kept_up_to_a_bound(tmp_path, monkeypatch) -> None:
    dataset = IndividualFileDataset(1000, None, None, tmp_path, NumpyCompressedSerialization(), durability="rename")
    add(dataset, [10] * 8)
    one = 10 * dataset.fields.nbytes  # type: ignore[union-attr]
    loads, load = [], NumpyCompressedSerialization.load
    monkeypatch.setattr(NumpyCompressedSerialization, "load", lambda *given: loads.append(1) or load(*given))
    for bound, num_loads in ((8 * one, 8), (3 * one, 8 * 5), (one - 1, 8 * 5)):
        monkeypatch.setattr(window_reader, "MAX_DECODED_BYTES", bound)
        reader = IndividualFileDataset(1000, directory=tmp_path, mode="r")
        loads.clear()
        for _ in range(5):
            assert len(numbers(reader)) == 8
        assert len(loads) == num_loads


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("length", [None, 3])
def test_a_batch_decodes_each_episode_once_whatever_the_cache_holds(tmp_path, monkeypatch, length, is_mixed) -> None:
    with IndividualFileDataset(1000, None, None, tmp_path, NumpyCompressedSerialization()) as dataset:
        add(dataset, [10] * 8)
        one = 10 * dataset.fields.nbytes  # type: ignore[union-attr]
    loads, load = [], NumpyCompressedSerialization.load
    monkeypatch.setattr(NumpyCompressedSerialization, "load", lambda *given: loads.append(1) or load(*given))
    for bound in (one - 1, 3 * one):
        monkeypatch.setattr(window_reader, "MAX_DECODED_BYTES", bound)
        reader: EpisodeSource = IndividualFileDataset(directory=tmp_path, mode="r")
        reader = MixtureDataset([reader], [1.0]) if is_mixed else reader
        loads.clear()
        batch = reader.get_loader(64, length, chunk_size=4, include=("episode",), seed=0).stream.take()
        assert len(loads) == len(batch["episode"].unique()) == 8
        tagged.origins(batch)
