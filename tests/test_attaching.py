"""Processes that are no children of a ring's writer read it by name, and hear when the writer is gone."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.dataset.fields import Vector
from buffers.sampler import PrioritizedSampler
from buffers.sharing import handover
from tests import reading, tagged

# Writers and readers are children of a server, not of each other.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "buffers", "tests.reading"])
GONE = r"The process \d+, which shared a ring as `ring`, has ended or has given the ring up. Attach again"
NUM_EPISODES = 30


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where names are. Sockets have short paths."""
    os.chmod(tmp_path, 0o700)
    short = Path(f"/tmp/b{os.getpid()}-{time.monotonic_ns() % 10**9}")
    short.symlink_to(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    yield tmp_path / "buffers"
    short.unlink()


class Other:
    """Another process, which does what it is told by a function of (connection, *arguments)."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        self.connection, its_end = CONTEXT.Pipe()
        self.process = CONTEXT.Process(
            target=_in_folder, args=(os.environ["XDG_RUNTIME_DIR"], target, its_end, *arguments)
        )
        self.process.start()
        its_end.close()

    def answer(self, timeout: float = 60) -> Any:
        assert self.connection.poll(timeout), "no answer"
        return self.connection.recv()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()


def _in_folder(folder: str, target: Any, *arguments: Any) -> None:
    os.environ["XDG_RUNTIME_DIR"] = folder
    target(*arguments)


def filled() -> RingBufferDataset:
    ring = RingBufferDataset(1_000)
    for number in range(NUM_EPISODES):
        ring.add_episode(tagged.episode(5 + number % 7, number))
    return ring


def write(connection: Connection, is_lapping: bool = False) -> None:
    """Share a ring; with `is_lapping`, go on adding until told to stop."""
    ring = reading.tiny_ring(128) if is_lapping else filled()
    rng = np.random.default_rng(0)
    if is_lapping:
        ring.add_episode(reading.tagged_episode(ring, 5))
    ring.share("ring")
    connection.send(os.getpid())
    while is_lapping and not connection.poll():
        for _ in range(20):
            ring.add_episode(reading.tagged_episode(ring, int(rng.integers(1, 9))))
    connection.recv()
    connection.send(ring.table.next_start)
    connection.recv()


def read(connection: Connection, num_workers: int, method: str | None) -> None:
    """Attach, answer with a batch, and with the error that comes in the end."""
    ring = RingBufferDataset.attach("ring")
    options = {"num_workers": num_workers, "multiprocessing_context": method, "include": ("index",)}
    loader = ring.get_loader(4, 3, seed=0, **options)
    batches = iter(loader)
    connection.send(tagged.origins(next(batches)))
    try:
        while True:
            next(batches)
            time.sleep(0.01)
    except RuntimeError as error:
        connection.send(str(error))


def sockets(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is read.


@pytest.mark.parametrize(("num_workers", "method"), [(0, None), (1, "fork"), (2, "spawn")])
def test_an_attached_ring_gives_the_batches_of_its_owner(num_workers: int, method: str | None) -> None:
    own = list(itertools.islice(filled().get_loader(4, 3, seed=0), 6))
    with Other(write) as writer:
        writer.answer()
        ring = RingBufferDataset.attach("ring")
        loader = ring.get_loader(4, 3, seed=0, num_workers=num_workers, multiprocessing_context=method)
        for batch, expected in zip(loader, own, strict=False):
            assert torch.equal(batch["code"], expected["code"])
        assert ring.fields == filled().fields and len(ring) == len(filled())
        with ReplayBuffer(ring, 4, 3, seed=0) as buffer:
            assert torch.equal(buffer.sample()["code"], own[0]["code"])
        mixed = MixtureDataset([ring, filled()], [0.5, 0.5])
        tagged.origins(next(iter(mixed.get_loader(4, 3, seed=0))))


@pytest.mark.parametrize("world_size", [2, 4])
def test_attached_ranks_share_out_the_batches_of_one(world_size: int) -> None:
    own = list(itertools.islice(filled().get_loader(4, 3, seed=0), 2 * world_size))
    with Other(write) as writer:
        writer.answer()
        rings = [RingBufferDataset.attach("ring") for _ in range(world_size)]
        loaders = [
            iter(ring.get_loader(4, 3, seed=0, rank=rank, world_size=world_size)) for rank, ring in enumerate(rings)
        ]
        for n, expected in enumerate(own):
            assert torch.equal(next(loaders[n % world_size])["code"], expected["code"])


@pytest.mark.parametrize("num_batches", [1_500, pytest.param(32_000, marks=pytest.mark.slow)])
def test_no_window_is_torn_under_a_writer_that_laps(num_batches: int) -> None:
    with Other(write, True) as writer, contextlib.ExitStack() as stack:
        writer.answer()
        readers = [stack.enter_context(Other(read_checked, num_batches, seed)) for seed in range(2)]
        for reader in readers:
            assert reader.answer() == "ready"
            reader.connection.send("may stop")
        for reader in readers:
            assert reader.answer(1200) == 0
        writer.connection.send("stop")
        assert writer.answer() > 20 * 128


def read_checked(connection: Connection, num_batches: int, seed: int) -> None:
    reading.read(RingBufferDataset.attach("ring"), num_batches, seed, connection)


def test_late_fields_are_read_and_not_written() -> None:
    ring = filled()
    ring.add_late_field("latent", Vector(2))
    ring.share("ring")
    reader = RingBufferDataset.attach("ring")
    batches = iter(reader.get_loader(4, 3, include=("index",)))
    assert not next(batches)["latent"].any()
    ids = np.arange(ring.table.oldest_start, ring.table.next_start)
    ring.update(ids, {"latent": np.repeat(ids[:, None], 2, 1).astype(np.float32)})
    batch = next(batches)
    assert torch.equal(batch["latent"][..., 0], batch["index"].float())
    with pytest.raises(RuntimeError, match="Only the process that made the dataset can update its late fields"):
        reader.update(batch["index"], {"latent": batch["latent"]})


def test_an_extended_ring_is_attached_without_what_is_behind_it() -> None:
    ring, behind = filled(), RingBufferDataset(10_000)
    ring.extend(behind)
    ring.share("ring")
    reader = RingBufferDataset.attach("ring")
    ring.add_episode(tagged.episode(5, 99))
    reader.refresh()
    assert reader.extension is None and reader.num_episodes == ring.num_episodes > NUM_EPISODES


def test_an_attached_ring_is_only_read() -> None:
    ring = filled()
    ring.share("ring")
    with Other(refused) as other:
        found = other.answer()
    assert len(found) == 5 and all(
        re.search("Only the process that made|this one reads along", message) for message in found
    )


def refused(connection: Connection) -> None:
    ring = RingBufferDataset.attach("ring")
    calls = [
        lambda: ring.add_episode(tagged.episode(5, 0)),
        lambda: ring.evict_episode(0),
        lambda: ring.share("other"),
        lambda: ring.save("nowhere"),
        lambda: ring.get_loader(4, 3, sampler=PrioritizedSampler()),
    ]
    found = []
    for call in calls:
        with pytest.raises(RuntimeError) as error:
            call()
        found.append(str(error.value))
    connection.send(found)


# Ends.


@pytest.mark.parametrize(("num_workers", "method"), [(0, None), (1, "fork"), (1, "spawn")])
def test_a_reader_hears_that_the_writer_was_killed(folder: Path, num_workers: int, method: str | None) -> None:
    with Other(write) as writer:
        # Without a name, memory cannot outlive those that map it.
        assert "/dev/shm" not in Path(f"/proc/{writer.answer()}/maps").read_text()
        with Other(read, num_workers, method) as reader:
            assert len(reader.answer()) == 4
            writer.kill()
            assert re.search(GONE, reader.answer())
    with pytest.raises(RuntimeError, match="The process that shared a ring as `ring` has ended: after 0.05 s"):
        RingBufferDataset.attach("ring", timeout=0.05)
    # That has removed the name.
    assert sockets(folder) == []
    with pytest.raises(RuntimeError, match="No process of yours shares a ring as `ring`"):
        RingBufferDataset.attach("ring", timeout=0.05)


def test_a_writer_goes_on_when_readers_are_killed() -> None:
    with Other(write, True) as writer:
        writer.answer()
        for _ in range(3):
            with Other(read_checked, 10**6, 0) as reader:
                assert reader.answer() == "ready"
                reader.kill()
        with Other(read_checked, 500, 0) as reader:
            assert reader.answer() == "ready"
            reader.connection.send("may stop")
            assert reader.answer() == 0


def test_all_are_killed_and_nothing_is_left(folder: Path) -> None:
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        with Other(write) as writer:
            writer.answer()
            readers = [Other(read, 1, "fork") for _ in range(2)]
            for reader in readers:
                reader.answer()
            for number in order:
                [writer, *readers][number].kill()
            # The name of a killed writer is free for another.
            with Other(write) as another:
                another.answer()
                assert len(RingBufferDataset.attach("ring")) == len(filled())
            assert not any(other.process.is_alive() for other in (writer, *readers))


def test_a_child_of_the_writer_neither_keeps_nor_removes_the_name(folder: Path) -> None:
    ring = filled()
    ring.share("ring")
    child = os.fork()
    if child == 0:
        os._exit(any(own.fileno() >= 0 for own in handover._own_sockets))
    assert os.waitpid(child, 0)[1] == 0 and sockets(folder) == ["ring"]


def test_a_ring_that_is_given_up_is_gone(folder: Path) -> None:
    ring = filled()
    ring.share("ring")
    reader = RingBufferDataset.attach("ring")
    batches = iter(reader.get_loader(4, 3))
    next(batches)
    del ring
    gc.collect()
    assert sockets(folder) == []
    with pytest.raises(RuntimeError, match=GONE):
        for _ in range(1000):
            next(batches)
            time.sleep(0.01)


# Names.


def test_a_reader_waits_for_the_fields() -> None:
    ring = RingBufferDataset(100)
    ring.share("ring")
    with pytest.raises(RuntimeError, match="The ring that is shared as `ring` has no fields yet: after 0.1 s"):
        RingBufferDataset.attach("ring", timeout=0.1)
    threading.Timer(0.1, lambda: ring.add_episode(tagged.episode(5, 0))).start()
    assert RingBufferDataset.attach("ring").num_episodes == 1


def test_a_name_is_of_one_ring() -> None:
    ring, other = filled(), filled()
    ring.share("ring")
    ring.share("ring")
    with pytest.raises(RuntimeError, match="Another process of yours shares a ring as `ring`"):
        other.share("ring")
    with pytest.raises(RuntimeError, match="The ring is shared already, as `ring`"):
        ring.share("other")
    for name in ("", "a/b", "..", "x" * 65, ".hidden"):
        with pytest.raises(ValueError, match="`name` must be 1 to 64 letters"):
            other.share(name)
        with pytest.raises(ValueError, match="`name` must be 1 to 64 letters"):
            RingBufferDataset.attach(name)
    for timeout in (float("nan"), float("inf"), -1):
        with pytest.raises(ValueError, match="`timeout` must be finite, at least 0"):
            RingBufferDataset.attach("ring", timeout)


def test_a_folder_that_others_can_enter_is_refused(folder: Path) -> None:
    folder.mkdir(0o755)
    for call in (lambda: filled().share("ring"), lambda: RingBufferDataset.attach("ring")):
        with pytest.raises(RuntimeError, match="must be a directory that only you can enter"):
            call()
    folder.rmdir()
    folder.symlink_to(folder.parent)
    with pytest.raises(RuntimeError, match="must be a directory that only you can enter"):
        filled().share("ring")


def test_a_path_that_is_too_long_for_a_socket_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ("d" * 90)).mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("d" * 90)))
    for use in (filled().share, RingBufferDataset.attach):
        with pytest.raises(ValueError, match="/buffers/ring is longer than the 107 bytes of a socket's path"):
            use("ring")


def test_a_file_that_is_in_the_way_is_named(folder: Path) -> None:
    folder.mkdir(0o700)
    (folder / "ring").touch()
    with pytest.raises(RuntimeError, match=r"buffers/ring is in the way of `ring`. Choose another name"):
        filled().share("ring")
    with pytest.raises(RuntimeError, match=r"buffers/ring is no shared ring: after 0.05 s"):
        RingBufferDataset.attach("ring", timeout=0.05)
    assert sockets(folder) == ["ring"]


def test_strangers_get_nothing_and_are_given_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    ring = filled()
    ring.share("ring")
    peer = handover._peer
    monkeypatch.setattr(handover, "_peer", lambda connection: (peer(connection)[0], os.geteuid() + 1))
    with pytest.raises(RuntimeError, match="What is shared as `ring` belongs to another user"):
        RingBufferDataset.attach("ring", timeout=0.1)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(30)
        stranger.connect(os.path.join(os.environ["XDG_RUNTIME_DIR"], "buffers", "ring"))
        assert stranger.recv(1) == b""


def test_what_cannot_be_described_is_an_error_for_who_asks() -> None:
    door = handover.Door("ring", lambda: threading.Lock())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="TypeError: cannot pickle"):
            handover.enter("ring", 1.0)
    door.close()


def test_a_writer_that_does_not_answer_is_named() -> None:
    with Other(write) as writer:
        pid = writer.answer()
        os.kill(pid, signal.SIGSTOP)
        while " T " not in Path(f"/proc/{pid}/stat").read_text():
            time.sleep(0.01)
        try:
            with pytest.raises(RuntimeError, match="The process that shares a ring as `ring` does not answer"):
                RingBufferDataset.attach("ring", timeout=0.3)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert len(RingBufferDataset.attach("ring")) == len(filled())


def descriptors() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/self/fd/{name}")


def test_readers_that_come_and_go_leave_no_descriptor() -> None:
    ring = filled()
    ring.share("ring")
    RingBufferDataset.attach("ring")
    gc.collect()
    time.sleep(0.2)
    before = len(list(descriptors()))
    for _ in range(20):
        RingBufferDataset.attach("ring")
    gc.collect()
    deadline = time.monotonic() + 10
    while len(list(descriptors())) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(descriptors())) <= before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_ring_on_a_gpu_is_not_shared() -> None:
    with pytest.raises(ValueError, match="A ring on cuda makes its batches there"):
        RingBufferDataset(100, device="cuda").share("ring")


def write_compressed(connection: Connection) -> None:
    """Share a ring of tagged episodes, compressed."""
    ring = RingBufferDataset(1_000, compress={"obs": "lz4", "code": "zstd"})
    for number in range(40):
        ring.add_episode(tagged.episode(1 + number % 40, number))
    ring.share("ring")
    connection.send("shared")
    connection.recv()


def test_compressed_fields_are_read_by_those_that_attach() -> None:
    pytest.importorskip("cramjam")
    with Other(write_compressed) as writer:
        assert writer.answer() == "shared"
        ring = RingBufferDataset.attach("ring")
        for batch in itertools.islice(ring.get_loader(16, 8, seed=0), 10):
            assert len(tagged.origins(batch)) == 16
        assert tagged.numbers(ring) == list(range(40))[-ring.num_episodes :]
        writer.connection.send("stop")
