"""Rows are what was written, whatever pages they lie in, and pages are made where there are rows and nowhere else."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers.dataset import RingBufferDataset
from buffers.sharing import SharedArrays
from buffers.sharing.huge_pages import HUGE_PAGE, HugePages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory is torch's own here")

ROOT = Path(__file__).parent.parent
CAPACITY, ROW_BYTES = 50_000, 150  # 3.6 huge pages.


def episode(number: int, length: int) -> dict[str, np.ndarray]:
    """Rows without a zero in them, which differ from those of other episodes."""
    rows = np.arange(length * ROW_BYTES) % 97 + number % 100 + 1
    return {"x": rows.astype(np.uint8).reshape(length, ROW_BYTES)}


class Kernel:
    """Notes what is asked, and refuses it from some time on."""

    def __init__(self, memory: Any, num_granted: int) -> None:
        self._memory, self._num_granted = memory, num_granted
        self.asked: list[tuple[int, int]] = []

    def madvise(self, option: int, begin: int, length: int) -> None:
        self.asked.append((begin, length))
        if len(self.asked) > self._num_granted:
            raise OSError(22, "Invalid argument")


@pytest.mark.parametrize(("num_granted", "copy_after"), [(None, None), (None, 3), (0, None), (1, 12)])
def test_rows_are_as_they_were_added_whatever_the_kernel_does(num_granted, copy_after) -> None:
    ring, lengths = RingBufferDataset(CAPACITY), [7_001, 30_000, 1, 12_345, 50_000, 3]
    for number in range(14):
        ring.add_episode(episode(number, lengths[number % len(lengths)]))
        pages = ring._rows.columns["x"]._pages
        if number == 0 and num_granted is not None:
            assert pages is not None
            kernel = pages._memory = Kernel(pages._memory, num_granted)  # type: ignore[assignment]
        for position in range(ring.num_episodes):
            live = int(ring.table.ids[position])
            expected = episode(live, lengths[live % len(lengths)])["x"]
            np.testing.assert_array_equal(ring.get_episode(position)["x"].numpy(), expected)
        if number == copy_after:
            # Its rows were not written in order, so pages are made where there are some already.
            ring = copy.deepcopy(ring)
    assert num_granted is None or len(kernel.asked) == num_granted + 1, "one that refuses is not asked again"


MAPS_AGAIN = """
import numpy as np
from buffers.dataset import RingBufferDataset
from tests import reading
ring = RingBufferDataset(50_000)
ring.add_episode({"x": np.ones((30_000, 150), np.uint8)})
rings = ring, *[reading.reader_of(ring) for _ in range(3)]
own, *others = [one._rows.columns["x"].tensor.data_ptr() for one in rings]
print([(other - own) % (1 << 21) for other in others])
"""


def test_huge_pages_are_huge_in_other_processes_too() -> None:
    # In a process of its own: where many pieces of memory came and went, there may be no place for it.
    found = subprocess.run([sys.executable, "-c", MAPS_AGAIN], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 in json.loads(found.stdout)


def test_pages_are_made_just_ahead_of_rows() -> None:
    before, after = ((3_000_001,), np.dtype(np.uint8)), ((5_000_000,), np.dtype(np.uint8))
    shared = SharedArrays({"before": before, "rows": ((CAPACITY, ROW_BYTES), np.dtype(np.uint8)), "after": after})
    pages, rows = shared.huge_pages("rows"), shared["rows"]
    assert pages is not None
    kernel = pages._memory = Kernel(pages._memory, 100)  # type: ignore[assignment]
    memory = np.frombuffer(shared._mapping, np.uint8)  # type: ignore[arg-type]
    begin = rows.ctypes.data - memory.ctypes.data
    assert (memory.ctypes.data - shared._offset) % HUGE_PAGE == 0
    row = 0
    rows[...] = 7
    for end in (1, 10_000, 10_001, 25_000, 40_000, CAPACITY):
        if end > row:
            row = pages.reach(end)
            assert end <= row <= CAPACITY
        # Beyond what was written, there is less than a page, unless it lies in one with others.
        assert all(start + length < begin + end * ROW_BYTES + HUGE_PAGE for start, length in kernel.asked)
    assert len(kernel.asked) in (2, 3) and row == CAPACITY
    for number, (start, length) in enumerate(kernel.asked):
        assert length == HUGE_PAGE and (start + shared._offset) % HUGE_PAGE == 0
        assert begin <= start and start + length <= begin + rows.nbytes
        assert start == kernel.asked[0][0] + number * HUGE_PAGE
    assert (rows == 7).all(), "what is there stays"


def test_arrays_of_nothing_and_those_of_others_have_none() -> None:
    shared = SharedArrays({"nothing": ((5, 0), np.dtype(np.uint8)), "small": ((5, 2), np.dtype(np.uint8))})
    assert shared.huge_pages("nothing") is None
    small = shared.huge_pages("small")
    assert small is not None and small.reach(1) == 5
    reader = SharedArrays.opened(shared.__getstate__())
    assert reader.huge_pages("small") is None


def bytes_of(ring: RingBufferDataset, name: str) -> int:
    """What the kernel says of the memory of a ring, in bytes: "Rss", "ShmemPmdMapped", ..."""
    address = int(ring._rows.columns["x"].array.ctypes.data)  # type: ignore[union-attr]
    for text in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(part, 16) for part in text.split(" ")[0].split("-"))
        if begin <= address < end:
            return int(re.search(rf"^{name}: +(\d+) kB", text, re.MULTILINE)[1]) * 1024  # type: ignore[index]
    raise AssertionError("The memory is not mapped.")


def test_huge_pages_hold_what_is_written_and_no_more() -> None:
    ring, done = RingBufferDataset(400_000), {"done": np.zeros(10_000, np.bool_)}  # Too small to have any.
    ring.add_episode({**episode(0, 10_000), **done})
    assert bytes_of(ring, "Rss") <= 10_000 * ROW_BYTES + 2 * HUGE_PAGE
    for number in range(1, 40):
        ring.add_episode({**episode(number, 10_000), **done})
    pages = ring._rows.columns["x"]._pages
    assert isinstance(pages, HugePages)
    if pages._end == 0:
        pytest.skip("this kernel has none for shared memory")
    assert bytes_of(ring, "ShmemPmdMapped") >= 400_000 * ROW_BYTES - 3 * HUGE_PAGE
