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
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import get_worker_info

from buffers.sampler.base import Geometry, Sampler
from buffers.sampler.uniform import UniformSampler
from buffers.sharing import SharedArrays, fence
from buffers.table import EpisodeTable, Int64Array, TableRow, Windows, joined

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["OnlineSampler"]

_NUM_NOTES = 4096  # Far more than batches that wait to be delivered.
_BATCH, _EPISODE, _WINDOW = range(3)
_PAUSE = 0.0001
_NUM_WORKERS = 64  # That count for themselves; the last word is the trainer's.


class OnlineSampler(Sampler):
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

    can_pack = False

    def __init__(self, then: Sampler | None = None) -> None:
        if then is not None and not isinstance(then, Sampler):
            raise TypeError(f"`then` must be a Sampler, found {type(then).__name__}.")
        self.then = UniformSampler() if then is None else then
        self._memory: SharedArrays | None = None
        self._geometry = Geometry()
        # Of the last batch that was made here: the first steps of the windows that were new.
        self._claimed: Int64Array = np.zeros(0, np.int64)

    @property
    def beta(self) -> float | None:  # type: ignore[override]
        """That of `then`."""
        return self.then.beta

    def bind(self, dataset: EpisodeDataset, geometry: Geometry) -> Sampler:
        """As `Sampler.bind`: from now on, episodes are new."""
        part = copy.copy(self)
        part.then, part._geometry = self.then.bind(dataset, geometry), geometry
        int64 = np.dtype(np.int64)
        # Notes of the last batches: number, and the episode id and window that the next batch begins with.
        layout = {"notes": ((_NUM_NOTES, 3), int64), "newest": ((1,), int64), "missed": ((_NUM_WORKERS,), int64)}
        part._memory = SharedArrays(layout)
        part._restart(dataset.table.next_id, 0)
        dataset.listen(part)
        return part

    def _restart(self, episode: int, window: int) -> None:
        assert self._memory is not None  # It is bound.
        self._memory["notes"][:, _BATCH] = -1
        self._memory["notes"][-1] = -1, episode, window
        self._memory["newest"][0] = -1

    @property
    def num_missed(self) -> int:  # type: ignore[override]
        """Windows that were never drawn, as their episode had left."""
        return self.then.num_missed + (0 if self._memory is None else int(self._memory["missed"].sum()))

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """`Sampler.draw`: what is new, then what `then` draws."""
        context = table.context
        if context.again is not None:
            # What is new is not drawn again: it has left.
            lost = int(np.isin(context.again.first_steps, self._claimed).sum())
            self._missed[_worker_number()] += lost
            return self.then.draw(table, num_windows, length, rng)
        position, step = self._claim(table, context.batch, context.first, num_windows)
        if not len(position):
            self._claimed = position
            return self.then.draw(table, num_windows, length, rng)
        most = int(table.lengths[position].max()) if length is None else length
        new = table.windows(position, step, most)
        self._claimed = new.first_steps
        if len(new) == num_windows:
            return new
        table.context = context._replace(needs_density=context.has_weights)
        others = self.then.draw(table, num_windows - len(new), length, rng)
        table.context = context
        windows = joined([new, others])
        windows.oldest_step = new.oldest_step
        return windows

    @property
    def _missed(self) -> Int64Array:
        assert self._memory is not None  # It is bound.
        return self._memory["missed"]

    def _claim(self, table: EpisodeTable, batch: int, first: int, most: int) -> tuple[Int64Array, Int64Array]:
        """Positions and first steps `(n,)` of the new windows of a batch, up to `most`."""
        assert self._memory is not None  # It is bound.
        notes = self._memory["notes"]
        episode, window = self._begin_of(batch, first)
        position = int(table.ids.searchsorted(episode))
        # Each of these episodes has a window, but for those that are too short.
        rows, at_once = table.rows[position : position + most + 1], most + 1
        while True:
            num, begin, end, stride = self._geometry.spaced(rows)
            skipped = min(window, int(num[0])) if len(rows) and rows[0, 2] == episode else 0
            ends = num.cumsum() - skipped
            if len(rows) < at_once or ends[-1] >= most:
                break
            at_once *= 4
            rows = table.rows[position : position + at_once]
        taken = min(most, int(ends[-1]) if len(ends) else 0)
        note = notes[batch % _NUM_NOTES]
        if note[_BATCH] == batch:  # It is made again.
            at = int(rows[:, 2].searchsorted(note[_EPISODE]))
            is_within = at < len(rows) and rows[at, 2] == note[_EPISODE]
            before = int(ends[at] - num[at]) if at < len(rows) else taken
            taken = min(max(before + int(note[_WINDOW]) * is_within, 0), taken)
        else:
            at = int(ends.searchsorted(taken, "right"))
            if at < len(rows):
                episode, window = int(rows[at, 2]), int(taken - ends[at] + num[at])
            elif len(rows):
                episode, window = int(rows[-1, 2]) + 1, 0
            self._note(batch, episode, window)
        numbers = np.arange(taken)
        chosen = ends.searchsorted(numbers, "right")
        j = numbers - (ends - num)[chosen]
        return position + chosen, np.where(j == num[chosen] - 1, end[chosen], begin[chosen] + j * stride)

    def _note(self, batch: int, episode: int, window: int) -> None:
        """Write down where the batch after this one begins."""
        assert self._memory is not None  # It is bound.
        note = self._memory["notes"][batch % _NUM_NOTES]
        note[_EPISODE], note[_WINDOW] = episode, window
        fence()
        note[_BATCH] = batch
        self._memory["newest"][0] = batch

    def give_up(self, batch: int, first: int) -> None:
        """As `Sampler.give_up`: the next batch begins where this one would have."""
        assert self._memory is not None  # It is bound.
        if self._memory["notes"][batch % _NUM_NOTES, _BATCH] != batch:
            self._note(batch, *self._begin_of(batch, first))
        self.then.give_up(batch, first)

    def _begin_of(self, batch: int, first: int) -> tuple[int, int]:
        assert self._memory is not None  # It is bound.
        while True:
            note = self._memory["notes"][(batch - 1) % _NUM_NOTES]
            if note[_BATCH] != batch - 1 and batch <= first:
                note = self._memory["notes"][self._memory["newest"][0] % _NUM_NOTES]
                break
            if note[_BATCH] == batch - 1:
                break
            time.sleep(_PAUSE)  # Another worker makes the batch before.
        fence()
        return int(note[_EPISODE]), int(note[_WINDOW])

    def episode_removed(self, row: TableRow) -> None:
        """As `Sampler.episode_removed`."""
        assert self._memory is not None  # Only the part that is bound is told.
        note = self._memory["notes"][self._memory["newest"][0] % _NUM_NOTES]
        if row[2] >= note[_EPISODE]:
            num = int(self._geometry.spaced(np.array([row]))[0][0])
            self._missed[-1] += num - (int(note[_WINDOW]) if row[2] == note[_EPISODE] else 0)

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """Where the batch of this number begins; by default, the one after the newest."""
        if self._memory is None:
            raise RuntimeError("An OnlineSampler has its state in a loader: ask `loader.state_dict()`.")
        if batch is None:
            batch = int(self._memory["newest"][0]) + 1
        episode, window = self._begin_of(batch, batch)
        return {"episode": episode, "window": window, "then": self.then.state_dict(batch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Sampler.load_state_dict`."""
        if sorted(state) != ["episode", "then", "window"]:
            raise ValueError(f"The state is not one of an OnlineSampler, found {sorted(state)}.")
        self.then.load_state_dict(state["then"])
        self._restart(int(state["episode"]), int(state["window"]))


def _worker_number() -> int:
    worker = get_worker_info()
    return 0 if worker is None else worker.id % (_NUM_WORKERS - 1)
