"""OnlineSampler: what is added, once.

Batch n begins where batch n - 1 ended, whoever draws it: each notes where it ended in memory that all share.

    episodes added        0 0 0 0 0 | 1 1 1          windows of T = 2: 0 at 0, 2 and 3; 1 at 0 and 1
    batch 0, of 2         #-# #-#                    ended at episode 0, window 2
    batch 1                     #-#   #-#            ended at episode 1, window 1
    batch 2                             #-#          one of its two is left for `then`

A batch that is made again, because it was never delivered, has the same windows again.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import get_worker_info

from buffers.sampler.base import Geometry, Sampler
from buffers.sampler.composite import CompositeSampler
from buffers.sampler.uniform import UniformSampler
from buffers.sharing import SharedArrays, fence, store_fence
from buffers.table import YES, DrawContext, EpisodeTable, Int64Array, TableRow, Windows, joined
from buffers.utils import integer

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["OnlineSampler"]

_NUM_NOTES = 4096  # Far more than batches that wait to be delivered.
_NONE, _NEVER = -1, -2  # Numbers of batches: of the one before the first, and of none.
_LARGEST = 2**62
_NUM_WORKERS = 64  # That count for themselves; the last word is the trainer's.


class _Notes:
    """Of the last batches, where the one after each begins: an episode id and the number of a window in the episode."""

    def __init__(self, memory: SharedArrays) -> None:
        self._memory = memory
        self._words, self._newest = memory["notes"].reshape(-1).data, memory["newest"].data
        #: Windows that were missed, as each process counts them.
        self.missed: Int64Array = memory["missed"]

    def __reduce__(self) -> tuple[type[_Notes], tuple[SharedArrays]]:
        return _Notes, (self._memory,)

    @classmethod
    def new(cls) -> _Notes:
        int64 = np.dtype(np.int64)
        layout = {"notes": ((_NUM_NOTES, 3), int64), "newest": ((1,), int64), "missed": ((_NUM_WORKERS,), int64)}
        return cls(SharedArrays(layout))

    def restart(self, episode: int, window: int) -> None:
        """Forget all; the next batch begins here."""
        self._memory["notes"][:, 0] = _NEVER
        self.write(_NONE, episode, window)

    @property
    def newest(self) -> int:
        """The newest batch that is noted."""
        return self._newest[0]

    def after(self, batch: int) -> tuple[int, int] | None:
        """Where the batch after this one begins; None if it is not noted."""
        word = 3 * (batch % _NUM_NOTES)
        if self._words[word] != batch:
            return None
        fence()
        return self._words[word + 1], self._words[word + 2]

    def write(self, batch: int, episode: int, window: int) -> None:
        """Note where the batch after this one begins."""
        word = 3 * (batch % _NUM_NOTES)
        self._words[word + 1], self._words[word + 2] = episode, window
        store_fence()
        self._words[word] = self._newest[0] = batch


class OnlineSampler(CompositeSampler):
    """What is added comes once, before `then` fills the rest of a batch.

    Of each episode that is added after the loader was made: the windows at 0, T, 2 T, ... The last is aligned to the
    episode's end, so up to T - 1 rows come twice; where `pad_after` allows it, it is padded instead. Whole episodes
    (T = None) come once each; with `offsets`, so does each anchor. Rows that a piece of a stream repeats are left out.

    An episode of fewer than T rows has no window unless it can be padded. Windows whose episode left before their turn
    are lost: `ReplayBuffer.stats()` counts them as `num_missed_windows`. Windows that come once weigh as uniform ones.

    Args:
        then: Draws the rest; uniformly by default.

    Raises:
        TypeError: `then` is no sampler.
    """

    counts_batches = True

    def __init__(self, then: Sampler | None = None) -> None:
        if then is not None and not isinstance(then, Sampler):
            raise TypeError(f"`then` must be a Sampler, found {type(then).__name__}.")
        self.then = UniformSampler() if then is None else then
        self._notes: _Notes | None = None
        self._geometry = Geometry()
        # Of the last batch that was made here: the first steps of the windows that were new.
        self._claimed: Int64Array = np.zeros(0, np.int64)

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """The one that draws the rest."""
        return (self.then,)

    def bind(self, dataset: EpisodeDataset, geometry: Geometry) -> Sampler:
        """As `Sampler.bind`: from now on, episodes are new."""
        part = copy.copy(self)
        part.then, part._geometry, part._notes = self.then.bind(dataset, geometry), geometry, _Notes.new()
        part._notes.restart(dataset.table.next_id, 0)
        return part

    @property
    def _bound(self) -> _Notes:
        if self._notes is None:
            raise RuntimeError("An OnlineSampler has its state in a loader: ask `loader.state_dict()`.")
        return self._notes

    @property
    def num_missed(self) -> int:  # type: ignore[override]
        """Windows that were never drawn, as their episode had left."""
        return (super().num_missed or 0) + (0 if self._notes is None else int(self._notes.missed.sum()))

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """`Sampler.draw`: what is new, then what `then` draws."""
        context = table.context
        if context.again is not None:
            # What is new is not drawn again: it has left.
            lost = int(np.isin(context.again.first_steps, self._claimed).sum())
            self._bound.missed[_worker_number()] += lost
            return self._by_then(table, num_windows, length, rng)
        position, step, after = self._claim(table, num_windows)
        windows = self._completed(table, position, step, num_windows, length, rng)
        # Last: if the rest cannot be drawn, the next batch begins where this one would have.
        if self._bound.after(context.batch) is None:
            self._bound.write(context.batch, *after)
        return windows

    def _completed(
        self,
        table: EpisodeTable,
        position: Int64Array,
        step: Int64Array,
        num_windows: int,
        length: int | None,
        rng: np.random.Generator,
    ) -> Windows:
        """New windows, and others up to `num_windows`."""
        self._claimed = np.zeros(0, np.int64)
        if not len(position):
            return self._by_then(table, num_windows, length, rng)
        new = table.windows(position, step, int(table.lengths[position].max()) if length is None else length)
        if len(new) < num_windows:
            others = self._by_then(table, num_windows - len(new), length, rng)
        else:
            self.then.skip(table.context)
        self._claimed = new.first_steps
        return new if len(new) == num_windows else joined([new, others])

    def _by_then(self, table: EpisodeTable, num: int, length: int | None, rng: np.random.Generator) -> Windows:
        """Windows beside new ones, whose density is 1."""
        context = table.context
        table.context = context._replace(needs_density=context.has_weights)
        windows = self.then.draw(table, num, length, rng)
        table.context = context
        return windows

    def _claim(self, table: EpisodeTable, most: int) -> tuple[Int64Array, Int64Array, tuple[int, int]]:
        """Positions and first steps `(n,)` of the new windows of a batch, up to `most`, and where the next begins."""
        episode, window = self._begin_of(table.context)
        position = int(table.ids.searchsorted(episode))
        rows = table.rows[position:]
        if not len(rows):
            return np.zeros(0, np.int64), np.zeros(0, np.int64), (episode, window)
        # Most episodes have a window.
        num_rows = most + 1
        while True:
            num, begin, last, stride = self._geometry.spaced(rows[:num_rows])
            ends = num.cumsum() - (min(window, int(num[0])) if rows[0, 2] == episode else 0)
            if num_rows >= len(rows) or ends[-1] >= most:
                break
            num_rows *= 4
        begins, ids = ends - num, rows[:num_rows, 2]
        taken, end = min(most, int(ends[-1])), self._bound.after(table.context.batch)
        if end is not None:
            # It is made again.
            at = int(ids.searchsorted(end[0]))
            most = int(ends[-1]) if at == len(ids) else int(begins[at]) + (end[1] if ids[at] == end[0] else 0)
            taken = min(max(most, 0), taken)
        at = int(ends.searchsorted(taken, "right"))
        after = (int(ids[at]), taken - int(begins[at])) if at < len(ids) else (int(ids[-1]) + 1, 0)
        numbers = np.arange(taken)
        at_each = ends.searchsorted(numbers, "right")
        j = numbers - begins[at_each]
        step = np.where(j == num[at_each] - 1, last[at_each], begin[at_each] + j * stride)
        return position + at_each, step, after

    def _begin_of(self, context: DrawContext) -> tuple[int, int]:
        """Where a batch begins; waits for the worker that makes the batch before."""
        while (found := self._bound.after(context.batch - 1)) is None:
            if context.batch <= context.first:
                return self._end_of_newest
            context.pause()
        return found

    @property
    def _end_of_newest(self) -> tuple[int, int]:
        found = self._bound.after(self._bound.newest)
        assert found is not None  # Only workers write while others read.
        return found

    def skip(self, context: DrawContext) -> None:
        """As `Sampler.skip`: the next batch begins where this one would have."""
        if self._bound.after(context.batch) is None:
            self._bound.write(context.batch, *self._begin_of(context))
        super().skip(context)

    def num_to_draw(self, table: EpisodeTable, length: int | None) -> int:
        """As `Sampler.num_to_draw`, by `then`."""
        return self.then.num_to_draw(table, length)

    def episode_removed(self, row: TableRow) -> None:
        """As `Sampler.episode_removed`."""
        super().episode_removed(row)
        split, begin = self._geometry.selection.split, self._bound.after(self._bound.newest)
        if begin is None or (split is not None and split.judge(np.array([row[2]]))[0] != YES):
            return
        if row[2] >= begin[0]:
            num = int(self._geometry.spaced(np.array([row]))[0][0])
            self._bound.missed[-1] += num - (begin[1] if row[2] == begin[0] else 0)

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """Where the batch of this number begins; by default, the one after the newest."""
        found = None if batch is None else self._bound.after(batch - 1)
        episode, window = found or self._end_of_newest
        return {"episode": episode, "window": window, "then": self.then.state_dict(batch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Sampler.load_state_dict`."""
        if sorted(state) != ["episode", "then", "window"]:
            raise ValueError(f"The state is not one of an OnlineSampler, found {sorted(state)}.")
        episode, window = integer("episode", state["episode"], 0), integer("window", state["window"], 0)
        if max(episode, window) > _LARGEST:
            raise ValueError(f"`episode` and `window` must be at most {_LARGEST}, found {episode} and {window}.")
        self.then.load_state_dict(state["then"])
        self._bound.restart(episode, window)


def _worker_number() -> int:
    worker = get_worker_info()
    return 0 if worker is None else worker.id % (_NUM_WORKERS - 1)
