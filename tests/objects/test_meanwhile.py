"""Uploads of a directory that is written to meanwhile, and of one that has nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.dataset.transfer import download, upload
from buffers.fields import Scalar
from buffers.objects import INDEX, Index, ObjectStore
from tests import tagged
from tests.file_helpers import files
from tests.objects.store_helpers import S3, reader, same_batches, tagged_episodes

Before = Callable[[int], None]


@pytest.fixture
def before_sending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Before], None]:
    """Lets something happen each time that files have been listed, before they are sent."""
    send = ObjectStore.upload
    number = iter(range(1000))

    def install(before: Before) -> None:
        def upload(self: ObjectStore, some: Any) -> Iterator[int]:
            if some:
                before(next(number))
            return send(self, some)

        monkeypatch.setattr(ObjectStore, "upload", upload)

    return install


@pytest.fixture(params=["s3", "file", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    if request.param != "s3":
        return f"{request.param}://{tmp_path}/store/episodes", {}
    s3: S3 = request.getfixturevalue("s3")
    return s3.new_url(), {"storage_options": s3.options}


def evict(dataset: IndividualFileDataset, *ids: int) -> None:
    for episode_id in ids:
        dataset.evict_episode(dataset.table.ids.tolist().index(episode_id))


def index_of(url: str, **options: Any) -> Index:
    return Index.decode(ObjectStore(url, **options).read(INDEX))


@pytest.mark.parametrize("by_path", [False, True])
def test_files_that_go_before_they_are_sent_are_left_out(
    target: tuple[str, dict[str, Any]], by_path: bool, tmp_path: Path, before_sending: Callable[[Before], None]
) -> None:
    """The directory is listed again, so the URL has what came meanwhile, too, and nothing that was left out."""
    url, options = target
    tagged_episodes(tmp_path / "mine", [5, 9, 4])
    with IndividualFileDataset(10_000, directory=tmp_path / "mine") as dataset:

        def write(number: int) -> None:
            if number < 2:
                evict(dataset, *([0] if number == 0 else [1, 3]))
                dataset.add_episode(tagged.episode(6, 3 + number))

        before_sending(write)
        done = upload(tmp_path / "mine", url, **options) if by_path else dataset.upload(url, **options)
        # Of the first list, episodes 1 and 2 were sent; of the second, none; of the third, 4. Then 1 was removed.
        index = index_of(url, **options)
        assert (done.num_files, done.num_kept, done.num_removed) == (len(index.names), 0, 1)
        assert reader(url, **options).table.ids.tolist() == [2, 4]
        assert sorted(index.names) == files(tmp_path / "mine")
        found = {name for page in ObjectStore(url, **options).pages() for name, _ in page.objects}
        assert found == {*index.names, INDEX}
        same_batches(reader(url, **options), dataset)


def test_after_some_lists_the_index_names_what_was_sent(
    tmp_path: Path, before_sending: Callable[[Before], None]
) -> None:
    url = f"memory://{tmp_path}/episodes"
    tagged_episodes(tmp_path / "mine", [5, 9, 4])
    with IndividualFileDataset(10_000, directory=tmp_path / "mine") as dataset:

        def write(number: int) -> None:
            dataset.add_episode(tagged.episode(6, 3 + 2 * number))
            dataset.add_episode(tagged.episode(6, 4 + 2 * number))
            evict(dataset, 2 if number == 0 else 2 * number + 1)

        before_sending(write)
        done = dataset.upload(url)
    # Each list had one of the two that came before it, and the other was gone before it was sent.
    assert reader(url).table.ids.tolist() == [0, 1, 4, 6, 8, 10]
    assert (done.num_files, done.num_kept) == (len(index_of(url).names), 0)


def test_a_writer_that_is_always_faster_leaves_the_index(
    tmp_path: Path, before_sending: Callable[[Before], None]
) -> None:
    url = f"memory://{tmp_path}/episodes"
    tagged_episodes(tmp_path / "mine", [5])
    upload(tmp_path / "mine", url)
    names = index_of(url).names
    with IndividualFileDataset(10_000, directory=tmp_path / "mine") as dataset:
        dataset.add_episode(tagged.episode(6, 1))
        evict(dataset, 0)

        def write(number: int) -> None:
            dataset.add_episode(tagged.episode(6, 2 + number))
            evict(dataset, 1 + number)

        before_sending(write)
        with pytest.raises(RuntimeError, match=r"faster than they can be uploaded \(0.*listed 5 times.*Upload again"):
            dataset.upload(url)
    assert index_of(url).names == names


def test_late_fields_that_are_replaced_meanwhile_are_sent_again(
    tmp_path: Path, before_sending: Callable[[Before], None]
) -> None:
    url = f"memory://{tmp_path}/episodes"
    tagged_episodes(tmp_path / "mine", [5, 9, 4])
    with IndividualFileDataset(10_000, directory=tmp_path / "mine") as dataset:
        dataset.add_late_field("label", Scalar((), torch.float32), 7.0)
        dataset.annotate(0, {"label": np.arange(5, dtype=np.float32)})

        def write(number: int) -> None:
            if number == 0:
                dataset.add_episode(tagged.episode(30, 3))
                dataset.annotate(1, {"label": np.arange(9, dtype=np.float32)})
                dataset.sync()

        before_sending(write)
        dataset.upload(url)
        same_batches(reader(url), dataset)
    assert download(url, tmp_path / "back").num_files == 6
    assert download(url, tmp_path / "back").num_files == 0


def test_saves_that_go_meanwhile_are_replaced_by_later_ones(
    tmp_path: Path, before_sending: Callable[[Before], None]
) -> None:
    url, dataset = f"memory://{tmp_path}/saves", IndividualFileDataset(100, directory=tmp_path / "episodes")
    buffer = ReplayBuffer(dataset, 4, 2, seed=3)

    def save(number: int) -> None:
        if number < 2:
            buffer.add_episode(tagged.episode(5, number))
            buffer.save(tmp_path / "saves", keep=1)

    save(0)
    before_sending(lambda number: save(number + 1))
    upload(tmp_path / "saves", url)
    dataset.close()
    assert [name for name in index_of(url).names if name.startswith("save-") and "/" not in name] == [
        "save-0000000001.safetensors"
    ]
    download(url, tmp_path / "back")
    assert ReplayBuffer.load(tmp_path / "back", RingBufferDataset(100)).dataset.num_episodes == 2


@pytest.mark.parametrize("has_index", [True, False])
def test_a_directory_without_episodes_removes_none(
    target: tuple[str, dict[str, Any]], has_index: bool, tmp_path: Path
) -> None:
    url, options = target
    tagged_episodes(tmp_path / "mine", [5, 9])
    upload(tmp_path / "mine", url, **options)
    store = ObjectStore(url, **options)
    if not has_index:
        store.remove([INDEX])
    objects = [page.objects for page in store.pages()]
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "a.txt").write_text("x")
    message = r"no episodes, and .* has some \(000000000[01]-[0-9]+-[59].safetensors, .*or choose another URL. To empty"
    with pytest.raises(ValueError, match=message):
        upload(tmp_path / "wrong", url, **options)
    with (
        IndividualFileDataset(10_000, directory=tmp_path / "new") as dataset,
        pytest.raises(ValueError, match=message),
    ):
        dataset.upload(url, **options)
    with IndividualFileDataset(10_000, directory=tmp_path / "mine") as dataset:
        evict(dataset, 0, 1)
        with pytest.raises(ValueError, match=message):
            dataset.upload(url, **options)
    assert [page.objects for page in store.pages()] == objects
    # Where there are none, it is as good as any.
    upload(tmp_path / "wrong", f"memory://{tmp_path}/other")
    assert upload(tmp_path / "wrong", f"memory://{tmp_path}/other").num_files == 0
