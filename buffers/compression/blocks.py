"""Blocks of an episode: rows 0 to k - 1, k to 2k - 1, ..., and what is left.

    row      0 1 2 3 | 4 5 6 7 | 8 9          k = 4, an episode of 10 rows
    block    0       | 1       | 2

So row t is in block t // k, and a window of T rows needs at most T / k + 2 blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from buffers.compression.codecs import Codec

__all__ = ["CompressedEpisode", "decoded_rows", "num_blocks", "whole_blocks"]


class CompressedEpisode(dict[str, np.ndarray]):
    """An episode `name -> (L, *shape)`, with the first of its blocks, which have been compressed already by `codecs`.

    A copy of the dict is without them, and is compressed anew.
    """

    def __init__(
        self, rows: Mapping[str, np.ndarray], blocks: Mapping[str, Sequence[bytes]], codecs: Mapping[str, Codec]
    ) -> None:
        super().__init__(rows)
        self._blocks, self._codecs = blocks, codecs

    def blocks_by(self, name: str, codec: Codec) -> Sequence[bytes]:
        """The first blocks of a field, if it was that codec that has compressed them."""
        own = self._codecs.get(name)
        return self._blocks.get(name, ()) if own is not None and own.key == codec.key else ()


def num_blocks(length: int, codec: Codec) -> int:
    """Blocks of an episode of `length` rows."""
    return -(-length // codec.rows_per_block)


def whole_blocks(codec: Codec, name: str, episode: Mapping[str, np.ndarray]) -> list[bytes]:
    """All blocks of a field of an episode; those that are missing are compressed now."""
    blocks = list(episode.blocks_by(name, codec)) if isinstance(episode, CompressedEpisode) else []
    rows, num = episode[name], codec.rows_per_block
    for first in range(len(blocks) * num, len(rows), num):
        blocks.append(codec.encode(rows[first : first + num]))
    return blocks


def decoded_rows(codec: Codec, blocks: Iterable[bytes | memoryview], length: int) -> np.ndarray:
    """The rows of an episode, `(length, *shape)`, from all its blocks; DamagedBlockError if one is not theirs."""
    memory, size, begin = np.empty(length * codec.kind.nbytes, np.uint8), codec.rows_per_block * codec.kind.nbytes, 0
    for block in blocks:
        codec.decode(memoryview(block), memory[begin : begin + size])
        begin += size
    return memory.view(codec.kind.numpy_dtype).reshape(length, *codec.kind.shape)
