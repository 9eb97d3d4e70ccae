"""The steps of a round of "saving", in a contestant's process. `saving.py` says in which order."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contestant import Contestant, Rows
from benchmarks.serving import memory_in_use
from benchmarks.workloads import Store, Workload, tagged_rows, tags_of

#: The share of the episodes that are new when a store is saved again; at least one.
SHARE_NEW = 0.01
# Seconds between episodes that are added while a save goes on, and at most so many of them, a share of the store.
_PACE, _SHARE_MEANWHILE = 0.02, 0.2
_SECONDS_PER_READING = 0.002
_READ_AT_ONCE = 16 << 20


class Steps:
    """What the driver asks for; times are milliseconds.

    Args:
        contestant: Its store is full.
        workload: Of "saving".
    """

    def __init__(self, contestant: Contestant, workload: Workload) -> None:
        self.contestant, self.workload, self.store = contestant, workload, workload.store
        self.num_episodes = self.store.num_steps // self.store.episode_length
        self.num_new = num_new(self.store)
        # The oldest episode that is stored.
        self.first = 0

    def start(self, directory: str) -> dict[str, Any]:
        """Get ready for saves into an empty folder."""
        self.directory = Path(directory)
        self.directory.mkdir()
        self._files: dict[Path, tuple[int, ...]] = {}
        self._written = _bytes_to_disk()
        if self.contestant.saves_in_place:
            self.contestant.folder, self.first = directory, 0
            self.contestant.fill(self.store)
            # Or the next who saves would wait for that, too.
            _sync(self._new_or_changed())
        return {}

    def save(self) -> dict[str, float]:
        """Save all."""
        with _Memory() as memory:
            found = self._saved()
        if self.contestant.saves_in_place:
            # The kernel has written some of it before, while it was added.
            return {"files": found["files"]}
        return {"save": found["milliseconds"], "files": found["files"], "memory": memory.most}

    def load(self) -> dict[str, float]:
        """Load, with all files in the page cache."""
        _read_through(self.directory)
        return {"load": self._loaded()}

    def load_from_disk(self) -> dict[str, float]:
        """Load, with all files dropped from the page cache."""
        _drop_from_cache(self.directory)
        return {"load_from_disk": self._loaded()}

    def save_new(self) -> dict[str, float]:
        """Add a few episodes, and save again."""
        self._add(self.num_new)
        found = self._saved()
        return {"save_new": found["milliseconds"], "files_new": found["files"], "to_disk_new": found["to_disk"]}

    def check(self) -> dict[str, float]:
        """Load, and look at every row.

        Raises:
            AssertionError: What was loaded is not what is stored.
        """
        check_rows(self._rows(self.directory), self.store, self.first)
        return {}

    def hold_up(self, check: bool) -> dict[str, float]:
        """Save in the background into another folder, and go on adding episodes."""
        if not self.contestant.saves_in_background:
            return {}
        directory, first = self.directory.with_name(f"{self.directory.name}-background"), self.first
        directory.mkdir()
        with _Memory() as memory:
            begin = time.perf_counter()
            saving = self.contestant.save_in_background(directory)
            held_up = (time.perf_counter() - begin) * 1e3
            slowest = self._slowest_addition(lambda: not saving.done())
            saving.result()
        num_added = self.first - first
        found = {"held_up": held_up, "memory_background": memory.most}
        if num_added:
            found["addition_meanwhile"] = slowest
            last = self.first + num_added
            found["addition_else"] = self._slowest_addition(lambda: self.first < last)
        if check:
            check_rows(self._rows(directory), self.store, first)
        return found

    def _slowest_addition(self, goes_on: Any) -> float:
        """Milliseconds of the slowest of additions at the pace of a trainer."""
        slowest, last = 0.0, self.first + _SHARE_MEANWHILE * self.num_episodes
        while goes_on() and self.first < last:
            rows = tagged_rows(self.store.kind, self.first + self.num_episodes, 1, self.store.episode_length)
            add = self.contestant.episode_adder(rows, self.store.episode_length)
            begin = time.perf_counter()
            add()
            slowest = max(slowest, (time.perf_counter() - begin) * 1e3)
            self.first += 1
            time.sleep(_PACE)
        return slowest

    def _saved(self) -> dict[str, float]:
        begin = time.perf_counter()
        self.contestant.save(self.directory)
        if not self.contestant.syncs:
            _sync(self._new_or_changed())
        seconds = time.perf_counter() - begin
        changed = self._new_or_changed()
        written, before = _bytes_to_disk(), self._written
        self._files.update(_described(self.directory))
        self._written = written
        return {
            "milliseconds": seconds * 1e3,
            "files": sum(path.stat().st_size for path in changed) / 1e6,
            "to_disk": (written - before) / 1e6,
        }

    def _new_or_changed(self) -> list[Path]:
        return [path for path, state in _described(self.directory).items() if self._files.get(path) != state]

    def _loaded(self) -> float:
        gc.collect()
        begin = time.perf_counter()
        loaded = self.contestant.load(self.directory)
        taken = (time.perf_counter() - begin) * 1e3
        assert loaded is not None
        return taken

    def _rows(self, directory: Path) -> Rows:
        return self.contestant.rows_of(self.contestant.load(directory))

    def _add(self, num: int) -> None:
        length = self.store.episode_length
        self.contestant.add_rows(tagged_rows(self.store.kind, self.first + self.num_episodes, num, length), length)
        self.first += num


def num_new(store: Store) -> int:
    """How many episodes are new when a store is saved again."""
    return max(1, int(SHARE_NEW * store.num_steps / store.episode_length))


def check_rows(rows: Rows, store: Store, first: int) -> None:
    """Compare rows, in any order, with those of a full store whose oldest episode is number `first`.

    Raises:
        AssertionError: They differ.
    """
    wanted = store.num_steps
    found = {name: (len(values), values.dtype.name) for name, values in rows.items()}
    assert found == {name: (wanted, dtype) for name, (_, dtype) in store.fields.items()}, f"other fields: {found}"
    episode, step = tags_of(rows["obs"])
    order = np.lexsort((step, episode))
    length = store.episode_length
    at_once = max(1, 10_000 // length)
    for begin in range(0, wanted // length, at_once):
        num = min(at_once, wanted // length - begin)
        places = order[begin * length : (begin + num) * length]
        for name, values in tagged_rows(store.kind, first + begin, num, length).items():
            assert np.array_equal(rows[name][places], values), f"{name} is not what was stored from {first + begin} on"


class _Memory:
    """Megabytes that this process has had in use beyond what it had before, its memory-mapped files left out.

    What the kernel counts is read by a thread, every 2 ms. Shared memory that was in use before, such as a ring's,
    stays what it was.
    """

    def __enter__(self) -> _Memory:
        memory_in_use()  # Gives back what is free.
        self._before = self._highest = _anonymous_and_shared()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def most(self) -> float:
        return (self._highest - self._before) / 1e6

    def _read(self) -> None:
        while not self._ended.wait(_SECONDS_PER_READING):
            self._highest = max(self._highest, _anonymous_and_shared())


def _anonymous_and_shared() -> int:
    with open("/proc/self/status") as file:
        found = [int(line.split()[1]) for line in file if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(found) * 1024


def _bytes_to_disk() -> int:
    """Bytes of files that this process has changed in the page cache, by writing or in memory that maps them."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("write_bytes:"))


def _described(directory: Path) -> dict[Path, tuple[int, ...]]:
    """What tells a file from another version of it, by path."""
    found = {}
    for path in directory.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[path] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def _sync(paths: list[Path]) -> None:
    """`fsync` of files, and of the folders that they are in."""
    for path in (*paths, *dict.fromkeys(path.parent for path in paths)):
        with _opened(path) as file:
            os.fsync(file)


def _read_through(directory: Path) -> None:
    space = bytearray(_READ_AT_ONCE)
    for path in _described(directory):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(space):
                pass


def _drop_from_cache(directory: Path) -> None:
    for path in _described(directory):
        with _opened(path) as file:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)
