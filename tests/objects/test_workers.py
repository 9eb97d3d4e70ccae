from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest

from buffers.dataset import IndividualFileDataset
from buffers.objects import ObjectStoreError
from tests import tagged
from tests.faults import in_child, status_of
from tests.objects.store_helpers import S3, always, reader, same_batches, tagged_episodes


@pytest.fixture
def bucket(s3: S3, tmp_path: Path) -> tuple[S3, Path, str]:
    directory, url = tmp_path / "episodes", s3.new_url()
    tagged_episodes(directory, [25, 9, 14, 12])
    s3.put(directory, url)
    return s3, directory, url


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_return_what_those_of_a_directory_return(
    bucket: tuple[S3, Path, str], tmp_path: Path, method: str
) -> None:
    s3, directory, url = bucket
    dataset = reader(url, tmp_path / "cache", storage_options=s3.options)
    # The parent has connections, and a thread that serves them, which a child must not use.
    tagged.assert_same_episode(dataset.get_episode(0), tagged.episode(25, 0))
    local = IndividualFileDataset(directory=directory, mode="r")
    loader = dataset.get_loader(8, 3, num_workers=2, seed=5, multiprocessing_context=method)
    expected = local.get_loader(8, 3, num_workers=0, seed=5)
    batches = iter(loader)
    for _, one in zip(range(4), expected, strict=False):
        found = next(batches)
        for name, value in tagged.flatten(one).items():
            assert tagged.flatten(found)[name].equal(value)
    del batches
    # Nor has the child done anything to those of the parent.
    same_batches(dataset, local)


def test_a_forked_child_reads_while_its_parent_does(bucket: tuple[S3, Path, str]) -> None:
    s3, directory, url = bucket
    dataset = reader(url, storage_options=s3.options)

    def read() -> None:
        for _ in range(5):
            for number, length in enumerate([25, 9, 14, 12]):
                tagged.assert_same_episode(dataset.get_episode(number), tagged.episode(length, number))

    read()
    thread = threading.Thread(target=read)
    thread.start()
    children = [in_child(read) for _ in range(2)]
    read()
    assert [status_of(child) for child in children] == [0, 0]
    thread.join()


def test_threads_read_at_the_same_time(bucket: tuple[S3, Path, str], tmp_path: Path) -> None:
    s3, directory, url = bucket
    dataset = reader(url, tmp_path / "cache", storage_options=s3.options)
    failed = []

    def read(seed: int) -> None:
        try:
            for _ in range(20):
                tagged.origins(dataset.get_loader(8, 3, seed=seed).stream.take())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_pickled_dataset_is_small_and_reads(bucket: tuple[S3, Path, str]) -> None:
    s3, directory, url = bucket
    dataset = reader(url, storage_options=s3.options, timeout=7.5)
    data = pickle.dumps(dataset)
    assert len(data) < 5000
    copy = pickle.loads(data)
    assert copy._directory.store.timeout == 7.5 and os.path.exists(directory)
    same_batches(copy, IndividualFileDataset(directory=directory, mode="r"))


def test_an_error_of_a_worker_reaches_the_trainer(bucket: tuple[S3, Path, str]) -> None:
    s3, _, url = bucket
    dataset = reader(url, storage_options=s3.options)
    s3.proxy.fault = always("403", of=".safetensors")
    batches = iter(dataset.get_loader(8, 3, num_workers=1, seed=5, multiprocessing_context="fork"))
    with pytest.raises(ObjectStoreError, match="bytes .* of 00000.*Check the credentials"):
        next(batches)
