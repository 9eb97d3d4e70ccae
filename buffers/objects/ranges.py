"""Ranges of bytes: which requests bring the parts that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["BLOCK", "GAP", "LARGEST_REQUEST", "copy_overlap", "merged"]

#: What a cache keeps is made of blocks of so many bytes. Each field of a window costs up to two blocks that hold other
#: rows, so larger ones read too much.
BLOCK = 2**14
#: Ranges with at most so many bytes between them are one request: bringing these takes less time than another request.
GAP = 2**16
#: A longer range is several requests, so that each has an answer in time.
LARGEST_REQUEST = 2**23


def merged(
    ranges: Iterable[tuple[int, int]], size: int, block: int = 1, gap: int = GAP, largest: int = LARGEST_REQUEST
) -> Iterator[tuple[int, int]]:
    """The requests (start, end) that bring ranges [start, end) of an object: ascending, without overlaps.

        ranges      ###   ##         #     in blocks of 3
        requests    #########     ###      merged where the gap is small, whole blocks

    Args:
        ranges: In any order; they may overlap. All lie within the object.
        size: Of the object, where the last block ends.
        block: Starts are multiples of it, and so are ends, except the object's.
        gap: The most bytes between two ranges of one request.
        largest: The most bytes of a request, a multiple of `block`.
    """
    first = last = -1
    for start, end in sorted((start // block * block, min(-(-end // block) * block, size)) for start, end in ranges):
        if first < 0:
            first, last = start, end
        elif start - last <= gap:
            last = max(last, end)
        else:
            yield from _split(first, last, largest)
            first, last = start, end
    if first >= 0:
        yield from _split(first, last, largest)


def _split(start: int, end: int, largest: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, largest):
        yield first, min(first + largest, end)


def copy_overlap(start: int, data: bytes, offset: int, memory: memoryview) -> None:
    """Copy what an answer, from `start` on, has of the bytes from `offset` on into their memory."""
    first, last = max(start, offset), min(start + len(data), offset + len(memory))
    if first < last:
        memory[first - offset : last - offset] = memoryview(data)[first - start : last - start]
