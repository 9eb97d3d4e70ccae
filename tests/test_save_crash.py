"""Saves through a loss of power, a kill and a full disk: what loads is the last save that had returned, or the next.

A power loss is modelled as in `test_crash.py`: the calls of a run are recorded, and every state that the directory of
saves may be in after any of them is made and loaded.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.fields import Scalar
from buffers.saving import DamagedSaveError, places, save_directory
from tests import faults, tagged
from tests.file_helpers import add
from tests.saving_helpers import close, contents, loaded, opened_save
from tests.test_crash import Disk, directly, without

SAVE = re.compile(r"saves/save-[0-9]+\.safetensors")
LENGTHS = 5, 3, 9, 4, 1, 6, 2


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a kill nor an error loses what the disk does not have yet, and a power loss is a model here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def made(folder: Path, kind: str = "extended", durability: str = "rename") -> RingBufferDataset:
    """An empty ring with a late field: alone, or extended by the files of a folder."""
    ring = RingBufferDataset(14)
    if kind == "extended":
        files = IndividualFileDataset(26, directory=folder / "episodes", durability=durability)
        ring.extend(files, other_batch_size=2, seed=0)
    ring.add_late_field("value", Scalar())
    return ring


def train(ring: RingBufferDataset, round_: int) -> None:
    """Add two episodes, which evict others from the third round on, and give all rows other late values."""
    for number in (2 * round_, 2 * round_ + 1):
        rows = tagged.episode(LENGTHS[number % len(LENGTHS)], number)
        # One field only, because what follows is repeated for each write.
        ring.add_episode({"code": rows["code"]}, {"number": number})
    steps = np.concatenate([np.arange(start, start + n) for start, n, *_ in ring.table.rows.tolist()])
    assert ring.update(steps, {"value": steps + 1000.0 * round_}) == 0


def everything(ring: RingBufferDataset) -> list[Any]:
    """What a save must bring back, in a form that compares by value."""
    return [*contents(ring), repr(ring.extension and ring.extension.state_dict())]


def begun(folder: Path) -> RingBufferDataset:
    """Three rounds with a save after each."""
    ring = made(folder)
    for round_ in range(3):
        train(ring, round_)
        ring.save(folder / "saves")
    return ring


def found_in(saves: Path, folder: Path, kind: str = "extended") -> list[Any]:
    """What loads into a ring whose files are in a folder."""
    ring = made(folder, kind)
    try:
        return everything(loaded(saves, ring))
    finally:
        close(ring)


def assert_saves_again(ring: RingBufferDataset, folder: Path) -> None:
    """Go on, save, and find all that there is, and no file that it does not need."""
    train(ring, 7)
    ring.evict_episode(0)
    ring.save(folder / "saves")
    assert found_in(folder / "saves", folder / "again") == everything(ring)
    needed = opened_save(folder / "saves")
    names = {f"save-{number:010d}.safetensors" for number in needed.stamps}
    assert {*os.listdir(folder / "saves")} == {".lock", *names, *needed.folders}


# Power.


def record(path: Path, kind: str, keep: int, durability: str = "fsync", num_saves: int = 4) -> tuple[Any, Any]:
    """What becomes of files in a run that saves, with ("acknowledged", number) between; and what was saved."""
    (path / "saves").mkdir(parents=True)
    saved = []
    with faults.recorded_calls(path) as calls:
        ring = made(path, kind, durability)
        for number in range(num_saves):
            train(ring, number)
            saved.append(everything(ring))
            ring.save(path / "saves", keep=keep)
            calls.append(("acknowledged", number))
        close(ring)
    return calls, saved


class Tree(Disk):
    """A `Disk` of saves with folders: names are paths, each folder is synced by itself, files may have two names.

    Of the dataset's own files only the contents matter, because saves have links to them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folders: set[int] = set()

    def apply(self, call: tuple[Any, ...]) -> None:
        kind, *arguments = call
        if kind == "mkdir":
            super().apply(("create", *arguments))
            self.folders.add(self.live[arguments[0]])
        elif kind == "link":
            old, new, _ = arguments
            self.live[new] = self.live[old]
            self.pending.append(("link", new, self.live[new]))
        elif kind == "sync directory":
            is_synced = {name: os.path.dirname(name) == arguments[0] for name in {*self.names, *self.live}}
            self.names = {name: file for name, file in self.names.items() if not is_synced[name]}
            self.names |= {name: file for name, file in self.live.items() if is_synced[name]}
            self.pending = [change for change in self.pending if os.path.dirname(change[1]) != arguments[0]]
        else:
            super().apply(("unlink", *arguments) if kind == "rmdir" else call)
        self.names = {name: file for name, file in self.names.items() if name.startswith("saves/")}
        self.pending = [change for change in self.pending if change[1].startswith("saves/")]

    def contents(self, file: int) -> list[Any]:
        return [None] if file in self.folders else super().contents(file)


def states(calls: list[Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Every state after every call: the files, None for folders, and the last save that had returned."""
    disk, seen = Tree(), set()
    for call in [("begin",), *calls]:
        disk.apply(call)
        for found in disk.directories():
            names = {name: file for name, file in found.items() if os.path.dirname(name) in ("saves", *found)}
            # Files that were not synced differ one at a time; all others are whole.
            for name in [name for name, file in names.items() if len(disk.contents(file)) > 1] or [""]:
                for content in disk.contents(names[name]) if name else [b""]:
                    state = {other: disk.contents(file)[-1] for other, file in names.items()}
                    if name:
                        state[name] = content
                    key = hash((tuple(sorted(state.items())), disk.acknowledged))
                    if key not in seen:
                        seen.add(key)
                        yield state, disk.acknowledged


def what_is_wrong(path: Path, kind: str, calls: list[Any], saved: list[Any]) -> Iterator[str]:
    """Load every state; what is not as promised."""
    for number, (files, acknowledged) in enumerate(states(calls)):
        state = path / f"state{number}"
        (state / "saves").mkdir(parents=True)
        for name, content in sorted(files.items()):
            (state / name).mkdir() if content is None else (state / name).write_bytes(content)
        found = None
        # RuntimeError: an episode whose file is damaged is gone.
        with contextlib.suppress(DamagedSaveError, FileNotFoundError, RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = found_in(state / "saves", state, kind)
        # The save that was on its way may be there.
        if found is not None and found not in [None, *saved][acknowledged + 1 : acknowledged + 3]:
            yield "loads an older save" if found in saved else "loads what was never saved"
        elif found is None and (acknowledged >= 0 or any(SAVE.fullmatch(name) for name in files)):
            yield "a save is not whole"
        shutil.rmtree(state)


@pytest.mark.parametrize(("keep", "spare_bytes"), [(1, 2**26), (2, 2**26), (1, 0)], ids=["1", "2", "packed"])
def test_after_a_power_loss_the_last_save_of_a_ring_loads_or_the_next(tmp_path, monkeypatch, keep, spare_bytes) -> None:
    monkeypatch.setattr(places, "_SPARE_BYTES", spare_bytes)
    calls, saved = record(tmp_path / "run", "ring", keep, num_saves=6)
    commit = ["create", "write", "sync", "rename", "sync directory", "acknowledged"]
    assert [call[0] for call in calls if call[0] != "unlink"] == commit * 6
    assert sum(call[0] == "unlink" for call in calls) >= 2 and len(list(states(calls))) > 50
    assert list(what_is_wrong(tmp_path, "ring", calls, saved)) == []


@pytest.mark.parametrize(("keep", "durability"), [(1, "fsync"), (2, "rename")])
def test_after_a_power_loss_the_last_save_with_files_loads_or_the_next(tmp_path, keep, durability) -> None:
    calls, saved = record(tmp_path / "run", "extended", keep, durability)
    assert any(call[0] == "unlink" and ".episodes/" in call[1] for call in calls)
    assert [call[0] for call in calls].count("link") == 8 and len(list(states(calls))) > 80
    assert list(what_is_wrong(tmp_path, "extended", calls, saved)) == []


def without_syncs_of(what: str, calls: list[Any]) -> list[Any]:
    """As if nothing waited for the files or folders of these paths."""
    return [call for call in calls if not (call[0].startswith("sync") and re.search(what, call[1]))]


def removed_first(calls: list[Any]) -> list[Any]:
    """As if older saves were removed before the new one is there."""
    changed: list[Any] = []
    for call in calls:
        renames = [number for number, other in enumerate(changed) if other[0] == "rename"]
        changed.insert(renames[-1] if call[0] == "unlink" and renames else len(changed), call)
    return changed


MUTANTS = {
    "no fsync of the file": ("ring", lambda calls: without("sync", calls)),
    "no fsync of the directory": ("ring", lambda calls: without("sync directory", calls)),
    "under its name at once": ("ring", directly),
    "older saves removed first": ("ring", removed_first),
    "no fsync of links' folders": ("extended", lambda calls: without_syncs_of(r"\.episodes$", calls)),
    "no fsync of linked files": ("extended", lambda calls: without_syncs_of(r"\.episodes/", calls)),
    "no fsync after mkdir": (
        "extended",
        lambda calls: [call for last, call in zip([("",), *calls], calls, strict=False) if last[0] != "mkdir"],
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_save_without_one_of_its_steps_is_found_wanting(tmp_path, mutant) -> None:
    kind, change = MUTANTS[mutant]
    calls, saved = record(tmp_path / "run", kind, 1, "rename", num_saves=3)
    assert change(calls) != calls
    assert any(what_is_wrong(tmp_path, kind, change(calls), saved))


def attempts(folder: Path) -> Iterator[tuple[int, Path, list[Any]]]:
    """Folders in each of which a run has saved, and what: one for each call that can go wrong."""
    for number in itertools.count():
        path = folder / str(number)
        ring = begun(path)
        before = everything(ring)
        close(ring)
        yield number, path, before
        shutil.rmtree(path)


def resumed(path: Path) -> RingBufferDataset:
    """One that goes on, and has what was not saved yet."""
    ring = loaded(path / "saves", made(path))
    train(ring, 3)
    return ring


def test_killed_before_each_call_of_a_save_it_loads_as_before_or_after(tmp_path) -> None:
    close(begun(tmp_path / "whole"))
    whole = resumed(tmp_path / "whole")
    after = everything(whole)
    close(whole)
    for num_calls, path, before in attempts(tmp_path):
        save = partial(RingBufferDataset.save, directory=path / "saves")
        was_killed = faults.killed_before_call(num_calls, save, partial(resumed, path))
        ring = loaded(path / "saves", made(path))
        assert everything(ring) in ((before, after) if was_killed else (after,))
        assert_saves_again(ring, path)
        close(ring)
        if not was_killed:
            assert num_calls > 15
            return


def test_killed_before_each_call_of_a_load_it_loads_the_next_time(tmp_path) -> None:
    for num_calls, path, before in attempts(tmp_path):
        close(resumed(path))  # Its files are set aside.
        was_killed = faults.killed_before_call(num_calls, partial(loaded, path / "saves"), partial(made, path))
        ring = loaded(path / "saves", made(path))
        assert everything(ring) == before
        close(ring)
        if not was_killed:
            assert num_calls > 8
            return


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "open", "mkdir", "link", "unlink"])
def test_when_a_call_finds_no_space_the_save_before_stands_and_the_next_is_whole(tmp_path, call, block) -> None:
    for number, path, before in attempts(tmp_path):
        ring = resumed(path)
        after = everything(ring)
        with faults.failing_call(number, OSError(errno.ENOSPC, "No space"), call) as failed:
            error = faults.save_error(ring, path / "saves", block)
        assert error is None or (error[0] is OSError and "No space" in error[1] and f"'{path}/saves'" in error[1])
        assert found_in(path / "saves", path / "other") == (after if error is None else before)
        assert not [*path.rglob(".tmp-*")]
        assert_saves_again(ring, path)
        close(ring)
        if not failed:
            assert error is None and number > 0
            return


def test_cut_off_by_ctrl_c_before_each_call_the_next_save_is_whole(tmp_path) -> None:
    for number, path, before in attempts(tmp_path):
        ring = resumed(path)
        with faults.failing_call(number, KeyboardInterrupt()) as failed:
            error = faults.save_error(ring, path / "saves")
        assert failed or error is None
        assert found_in(path / "saves", path / "other") in (before, everything(ring))
        assert_saves_again(ring, path)
        assert not [*path.rglob(".tmp-*")]
        close(ring)
        if not failed:
            return


def test_a_full_disk_that_an_eviction_meets_fails_the_save_and_not_the_eviction(tmp_path, monkeypatch) -> None:
    go_on = threading.Event()

    class Late(threading.Thread):
        def run(self) -> None:
            assert go_on.wait(60)
            super().run()

    monkeypatch.setattr(save_directory.threading, "Thread", Late)
    ring = begun(tmp_path)
    before = everything(ring)
    train(ring, 3)
    saving = ring.save(tmp_path / "saves", block=False)
    with faults.failing_call(0, OSError(errno.ENOSPC, "No space"), "pwrite") as failed:
        ring.evict_episode(0)
        train(ring, 4)
    assert failed == ["pwrite"]
    with pytest.warns(UserWarning, match="A save failed: .*No space"):
        go_on.set()
        with pytest.raises(OSError, match=f"No space.*'{tmp_path / 'saves'}'"):
            saving.result()
        faults.join_saves()
    assert found_in(tmp_path / "saves", tmp_path / "other") == before
    assert_saves_again(ring, tmp_path)
    close(ring)


@pytest.mark.parametrize("block", [True, False])
def test_on_a_full_disk_the_save_before_stands_and_the_next_is_whole_once_there_is_room(tmp_path, block) -> None:
    with faults.small_disk(tmp_path / "disk") as disk:
        ring = RingBufferDataset(8_000)
        add(ring, [1_000])
        ring.save(disk)
        before = everything(ring)
        add(ring, [1_000] * 5, 1)  # 49 kB each.
        error = faults.save_error(ring, disk, block)
        assert error is not None and error[0] is OSError and f"'{disk}'" in error[1]
        assert everything(loaded(disk)) == before and not [*disk.rglob(".tmp-*")]
        for _ in range(4):
            ring.evict_episode(0)
        ring.save(disk)
        assert everything(loaded(disk)) == everything(ring)


def test_links_that_could_not_be_made_leave_no_copies_that_fill_the_disk(tmp_path) -> None:
    with faults.small_disk(tmp_path / "disk") as disk:
        files = IndividualFileDataset(8_000, directory=tmp_path / "episodes", durability="rename")
        # On another file system than the saves, which has room for five of them.
        add(files, [1_000] * 6)
        assert faults.save_error(files, disk)
        for _ in range(3):
            files.evict_episode(0)
        assert faults.save_error(files, disk) is None
        other = IndividualFileDataset(8_000, directory=tmp_path / "other", durability="rename")
        assert contents(loaded(disk, other)) == contents(files)
        close(files)
        close(other)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_impossible_files_are_copied(tmp_path, number) -> None:
    with faults.failing_calls("link", OSError(number, "No links")):
        close(begun(tmp_path))
        ring = resumed(tmp_path)
        assert_saves_again(ring, tmp_path)
    close(ring)


def test_an_error_that_is_kept_does_not_keep_the_lock(tmp_path) -> None:
    ring, errors = begun(tmp_path), []
    for call in ("pwrite", "fsync", "open"):
        with faults.failing_call(0, OSError(errno.ENOSPC, "No space"), call), pytest.raises(OSError) as found:
            ring.save(tmp_path / "saves")
        errors.append(found.value)
        assert_saves_again(ring, tmp_path)
    close(ring)
