"""One pass: every window exactly once, in random order, shared out among workers and ranks.

A pass is over the episodes that live when an iteration begins, which are the same in all workers. Batch k has the
windows k * B to (k + 1) * B of an order that follows from the seed and the number of the pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from buffers.loading.randomness import BatchRandom
from buffers.table import EpisodeTable, Int64Array, Selection, Windows, joined

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["OnePass"]

_POSITION, _NUMBER, _NUM_WINDOWS, _BOUNDS = range(4)
_ALL = 2**63 - 1


class OnePass:
    """The batches of an iteration, which has `epochs` passes. Rank r of W makes batches r, r + W, r + 2W, ... of each.

    Attributes:
        state: int64 `(3 + datasets,)`, shared with workers: the position of the iteration's first batch, the number of
            its first pass, the windows of each pass, and for each dataset the id of the first episode that is too new.
    """

    def __init__(
        self,
        source: EpisodeSource,
        batch_size: int,
        length: int | None,
        selection: Selection,
        *,
        epochs: int,
        shuffle: bool,
        drop_last: bool,
        rank: int,
        world_size: int,
    ) -> None:
        self._source, self._batch_size, self._length, self._selection = source, batch_size, length, selection
        self._epochs, self._shuffle, self._drop_last = epochs, shuffle, drop_last
        self._rank, self._world_size = rank, world_size
        self.state = np.zeros(_BOUNDS + len(source.leaves), np.int64)
        self._tables: list[EpisodeTable] = []
        # The number of windows before each dataset's.
        self._firsts: list[int] = []
        self._order: tuple[int, npt.NDArray[np.integer]] | None = None

    def begin(self, position: int) -> None:
        """Before an iteration from `position` on: go on with the last one, or begin another."""
        if not self.state[_NUM_WINDOWS] or position >= self.end:
            self.state[_NUMBER] += self._epochs if self.state[_NUM_WINDOWS] else 0
            self.state[_POSITION], self.state[_BOUNDS:] = position, _ALL
            num_windows = self._look()
            if not num_windows:
                raise RuntimeError(self._tables[0].no_window_message(self._length))
            self.state[_NUM_WINDOWS] = num_windows
            self.state[_BOUNDS:] = [table.next_id for table in self._tables]
            return
        try:
            self.open()
        except RuntimeError:
            self.state[_NUM_WINDOWS] = 0  # The next iteration begins another.
            raise

    @property
    def end(self) -> int:
        """The position after the last batch of the iteration."""
        return int(self.state[_POSITION]) + self._epochs * self._num_batches(int(self.state[_NUM_WINDOWS]))

    def num_batches_from(self, position: int) -> int:
        """The batches of the iteration that goes on, or will begin, at `position`."""
        if self.state[_NUM_WINDOWS] and position < self.end:
            num_windows = int(self.state[_NUM_WINDOWS])
        else:
            num_windows = sum(map(self._count, self._snapshots([_ALL] * len(self._source.leaves))))
        return self._epochs * self._num_batches(num_windows)

    def _num_batches(self, num_windows: int) -> int:
        """Of this rank, in one pass."""
        if self._drop_last:
            return num_windows // (self._batch_size * self._world_size)
        return max(0, -(-(-(-num_windows // self._batch_size) - self._rank) // self._world_size))

    def open(self) -> None:
        """Find the episodes of the iteration, in each process; RuntimeError if some have left."""
        num_windows = self._look()
        if num_windows != self.state[_NUM_WINDOWS]:
            raise RuntimeError(
                f"Of {self.state[_NUM_WINDOWS]} windows of this pass, {num_windows} are left: episodes were evicted "
                "since it began. Raise the `capacity`, or add nothing during a pass."
            )

    def _look(self) -> int:
        """Make snapshots of the tables, and return the number of windows."""
        self._tables = self._snapshots(self.state[_BOUNDS:].tolist())
        ends = np.cumsum([self._count(table) for table in self._tables]).tolist()
        self._firsts = [0, *ends[:-1]]
        return int(ends[-1])

    def _snapshots(self, bounds: list[int]) -> list[EpisodeTable]:
        return [leaf.snapshot(self._selection, bound) for leaf, bound in zip(self._source.leaves, bounds, strict=True)]

    def _count(self, table: EpisodeTable) -> int:
        return len(table) if self._length is None else table.count_windows(self._length).num

    def windows(self, position: int, random: BatchRandom) -> Windows:
        """The windows of the batch at a position of the iteration."""
        first, number, num_windows = self.state[:_BOUNDS].tolist()
        epoch, k = divmod(position - first, self._num_batches(num_windows))
        begin = (k * self._world_size + self._rank) * self._batch_size
        r = np.arange(begin, min(begin + self._batch_size, num_windows))
        if self._shuffle:
            r = self._order_of(number + epoch, random)[r].astype(np.int64)
        if not self._source.has_members:
            return self._windows_of(self._tables[0], r)
        leaf = np.searchsorted(self._firsts, r, "right") - 1
        numbers = np.unique(leaf).tolist()
        return joined([self._windows_of(self._tables[n], r[leaf == n] - self._firsts[n]) for n in numbers], numbers)

    def _windows_of(self, table: EpisodeTable, r: Int64Array) -> Windows:
        if self._length is None:
            return table.windows(r, np.zeros(len(r), np.int64), int(table.lengths[r].max()))
        return table.windows_of(table.count_windows(self._length), r, self._length)

    def _order_of(self, number: int, random: BatchRandom) -> npt.NDArray[np.integer]:
        if self._order is None or self._order[0] != number:
            num_windows = int(self.state[_NUM_WINDOWS])
            order = np.arange(num_windows, dtype=np.uint32 if num_windows < 2**32 else np.int64)
            random.generator(number).shuffle(order)
            self._order = number, order
        return self._order[1]
