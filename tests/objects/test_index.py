from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset
from buffers.dataset.transfer import upload
from buffers.disk import DamagedEpisodeError
from buffers.objects import INDEX, Index, ObjectStore, store
from tests import tagged
from tests.objects.store_helpers import S3, always, reader, same_batches, tagged_episodes

NAMES = st.lists(st.text("abc-./0é", min_size=1, max_size=9), max_size=5, unique=True)


@given(NAMES, st.data())
def test_an_index_comes_back_and_no_changed_byte_is_taken_for_one(names: list[str], data: st.DataObject) -> None:
    numbers = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3)
    table = np.array([data.draw(numbers) for _ in names], np.int64).reshape(-1, 3)
    index = Index({"kind": "episodes", "num_objects": len(names)}, names, table)
    encoded = index.encode()
    found = Index.decode(encoded)
    assert (found.said, found.names) == (index.said, names) and (found.table == table).all()
    at = data.draw(st.integers(0, len(encoded) - 1))
    changed = bytearray(encoded)
    changed[at] ^= data.draw(st.integers(1, 255))
    for spoilt in (bytes(changed), encoded[:at]):
        with pytest.raises((DamagedEpisodeError, ValueError)):
            Index.decode(spoilt)


def test_with_an_index_opening_neither_lists_nor_reads_headers(s3: S3, tmp_path: Path) -> None:
    url, directory = s3.new_url(), tmp_path / "mine"
    # Files with infos are looked into where there is no index.
    tagged_episodes(directory, [5, 9, 4], infos=True)
    upload(directory, url, storage_options=s3.options)
    s3.proxy.requests.clear()
    dataset = reader(url, storage_options=s3.options)
    assert s3.proxy.lists() == 0 and {path.rpartition("/")[2] for _, path, _ in s3.proxy.requests} == {INDEX}
    same_batches(dataset, IndividualFileDataset(directory=directory, mode="r"))
    # Looking again reads it only if it has changed.
    s3.proxy.requests.clear()
    for _ in range(3):
        dataset.refresh()
    assert [method for method, _, _ in s3.proxy.requests] == ["HEAD"] * 3
    tagged_episodes(directory, [6])
    upload(directory, url, storage_options=s3.options)
    dataset.refresh()
    assert dataset.table.ids.tolist() == [0, 1, 2, 3]


def test_a_damaged_index_is_passed_over_and_another_version_refused(s3: S3, tmp_path: Path) -> None:
    url, directory = s3.new_url(), tmp_path / "mine"
    tagged_episodes(directory, [5, 9])
    upload(directory, url, storage_options=s3.options)
    fs = s3.filesystem()
    good = fs.cat_file(f"{url}/{INDEX}")
    fs.pipe_file(f"{url}/{INDEX}", good[:-1])
    with pytest.warns(UserWarning, match=f"{url}/{INDEX} is not the index that was written: the objects are listed"):
        assert reader(url, storage_options=s3.options).num_episodes == 2
    fs.pipe_file(f"{url}/{INDEX}", good.replace(b"index 1", b"index 2"))
    with pytest.raises(ValueError, match=f"{INDEX} is an index of version 2; this library knows 1"):
        reader(url, storage_options=s3.options)
    # A reader that was open sees its index come and go.
    fs.pipe_file(f"{url}/{INDEX}", good)
    dataset = reader(url, storage_options=s3.options)
    tagged_episodes(directory, [3])
    fs.rm_file(f"{url}/{INDEX}")
    s3.put(directory, url)
    dataset.refresh()
    assert dataset.table.ids.tolist() == [0, 1, 2]


def test_new_episodes_appear_without_an_index_too(s3: S3, tmp_path: Path) -> None:
    url, directory = s3.new_url(), tmp_path / "mine"
    tagged_episodes(directory, [5])
    s3.put(directory, url)
    dataset = reader(url, storage_options=s3.options)
    assert dataset.capacity == 10_000  # From the object `.lock`.
    batches = iter(dataset.get_loader(64, 2, seed=0))
    tagged_episodes(directory, [7])
    s3.put(directory, url)
    s3.filesystem().rm_file(f"{url}/0000000000-000000000000-5.safetensors")
    for _ in range(1000):
        if {number for _, number, _, _ in tagged.origins(next(batches))} == {1}:
            break
    else:
        pytest.fail("it was never drawn")
    assert dataset.table.ids.tolist() == [1]


def test_looking_takes_at_most_a_twentieth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tagged_episodes(tmp_path / "mine", [5])
    dataset = reader(f"file://{tmp_path}/mine")
    now = [0.0]
    monkeypatch.setattr("buffers.dataset.files.directory.time.monotonic", lambda: now[0])
    lists = [0]
    pages = ObjectStore.pages

    def slow(self: ObjectStore, folder: str = "") -> object:
        lists[0] += 1
        now[0] += 1.0
        return pages(self, folder)

    monkeypatch.setattr(ObjectStore, "pages", slow)
    loader = dataset.get_loader(2, 2, seed=0)
    for _ in range(100):
        loader.stream.take()
        now[0] += 1.0
    assert 3 <= lists[0] <= 6


def test_a_long_list_comes_in_pages_and_stays_small(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PAGE", 3)
    url = s3.new_url()
    fs = s3.filesystem()
    names = [f"{number:02d}.x" for number in range(11)]
    for name in [*names, "late/a", "late/b", "zoo/c"]:
        fs.pipe_file(f"{url}/{name}", b"content")
    found = ObjectStore(url, s3.options)
    s3.proxy.requests.clear()
    pages = list(found.pages())
    assert [name for page in pages for name, _ in page.objects] == names
    assert [name for page in pages for name in page.folders] == ["late", "zoo"]
    assert max(len(page.objects) + len(page.folders) for page in pages) == 3 and s3.proxy.lists() == 5
    assert {info.size for page in pages for _, info in page.objects} == {7}
    # One that fails in the middle is asked for again.
    s3.proxy.fault = lambda method, path: "500" if "list-type" in path and len(s3.proxy.requests) % 2 == 0 else None
    assert [name for page in found.pages() for name, _ in page.objects] == names
    s3.proxy.fault = always("403", of="list-type")
    with pytest.raises(OSError, match="its list of objects.*PermissionError"):
        list(found.pages())


def test_what_is_kept_of_a_long_list_is_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 bytes an episode at most, besides its name, which what is drawn from keeps."""
    num = 20_000
    tagged_episodes(tmp_path / "mine", [5])
    dataset = reader(f"file://{tmp_path}/mine")
    info = store.ObjectInfo((tmp_path / "mine" / "0000000000-000000000000-5.safetensors").stat().st_size, 3)

    def pages(self: ObjectStore, folder: str = "") -> object:
        for first in range(0, num, 1000):
            numbers = range(first, first + 1000)
            yield store.Page([(f"{n:010d}-{5 * n:012d}-5.safetensors", info) for n in numbers], [])

    monkeypatch.setattr(ObjectStore, "pages", pages)
    tracemalloc.start()
    dataset.refresh()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.num_episodes == num
    assert kept < num * 400 and peak < num * 1000
