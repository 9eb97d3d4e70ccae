"""Blocks of open episodes, compressed as they fill, so that an episode's end does not wait for all of them.

Environments that step together fill their blocks together. They take turns, so that each step compresses as much:

    step             8    9    10   11   ...          blocks of 8 rows, 16 environments
    filled           16   0    0    0
    compressed       2    2    2    2                 of environments 0 and 1, 2 and 3, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from buffers.compression.blocks import CompressedEpisode
from buffers.compression.codecs import Codec

__all__ = ["EarlyBlocks"]

_MOST_AT_ONCE = 2


class EarlyBlocks:
    """The blocks of the open episodes of N environments.

    Args:
        codecs: By field.
        num_envs: N.
        rows_of: The rows of an environment's open episode, `name -> (n, *shape)`.
    """

    def __init__(
        self, codecs: Mapping[str, Codec], num_envs: int, rows_of: Callable[[int], Mapping[str, np.ndarray]]
    ) -> None:
        self.codecs = codecs
        # `truncated` may be set in a row that is there.
        self._codecs = {name: codec for name, codec in codecs.items() if name != "truncated"}
        self._num_envs, self._rows_of, self._turn = num_envs, rows_of, 0
        least = min((codec.rows_per_block for codec in self._codecs.values()), default=1)
        self._num_each_step = -(-num_envs // least) if self._codecs else 0
        self._blocks: list[dict[str, list[bytes]]] = [{} for _ in range(num_envs)]

    def advance(self) -> None:
        """A row is about to be added: compress what is due."""
        for _ in range(self._num_each_step):
            self._compress(self._turn)
            self._turn = (self._turn + 1) % self._num_envs

    def _compress(self, env: int) -> None:
        rows, blocks = self._rows_of(env), self._blocks[env]
        for name, codec in self._codecs.items():
            found, num, array = blocks.setdefault(name, []), codec.rows_per_block, rows[name]
            for _ in range(_MOST_AT_ONCE):
                first = len(found) * num
                if first + num > len(array):
                    break
                found.append(codec.encode(array[first : first + num]))

    def take(self, env: int, episode: Mapping[str, np.ndarray]) -> CompressedEpisode:
        """An episode that has ended, with its blocks; the next one begins."""
        blocks, self._blocks[env] = self._blocks[env], {}
        return CompressedEpisode(episode, blocks, self._codecs)
