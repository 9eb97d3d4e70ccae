from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from buffers.dataset import IndividualFileDataset
from buffers.dataset.files.opening import Verify
from buffers.dataset.individual_file import (
    EpisodeSerializationStrategy,
    NumpyCompressedSerialization,
    TorchSerialization,
)
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.transfer import upload
from tests import tagged
from tests.file_helpers import files
from tests.objects.store_helpers import S3, reader, same_batches, tagged_episodes
from tests.test_individual_file import Raw


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, dict]:
    """A directory of episodes, a URL of the same, and options for it."""
    directory = tmp_path / "episodes"
    tagged_episodes(directory, [5, 9, 4, 7, 3], infos=True)
    if request.param == "file":
        return directory, f"file://{directory}", {}
    s3: S3 = request.getfixturevalue("s3")
    url = s3.new_url()
    s3.put(directory, url)
    return directory, url, {"storage_options": s3.options}


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_url_holds_what_its_directory_holds(place: tuple[Path, str, dict], tmp_path: Path, is_cached: bool) -> None:
    directory, url, options = place
    local = IndividualFileDataset(directory=directory, mode="r")
    for _ in range(2):
        remote = reader(url, tmp_path / "cache" if is_cached else None, **options)
        assert remote.capacity == local.capacity == 10_000
        assert (remote.table.rows == local.table.rows).all() and remote.fields == local.fields
        for number in range(5):
            tagged.assert_same_episode(remote.get_episode(number), local.get_episode(number))
            assert remote.episode_info(number) == local.episode_info(number) == {"task": f"task {number}"}
        same_batches(remote, local)


@pytest.mark.parametrize("strategy", [NumpyCompressedSerialization(), TorchSerialization(), Raw()])
def test_other_formats_are_read_whole(tmp_path: Path, strategy: EpisodeSerializationStrategy) -> None:
    directory = tmp_path / "mine"
    is_known = strategy.keeps_info
    tagged_episodes(directory, [5, 9, 4], infos=is_known, serialization_strategy=strategy)
    local_options: dict = {} if is_known else {"serialization_strategy": strategy}
    if not is_known:
        with IndividualFileDataset(100, directory=tmp_path / "same") as same:
            same.add_episode(tagged.episode(2, 0))
            local_options["info"] = EpisodeDatasetInfo(same.fields)
    local = IndividualFileDataset(directory=directory, mode="r", **local_options)
    for cache in (None, tmp_path / "cache"):
        remote = reader(f"file://{directory}", cache, **local_options)
        same_batches(remote, local)
        assert remote.episode_info(1) == local.episode_info(1)
        remote = reader(f"file://{directory}", cache, verify="full", **local_options)
        assert remote.num_episodes == 3
    store = remote._directory.store
    before = store.num_requests
    for _ in range(3):
        remote.get_loader(8, 2, seed=1).stream.take()
    assert store.num_requests - before <= 3 * 3  # Once each, from the cache then; and lists.


@pytest.mark.parametrize("verify", ["size", "header", "full"])
def test_damage_is_reported_as_of_a_directory(s3: S3, tmp_path: Path, verify: Verify) -> None:
    directory, url = tmp_path / "mine", s3.new_url()
    tagged_episodes(directory, [5, 9, 4, 6])
    names = files(directory)
    (directory / names[0]).write_bytes((directory / names[0]).read_bytes()[:-7])
    for name, at in ((names[1], 3), (names[2], -3)):
        content = bytearray((directory / name).read_bytes())
        content[at] ^= 255
        (directory / name).write_bytes(content)
    # Before the last one, by its name, and with its number.
    (directory / names[3].replace("-6.", "-2.")).write_bytes((directory / names[3]).read_bytes()[:50])
    (directory / "other.npz").write_bytes(b"what")
    (directory / ".tmp-0000000009-000000000999-4.safetensors").write_bytes(b"")
    s3.put(directory, url)
    reports = []
    for path, options in ((str(directory), {}), (url, {"storage_options": s3.options, "cache_bytes": 0})):
        with pytest.warns(UserWarning) as found:
            dataset = IndividualFileDataset(directory=path, mode="r", verify=verify, **options)
            batch = dataset.get_loader(128, 2, seed=0).stream.take()
        texts = sorted(str(warning.message).replace(path, "HERE") for warning in found)
        drawn = sorted({number for _, number, _, _ in tagged.origins(batch)} if verify == "full" else {})
        reports.append((texts, dataset.damaged_files, dataset.table.rows.tolist(), dataset.num_lost, drawn))
    assert reports[0] == reports[1]
    assert len(reports[0][1]) == (4 if verify == "full" else 3)


def test_windows_of_pixels_read_little_more_than_their_bytes(s3: S3, tmp_path: Path) -> None:
    """16 x 64 of 64 x 64 x 3, each touched for the first time, with the headers; and once more, nothing."""
    directory, url = tmp_path / "mine", s3.new_url()
    rng = np.random.default_rng(0)
    with IndividualFileDataset(10_000, directory=directory, durability="rename") as dataset:
        for _ in range(16):
            rows = {"pixels": rng.integers(0, 256, (150, 64, 64, 3), np.uint8)}
            rows |= {"action": np.zeros((150, 6), np.float32), "reward": np.zeros(150, np.float32)}
            rows |= {"terminated": np.zeros(150, np.bool_)}
            dataset.add_episode(rows)
        upload(directory, url, storage_options=s3.options)
        dataset = reader(url, tmp_path / "cache", storage_options=s3.options)
        episodes = np.arange(16)
        for num_bytes in (64 * (12288 + 24 + 4 + 1) * 16, 0):
            s3.proxy.num_bytes = 0
            s3.proxy.requests.clear()
            windows = dataset.table.windows(episodes, 11 * episodes % 80, 64)
            kinds = dataset.fields.items()
            found = {name: torch.empty((16, 64, *kind.shape), dtype=kind.dtype) for name, kind in kinds}
            assert dataset._read(windows, found) is None
            for b, (number, step) in enumerate(zip(windows.episode.tolist(), windows.step.tolist(), strict=True)):
                expected = dataset_rows(directory, number)["pixels"][step : step + 64]
                assert torch.equal(found["pixels"][b], expected)
            assert s3.proxy.num_bytes <= 1.3 * num_bytes
            assert len(s3.proxy.gets()) <= (16 * 4 if num_bytes else 0)


def dataset_rows(directory: Path, number: int) -> dict:
    return dict(IndividualFileDataset(directory=directory, mode="r").get_episode(number))


def test_a_changed_object_is_not_mixed_with_what_the_cache_has(s3: S3, tmp_path: Path) -> None:
    directory, url = tmp_path / "mine", s3.new_url()
    tagged_episodes(directory, [5])
    s3.put(directory, url)
    for number in range(2):
        dataset = reader(url, tmp_path / "cache", storage_options=s3.options)
        tagged.assert_same_episode(dataset.get_episode(0), tagged.episode(5, number))
        with IndividualFileDataset(100, directory=tmp_path / "other") as other:
            other.add_episode(tagged.episode(5, 1))
        if number == 0:
            s3.put(tmp_path / "other", url)


def test_a_saved_reader_reads_the_same_url_again(tmp_path: Path) -> None:
    tagged_episodes(tmp_path / "mine", [5, 9])
    url = f"memory://{tmp_path}/x"
    upload(tmp_path / "mine", url)
    reader(url).save(tmp_path / "saves")
    for given in (None, reader(url)):
        again = IndividualFileDataset.load(tmp_path / "saves", given)
        same_batches(again, reader(url))
    with pytest.raises(RuntimeError, match="This dataset reads memory.*`download` it"):
        again.upload("memory://elsewhere")


def test_rows_without_bytes_and_episodes_of_one_row_are_read(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    with IndividualFileDataset(100, directory=directory, durability="rename") as dataset:
        for length in (1, 7):
            dataset.add_episode({"none": np.zeros((length, 0), np.float32), "some": np.arange(length)})
        for cache in (None, tmp_path / "cache"):
            remote = reader(f"file://{directory}", cache)
            for number in range(2):
                tagged.assert_same_episode(remote.get_episode(number), dataset.get_episode(number))


def test_a_cache_smaller_than_an_episode_does_no_harm(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    tagged_episodes(directory, [500, 900, 700])
    local = IndividualFileDataset(directory=directory, mode="r")
    remote = reader(f"file://{directory}", tmp_path / "cache", cache_bytes=20_000)
    same_batches(remote, local, sequence_length=50)
    assert sum(512 * path.stat().st_blocks for path in (tmp_path / "cache").iterdir()) <= 20_000 * 17 / 16 + 2**16
