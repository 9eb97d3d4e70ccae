"""Only a file's own bytes may convict it: whatever else goes wrong reaches the caller, and the file stays."""

from __future__ import annotations

import concurrent.futures
import errno
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers.dataset import IndividualFileDataset
from buffers.dataset.files.serialization import as_damage
from buffers.dataset.individual_file import DamagedEpisodeError
from buffers.dataset.info import EpisodeDatasetInfo
from tests import tagged
from tests.faults import failing_calls
from tests.file_helpers import add, files, numbers, numbers_drawn, open_files
from tests.format_helpers import FIELDS, STRATEGIES, each_strategy, made, same, saved
from tests.test_individual_file import Raw

ROOT = Path(__file__).parent.parent

LOW_ON_MEMORY = """
import resource, sys
import numpy as np
from buffers.dataset import IndividualFileDataset
from buffers.dataset import individual_file
path, strategy = sys.argv[1:]
strategy = getattr(individual_file, strategy)()
for mode in "ar":
    with IndividualFileDataset(10**9, None, None, path, strategy, mode=mode) as dataset:
        with open("/proc/self/statm") as file:
            used = 4096 * int(file.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + 25_000_000, resource.RLIM_INFINITY))
        for attempt in range(3):
            try:
                dataset.get_loader(4, 1, seed=0).stream.take()
            except MemoryError:
                continue
            sys.exit("there was enough memory")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert dataset.num_episodes == 2
"""


@each_strategy
def test_a_good_file_survives_a_load_without_memory(tmp_path, strategy) -> None:
    with IndividualFileDataset(10**9, None, None, tmp_path, strategy, durability="rename") as dataset:
        for _ in range(2):
            dataset.add_episode({"x": np.zeros((1, 40_000_000), np.uint8)})
    command = [sys.executable, "-W", "error", "-c", LOW_ON_MEMORY, str(tmp_path), type(strategy).__name__]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert len(files(tmp_path)) == 2


def raised_after(num_calls: int, error: Exception, function: Callable[[], Any]) -> bool:
    """Call a function while a signal handler raises an error at its n-th call or return; whether it came so far."""

    def handle(*_: Any) -> None:
        raise error

    left = num_calls

    def profile(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    gc.disable()  # What earlier calls left behind says so at another time.
    try:
        sys.setprofile(profile)
        try:
            function()
        finally:
            sys.setprofile(None)  # Which is a call, too, and may be the n-th.
    except Exception as found:
        assert not isinstance(found, Warning)  # Of damage.
        # Python's codecs make a new one of it, and zipfile another one of a TimeoutError.
        assert str(error.args[0]) in str(found) or isinstance(found, zipfile.BadZipFile)
    finally:
        gc.enable()
        signal.signal(signal.SIGUSR1, before)
    return left <= 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("what", "error"), [("rows", RuntimeError), ("directory", ValueError), ("info", TimeoutError), ("rows", ValueError)]
)
@each_strategy
def test_a_good_file_survives_a_signal_handler_that_raises(tmp_path, strategy, what, error) -> None:
    dataset = IndividualFileDataset(100, None, None, tmp_path, strategy, durability="rename")
    dataset.add_episode(tagged.episode(4, 0), {"success": True})
    windows = dataset.table.windows(np.zeros(1, np.int64), np.zeros(1, np.int64), 4)
    num_calls, out = 1, dataset.empty_batch(windows)

    def look() -> None:
        if what == "directory":
            IndividualFileDataset(100, directory=tmp_path, mode="r", verify="header").close()
        elif what == "info":
            assert dataset.episode_info(0) == {"success": True}
        else:
            dataset._read(windows, out)

    while True:
        dataset._reader.close()
        dataset._reader._layouts.clear()
        was_hit = raised_after(num_calls, error("time is up"), look)
        assert numbers(dataset) == [(0, 4)], num_calls
        if not was_hit:
            break
        num_calls += 1 if num_calls < 60 else 11
    gc.collect()  # Files that were cut off while being opened say so now, not in another test.
    assert num_calls > 50 and files(tmp_path) == [f"0000000000-000000000000-4{strategy.suffix}"]


@each_strategy
def test_a_good_file_survives_a_default_device(tmp_path, strategy) -> None:
    with IndividualFileDataset(100, None, None, tmp_path, strategy, durability="rename") as dataset:
        add(dataset, [4, 5])
    torch.set_default_device("meta")
    try:
        with IndividualFileDataset(100, None, None, tmp_path, strategy, verify="full") as dataset:
            assert numbers(dataset) == [(0, 4), (1, 5)]
            add(dataset, [6], 2)
    finally:
        torch.set_default_device("cpu")
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("mode", ["a", "r"])
@each_strategy
def test_a_good_file_survives_a_lack_of_descriptors(tmp_path, strategy, mode) -> None:
    with IndividualFileDataset(100, None, None, tmp_path, strategy, durability="rename") as dataset:
        add(dataset, [4, 5])
    with IndividualFileDataset(100, None, None, tmp_path, strategy, mode=mode) as dataset:
        with failing_calls("open", OSError(errno.EMFILE, "Too many")), pytest.raises(OSError, match="Too many"):
            dataset.get_episode(0)
        assert numbers(dataset) == [(0, 4), (1, 5)]
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, OSError, ValueError, KeyError, DamagedEpisodeError])
def test_of_a_users_format_one_error_means_damage(tmp_path, error) -> None:
    is_damage = error is DamagedEpisodeError

    class Broken(Raw):
        def load(self, file: Any, fields: Any, length: int) -> Any:
            raise error("no")

    with IndividualFileDataset(100, directory=tmp_path, serialization_strategy=Raw()) as dataset:
        add(dataset, [4])
        info = EpisodeDatasetInfo(dataset.fields)
    with IndividualFileDataset(100, info, directory=tmp_path, serialization_strategy=Broken()) as dataset:
        if is_damage:
            with pytest.warns(UserWarning, match="1 files"), pytest.raises(RuntimeError, match="is gone"):
                dataset.get_episode(0)
        else:
            with pytest.raises(error, match="no"):
                dataset.get_episode(0)
        assert dataset.num_episodes == len(dataset.damaged_files) ^ 1 == (not is_damage)


def test_a_lack_of_memory_that_zlib_reports_is_no_damage() -> None:
    with pytest.raises(MemoryError), as_damage():
        raise zlib.error("Error -4 while preparing to decompress data: out of memory")


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_an_archive_on_a_bad_disk_is_not_damaged(strategy, opened) -> None:
    class Bad(io.FileIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    file = opened(saved(strategy, made(FIELDS, 4)))
    with Bad(os.dup(file.fileno())) as bad, pytest.raises(OSError, match="Input/output error"):
        strategy.check(bad, FIELDS, 4)


def test_deep_in_a_stack_a_good_file_is_not_damaged(opened) -> None:
    strategy = STRATEGIES[0]
    content = saved(strategy, made(FIELDS, 4))

    def descend() -> Any:
        try:
            return descend()
        except RecursionError:
            return strategy.load(opened(content), FIELDS, 4)

    try:
        assert same(descend(), made(FIELDS, 4))
    except DamagedEpisodeError:
        raise
    except RecursionError:
        pass


def test_a_slow_load_holds_up_no_addition_or_eviction(tmp_path) -> None:
    loading, go_on = threading.Event(), threading.Event()

    class Slow(Raw):
        def load(self, file: Any, fields: Any, length: int) -> Any:
            loading.set()
            assert go_on.wait(60)
            return super().load(file, fields, length)

    dataset = IndividualFileDataset(12, None, None, tmp_path, Slow(), durability="rename")
    add(dataset, [5, 5])
    windows = dataset.table.windows(np.array([0, 1]), np.array([0, 0]), 5)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(dataset.read, windows)
        assert loading.wait(60)
        # Neither of these waits: the load goes on only after them.
        add(dataset, [5], 2)
        dataset.evict_episode(0)
        assert not reading.done() and dataset.num_episodes == 1
        go_on.set()
        # The episode whose load had begun was read, the other was gone by then.
        assert reading.result()[1].tolist() == [True, False]
    assert numbers(dataset) == [(2, 5)]


@each_strategy
def test_threads_that_read_while_episodes_come_and_go_agree(tmp_path, strategy) -> None:
    dataset = IndividualFileDataset(60, None, None, tmp_path, strategy, durability="rename")
    add(dataset, [4] * 15)
    stop = threading.Event()

    def read(seed: int) -> None:
        stream = dataset.get_loader(8, 3, include=("episode",), seed=seed).stream
        while not stop.is_set():
            batch = stream.take()
            assert [number for _, number, _, _ in tagged.origins(batch)] == batch["episode"].tolist()

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        reading = [pool.submit(read, seed) for seed in range(3)]
        try:
            for number in range(15, 150):
                add(dataset, [4 + number % 3], number)
        finally:
            stop.set()
    assert [each.result() for each in reading] == [None] * 3
    assert numbers_drawn(dataset) <= set(dataset.table.ids.tolist())
    dataset.close()
    assert open_files(tmp_path) == []
