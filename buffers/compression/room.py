"""BlockRoom: where the blocks of a ring's episodes lie, in memory that processes share.

The blocks of an episode lie together, in a region; regions follow each other around a circle of addresses, of which
only those take memory that hold live episodes:

    place        by the ring offset of an episode's first row: where its region begins, in units of 64 bytes
    region       | where the index of each field begins | index | blocks | index | blocks |
    index        where each block of the field ends, counted from the first one's begin

A reader copies blocks, then looks whether their episode was retired meanwhile, and only then decompresses: what is
being overwritten is never decompressed. The writer retires an episode before it gives back, or overwrites, its region.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from buffers.compression.blocks import decoded_rows, num_blocks, whole_blocks
from buffers.compression.codecs import Codec
from buffers.compression.decoding import Fetched, Run, decode_runs, runs_of
from buffers.sharing import SharedArrays
from buffers.table import Windows

__all__ = ["BlockRoom", "EpisodeTooLargeError", "MOST_BYTES", "blocks_in", "rows_in"]

_UNIT, _WORD = 64, 8
#: Of live regions. There are twice as many addresses, which `place` has in 32 bits.
MOST_BYTES = _UNIT << 31
_PLACE, _BYTES, _COUNTS = "place", "bytes", "counts"


class EpisodeTooLargeError(ValueError):
    """An episode that cannot be stored, whatever leaves."""


class BlockRoom:
    """The compressed rows of a ring. One process writes; any number read.

    Args:
        codecs: By field.
        capacity: Steps of the ring.
        capacity_bytes: The most bytes of live regions, up to `MOST_BYTES`; None for as many as `capacity` steps can
            take.
    """

    def __init__(self, codecs: Mapping[str, Codec], capacity: int, capacity_bytes: int | None = None) -> None:
        self.codecs, self._capacity = dict(codecs), capacity
        row_bytes = sum(codec.kind.nbytes for codec in codecs.values())
        # The shortest episodes take the most: an index each, and what rounding adds.
        most = capacity * (row_bytes + len(codecs) * 2 * _WORD + _UNIT)
        self.capacity_bytes = min(most, MOST_BYTES) if capacity_bytes is None else capacity_bytes
        # A region never wraps, so up to a region is left over at the end.
        self._size = 2 * (-(-self.capacity_bytes // mmap.PAGESIZE) + 1) * mmap.PAGESIZE
        layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            _PLACE: ((capacity,), np.dtype(np.uint32)),
            _BYTES: ((self._size,), np.dtype(np.uint8)),
            _COUNTS: ((len(codecs),), np.dtype(np.int64)),
        }
        self.memory = SharedArrays(layout, sparse=True)
        # The live regions, oldest first: the step id of the episode, where it begins and ends, on an endless line; and
        # the bytes of all regions up to it, so that Ctrl-C never leaves a sum that is wrong.
        self._regions: deque[tuple[int, int, int, int]] = deque()
        self._next = self._released = 0
        self._open()

    def _open(self) -> None:
        self._place, self._bytes, self._counts = (self.memory[name] for name in (_PLACE, _BYTES, _COUNTS))
        self._words = self._bytes.view(np.uint64)
        self._view = self._bytes.data

    def __getstate__(self) -> dict[str, object]:
        views = ("_place", "_bytes", "_counts", "_words", "_view")
        kept = {name: value for name, value in self.__dict__.items() if name not in views}
        return {**kept, "_regions": deque()}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def field_bytes(self) -> dict[str, int]:
        """Of live regions, by field."""
        return dict(zip(self.codecs, self._counts.tolist(), strict=True))

    # The writer's side.

    def region(self, episode: Mapping[str, np.ndarray]) -> np.ndarray:
        """The blocks of an episode `name -> (L, *shape)`, as they will lie: uint8 `(num_bytes,)`."""
        indices, blocks = [], []
        for name, codec in self.codecs.items():
            found = whole_blocks(codec, name, episode)
            blocks.append(found)
            indices.append(np.cumsum([len(block) for block in found], dtype=np.uint64))
        begins, at = [], _WORD * len(blocks)
        for index in indices:
            begins.append(at)
            at += index.nbytes + _aligned(int(index[-1]), _WORD)
        region = np.zeros(_aligned(at, _UNIT), np.uint8)
        region[: _WORD * len(begins)].view(np.uint64)[:] = begins
        for begin, index, found in zip(begins, indices, blocks, strict=True):
            first = begin + index.nbytes
            region[begin:first] = index.view(np.uint8)
            region[first : first + int(index[-1])] = np.frombuffer(b"".join(found), np.uint8)
        return region

    @property
    def num_bytes(self) -> int:
        """Of live regions."""
        return self._bytes_from(0)

    def _bytes_from(self, number: int) -> int:
        if number == len(self._regions):
            return 0
        _, begin, end, written = self._regions[number]
        return self._regions[-1][3] - written + end - begin

    def lacks_beside(self, start: int, num_bytes: int) -> bool:
        """Whether such a region does not fit even if all episodes before the one with step id `start` leave."""
        number = len(self._regions)
        while number and self._regions[number - 1][0] >= start:
            number -= 1
        return self._bytes_from(number) + num_bytes > self.capacity_bytes

    def lacks(self, num_bytes: int) -> bool:
        """Whether an episode must leave before a region of so many bytes fits."""
        return self.num_bytes + num_bytes > self.capacity_bytes

    def write(self, start: int, region: np.ndarray) -> None:
        """Keep the region of the episode that begins with step id `start`, for which there is room."""
        # Behind the last region: what was forgotten leaves no gap, of which many would reach around to live regions.
        _, _, begin, written = self._regions[-1] if self._regions else (0, 0, self._next, 0)
        size = len(region)
        left = -begin % self._size
        if left < size and left:
            begin += left
        at = begin % self._size
        self._bytes[at : at + size] = region
        self._place[start % self._capacity] = at // _UNIT
        self._count(region, 1)
        self._next = begin + size
        self._regions.append((start, begin, begin + size, written + size))

    def erase(self, oldest_step: int) -> None:
        """Give back the regions of episodes that begin before a step id, which are retired."""
        while self._regions and self._regions[0][0] < oldest_step:
            self._uncount(self._regions.popleft())
        self._release(self._regions[0][1] if self._regions else self._next)

    def forget(self, next_start: int) -> None:
        """Forget regions of episodes that were not stored in the end: the next begins with this step id, or later."""
        while self._regions and self._regions[-1][0] >= next_start:
            self._uncount(self._regions.pop())
        counted = self.num_bytes - _WORD * len(self.codecs) * len(self._regions)
        if int(self._counts.sum()) != counted:
            # Ctrl-C came between a region and its count.
            self._counts[:] = 0
            for _, begin, end, _ in self._regions:
                self._count(self._bytes[begin % self._size :][: end - begin], 1)

    def _uncount(self, region: tuple[int, int, int, int]) -> None:
        at = region[1] % self._size
        self._count(self._bytes[at : at + region[2] - region[1]], -1)

    def _count(self, region: np.ndarray, sign: int) -> None:
        begins = region[: _WORD * len(self.codecs)].view(np.uint64).tolist()
        self._counts += sign * np.diff([*begins, len(region)])

    def _release(self, end: int) -> None:
        """Give whole pages up to an address of the endless line back to the system."""
        end -= end % mmap.PAGESIZE
        while self._released < end:
            at = self._released % self._size
            stop = min(at + end - self._released, self._size)
            self.memory.release(_BYTES, at, stop)
            self._released += stop - at

    def stored(self, start: int, num_bytes: int) -> np.ndarray:
        """The memory of regions that follow each other, from that of the episode with step id `start` on."""
        at = int(self._place[start % self._capacity]) * _UNIT
        return self._bytes[at : at + num_bytes]

    def sizes(self) -> dict[int, int]:
        """The bytes of each live region, by the step id of its episode."""
        return {start: end - begin for start, begin, end, _ in self._regions}

    def blocks(self, start: int, length: int) -> dict[str, list[bytes]]:
        """Copies of all blocks of an episode, by field."""
        return blocks_in(self.stored(start, self._size), self.codecs, length)

    # A reader's side.

    def read(
        self, windows: Windows, out: Mapping[str, torch.Tensor], oldest_step: Callable[[], int], names: Sequence[str]
    ) -> None:
        """Fill `name -> (B, T, *shape)` for those of the fields that are compressed.

        Rows of episodes that are retired meanwhile, those before `oldest_step`, may be left as they are. RuntimeError
        if blocks are damaged otherwise.
        """
        runs: dict[int, list[Run]] = {}
        for name in names:
            codec = self.codecs[name]
            size = codec.rows_per_block
            if size not in runs:
                runs[size] = runs_of(windows, size)
            number = list(self.codecs).index(name)
            copied = ((run, self._copied(run, number, codec)) for run in runs[size])
            # Whatever was copied of an episode that is not retired now is whole.
            whole = (pair for pair in copied if pair[0].start >= oldest_step())
            damaged = decode_runs(codec, whole, out[name])
            if damaged:
                run, error = damaged[0]
                raise RuntimeError(f"Field `{name}` of episode {run.episode} {error}: its memory was overwritten.")

    def _copied(self, run: Run, number: int, codec: Codec) -> Fetched:
        region = int(self._place[run.start % self._capacity]) * _UNIT
        # What is being overwritten may say anything: slices stay within the memory, and a block within its rows.
        index = (region + int(self._words[region // _WORD + number])) // _WORD
        first = _WORD * (index + num_blocks(run.length, codec))
        ends = self._words[index + max(0, run.first - 1) : index + run.end].tolist()
        begin = ends.pop(0) if run.first and ends else 0
        most = (run.end - run.first) * codec.rows_per_block * codec.kind.nbytes
        end = ends[-1] if ends and begin <= ends[-1] <= begin + most else begin
        data = self._view[first + begin : first + end].tobytes()
        return Fetched([end - begin for end in ends], data)


def blocks_in(region: np.ndarray, codecs: Mapping[str, Codec], length: int) -> dict[str, list[bytes]]:
    """All blocks of an episode of so many rows, by field, from memory that begins with its region."""
    found = {}
    for number, (name, codec) in enumerate(codecs.items()):
        begin = int(region[number * _WORD : (number + 1) * _WORD].view(np.uint64)[0])
        first = begin + _WORD * num_blocks(length, codec)
        ends = [0, *region[begin:first].view(np.uint64).tolist()]
        found[name] = [region[first + a : first + b].tobytes() for a, b in pairwise(ends)]
    return found


def rows_in(region: np.ndarray, codecs: Mapping[str, Codec], length: int) -> dict[str, np.ndarray]:
    """The rows of an episode, `name -> (length, *shape)`, from its region; DamagedBlockError if it is not one."""
    found = {}
    for name, blocks in blocks_in(region, codecs, length).items():
        codec = codecs[name]
        found[name] = decoded_rows(codec, blocks, length)
    return found


def _aligned(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit
