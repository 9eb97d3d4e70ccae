"""One writer at a time; and what is set aside when a directory is opened or read."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from buffers.dataset import IndividualFileDataset
from buffers.disk import lock
from tests import tagged
from tests.faults import CAPACITY, in_child, kill, opened, status_of
from tests.file_helpers import add, files, numbers
from tests.test_individual_file import Raw

# The lock.


def told_by_child(action: Any) -> tuple[int, int]:
    """A process that is given a pipe, and the number that it has sent."""
    receive, send = os.pipe()
    pid = in_child(lambda: action(send))
    os.close(send)
    with os.fdopen(receive) as pipe:
        return pid, int(pipe.readline())


def hold(path: Path, send: int, forks: bool = False) -> None:
    """Hold the directory open for writing, with a forked child if that is asked for, and tell of it."""
    dataset = opened(path)
    dataset.add_episode(tagged.episode(3, dataset.table.next_id))
    os.write(send, b"%d\n" % (in_child(signal.pause) if forks else 0))
    signal.pause()


def test_a_second_writer_waits_for_the_death_of_the_first(tmp_path) -> None:
    pid, _ = told_by_child(lambda send: hold(tmp_path, send))
    message = rf"is being written to by process {pid} on {socket.gethostname()}.*mode='r'"
    with pytest.raises(RuntimeError, match=message):
        IndividualFileDataset(CAPACITY, directory=tmp_path)
    assert opened(tmp_path, mode="r").num_episodes == 1
    kill(pid)
    with opened(tmp_path) as dataset:
        assert dataset.num_episodes == 1
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} on"):
            IndividualFileDataset(CAPACITY, directory=tmp_path)
    opened(tmp_path).close()


def kept_by_a_forked_child(path: Path) -> bool:
    """Whether a child that was forked keeps the lock after its parent was killed."""
    pid, child = told_by_child(lambda send: hold(path, send, forks=True))
    kill(pid)
    try:
        opened(path).close()
        return False
    except RuntimeError:
        return True
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_does_not_keep_the_lock(tmp_path, monkeypatch) -> None:
    assert not kept_by_a_forked_child(tmp_path)
    # It would, if it did not give up its part.
    monkeypatch.setattr(lock.Descriptor, "close", lambda self: None)
    assert kept_by_a_forked_child(tmp_path)


def test_a_forked_child_follows_its_parent_and_cannot_write(tmp_path) -> None:
    dataset = opened(tmp_path)
    dataset.add_episode(tagged.episode(5, 0))
    receive, send = os.pipe()

    def run() -> None:
        os.read(receive, 1)
        with pytest.raises(RuntimeError, match="only reads"):
            dataset.add_episode(tagged.episode(5, 7))
        with pytest.raises(RuntimeError, match="only reads"):
            dataset.evict_episode(0)
        dataset.refresh()
        assert [tagged.number_and_length(episode)[0] for episode in dataset.episodes()] == [0, 1]
        dataset.close()

    pid = in_child(run)
    dataset.add_episode(tagged.episode(5, 1))
    os.write(send, b"x")
    assert status_of(pid) == 0
    # Its closing has not given up the parent's lock.
    with pytest.raises(RuntimeError, match="is being written to"):
        IndividualFileDataset(CAPACITY, directory=tmp_path)
    dataset.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_file_locks_one_writer_can_vouch_for_itself(tmp_path, monkeypatch, number) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = rf"cannot lock files \({os.strerror(number)}\).*second writer.*pass lock=False: '{tmp_path}'"
    with pytest.raises(OSError, match=message) as found:
        IndividualFileDataset(CAPACITY, directory=tmp_path)
    assert found.value.errno == number
    with IndividualFileDataset(CAPACITY, directory=tmp_path, lock=False) as dataset:
        assert add(dataset, [3]) == [0]
        assert numbers(IndividualFileDataset(directory=tmp_path, mode="r")) == [(0, 3)]


# Setting aside.


NOT_OURS = "notes.txt", ".tmp-notes"


def test_what_is_no_episode_is_set_aside_with_one_warning(tmp_path) -> None:
    path = tmp_path / "episodes"
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    with opened(path, 100) as dataset:
        add(dataset, [5, 3, 9, 4])
    names = files(path)
    content = (path / names[0]).read_bytes()
    os.truncate(path / names[3], 100)
    (path / "model.safetensors").write_bytes(content)
    (path / "0000000000-000000000000-6.safetensors").write_bytes(content)
    (path / "0000000009-000000000002-5.safetensors").write_bytes(content)
    (path / "0000000010-000000000100-5.safetensors").symlink_to(outside)
    os.mkfifo(path / "0000000011-000000000200-5.safetensors")
    (path / "0000000012-000000000300-5.safetensors").mkdir()
    (path / "00000000013-000000000400-5.safetensors").write_bytes(content)
    (path / "0000000014-999999999999990-20.safetensors").write_bytes(content)  # A name that no episode can have.
    for name in NOT_OURS:
        (path / name).write_text("mine")
    (path / ".tmp-folder").mkdir()
    (path / ".tmp-0000000004-000000000021-5.safetensors").write_text("unfinished")
    with pytest.warns(UserWarning) as found:
        dataset = IndividualFileDataset(100, directory=path)
    strangers, damage = [str(warning.message) for warning in found]
    assert "2 files" in strangers and "00000000013-" in strangers and "are not read" in strangers
    assert re.match("7 files in .* are no whole episodes and were moved .*; and 2 more", damage)
    assert numbers(dataset) == [(0, 5), (1, 3), (2, 9)]
    assert len(os.listdir(path / "damaged")) == len(dataset.damaged_files) == 7
    assert outside.read_bytes() == b"precious"
    # Files that are not named like episodes are nobody's business.
    left = set(os.listdir(path))
    assert left >= {*NOT_OURS, ".tmp-folder", "model.safetensors", "00000000013-000000000400-5.safetensors"}
    assert ".tmp-0000000004-000000000021-5.safetensors" not in left
    assert dataset.add_episode(tagged.episode(2, 13)) == 13
    dataset.close()
    with pytest.warns(UserWarning, match="are not read") as found:
        IndividualFileDataset(100, directory=path).close()
    assert len(found) == 1


@pytest.mark.parametrize("mode", ["a", "r"])
@pytest.mark.parametrize(
    "name", ["0000012_200_20231001-120000.npz", "a.pt", "b.safetensors", "c.hdf5", "d.h5", "e.raw"]
)
def test_data_that_is_not_named_as_episodes_gets_one_warning(tmp_path, mode, name) -> None:
    for other in (name, f"x{name}"):
        (tmp_path / other).write_bytes(b"data")
    for other in ("notes.txt", f".tmp-{name}", f".tmp-0000000004-000000000021-5{Path(name).suffix}", f"{name}.bak"):
        (tmp_path / other).write_bytes(b"")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / name).write_bytes(b"")
    strategy = Raw() if name.endswith(".raw") else None
    with pytest.warns(
        UserWarning, match=rf"^2 files in .*\({name}, for example\).*`add_episode`.*coming-from"
    ) as found:
        dataset = IndividualFileDataset(100, directory=tmp_path, serialization_strategy=strategy, mode=mode)
    assert len(found) == 1 and found[0].filename == __file__ and dataset.is_empty
    # Neither a reader that looks again says so again, nor a copy in a worker.
    (tmp_path / f"y{name}").write_bytes(b"data")
    dataset.refresh()
    pickle.loads(pickle.dumps(dataset)).refresh()
    dataset.close()
    assert (tmp_path / name).read_bytes() == b"data"


def test_files_are_set_aside_over_no_other(tmp_path) -> None:
    opened(tmp_path).close()
    name = "0000000001-000000000000-5.safetensors"
    for content in (b"one", b"two"):
        (tmp_path / name).write_bytes(content)
        opened(tmp_path).close()
    found = [(tmp_path / "damaged" / other).read_bytes() for other in (name, f"{name}.1")]
    assert found == [b"one", b"two"]


def test_files_are_not_set_aside_out_of_the_directory(tmp_path) -> None:
    path, outside = tmp_path / "episodes", tmp_path / "outside"
    outside.mkdir()
    opened(path).close()
    (path / "damaged").symlink_to(outside)
    (path / "0000000001-000000000000-5.safetensors").write_bytes(b"one")
    with pytest.warns(UserWarning, match="and it could not be moved"):
        IndividualFileDataset(CAPACITY, directory=path).close()
    assert os.listdir(outside) == [] and (path / "0000000001-000000000000-5.safetensors").exists()


def test_a_file_with_false_numbers_costs_no_good_one(tmp_path) -> None:
    with opened(tmp_path, 100) as dataset:
        add(dataset, [5, 3, 9])
    (second,) = tmp_path.glob("0000000001-*")
    # It says to have a row more, which the next has, and is as large as if it did.
    second.write_bytes(second.read_bytes() + bytes(dataset.fields.nbytes))
    second.rename(tmp_path / "0000000001-000000000005-4.safetensors")
    with pytest.warns(UserWarning, match="1 files .*: 0000000001-000000000005-4"):
        dataset = IndividualFileDataset(100, directory=tmp_path)
    assert numbers(dataset) == [(0, 5), (2, 9)]


@pytest.mark.parametrize("put_there", [os.mkdir, os.mkfifo])
def test_what_took_the_place_of_a_file_is_damage(tmp_path, put_there) -> None:
    with opened(tmp_path, 100) as dataset:
        add(dataset, [6, 6, 6])
    names = files(tmp_path)
    dataset = IndividualFileDataset(100, directory=tmp_path, mode="r")
    os.unlink(tmp_path / names[1])
    put_there(tmp_path / names[1])
    with pytest.warns(UserWarning, match=f"{names[1]}: it is no regular file"):
        batch = dataset.get_loader(64, 2, seed=0).stream.take()
    assert {number for _, number, _, _ in tagged.origins(batch)} == {0, 2}


@pytest.mark.parametrize("mode", ["a", "r"])
def test_damage_found_while_drawing_is_not_served(tmp_path, mode) -> None:
    with opened(tmp_path, 100) as dataset:
        add(dataset, [6, 6, 6])
    names = files(tmp_path)
    with open(tmp_path / names[1], "r+b") as file:
        file.seek(300)
        file.write(b"#")
    dataset = IndividualFileDataset(100, directory=tmp_path, mode=mode)
    assert dataset.num_episodes == 3
    what = "moved into the folder" if mode == "a" else "left out"
    with pytest.warns(
        UserWarning, match=f"1 files in .* are no whole episodes and were {what}.*{names[1]}: it "
    ) as found:
        batch = dataset.get_loader(64, 2, seed=0).stream.take()
    assert len(found) == 1
    assert {number for _, number, _, _ in tagged.origins(batch)} == {0, 2}
    # Cut short while it is open: what is missing is not made up.
    os.truncate(tmp_path / names[0], 900)
    with pytest.warns(UserWarning, match=f"{names[0]}: it is shorter than its header says"):
        batch = dataset.get_loader(64, 2, seed=0).stream.take()
    assert {number for _, number, _, _ in tagged.origins(batch)} == {2}
    dataset.close()
    with pytest.warns(UserWarning, match="it ") if mode == "r" else contextlib.nullcontext():
        IndividualFileDataset(100, directory=tmp_path, mode=mode, verify="header").close()
