"""What reader processes of the tests run: it must be importable by processes that are spawned."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing.context
import pickle
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from buffers.dataset import RingBufferDataset
from buffers.dataset.fields import Fields, Scalar, TensorType
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.loading import SequenceStream

# Rows of two pages and more, so that a window that is written over meanwhile is torn between fields or within rows.
WIDE = Fields(x=TensorType((1100,), torch.int64), y=TensorType((600,), torch.int64), length=Scalar(dtype=torch.int64))


def tiny_ring(capacity: int, compress: dict[str, str] | None = None) -> RingBufferDataset:
    return RingBufferDataset(capacity, EpisodeDatasetInfo(WIDE), compress=compress)


def tagged_episode(ring: RingBufferDataset, length: int) -> dict[str, np.ndarray]:
    """The next episode, every number of which is the step id of its row (and the number of rows)."""
    steps = ring.start_of_next(length) + np.arange(length)
    return {
        "x": np.broadcast_to(steps[:, None], (length, 1100)),
        "y": np.broadcast_to(steps[:, None], (length, 600)),
        "length": np.full(length, length),
    }


def handle_of(shared: Any) -> bytes:
    """The pickle that a process which multiprocessing starts is given."""
    multiprocessing.context.set_spawning_popen(object())
    try:
        return pickle.dumps(shared)
    finally:
        multiprocessing.context.set_spawning_popen(None)


def reader_of(shared: Any) -> Any:
    """What such a process unpickles."""
    return pickle.loads(handle_of(shared))


@contextlib.contextmanager
def adding(ring: RingBufferDataset) -> Iterator[None]:
    """Another thread adds episodes of 5 steps, one after the other, meanwhile."""
    stop = threading.Event()

    def add() -> None:
        while not stop.is_set():
            ring.add_episode(tagged_episode(ring, 5))

    thread = threading.Thread(target=add)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def count_inconsistent(batch: dict[str, Any]) -> int:
    """Windows with a row that is not what its step id says, or of an episode of another length."""
    index = batch["index"][..., None]
    is_right = (batch["x"] == index).all(-1) & (batch["y"] == index).all(-1)
    is_right &= batch["length"] == batch["length"][:, :1]
    is_right &= batch["step"] < batch["length"]
    return int((~is_right.all(1)).sum())


BATCH_SIZE = 16


def batch_of(stream: SequenceStream, n: int) -> Any:
    """Batch n; drawn again where everything was written over before it could be read."""
    while True:
        try:
            return stream.batch(n)
        except RuntimeError as error:
            if "gone" not in str(error) and "longer than every" not in str(error):
                raise


def read(ring: RingBufferDataset, num_batches: int, seed: int, connection: Connection) -> None:
    """Draw so many batches and on until told to stop; send the number of inconsistent windows."""
    torch.set_num_threads(1)
    stream = ring.get_loader(BATCH_SIZE, 3, include=("index", "step"), seed=seed).stream
    oldest, inconsistent = int(stream.batch(0)["index"].max()), 0
    connection.send("ready")
    for n in itertools.count(1):
        is_last = n > num_batches and connection.poll()
        batch = batch_of(stream, n)
        inconsistent += count_inconsistent(batch)
        if is_last:
            break
    assert int(batch["index"].min()) > oldest, "it saw nothing new"
    connection.send(inconsistent)


def start(ring: RingBufferDataset, method: str, num_batches: int, seed: int) -> tuple[Any, Connection]:
    """A process that reads, and has begun to; and the connection to it."""
    context: Any = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    process = context.Process(target=read, args=(ring, num_batches, seed, theirs), daemon=True)
    process.start()
    theirs.close()
    assert mine.recv() == "ready"
    return process, mine
