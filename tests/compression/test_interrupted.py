"""A signal handler that raises while rows are decompressed says nothing about what is stored."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers.compression import CODECS
from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset
from buffers.dataset.fields import TensorType
from tests import tagged
from tests.faults import in_child, limited, status_of
from tests.test_trouble import raised_after

pytest.importorskip("cramjam")


def ring(path: Path, codec: str) -> EpisodeDataset:
    return RingBufferDataset(100, compress={TensorType: codec})


def files(path: Path, codec: str) -> EpisodeDataset:
    return IndividualFileDataset(100, directory=path, durability="rename", compress={TensorType: codec})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("make", [ring, files])
def test_an_episode_is_not_damaged_because_a_handler_raises(tmp_path: Path, make: Any, codec: str) -> None:
    dataset = make(tmp_path, codec)
    dataset.add_episode(tagged.episode(40, 0))
    windows = dataset.table.windows(np.zeros(1, np.int64), np.full(1, 3), 20)
    num_calls, out = 1, dataset.empty_batch(windows)
    kinds: set[type[Exception]] = set()

    def look() -> None:
        try:
            dataset._read(windows, out)
        except Exception as error:
            kinds.add(type(error))
            raise

    look()
    while raised_after(num_calls, TimeoutError("time is up"), look):
        assert dataset.num_episodes == 1, num_calls
        num_calls += 1
    assert num_calls > 20 and kinds == {TimeoutError}
    assert dataset._read(windows, out) is None


def test_a_lack_of_memory_is_no_damage_when_a_block_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = CODECS["lz4"]("x", TensorType((100,), torch.uint8))
    rows = np.zeros((16, 100), np.uint8)
    block, errors = memoryview(codec.encode(rows)), [ValueError("a handler"), MemoryError()]

    def fail(block: memoryview, out: np.ndarray) -> object:
        raise errors.pop(0)

    monkeypatch.setattr(codec, "_decode", fail)
    with pytest.raises(MemoryError):
        codec.decode(block, np.empty(1600, np.uint8))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_lack_of_memory_while_rows_are_compressed_does_not_end_the_process() -> None:
    codec = CODECS["lz4"]("x", TensorType((1 << 22,), torch.uint8))
    rows = np.zeros((16, 1 << 22), np.uint8)

    def encode() -> None:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        with limited(resource.RLIMIT_AS, num_pages * resource.getpagesize() + (1 << 23)), pytest.raises(MemoryError):
            codec.encode(rows)

    assert status_of(in_child(encode)) == 0
