"""A writer that is killed before any line of what it does to the log leaves readers a whole one."""

from __future__ import annotations

import os
import pickle
import sys
import types
from typing import Any

import pytest

from buffers.dataset import IndividualFileDataset, shared
from buffers.dataset.index import EpisodeIndex
from buffers.dataset.shared import EpisodeLog, SharedArrays
from tests.faults import fork
from tests.file_helpers import add, numbers

_KILLED = 9
LIVE = 5


def killed_before_line(n: int, action: Any) -> bool:
    """Run an action in a forked child that ends before the n-th line of the log's code; whether it came so far."""
    pid = fork()
    if pid == 0:
        num_lines = 0

        def trace(frame: types.FrameType, event: str, _: Any) -> Any:
            nonlocal num_lines
            if frame.f_code.co_filename != shared.__file__:
                return None
            if event == "line":
                num_lines += 1
                if num_lines == n:
                    os._exit(_KILLED)
            return trace

        sys.settrace(trace)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, _KILLED)
    return status == _KILLED


def rows_of(index: EpisodeIndex) -> list[list[int]]:
    return index.rows.tolist()


@pytest.mark.parametrize("what", ["add", "add what is in the index", "remove the oldest", "remove one in the middle"])
@pytest.mark.parametrize("num_more", [0, 1, 2, 3, 4, 5])  # So that the half is full, or about to be.
def test_a_log_is_whole_before_every_line_at_which_its_writer_dies(what, num_more, monkeypatch) -> None:
    monkeypatch.setattr(shared, "_MIN_ROOM", 4)
    for n in range(1, 200):
        memory = SharedArrays(EpisodeLog.layout(400))
        log, index = EpisodeLog(memory), EpisodeIndex()
        known, mirror = EpisodeLog(memory), EpisodeIndex()
        for _ in range(LIVE + num_more):
            log.add(index.next_start, 3, index.next_id, index)
            index.append(3)
        known.follow(mirror)
        before = rows_of(index)

        def act(log: EpisodeLog = log, index: EpisodeIndex = index) -> None:
            start, number = index.next_start, index.next_id
            if what == "add what is in the index":
                index.append(3)
            if what.startswith("add"):
                log.add(start, 3, number, index)
            else:
                log.remove(int(index.ids[0 if what == "remove the oldest" else 2]), index)

        behind = [*before, [index.next_start, 3, index.next_id]]
        if what.startswith("remove"):
            behind = before[1:] if what == "remove the oldest" else before[:2] + before[3:]
        was_killed = killed_before_line(n, act)
        fresh = EpisodeIndex()
        EpisodeLog(memory).follow(fresh)
        known.follow(mirror)
        assert rows_of(fresh) == rows_of(mirror)
        assert rows_of(fresh) in ([before, behind] if was_killed else [behind])
        assert (fresh.next_id, fresh.next_start) >= (index.next_id, index.next_start)
        if not was_killed:
            break
    assert 5 < n < 199


def test_a_log_that_ends_says_so_to_who_has_it() -> None:
    memory = SharedArrays(EpisodeLog.layout(10))
    reader = EpisodeLog(pickle.loads(pickle.dumps(memory)))
    assert not reader.has_ended
    EpisodeLog(memory).end()
    assert reader.has_ended


def test_memory_that_is_another_than_was_shared_is_not_taken_for_it() -> None:
    layout = EpisodeLog.layout(10)
    state = SharedArrays(layout).__getstate__()
    other = SharedArrays(layout)  # On another machine, say, where all numbers happen to be the same.
    state["handle"] = other.__getstate__()["handle"]
    memory = SharedArrays.__new__(SharedArrays)
    with pytest.raises(RuntimeError, match="does not have the memory that it shared"):
        memory.__setstate__(state)


def test_what_was_pickled_before_its_writer_ended_reads_the_directory(tmp_path) -> None:
    dataset = IndividualFileDataset(100, directory=tmp_path, durability="rename")
    add(dataset, [3, 4])
    data = pickle.dumps(dataset)
    early = pickle.loads(data)
    dataset.close()
    late = pickle.loads(data)
    with IndividualFileDataset(100, directory=tmp_path, durability="rename") as other:
        add(other, [5], 2)
        for reader in (early, late, pickle.loads(pickle.dumps(dataset))):
            reader.refresh()
            assert numbers(reader) == [(0, 3), (1, 4), (2, 5)]
