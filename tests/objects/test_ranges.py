from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from buffers.objects.ranges import copy_overlap, merged

SIZE = 60
RANGES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 15)), max_size=8)


def bytes_in(ranges: list[tuple[int, int]]) -> set[int]:
    return {byte for start, end in ranges for byte in range(start, end)}


@given(RANGES, st.sampled_from([1, 4]), st.integers(0, 10), st.sampled_from([4, 8, 64]))
def test_requests_bring_all_that_is_asked_for_and_little_else(
    asked: list[tuple[int, int]], block: int, gap: int, largest: int
) -> None:
    ranges = [(start, min(start + length, SIZE)) for start, length in asked]
    requests = list(merged(ranges, SIZE, block, gap, largest))
    wanted = bytes_in([(start // block * block, min(-(-end // block) * block, SIZE)) for start, end in ranges])
    brought = bytes_in(requests)
    # The model: every byte that is wanted, and every run of at most `gap` others between two of them.
    between = {
        byte
        for byte in range(SIZE)
        if any(byte - back in wanted for back in range(1, gap + 1))
        and any(
            byte - back in wanted and byte + ahead in wanted and back + ahead - 1 <= gap
            for back in range(1, gap + 1)
            for ahead in range(1, gap + 1)
        )
    }
    assert brought == wanted | between
    assert sum(end - start for start, end in requests) == len(brought)
    assert requests == sorted(requests)
    for start, end in requests:
        assert end - start <= largest and start % block == 0 and (end % block == 0 or end == SIZE)
    # As few as that takes: one more only where the largest is reached.
    for (_, end), (start, _) in zip(requests, requests[1:], strict=False):
        assert start - end > gap or start == end


@given(RANGES, st.integers(0, SIZE - 1), st.integers(1, 20))
def test_answers_are_copied_where_they_belong(asked: list[tuple[int, int]], offset: int, length: int) -> None:
    content = bytes(range(SIZE))
    memory = bytearray(b"\xff" * length)
    ranges = [(start, min(start + size, SIZE)) for start, size in asked]
    for start, end in ranges:
        copy_overlap(start, content[start:end], offset, memoryview(memory))
    brought = bytes_in(ranges)
    assert list(memory) == [byte if byte in brought else 255 for byte in range(offset, offset + length)]
