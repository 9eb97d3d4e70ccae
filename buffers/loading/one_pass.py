"""One pass: every window exactly once, in random order, shared out among workers and ranks.

A pass is over the episodes that live when an iteration begins, which are the same in all workers. Batch k has the
windows k * B to (k + 1) * B of an order that follows from the seed and the number of the pass.
"""

from __future__ import annotations

import time
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from buffers.loading.randomness import BatchRandom
from buffers.table import EMPTY_PART, EpisodeTable, Selection, Windows, joined

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["LOST_DURING_A_PASS", "OnePass"]

_POSITION, _NUMBER, _NUM_WINDOWS, _CHECKSUM, _DONE, _EPOCHS, _BOUNDS = range(7)
_ALL = 2**63 - 1
_SECONDS_TO_WAIT, _PAUSE = 3.0, 0.05
LOST_DURING_A_PASS = "Raise the `capacity`, or add nothing during a pass; find damage by opening with verify='full'."


class OnePass:
    """The batches of an iteration, which has `epochs` passes. Rank r of W makes batches r, r + W, r + 2W, ... of each.

    Attributes:
        state: int64 `(6 + datasets,)`, shared with workers: the position of the iteration's first batch, the number of
            its first pass, the windows of each pass (0 before the first), a checksum of what follows from arguments,
            how many batches of the first pass other numbers of ranks have made, the number of passes, and for each
            dataset the id of the first episode that is too new.
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
        arguments = batch_size, length, selection, epochs, shuffle, drop_last
        self.state[_CHECKSUM] = zlib.crc32(repr(arguments).encode())
        self.state[_EPOCHS] = epochs
        # Whether the next iteration is the rest of one of other ranks, even if this rank has no batch of it.
        self._is_rest = False
        self.forget()

    def forget(self) -> None:
        """Find the episodes again before the next batch."""
        self._tables: list[EpisodeTable] = []
        # The number of windows before each dataset's.
        self._firsts: list[int] = []
        self._order: tuple[tuple[int, int, int], npt.NDArray[np.integer]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": [], "_order": None}

    def begin(self, position: int) -> None:
        """Before an iteration from `position` on: go on with the last one, or begin another."""
        self._source.check_drawable()
        if self._goes_on_at(position):
            self._is_rest = False
            try:
                return self._open()
            except RuntimeError:
                # The next iteration begins another.
                self.state[_NUMBER] += self.state[_EPOCHS]
                self.state[_NUM_WINDOWS] = 0
                raise
        num_windows = self._look([_ALL] * len(self._source.leaves), is_urgent=True)
        if not num_windows:
            longest = max(self._tables, key=lambda table: table.lengths.max(initial=0))
            is_part = self._selection.split is not None and not len(longest)
            raise RuntimeError(EMPTY_PART if is_part else longest.no_window_message(self._length))
        number = self.state[_NUMBER] + (self.state[_EPOCHS] if self.state[_NUM_WINDOWS] else 0)
        bounds = [table.next_id for table in self._tables]
        # At once, so that no error leaves half a change.
        self.state[:] = position, number, num_windows, self.state[_CHECKSUM], 0, self._epochs, *bounds

    def _goes_on_at(self, position: int) -> bool:
        return self.state[_NUM_WINDOWS] > 0 and (self._is_rest or position < self.end)

    @property
    def end(self) -> int:
        """The position after the last batch of the iteration."""
        num_windows, done, epochs = (int(self.state[word]) for word in (_NUM_WINDOWS, _DONE, _EPOCHS))
        rest = self._num_batches(num_windows, done) + (epochs - 1) * self._num_batches(num_windows) if epochs else 0
        return int(self.state[_POSITION]) + rest

    def num_batches_from(self, position: int) -> int:
        """The batches of the iteration that goes on, or will begin, at `position`."""
        if self._goes_on_at(position):
            return self.end - int(self.state[_POSITION])
        tables = self._snapshots([_ALL] * len(self._source.leaves))
        return self._epochs * self._num_batches(sum(table.num_to_draw(self._length) for table in tables))

    def check(self, state: list[int]) -> None:
        """ValueError if a state is not one of such a loader."""
        if np.shape(state) != self.state.shape or state[_CHECKSUM] != self.state[_CHECKSUM]:
            raise ValueError(
                "The state is of a loader of other windows, or in another order: give it the same arguments "
                "(`sequence_length`, padding, `offsets`, `split`, `stride`, `epochs`, `shuffle`, `drop_last`, "
                "`batch_size`) and as many datasets."
            )

    def load(self, state: list[int], position: int, rank: int, world_size: int) -> None:
        """Go on at a position of rank `rank` of `world_size`: at what all of these have not made."""
        self.state[:] = state
        self.forget()
        self._is_rest = False
        if world_size == self._world_size or not self.state[_NUM_WINDOWS]:
            return
        num_windows, done = int(self.state[_NUM_WINDOWS]), int(self.state[_DONE])
        taken, epoch, ranks = position - int(self.state[_POSITION]), 0, (rank, world_size)
        while epoch < self.state[_EPOCHS] and taken >= (num := self._num_batches(num_windows, done, ranks)):
            taken, epoch, done = taken - num, epoch + 1, 0
        self.state[_POSITION], self.state[_DONE] = position, done + taken * world_size
        self.state[_NUMBER] += epoch
        self.state[_EPOCHS] -= epoch
        self._is_rest = bool(self.state[_EPOCHS])

    def _num_batches(self, num_windows: int, done: int = 0, ranks: tuple[int, int] | None = None) -> int:
        """Of rank r of W, this one by default, in a pass of which all ranks have made `done` batches."""
        rank, world_size = ranks or (self._rank, self._world_size)
        if self._drop_last:
            return max(0, num_windows // self._batch_size - done) // world_size
        return max(0, -(-(-(-num_windows // self._batch_size) - done - rank) // world_size))

    def _open(self, seconds: float = 0.0) -> None:
        """Find the episodes of the iteration; RuntimeError if some are not there, and do not come for so long."""
        expected, bounds, deadline = self.state[_NUM_WINDOWS], self.state[_BOUNDS:].tolist(), time.monotonic() + seconds
        num_windows = self._look(bounds)
        while num_windows != expected:
            is_late = any(leaf.table.next_id < bound for leaf, bound in zip(self._source.leaves, bounds, strict=True))
            if time.monotonic() >= deadline or not is_late:
                self.forget()
                raise RuntimeError(
                    f"Of {expected} windows of this pass, {num_windows} are left: episodes were evicted since it "
                    f"began, or their files are damaged. {LOST_DURING_A_PASS}"
                )
            time.sleep(_PAUSE)
            num_windows = self._look(bounds, is_urgent=True)

    def _look(self, bounds: list[int], is_urgent: bool = False) -> int:
        """Make snapshots of the tables, and return the number of windows."""
        self._tables = self._snapshots(bounds, is_urgent)
        ends = np.cumsum([table.num_to_draw(self._length) for table in self._tables]).tolist()
        self._firsts = [0, *ends[:-1]]
        return int(ends[-1])

    def _snapshots(self, bounds: list[int], is_urgent: bool = False) -> list[EpisodeTable]:
        leaves = zip(self._source.leaves, bounds, strict=True)
        return [leaf.snapshot(self._selection, bound, is_urgent) for leaf, bound in leaves]

    def windows(self, position: int, random: BatchRandom) -> Windows:
        """The windows of the batch at a position of the iteration."""
        if not self._tables:
            # Another process may see later what the trainer has seen.
            self._open(_SECONDS_TO_WAIT)
        first, number, num_windows, _, done, _ = self.state[:_BOUNDS].tolist()
        epoch, k = 0, position - first
        num_in_first = self._num_batches(num_windows, done)
        if k >= num_in_first:
            epoch, k = divmod(k - num_in_first, self._num_batches(num_windows))
            epoch, done = epoch + 1, 0
        begin = (done + k * self._world_size + self._rank) * self._batch_size
        r = np.arange(begin, min(begin + self._batch_size, num_windows))
        if self._shuffle:
            r = self._order_of(number + epoch, random)[r].astype(np.int64)
        if not self._source.has_members:
            return self._tables[0].windows_at(r, self._length)
        leaf = np.searchsorted(self._firsts, r, "right") - 1
        numbers = np.unique(leaf).tolist()
        parts = [self._tables[n].windows_at(r[leaf == n] - self._firsts[n], self._length) for n in numbers]
        return joined(parts, numbers)

    def _order_of(self, number: int, random: BatchRandom) -> npt.NDArray[np.integer]:
        key = random.seed, number, int(self.state[_NUM_WINDOWS])
        if self._order is None or self._order[0] != key:
            order = np.arange(key[2], dtype=np.uint32 if key[2] < 2**32 else np.int64)
            random.generator(number).shuffle(order)
            self._order = key, order
        return self._order[1]
