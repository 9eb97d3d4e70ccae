"""Compressed fields in a file: their blocks, and an index of them, as two tensors of safetensors."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from buffers.compression import Codec, DamagedBlockError, Fetched, decoded_rows, num_blocks, whole_blocks
from buffers.disk import DamagedEpisodeError, read_at

__all__ = ["BlockIndex", "FieldBlocks", "INDEX", "decoded", "stored_blocks"]

#: What the name of an index begins with, before that of the field.
INDEX = "__blocks__/"


class BlockIndex(NamedTuple):
    """Where the blocks of a field end, counted from the first one's begin, and their CRC-32."""

    # Arrays, as one lies beside each open file.
    ends: np.ndarray
    checksums: np.ndarray

    def span(self, first: int, end: int) -> tuple[int, int]:
        """Where blocks [first, end) lie."""
        return int(self.ends[first - 1]) if first else 0, int(self.ends[end - 1])

    def fetched(self, first: int, end: int, data: bytes | bytearray | memoryview) -> Fetched:
        """Blocks [first, end), from their bytes; a DamagedEpisodeError if these are not what was written."""
        begin, _ = self.span(first, end)
        ends, memory = (self.ends[first:end] - begin).tolist(), memoryview(data)
        checksums = self.checksums[first:end].tolist()
        for number, (start, stop) in enumerate(pairwise([0, *ends])):
            if zlib.crc32(memory[start:stop]) != checksums[number]:
                raise DamagedEpisodeError(
                    f"has a block, number {first + number}, that is not the one it was written with"
                )
        return Fetched(ends, data)


class FieldBlocks(NamedTuple):
    """Where a file has a compressed field: the offsets of its index and of its first block, and the bytes of these."""

    codec: Codec
    index_at: int
    first: int
    num_bytes: int

    def read_index(self, file: Any, length: int) -> BlockIndex:
        """The index, in a file of so many rows."""
        num = num_blocks(length, self.codec)
        entries = np.frombuffer(read_at(file, 8 * num, self.index_at), np.uint32)
        if len(entries) != 2 * num:
            raise DamagedEpisodeError("is shorter than its header says")
        sizes, checksums = entries.reshape(num, 2).T
        ends = sizes.cumsum(dtype=np.int64)
        if int(ends[-1]) != self.num_bytes:
            raise DamagedEpisodeError(f"has blocks of {int(ends[-1])} bytes, its header says {self.num_bytes}")
        return BlockIndex(ends, checksums.copy())


def stored_blocks(episode: Mapping[str, np.ndarray], codecs: Mapping[str, Codec]) -> dict[str, torch.Tensor]:
    """The tensors of the compressed fields of an episode."""
    found = {}
    for name, codec in codecs.items():
        blocks = whole_blocks(codec, name, episode)
        entries = [(len(block), zlib.crc32(block)) for block in blocks]
        found[name] = torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8)
        # Signed, as not every version of safetensors has unsigned integers of 32 bits.
        found[INDEX + name] = torch.from_numpy(np.array(entries, np.uint32).view(np.int32))
    return found


def decoded(blocks: FieldBlocks, file: Any, length: int) -> np.ndarray:
    """All rows of a compressed field, `(length, *shape)`; a DamagedEpisodeError if a block is not what was written."""
    index = blocks.read_index(file, length)
    data = memoryview(read_at(file, blocks.num_bytes, blocks.first))
    ends, _ = index.fetched(0, len(index.ends), data)
    try:
        return decoded_rows(blocks.codec, [data[a:b] for a, b in pairwise([0, *ends])], length)
    except DamagedBlockError as error:
        raise DamagedEpisodeError(str(error)) from error
