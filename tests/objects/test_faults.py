from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.dataset.transfer import upload
from buffers.objects import INDEX, ObjectStore, ObjectStoreError
from tests import tagged
from tests.file_helpers import files
from tests.objects.store_helpers import S3, always, failing, reader, same_batches, tagged_episodes


@pytest.fixture
def bucket(s3: S3, tmp_path: Path) -> tuple[S3, Path, str]:
    """Three episodes in a directory, and under a URL."""
    directory, url = tmp_path / "episodes", s3.new_url()
    tagged_episodes(directory, [5, 9, 4])
    s3.put(directory, url)
    return s3, directory, url


@pytest.mark.parametrize("fault", ["500", "503", "drop", "short", "cut"])
def test_what_may_pass_is_asked_for_again(bucket: tuple[S3, Path, str], fault: str) -> None:
    s3, directory, url = bucket
    local = IndividualFileDataset(directory=directory, mode="r")
    dataset = reader(url, storage_options=s3.options)
    for of in (".safetensors", "list-type"):
        s3.proxy.fault = failing(2, fault, of=of)
        if of == "list-type" and fault in ("short", "cut"):
            continue
        dataset.refresh()
        same_batches(dataset, local, num=2)


@pytest.mark.parametrize(
    ("fault", "message", "num"),
    [
        ("500", "bytes [0-9]+ to [0-9]+ of 0000000001.*InternalError.*3 attempts.*Check the store and the", 3),
        ("503", "of 0000000001.*SlowDown.*3 attempts", 3),
        ("short", "of 0000000001.*bytes came.*3 attempts", 3),
        ("403", "of 0000000001.*PermissionError.*1 attempt\\). Check the credentials in `storage_options`", 1),
    ],
)
def test_what_stays_is_an_error_that_names_it(bucket: tuple[S3, Path, str], fault: str, message: str, num: int) -> None:
    s3, _, url = bucket
    dataset = reader(url, storage_options=s3.options)
    s3.proxy.fault = always(fault, of="0000000001")
    s3.proxy.requests.clear()
    with pytest.raises(ObjectStoreError, match=message) as caught:
        dataset.get_episode(1)
    assert url in str(caught.value)
    assert len(s3.proxy.gets("0000000001")) == num
    # It is no damage: once the store answers again, the episode is there.
    s3.proxy.fault = lambda *_: None
    tagged.assert_same_episode(dataset.get_episode(1), tagged.episode(9, 1))
    assert dataset.damaged_files == []


@pytest.mark.parametrize("of", ["list-type", "0000000001", "index"])
def test_a_store_that_hangs_is_named_within_the_deadline(bucket: tuple[S3, Path, str], of: str) -> None:
    s3, _, url = bucket
    dataset = reader(url, storage_options=s3.options)
    dataset._directory.store.timeout = 0.9
    s3.proxy.fault = lambda method, path: "hang" if of in path else None
    with pytest.raises(ObjectStoreError, match=r"no answer within [0-9.]+ s \(3 attempts\).*raise `timeout`") as caught:
        if of == "0000000001":
            dataset.get_episode(1)
        else:
            reader(url, storage_options=s3.options, timeout=3)
    assert url in str(caught.value)
    # The server hangs for a minute: it was not that which ended the call.
    assert not s3.proxy.has_answered_late
    s3.proxy.fault = lambda *_: None


def test_a_store_that_is_not_there_is_named(s3: S3) -> None:
    nowhere = {**s3.options, "endpoint_url": "http://127.0.0.1:9"}
    with pytest.raises(ObjectStoreError, match="asked for what index.buffers is.*Connect.*3 attempts.*s3://no/where"):
        reader("s3://no/where", storage_options=nowhere)
    with pytest.raises(FileNotFoundError, match="nothing under this URL.*python -m buffers upload"):
        reader("s3://no-such-bucket/where", storage_options=s3.options)
    with pytest.raises(FileNotFoundError, match="nothing under this URL"):
        reader(s3.new_url(), storage_options=s3.options)


def test_a_bucket_that_is_not_there_is_named_by_an_upload(s3: S3, tmp_path: Path) -> None:
    tagged_episodes(tmp_path / "mine", [5, 9])
    with pytest.raises(
        FileNotFoundError, match="no such bucket or folder. Make it, or check the URL: 's3://nowhere/x'"
    ):
        upload(tmp_path / "mine", "s3://nowhere/x", storage_options=s3.options)


def test_an_option_that_is_not_known_is_named(s3: S3) -> None:
    options = {"key": "key", "secret": "secret", "endpoint": s3.proxy.url}
    with pytest.raises(ValueError, match=r"s3://a/b .*`storage_options` \('key', 'secret', 'endpoint'\): .*'endpoint'"):
        reader("s3://a/b", storage_options=options)


def test_no_error_of_a_request_is_left_to_asyncio(s3: S3, tmp_path: Path) -> None:
    """The first that fails ends the call, and the others with it: asyncio prints what nobody asks for."""
    import fsspec.asyn

    loop, left = fsspec.asyn.get_loop(), []
    store = ObjectStore(s3.new_url(), s3.options)
    loop.set_exception_handler(lambda _, context: left.append(context["message"]))
    ended = []

    async def fail(*_: Any) -> bytes:
        # The second fails although it is cancelled.
        try:
            if ended or len(running) == 2:
                raise OSError("first")
            running.append(1)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise OSError("second") from None
        finally:
            ended.append(1)
        raise AssertionError

    running: list[int] = []
    store._read_range = fail  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(OSError, match="first"):
            list(store.read_ranges([("a", 0, 1, 1)] * 3))
        assert len(ended) == 3
        gc.collect()
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
    finally:
        loop.set_exception_handler(None)
    assert left == []


def test_a_full_store_is_named(bucket: tuple[S3, Path, str]) -> None:
    s3, directory, url = bucket
    s3.proxy.fault = always("507", "PUT")
    with pytest.raises(ObjectStoreError, match="uploading 000000000.*InsufficientStorage.*3 attempts"):
        upload(directory, f"{url}/other", storage_options=s3.options)


def test_an_upload_looks_whether_all_of_it_has_come(bucket: tuple[S3, Path, str]) -> None:
    s3, directory, url = bucket
    s3.proxy.fault = failing(1, "lose", "PUT", "0000000001-")
    with pytest.raises(
        ObjectStoreError, match="has nothing of 0000000001.* after [0-9]+ bytes were sent. Upload again"
    ):
        upload(directory, f"{url}/other", storage_options=s3.options)
    assert not s3.filesystem().exists(f"{url}/other/{INDEX}")
    upload(directory, f"{url}/other", storage_options=s3.options)
    assert s3.filesystem().exists(f"{url}/other/{INDEX}")


def test_an_object_that_is_shorter_than_it_was_is_left_out(bucket: tuple[S3, Path, str]) -> None:
    s3, directory, url = bucket
    dataset = reader(url, storage_options=s3.options)
    fs, (name, *_) = s3.filesystem(), files(directory)
    fs.pipe_file(f"{url}/{name}", (directory / name).read_bytes()[:-10])
    dataset._directory._next_look = float("inf")  # It does not look by itself.
    with pytest.warns(UserWarning, match=f"1 files in {url} are no whole episodes and were left out: {name}: it has"):
        batch = dataset.get_loader(64, 2, seed=0).stream.take()
    assert {number for _, number, _, _ in tagged.origins(batch)} == {1, 2}
    assert [found for found, _ in dataset.damaged_files] == [name]
    # As a local directory would say, when it is opened again.
    with pytest.warns(UserWarning, match=f"left out: {name}: it has"):
        again = reader(url, storage_options=s3.options)
    assert again.table.ids.tolist() == [1, 2]


@pytest.mark.filterwarnings("ignore:1 files in")
def test_shorter_objects_are_asked_for_once_whatever_their_number(s3: S3, tmp_path: Path) -> None:
    """Each took five attempts and their pauses, half of them one object after the other."""
    tagged_episodes(tmp_path, [5] * 12)
    s3.put(tmp_path, url := s3.new_url())
    dataset = reader(url, storage_options=s3.options)
    shorter, gone = files(tmp_path)[:6], files(tmp_path)[6:8]
    for name in shorter:
        s3.filesystem().pipe_file(f"{url}/{name}", b"short")
    for name in gone:
        s3.filesystem().rm_file(f"{url}/{name}")
    dataset._directory._next_look = float("inf")
    s3.proxy.requests.clear()
    batch = dataset.get_loader(128, 2, seed=0).stream.take()
    assert {number for _, number, _, _ in tagged.origins(batch)} == {8, 9, 10, 11}
    assert sorted(name for name, _ in dataset.damaged_files) == shorter
    assert [len(s3.proxy.gets(name)) for name in shorter + gone] == [1] * 8


def test_an_object_that_is_gone_is_drawn_no_more(bucket: tuple[S3, Path, str]) -> None:
    s3, directory, url = bucket
    dataset = reader(url, storage_options=s3.options)
    s3.filesystem().rm_file(f"{url}/{files(directory)[0]}")
    dataset._directory._next_look = float("inf")
    batch = dataset.get_loader(64, 2, seed=0).stream.take()
    assert {number for _, number, _, _ in tagged.origins(batch)} == {1, 2}
    assert dataset.damaged_files == [] and dataset.num_episodes == 2


def test_urls_where_directories_belong_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory://x is a URL.* mode='r'. To bring .* `upload\(url\)`"):
        IndividualFileDataset(10, directory="memory://x")
    buffer = ReplayBuffer(RingBufferDataset(10), 2)
    with pytest.raises(ValueError, match="memory://x is a URL.*Save to one.*upload DIRECTORY URL"):
        buffer.save("memory://x")
    with pytest.raises(ValueError, match="memory://x is a URL.*download URL DIRECTORY"):
        ReplayBuffer.load("memory://x")
    with pytest.raises(ValueError, match="`storage_options` are for URLs"):
        IndividualFileDataset(10, directory=tmp_path, storage_options={})
    for url in ("simplecache::s3://a/b", "blockcache://x", "filecache::memory://a"):
        with pytest.raises(ValueError, match="a cache of fsspec, which returns wrong bytes"):
            ObjectStore(url)
    for url in ("s3://", "file:///", "memory://"):
        with pytest.raises(ValueError, match=f"{url} names no bucket or folder. Add one"):
            ObjectStore(url)
    with pytest.raises(ValueError, match="`cache_bytes` must be at least 0"):
        reader("memory://x", cache_bytes=-1)
    with pytest.raises(ValueError, match="nonsense"):
        reader("nonsense://x")


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(ImportError, match=r"s3://a/b needs fsspec .*pip install '.\[objects\]'"):
        reader("s3://a/b")


def test_a_store_without_coroutines_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.implementations.memory as memory

    tagged_episodes(tmp_path / "mine", [4])
    url = f"memory://{tmp_path}/x"
    upload(tmp_path / "mine", url)
    dataset = reader(url)
    dataset._directory.store.timeout = 0.3

    def hang(*_: Any, **__: Any) -> None:
        time.sleep(1)

    monkeypatch.setattr(memory.MemoryFileSystem, "cat_file", hang)
    with pytest.raises(ObjectStoreError, match="no answer within 0.3 s"):
        dataset.get_episode(0)
    monkeypatch.undo()
    assert torch.equal(dataset.get_episode(0)["reward"], torch.arange(4.0))
