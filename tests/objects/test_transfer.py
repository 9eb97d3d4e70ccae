from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.dataset.transfer import download, upload
from buffers.disk import Directory
from buffers.fields import Scalar
from buffers.objects import INDEX, Index, ObjectStore
from buffers.viewing.commands import main
from tests import tagged
from tests.file_helpers import files
from tests.objects.store_helpers import S3, Fault, reader, same_batches, tagged_episodes


@pytest.fixture(params=["s3", "file", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A URL under which there is nothing, and options for it."""
    if request.param == "file":
        return f"file://{tmp_path}/store/episodes", {}
    if request.param == "memory":
        return f"memory://{tmp_path}/episodes", {}
    s3: S3 = request.getfixturevalue("s3")
    return s3.new_url(), {"storage_options": s3.options}


def test_what_is_uploaded_is_read_as_its_directory_is(target: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    url, options = target
    directory = tmp_path / "mine"
    tagged_episodes(directory, [5, 9, 4], infos=True)
    with IndividualFileDataset(10_000, directory=directory) as dataset:
        dataset.add_late_field("label", Scalar((), torch.float32), 7.0)
        dataset.annotate(1, {"label": np.arange(9, dtype=np.float32)})
        dataset.evict_episode(2)
        done = dataset.upload(url, **options)
        assert (done.num_files, done.num_kept, done.num_removed) == (len(files(directory)) - 1 + 2, 0, 0)
        assert dataset.upload(url, **options)[:3:2] == (0, done.num_files)
        remote = reader(url, **options)
        assert remote.capacity == 10_000 and remote.num_episodes == 2
        same_batches(remote, dataset)
        assert "label" in next(iter(remote.get_loader(2, 2)))
        # What has left leaves, what is new comes.
        dataset.evict_episode(0)
        assert dataset.add_episode(tagged.episode(6, 3)) == 3
        done = dataset.upload(url, **options)
        assert (done.num_files, done.num_removed) == (1, 1)
        remote.refresh()
        assert remote.table.ids.tolist() == [1, 3]
        same_batches(remote, dataset)
    again = tmp_path / "again"
    assert download(url, again, **options).num_files > 0
    assert download(url, again, **options).num_files == 0
    with (
        IndividualFileDataset(10_000, directory=again) as copy,
        IndividualFileDataset(10_000, directory=directory) as dataset,
    ):
        assert copy.table.next_id == dataset.table.next_id == 4
        same_batches(copy, dataset)


def test_saves_go_there_and_come_back(target: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    url, options = target
    dataset = IndividualFileDataset(100, directory=tmp_path / "episodes", durability="rename")
    buffer = ReplayBuffer(dataset, 4, 2, seed=3)
    for number in range(3):
        buffer.add_episode(tagged.episode(5, number))
        buffer.save(tmp_path / "saves", keep=2)
        upload(tmp_path / "saves", url, **options)
    with pytest.raises(ValueError, match="holds saves, not episodes. `python -m buffers download`"):
        reader(url, **options)
    expected = [buffer.sample()["obs"]["state"] for _ in range(3)]
    dataset.close()
    download(url, tmp_path / "back", **options)
    assert sorted(p.name for p in (tmp_path / "back").rglob("*.safetensors")) == sorted(
        p.name for p in (tmp_path / "saves").rglob("*.safetensors")
    )
    loaded = ReplayBuffer.load(tmp_path / "back", RingBufferDataset(100))
    for batch in expected:
        assert torch.equal(loaded.sample()["obs"]["state"], batch)
    # Another run's saves would replace these.
    other = ReplayBuffer(RingBufferDataset(100), 4, 2)
    other.add_episode(tagged.episode(5, 0))
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="holds saves of another run, which would be removed. Choose another URL"):
        upload(tmp_path / "other", url, **options)


def test_the_newest_save_is_sent_when_all_it_needs_is_there(s3: S3, tmp_path: Path) -> None:
    url, dataset = s3.new_url(), IndividualFileDataset(100, directory=tmp_path / "episodes", durability="rename")
    buffer = ReplayBuffer(dataset, 4, 2, seed=3)
    for number in range(2):
        buffer.add_episode(tagged.episode(5, number))
        buffer.save(tmp_path / "saves", keep=2)
    dataset.close()
    upload(tmp_path / "saves", url, storage_options=s3.options)
    sent = [path.rpartition("/")[2] for method, path, _ in s3.proxy.requests if method == "PUT"]
    assert len(sent) == 5 and sent[-2:] == ["save-0000000001.safetensors", INDEX]
    # And so it arrives.
    order: list[str] = []
    commit = Directory.commit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Directory, "commit", lambda self, name, *a, **k: order.append(name) or commit(self, name, *a, **k)
        )
        download(url, tmp_path / "back", storage_options=s3.options)
    assert len(order) == 4 and order[-1] == "save-0000000001.safetensors"


def test_another_dataset_is_not_replaced(tmp_path: Path) -> None:
    url = f"memory://{tmp_path}/episodes"
    for name, first in (("one", 0), ("two", 50)):
        with IndividualFileDataset(100, directory=tmp_path / name) as dataset:
            dataset.add_episode(tagged.episode(5, first))
    upload(tmp_path / "one", url)
    with pytest.raises(ValueError, match="holds another 0000000000-000000000000-5.safetensors, of another dataset"):
        upload(tmp_path / "two", url)
    with pytest.raises(ValueError, match="holds 1 files that the URL does not have"):
        tagged_episodes(tmp_path / "three", [4])
        download(url, tmp_path / "three")
    with pytest.raises(FileNotFoundError, match="neither episodes nor saves"):
        download(f"memory://{tmp_path}/nothing", tmp_path / "four")


def test_what_an_index_does_not_name_is_compared(tmp_path: Path) -> None:
    """Sent by an upload that was killed, it is kept. Of other content, it is sent."""
    tagged_episodes(tmp_path / "mine", [5, 9])
    for name in files(tmp_path / "mine"):
        content = (tmp_path / "mine" / name).read_bytes()
        other = content if name.startswith("0000000000") else content[:-1] + bytes([content[-1] ^ 255])
        ObjectStore(f"memory://{tmp_path}/x").write(name, other)
    done = upload(tmp_path / "mine", f"memory://{tmp_path}/x")
    assert (done.num_files, done.num_kept) == (1, 1)
    same_batches(reader(f"memory://{tmp_path}/x"), IndividualFileDataset(directory=tmp_path / "mine", mode="r"))


def killed_after(num_writes: int) -> Fault:
    """Nothing that writes is done any more, after so many requests that do."""
    left = itertools.count(num_writes, -1)
    return lambda method, _: "403" if method in ("PUT", "POST", "DELETE") and next(left) <= 0 else None


def test_an_upload_that_was_killed_goes_on(s3: S3, tmp_path: Path) -> None:
    """At each request that writes: before, the index says what it said; then, the same call makes all of it whole."""
    url = s3.new_url()
    directory = tmp_path / "mine"
    tagged_episodes(directory, [5, 9])
    upload(directory, url, storage_options=s3.options)
    with IndividualFileDataset(10_000, directory=directory) as dataset:
        dataset.evict_episode(0)
        dataset.add_episode(tagged.episode(4, 2))
        dataset.add_episode(tagged.episode(6, 3))
    writes = 0
    while True:
        s3.proxy.fault = killed_after(writes)
        try:
            upload(directory, url, storage_options=s3.options)
        except OSError:
            s3.proxy.fault = lambda *_: None
        else:
            break
        ids = reader(url, storage_options=s3.options).table.ids.tolist()
        assert ids in ([0, 1], [1, 2, 3])
        writes += 1
    assert writes >= 3
    s3.proxy.fault = lambda *_: None
    upload(directory, url, storage_options=s3.options)
    found = s3.filesystem().find(url)
    assert sorted(name.rpartition("/")[2] for name in found) == sorted([*files(directory), INDEX])


def test_the_commands_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tagged_episodes(tmp_path / "mine", [5])
    url = f"file://{tmp_path}/store"
    assert main(["upload", str(tmp_path / "mine"), url]) == 0
    assert "1 files (" in capsys.readouterr().out
    assert main(["download", url, str(tmp_path / "back")]) == 0
    same_batches(*(IndividualFileDataset(directory=tmp_path / name, mode="r") for name in ("mine", "back")))
    assert main(["download", f"file://{tmp_path}/no", str(tmp_path / "back")]) == 1
    assert "neither episodes nor saves" in capsys.readouterr().err
    assert main(["upload", str(tmp_path / "no"), url, "--option", "a.b=1"]) == 1
    assert "cannot be opened" in capsys.readouterr().err


def test_names_from_elsewhere_are_no_paths(tmp_path: Path) -> None:
    store = ObjectStore(f"memory://{tmp_path}/evil")
    names = ["../evil.safetensors", "late/../../x.safetensors", "/etc/passwd", "save-0000000000-0.episodes/../x"]
    said = {"kind": "episodes", "num_objects": len(names), "capacity": 1, "suffix": ".safetensors", "fields": None}
    store.write(INDEX, Index(said, names, np.zeros((len(names), 3), np.int64)).encode())
    with pytest.raises(FileNotFoundError, match="neither episodes"):
        download(store.url, tmp_path / "back")
    assert not (tmp_path / "back").exists()
