"""Rows of late fields that are written while other processes read them: all old or all new."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from buffers.dataset import RingBufferDataset
from buffers.fields import TensorType
from buffers.late import late_field
from buffers.late.late_field import LateField
from buffers.table import Windows
from tests import reading
from tests.list_dataset import ListDataset

pytestmark = pytest.mark.filterwarnings("ignore:This process .* multi-threaded")
NUM_ROWS, PER_READ, MOST_SEEN = 8, 16, 200
WIDE = TensorType((1536,), torch.int64)  # Three pages.


def dataset_of(kind: str) -> Any:
    dataset = RingBufferDataset(NUM_ROWS) if kind == "ring" else ListDataset(NUM_ROWS)
    dataset.add_episode({"x": np.zeros(NUM_ROWS)})
    dataset.add_late_field("wide", WIDE, 0)
    return dataset


def read(field: LateField, num_reads: int, seed: int, connection: Connection) -> None:
    """Read so many rows and on, until many numbers were seen; send how many rows held two."""
    torch.set_num_threads(1)
    rng, out = np.random.default_rng(seed), torch.empty(PER_READ, 1, *WIDE.shape, dtype=WIDE.dtype)
    zeros, num_rows = np.zeros(PER_READ, np.int64), np.full(PER_READ, NUM_ROWS)
    connection.send("ready")
    connection.recv()
    num_torn, num_done, seen = 0, 0, set[int]()
    while num_done < num_reads or len(seen) < MOST_SEEN:
        num_done += PER_READ
        steps = rng.integers(0, NUM_ROWS, PER_READ)
        field.read(Windows(1, steps, steps, zeros, num_rows), out)
        num_torn += int((out != out[..., :1]).any(-1).sum())
        seen |= set(out[:, 0, 0].tolist())
    connection.send(num_torn)


def torn_rows(kind: str, num_readers: int, num_reads: int, method: str = "fork") -> list[int]:
    """How many torn rows each reader has seen, while this process writes to the same rows without end."""
    dataset = dataset_of(kind)
    context: Any = multiprocessing.get_context(method)
    readers = []
    for seed in range(num_readers):
        mine, theirs = context.Pipe()
        field = dataset.late["wide"]
        arguments = (reading.handle_of(field) if method == "fork" else field, num_reads, seed, theirs)
        process = context.Process(target=_unpickle_and_read, args=arguments, daemon=True)
        process.start()
        theirs.close()
        readers.append((process, mine))
    for _, connection in readers:
        assert connection.recv() == "ready"
    for _, connection in readers:
        connection.send("begin")
    done, found = threading.Event(), list[int]()

    def collect() -> None:
        try:
            found.extend(connection.recv() for _, connection in readers)
        finally:
            done.set()

    thread = threading.Thread(target=collect)
    thread.start()
    rng, number = np.random.default_rng(0), 0
    while not done.is_set():
        number += 1
        ids = rng.integers(0, NUM_ROWS, int(rng.integers(1, 5)))
        values = np.full((len(ids), *WIDE.shape), number)
        assert dataset.update(ids, {"wide": values}) == 0
        if number % 3 == 0:
            dataset.update([np.arange(NUM_ROWS)], {"wide": np.full((1, NUM_ROWS, *WIDE.shape), number)})
    thread.join()
    for process, _ in readers:
        process.join()
    return found


def _unpickle_and_read(field: Any, *arguments: Any) -> None:
    read(pickle.loads(field) if isinstance(field, bytes) else field, *arguments)


@pytest.mark.parametrize(
    ("kind", "num_reads"),
    [("ring", 20_000), ("list", 5_000), pytest.param("ring", 1_000_000, marks=pytest.mark.slow)],
)
def test_readers_see_rows_old_or_new_and_never_half(kind, num_reads) -> None:
    assert torn_rows(kind, 4, num_reads // 4) == [0] * 4


def test_readers_without_versions_see_torn_rows(monkeypatch) -> None:
    monkeypatch.setattr(LateField, "read", lambda self, w, out: self._gather(w.start, w.length, out))
    assert sum(torn_rows("ring", 4, 5_000)) > 0


def test_a_reader_waits_for_a_row_that_is_half_written() -> None:
    dataset = dataset_of("ring")
    field = reading.reader_of(dataset.late["wide"])
    versions = dataset.late["wide"]._versions
    versions[3] += 1
    out = torch.empty(1, 2, *WIDE.shape, dtype=WIDE.dtype)
    windows = Windows(2, np.array([2]), np.array([2]), np.zeros(1, np.int64), np.array([NUM_ROWS]))

    def finish() -> None:
        time.sleep(0.05)
        dataset.late["wide"].column.array[3] = 5
        versions[3] += 1

    thread = threading.Thread(target=finish)
    thread.start()
    field.read(windows, out)
    thread.join()
    assert (out[0, 0] == 0).all() and (out[0, 1] == 5).all()


def test_a_row_whose_writer_was_killed_is_an_error_that_says_so(monkeypatch) -> None:
    monkeypatch.setattr(late_field, "_SECONDS_TO_WAIT", 0.05)
    dataset = dataset_of("ring")
    dataset.late["wide"]._versions[3] += 1
    loader = dataset.get_loader(4, NUM_ROWS, seed=0)
    with pytest.raises(RuntimeError, match="A row of late field `wide` stays half written: its writer was killed"):
        next(iter(loader))
    dataset.update([3], {"wide": np.zeros((1, *WIDE.shape), np.int64)})  # Which makes it whole.
    next(iter(loader))


def test_only_the_process_that_made_a_dataset_updates_it() -> None:
    dataset = dataset_of("ring")
    context: Any = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_try_to_update, args=(dataset, theirs), daemon=True)
    process.start()
    assert "Only the process that made the dataset can update its late fields" in mine.recv()
    process.join()


def _try_to_update(dataset: Any, connection: Connection) -> None:
    try:
        dataset.update([0], {"wide": np.zeros((1, *WIDE.shape), np.int64)})
        connection.send("it could")
    except RuntimeError as error:
        connection.send(str(error))
