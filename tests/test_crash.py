"""Killed anywhere, or without power: every acknowledged episode is there whole, and no partial one is served.

Processes kill themselves before each call that changes the directory. A power loss is modelled: the calls of a run are
recorded, and every state that a disk may be in after any of them is made and opened.
"""

from __future__ import annotations

import itertools
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tagged
from tests.contract import fifo_model
from tests.faults import CAPACITY, killed_before_call, lengths, opened, watched_calls
from tests.file_helpers import numbers


def assert_recovers(path: Path, acknowledged: int) -> int:
    """Check all that is served after a crash; the number of the newest episode."""
    with opened(path) as dataset:
        found = numbers(dataset)
        assert len(found) == dataset.num_episodes and dataset.num_timesteps <= CAPACITY
        ids = [number for number, _ in found]
        assert ids == dataset.table.ids.tolist() == list(range(ids[0], ids[-1] + 1)) if ids else True
        newest = ids[-1] if ids else -1
        # One that was not acknowledged may be there: it was on its way.
        assert acknowledged <= newest <= acknowledged + 1
        if acknowledged >= 0:
            batch = dataset.get_loader(32, 1, seed=0).stream.take()
            assert {number for _, number, _, _ in tagged.origins(batch)} <= set(ids)
        assert not [name for name in os.listdir(path) if name.startswith(".tmp")]
    return newest


@pytest.mark.parametrize("durability", ["fsync", "rename"])
def test_killed_before_each_call_of_adding_and_evicting_it_loses_nothing(tmp_path, durability) -> None:
    for num_calls in itertools.count():
        path = tmp_path / str(num_calls)
        with opened(path) as dataset:
            for number, length in zip(range(5), lengths(), strict=False):
                dataset.add_episode(tagged.episode(length, number))
        acknowledged = path / "acknowledged"

        def add_two(path: Path = path, acknowledged: Path = acknowledged) -> None:
            with opened(path, durability=durability) as dataset:
                for number in (5, 6):
                    dataset.add_episode(tagged.episode(8, number))
                    acknowledged.write_text(str(number))

        was_killed = killed_before_call(num_calls, add_two)
        newest = assert_recovers(path, int(acknowledged.read_text()) if acknowledged.exists() else 4)
        if not was_killed:
            assert newest == 6 and num_calls > 12
            return


def spoil(path: Path) -> None:
    """Leave what recovery has to deal with: a temporary, a file that was cut short, one too many steps."""
    with opened(path, 100) as dataset:
        for number, length in zip(range(6), lengths(), strict=False):
            dataset.add_episode(tagged.episode(length, number))
    names = sorted(name for name in os.listdir(path) if name.startswith("0"))
    shutil.copy(path / names[0], path / ".tmp-0000000006-000000000027-3.safetensors")
    os.truncate(path / names[-1], 700)


def test_killed_before_each_call_of_recovery_it_recovers_the_next_time(tmp_path) -> None:
    for num_calls in itertools.count():
        path = tmp_path / str(num_calls)
        spoil(path)
        was_killed = killed_before_call(num_calls, lambda path=path: opened(path, shrink=True).close())
        with opened(path, shrink=True) as dataset:
            found = numbers(dataset)
            assert found == [(2, 9), (3, 4), (4, 1)] or found == [(1, 3), (2, 9), (3, 4), (4, 1)]
            assert dataset.table.next_id == 6
            assert not [name for name in os.listdir(path) if name.startswith(".tmp")]
        if not was_killed:
            assert num_calls > 8
            return


# Power.


def record(path: Path, durability: str, num_episodes: int = 5) -> list[Any]:
    """What becomes of files in a run that adds, and evicts, with ("acknowledged", number) between."""
    calls: list[tuple[Any, ...]] = []
    folder = path.resolve()

    def before(kind: str, *arguments: Any) -> None:
        if kind == "open" and arguments[1] & os.O_CREAT and arguments[0] != ".lock":
            calls.append(("create", arguments[0]))
        elif kind == "rename":
            calls.append(("rename", *arguments, (folder / arguments[0]).read_bytes()))
        elif kind == "fsync":
            synced = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
            if synced == folder:
                calls.append(("sync directory",))
            else:
                calls.extend((kind, synced.name, synced.read_bytes()) for kind in ("write", "sync"))

    def after(kind: str, *arguments: Any) -> None:
        if kind == "unlink":
            calls.append(("unlink", arguments[0]))

    opened(path, 13).close()  # From then on, `.lock` tells the capacity.
    with watched_calls(before, after), opened(path, 13, durability=durability) as dataset:
        for number, length in zip(range(num_episodes), lengths(), strict=False):
            dataset.add_episode(tagged.episode(length, number))
            calls.append(("acknowledged", number))
    return calls


class Disk:
    """What is on the disk for certain, and what may be.

    The directory maps names to files; its changes since it was last synced may have arrived or not, each by itself.
    A file's content since it was last synced may have arrived, or in part, or as zeros, or not.
    """

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.pending: list[tuple[str, ...]] = []
        self.live: dict[str, int] = {}
        self.synced: dict[int, bytes] = {}
        self.written: dict[int, bytes] = {}
        self.acknowledged = -1
        self.count = itertools.count()

    def apply(self, call: tuple[Any, ...]) -> None:
        kind, *arguments = call
        if kind == "create":
            self.live[arguments[0]] = next(self.count)
            self.pending.append(("link", arguments[0], self.live[arguments[0]]))
        elif kind == "write":
            self.written[self.live[arguments[0]]] = arguments[1]
        elif kind == "sync":
            file = self.live[arguments[0]]
            self.synced[file] = self.written[file] = arguments[1]
        elif kind == "rename":
            old, new, content = arguments
            file = self.live[new] = self.live.pop(old)
            self.written[file] = content
            self.pending.append(("move", old, new, file))
        elif kind == "unlink":
            self.live.pop(arguments[0], None)
            self.pending.append(("unlink", arguments[0]))
        elif kind == "sync directory":
            self.names, self.pending = dict(self.live), []
        elif kind == "acknowledged":
            self.acknowledged = arguments[0]

    def directories(self) -> Iterator[dict[str, int]]:
        """The directory in every state that it may be in."""
        for chosen in itertools.product([False, True], repeat=len(self.pending)):
            names = dict(self.names)
            for is_there, change in zip(chosen, self.pending, strict=True):
                if not is_there:
                    continue
                if change[0] == "link":
                    names[change[1]] = change[2]  # type: ignore[assignment]
                elif change[0] == "move":
                    names.pop(change[1], None)
                    names[change[2]] = change[3]  # type: ignore[assignment]
                else:
                    names.pop(change[1], None)
            yield names

    def contents(self, file: int) -> list[bytes]:
        """The content in every state that it may be in, as far as they differ in kind."""
        if file in self.synced:
            return [self.synced[file]]
        content = self.written.get(file, b"")
        half = len(content) // 2
        # Nothing; cut short; all its length without anything, or without its last rows.
        return [b"", content[:half], bytes(len(content)), content[:-100] + bytes(len(content[-100:])), content]


def states(calls: list[Any]) -> Iterator[tuple[dict[str, bytes], int]]:
    """Every state after every call: the files, and the last number that had been acknowledged."""
    disk, seen = Disk(), set()
    for call in [("begin",), *calls]:
        disk.apply(call)
        for names in disk.directories():
            # Files that were not synced differ one at a time; all others are whole.
            for name in names or [""]:
                for content in disk.contents(names[name]) if name else [b""]:
                    state = {other: disk.contents(file)[-1] for other, file in names.items()}
                    if name:
                        state[name] = content
                    key = (tuple(sorted(state.items())), disk.acknowledged)
                    if hash(key) not in seen:
                        seen.add(hash(key))
                        yield state, disk.acknowledged


def live_after(number: int) -> list[tuple[int, int]]:
    """(number, length) of what lives after adding so many episodes to a capacity of 13."""
    return fifo_model([length for _, length in zip(range(number + 1), lengths(), strict=False)], 13)


def what_is_wrong(path: Path, calls: list[Any], **options: Any) -> set[str]:
    """Open every state; what was not as promised in any of them."""
    wrong = set()
    for number, (files, acknowledged) in enumerate(states(calls)):
        state = path / f"state{number}"
        state.mkdir()
        shutil.copy(path / "run" / ".lock", state)
        for name, content in files.items():
            (state / name).write_bytes(content)
        with opened(state, 13, durability="rename", **options) as dataset, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            served = []
            for episode_id in dataset.table.ids.tolist():
                episode = dataset.episode_of_id(episode_id)
                if episode is not None:
                    try:
                        served.append(tagged.number_and_length(episode))
                    except AssertionError:
                        wrong.add("served what was never written")
            # The episode that was on its way may be there, and have let older ones go.
            if not any(set(live_after(n)) <= set(served) for n in (acknowledged, acknowledged + 1)):
                wrong.add("lost an acknowledged episode")
        shutil.rmtree(state)
    return wrong


def test_no_power_loss_loses_an_acknowledged_episode_or_lets_a_partial_one_be_served(tmp_path) -> None:
    calls = record(tmp_path / "run", "fsync")
    kinds = [call[0] for call in calls if call[0] != "unlink"]
    assert kinds == ["create", "write", "sync", "rename", "sync directory", "acknowledged"] * 5
    assert sum(call[0] == "unlink" for call in calls) == 3
    assert len(list(states(calls))) > 50
    assert what_is_wrong(tmp_path, calls) == set()


@pytest.mark.parametrize("verify", ["size", "full"])
def test_without_fsync_only_the_checksum_keeps_partial_episodes_from_being_served(tmp_path, verify) -> None:
    calls = record(tmp_path / "run", "rename", num_episodes=3)
    assert not any(call[0].startswith("sync") for call in calls)
    wrong = what_is_wrong(tmp_path, calls, verify=verify)
    assert wrong == {"lost an acknowledged episode"} | (
        {"served what was never written"} if verify == "size" else set()
    )


def without(kind: str, calls: list[Any]) -> list[Any]:
    return [call for call in calls if call[0] != kind]


def directly(calls: list[Any]) -> list[Any]:
    """As if episodes were written under their final names."""
    finals = {call[1]: call[2] for call in calls if call[0] == "rename"}
    changed = []
    for call in calls:
        if call[0] == "create":
            content = next(other[3] for other in calls if other[0] == "rename" and other[1] == call[1])
            # The content is on its way from here on.
            changed += [("create", call[1]), ("rename", call[1], finals[call[1]], content)]
        elif call[0] == "sync":
            changed.append(("sync", finals[call[1]], call[2]))
        elif call[0] not in ("rename", "write"):
            changed.append(call)
    return changed


@pytest.mark.parametrize(
    ("mutant", "expected"),
    [
        (lambda calls: without("sync", calls), "served what was never written"),
        (lambda calls: without("sync", calls), "lost an acknowledged episode"),
        (lambda calls: without("sync directory", calls), "lost an acknowledged episode"),
        (directly, "served what was never written"),
    ],
    ids=["no fsync: serves", "no fsync: loses", "no fsync of the directory", "no rename"],
)
def test_without_one_of_its_steps_the_commit_is_found_wanting(tmp_path, mutant, expected) -> None:
    calls = mutant(record(tmp_path / "run", "fsync", num_episodes=3))
    assert expected in what_is_wrong(tmp_path, calls)
