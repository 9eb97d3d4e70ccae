from __future__ import annotations

import errno
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.objects import cache as cache_module
from buffers.objects.cache import CacheEntry, ObjectCache
from buffers.objects.ranges import BLOCK
from tests.faults import in_child, status_of

SIZE = 5 * BLOCK + 1000
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()


class Killed(BaseException):
    pass


class WatchedOS:
    """The os module, with a function called before each call that changes a file."""

    def __init__(self, before: Callable[..., object]) -> None:
        self.before = before

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        if name not in ("pwrite", "open", "unlink", "utime"):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self.before(name, found, *arguments)
            return found(*arguments, **options)

        return call


def entry_in(path: str | Path, num_bytes: int = 2**30, name: str = "object", size: int = SIZE) -> CacheEntry:
    return ObjectCache(path, num_bytes).entry("store", name, size, 7)


def check(entry: CacheEntry, offset: int = 0, length: int = SIZE) -> set[int]:
    """What is there is right; the blocks that are not all there."""
    memory = bytearray(b"\x00" * length)
    missing = entry.read(offset, memoryview(memory))
    lost = {byte // BLOCK for start, end in missing for byte in range(start, end)}
    at = offset
    for start, end in [*missing, (offset + length, offset + length)]:
        assert memory[at - offset : start - offset] == CONTENT[at:start]
        assert at <= start <= end
        at = end
    return lost


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), st.integers(1, 6)),
        st.tuples(st.just("read"), st.integers(0, SIZE - 1), st.integers(1, SIZE)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0)),
        st.tuples(st.just("remove"), st.just(0), st.just(0)),
    ),
    max_size=12,
)


@given(OPERATIONS)
@settings(max_examples=60)
def test_it_agrees_with_a_set_of_blocks(operations: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entry, model = entry_in(folder), set()
        for operation, one, other in operations:
            if operation == "put":
                last = min(one + other, 6)
                entry.put(one * BLOCK, CONTENT[one * BLOCK : last * BLOCK])
                model |= set(range(one, last))
            elif operation == "read":
                length = min(other, SIZE - one)
                asked = set(range(one // BLOCK, (one + length - 1) // BLOCK + 1))
                assert check(entry, one, length) == asked - model
            elif operation == "reopen":
                entry = entry_in(folder)
            else:
                for name in os.listdir(folder):
                    os.unlink(os.path.join(folder, name))
                entry.drop_if_removed()  # As a sweep does, or `put`, or a read some seconds later.
                model = set()
        assert check(entry) == set(range(6)) - model


@given(st.integers(0, 12), st.sampled_from(["before", "half"]), st.lists(st.integers(0, 4), min_size=1, max_size=4))
@settings(max_examples=60)
def test_a_kill_at_any_write_leaves_no_wrong_bytes(num_calls: int, how: str, blocks: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        left = [num_calls]

        def kill(name: str, call: Callable[..., Any], *arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                if how == "half" and name == "pwrite":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                raise Killed

        done: set[int] = set()
        try:
            patch.setattr(cache_module, "os", WatchedOS(kill))
            entry = entry_in(folder)
            for block in blocks:
                entry.put(block * BLOCK, CONTENT[block * BLOCK : (block + 2) * BLOCK])
                done |= {block, block + 1}
        except Killed:
            pass
        patch.undo()
        assert check(entry_in(folder)) <= set(range(6)) - done


@given(st.lists(st.tuples(st.integers(0, SIZE + 8000), st.integers(1, 255)), min_size=1, max_size=5))
@settings(max_examples=40)
def test_bytes_that_a_disk_has_lost_or_changed_are_not_served(changes: list[tuple[int, int]]) -> None:
    """Also the table, and a file that is shorter: whatever a loss of power leaves."""
    with tempfile.TemporaryDirectory() as folder:
        entry_in(folder).put(0, CONTENT)
        (path,) = (os.path.join(folder, name) for name in os.listdir(folder))
        with open(path, "r+b") as file:
            for at, by in changes:
                file.seek(at)
                byte = file.read(1)
                if byte:
                    file.seek(at)
                    file.write(bytes([byte[0] ^ by]))
                else:
                    file.truncate(max(0, at - 5000))
        check(entry_in(folder))


def test_a_block_that_lies_where_another_belongs_is_not_served(tmp_path: Path) -> None:
    entry_in(tmp_path).put(0, CONTENT)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    start = cache_module._PAGE
    one, other = slice(start, start + BLOCK), slice(start + BLOCK, start + 2 * BLOCK)
    data[one], data[other] = data[other], data[one]
    data[0:4], data[4:8] = data[4:8], data[0:4]
    path.write_bytes(data)
    assert check(entry_in(tmp_path)) == {0, 1}
    # Nor is a file that somebody has renamed.
    path.rename(tmp_path / Path(entry_in(tmp_path, name="other")._path).name)
    assert check(entry_in(tmp_path, name="other")) == set(range(6))


def test_what_was_used_longest_ago_leaves_first(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, 4 * 2**18)
    entries = [cache.entry("store", str(number), 2**18, 1) for number in range(8)]
    for number, entry in enumerate(entries):
        entry.put(0, bytes(2**18))
        os.utime(entry._path, (number, number))
        if number == 2:
            entries[0]._used = -100.0
            assert entries[0].read(0, memoryview(bytearray(10))) == []
    cache.sweep()
    kept = [number for number, entry in enumerate(entries) if os.path.exists(entry._path)]
    assert kept[0] == 0 and kept[1:] == [5, 6, 7][-len(kept[1:]) :]
    assert sum(512 * path.stat().st_blocks for path in tmp_path.iterdir()) <= cache.num_bytes
    # What has left is not read from the file that is still open, and takes no room.
    assert entries[3]._file is None and entries[3].read(0, memoryview(bytearray(10))) == [(0, 10)]


def test_the_bound_is_kept_while_blocks_come(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, 2**20)
    (tmp_path / "somebody's").write_bytes(bytes(10))
    for number in range(100):
        cache.entry("store", str(number), 2**16, 1).put(0, bytes(2**16))
        assert sum(512 * path.stat().st_blocks for path in tmp_path.iterdir()) <= 2**20 * 17 / 16 + 2**17
    assert (tmp_path / "somebody's").exists()


def fill_and_check(path: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = ObjectCache(path, 6 * SIZE)
    for _ in range(150):
        entry = cache.entry("store", str(rng.integers(12)), SIZE, 7)
        block = int(rng.integers(5))
        for number in range(3):
            if check(entry, block * BLOCK, SIZE - block * BLOCK) and number == 0:
                entry.put(block * BLOCK, CONTENT[block * BLOCK : (block + 2) * BLOCK])


def test_processes_share_it(tmp_path: Path) -> None:
    children = [in_child(partial(fill_and_check, str(tmp_path), seed)) for seed in range(3)]
    assert [status_of(child) for child in children] == [0, 0, 0]


def test_a_block_that_was_not_written_to_its_end_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two writes fails."""
    for num in range(2):
        left = [num]

        def fail(name: str, *_: Any, left: list[int] = left) -> None:
            left[0] -= name == "pwrite"
            if name == "pwrite" and left[0] < 0:
                raise OSError(errno.ENOSPC, "full")

        entry = entry_in(tmp_path / str(num))
        entry.put(5 * BLOCK, CONTENT[5 * BLOCK :])
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="cannot be used"):
            patch.setattr(cache_module, "os", WatchedOS(fail))
            entry.put(0, CONTENT[: 2 * BLOCK])
        assert check(entry) == set(range(5))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_directory_that_cannot_be_written_is_said_once_and_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(name: str, call: Callable[..., Any], *_: Any) -> None:
        if name == "pwrite":
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache_module, "os", WatchedOS(fail))
    entry = entry_in(tmp_path)
    with pytest.warns(
        UserWarning, match="cache .* cannot be used .*: objects are read from the store each time"
    ) as all:
        for _ in range(3):
            entry.put(0, CONTENT)
    assert len(all) == 1
    assert check(entry) == set(range(6))
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry.put(0, CONTENT)
    assert check(entry) == set()
