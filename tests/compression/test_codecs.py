"""Blocks come back bit by bit, and what is not one of them is an error."""

from __future__ import annotations

import importlib
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch

from buffers.compression import CODECS, DamagedBlockError, codec_as
from buffers.dataset import RingBufferDataset
from buffers.dataset.fields import TensorType

pytest.importorskip("cramjam")
KIND = TensorType((40, 50), torch.uint8)


def rows(seed: int, num: int) -> np.ndarray:
    """Rows that are much alike; sometimes those of which the second LZ4 makes less."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, rng.integers(2, 256), (40, 50), dtype=np.uint8)
    first = noise if seed % 3 else np.zeros((40, 50), np.uint8)
    found = np.broadcast_to(first, (num, 40, 50)).copy()
    for n in range(num):
        found[n, rng.integers(40)] = n
    return found


def memory(num: int) -> np.ndarray:
    return np.empty(num * KIND.nbytes, np.uint8)


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_blocks_come_back_bit_by_bit(name) -> None:
    codec, sizes = CODECS[name]("x", KIND), set[int]()
    for seed in range(300):
        given = rows(seed, 1 + seed % codec.rows_per_block)
        block, out = codec.encode(given), memory(len(given))
        codec.decode(memoryview(block), out)
        assert out.tobytes() == given.tobytes()
        sizes.add(int.from_bytes(block[:4], "little"))
    assert name == "zstd" or (0 in sizes and len(sizes) > 5), "once and twice"


@pytest.mark.parametrize("name", ["lz4", "zstd", "jpeg"])
def test_noise_is_kept_as_it_is(name) -> None:
    if name == "jpeg":
        pytest.importorskip("simplejpeg")
    codec = CODECS[name]("x", KIND)
    noise = np.frombuffer(random.Random(0).randbytes(KIND.nbytes), np.uint8).reshape(1, 40, 50)
    block, out = codec.encode(noise), memory(1)
    codec.decode(memoryview(block), out)
    assert name == "jpeg" or (block == noise.tobytes() and out.tobytes() == noise.tobytes())


@pytest.mark.parametrize("name", ["lz4", "zstd", "jpeg"])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_no_block_of_theirs_is_an_error(name, seed) -> None:
    if name == "jpeg":
        pytest.importorskip("simplejpeg")
    codec = CODECS[name]("x", KIND)
    num = codec.rows_per_block
    block, rng = codec.encode(rows(seed, num)), np.random.default_rng(seed)
    for wrong in (block[:-1], block[: len(block) // 2], b"", bytes(rng.integers(0, 256, 50, dtype=np.uint8))):
        with pytest.raises(DamagedBlockError, match="has a block"):
            codec.decode(memoryview(wrong), memory(num + 1))


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_a_block_of_other_rows_is_an_error(name) -> None:
    codec = CODECS[name]("x", KIND)
    block = codec.encode(rows(1, 5))
    for num in (4, 6):
        with pytest.raises(DamagedBlockError):
            codec.decode(memoryview(block), memory(num))


def test_codecs_are_made_again() -> None:
    codec = CODECS["lz4"]("x", TensorType((100_000,), torch.uint8))
    assert codec.rows_per_block == 4 and CODECS["lz4"]("x", KIND).rows_per_block == 16
    for other in (pickle.loads(pickle.dumps(codec)), codec_as(codec.describe(), "x", codec.kind)):
        assert type(other) is type(codec) and other.key == codec.key and other.kind == codec.kind


def test_a_missing_library_is_named(monkeypatch) -> None:
    found = importlib.import_module

    def missing(name: str, *arguments: Any) -> Any:
        if name == "cramjam":
            raise ImportError("No module named 'cramjam'")
        return found(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"`compress` needs cramjam .*pip install '.\[compress\]'"):
        RingBufferDataset(10, compress={"x": "lz4"})


def test_an_image_of_another_shape_and_as_many_bytes_is_an_error() -> None:
    kind = TensorType((16, 32, 3), torch.uint8)
    image = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None], (1, 16, 32, 3))
    block = CODECS["jpeg"]("x", TensorType((32, 16, 3), torch.uint8)).encode(image.reshape(1, 32, 16, 3))
    with pytest.raises(DamagedBlockError):
        CODECS["jpeg"]("x", kind).decode(memoryview(block), memory(16 * 32 * 3))
