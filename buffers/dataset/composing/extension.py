"""A small dataset extended by a large one: every episode is stored in both, and old ones are brought back.

The order of an addition, by which an error leaves both as they were:

    1. other    store the new episode there                     on failure, nothing has changed
    2. here     store it here, evicting the oldest              on failure, evict it from `other`
    3. bring    store episodes that the loader of `other` has   on failure, warn: the addition is done
                drawn, evicting the oldest, never the newest

A ring can only evict its oldest episode. So if storing here may fail and storing in `other` cannot, 2 comes before 1.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset.episode_info import EpisodeInfo
from buffers.evictor import FIFOEvictor
from buffers.loading import SequenceLoader, SequenceStream
from buffers.table import Windows
from buffers.utils import integer

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["Extension"]

_SPARE_IDS = 64
_EPISODES_PER_ITEM = 8  # That a worker sends at a time.


class _Drawn(NamedTuple):
    """An episode of `other`; its info is None where the process that read it does not know it."""

    id: int
    cut: int
    rows: dict[str, np.ndarray]
    info: EpisodeInfo | None


class Extension:
    """The larger dataset `other` behind a dataset. Arguments are those of `EpisodeDataset.extend`."""

    def __init__(
        self,
        dataset: EpisodeDataset,
        other: EpisodeDataset,
        batch_size: int,
        num_workers: int | None,
        every: int,
        seed: int | None,
    ) -> None:
        if dataset.extension is not None:
            raise RuntimeError(f"It is extended already, by a {type(dataset.extension.other).__name__}.")
        if any(behind is dataset for behind in _chain(other)):
            raise ValueError("`other` is the dataset itself, or leads back to it.")
        if dataset.is_behind:
            raise RuntimeError(
                "It is behind another dataset already. Extend the largest first: `b.extend(c)`, `a.extend(b)`."
            )
        self.other: EpisodeDataset = other
        self._batch_size = integer("other_batch_size", batch_size, 1)
        self._every = integer("fetch_from_other_every", every, 1)
        num_workers = 0 if num_workers is None else integer("other_num_workers", num_workers, 0)
        self._loader = _episode_loader(other, self._batch_size, num_workers, seed)
        self._rng = np.random.default_rng(None if seed is None else integer("seed", seed, 0))
        self._drawn: Iterator[Any] | None = None
        # Episodes that were drawn and not stored yet.
        self._waiting: deque[_Drawn] = deque()
        # Episode id in `other` -> id here, also of some that have left: ask `_is_here`.
        self._ids_here: dict[int, int] = {}
        self._num_additions = 0
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of the dataset are not extended: this becomes None.
        return type(None), ()

    def describe(self, stores: Sequence[object]) -> dict[str, Any]:
        """What `EpisodeDataset.extend` needs, as JSON can hold it; see `EpisodeSource.describe`."""
        arguments = [self._batch_size, self._loader.num_workers, self._every]
        return {"other": self.other.describe(stores), "arguments": arguments}

    def state_dict(self) -> dict[str, Any]:
        """What it takes to bring the same episodes."""
        ids = np.array(list(self._ids_here.items()), np.int64).reshape(-1, 2)
        return {
            "loader": self._loader.state_dict(),
            "random": self._rng.bit_generator.state,
            "num_additions": self._num_additions,
            "ids_here": ids,
            "waiting": [drawn._asdict() for drawn in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another extension of the same two datasets stood."""
        self._loader.load_state_dict(state["loader"])
        self._rng.bit_generator.state = state["random"]
        self._num_additions, self._ids_here = state["num_additions"], dict(state["ids_here"].tolist())
        self._drawn, self._waiting = None, deque(_Drawn(**drawn) for drawn in state["waiting"])

    def begin(self, dataset: EpisodeDataset) -> None:
        """Agree on the fields, and copy what is here to an empty `other`."""
        theirs, mine = self.other.fields, dataset.fields
        if theirs is not None:
            dataset.settle_fields(theirs)
        elif mine is not None:
            self.other.settle_fields(mine)
        if not self.other.is_empty or dataset.is_empty:
            return
        longest = int(dataset.table.lengths.max())
        if longest > self.other.episode_capacity:
            raise ValueError(
                f"An episode of {longest} steps is here, which does not fit the `capacity` of {self.other.capacity} "
                "steps of `other`. Raise that."
            )
        try:
            for episode_id in dataset.table.ids.tolist():
                episode = dataset.arrays_of_id(episode_id)
                if episode is not None:
                    info, cut = dataset.episode_info(episode_id), dataset.table.row_of(episode_id)[3]
                    self.other.check_info(info)
                    self._note(dataset, self.other.add(episode, cut, info), episode_id)
        except Exception:
            while not self.other.is_empty:
                self.other.evict(0)
            raise

    def add(self, dataset: EpisodeDataset, episode: dict[str, np.ndarray], cut: int, info: EpisodeInfo | None) -> int:
        """Store an episode in both; returns its id here, -1 if it is too long for here."""
        length = _length(episode)
        with dataset.prepared(episode) as fits:
            if not fits:
                is_long = length > dataset.capacity
                limit = f"`capacity` of {dataset.capacity} steps" if is_long else "`capacity_bytes`"
                self._warn(
                    "too long" if is_long else "too large",
                    f"An episode of {length} steps is {'longer' if is_long else 'larger'} than the {limit}: it, and "
                    f"others like it, are kept by the {type(self.other).__name__} only.",
                )
                self.other.add(episode, cut, info)
                return -1
            dataset.check(episode)
            was_full = dataset.is_full
            newest = self._add_to_both(dataset, episode, cut, info)
        self._num_additions += was_full
        if was_full and self._num_additions % self._every == 0 and not self.other.is_empty:
            self._bring(dataset, newest, dataset.capacity - length)
        return newest

    def _add_to_both(
        self, dataset: EpisodeDataset, episode: dict[str, np.ndarray], cut: int, info: EpisodeInfo | None
    ) -> int:
        other = self.other
        if _may_fail(dataset) and not _may_fail(other):
            episode_id = dataset.store(episode, cut, info)
            self._note(dataset, other.add(episode, cut, info), episode_id)
        else:
            there = [(member, member.table.next_id) for member in _chain(other)]
            # Noted before it is stored, so that after Ctrl-C in between it is not brought again.
            self._note(dataset, other.add(episode, cut, info), dataset.table.next_id)
            try:
                episode_id = dataset.store(episode, cut, info)
            except Exception:
                # A ring cannot evict it. Then the datasets behind the ring keep it, too.
                with contextlib.suppress(Exception):
                    for member, added_id in there:
                        position = member.table.position(added_id)
                        if position is not None:
                            member.evict(position)
                raise
        return episode_id

    def _bring(self, dataset: EpisodeDataset, newest: int, room: int) -> None:
        """Store drawn episodes of up to `room` steps in all; errors become warnings, as the addition is done."""
        most, what = room, ""
        try:
            for _ in range(self._batch_size):
                what = "read"
                drawn = self._next()
                other_id, cut, episode, info = drawn
                what, length = "brought back", _length(episode)
                if info is None and (info := _info_or_none(self.other, other_id)) is None:
                    continue  # It has left `other`, and its info with it.
                if length > most or self._is_here(dataset, other_id) or not self._is_accepted(dataset, episode, info):
                    continue
                with dataset.prepared(episode) as fits:
                    if not fits:
                        continue
                    if length > room or not dataset.make_room(dataset.start_of_next(length), length, keep=newest):
                        # Next time: dropping it would favour short ones.
                        self._waiting.appendleft(drawn._replace(info=info))
                        return
                    self._note(dataset, other_id, dataset.table.next_id)
                    dataset.store(episode, cut, info)
                room -= length
        except Exception as error:
            self._warn(what, f"Episodes of the {type(self.other).__name__} cannot be {what}: {error!r}")

    def _next(self) -> _Drawn:
        """The next episode that the loader has drawn."""
        if not self._waiting:
            try:
                self._drawn = iter(self._loader) if self._drawn is None else self._drawn
                numbers, infos, rows = next(self._drawn)
            except BaseException:
                # Workers may be gone, or Ctrl-C has ended the iterator: the next addition starts anew.
                self._drawn = None
                raise
            arrays = {name: as_array(name, tensor) for name, tensor in rows.items()}
            for b, (episode_id, length, cut) in enumerate(numbers):
                episode = {name: array[b, :length] for name, array in arrays.items()}
                self._waiting.append(_Drawn(episode_id, cut, episode, infos[b]))
        return self._waiting.popleft()

    def refill(self, dataset: EpisodeDataset) -> int:
        """As `EpisodeDataset.refill`; stored in the order of their ids, so that the newest stays longest."""
        lengths, ids = self.other.table.lengths, self.other.table.ids
        chosen, room = [], dataset.capacity - dataset.table.num_steps
        newest = len(ids) - 1
        for position in sorted(self._rng.permutation(len(ids)).tolist(), key=lambda n: n != newest):
            length, other_id = int(lengths[position]), int(ids[position])
            if self._is_here(dataset, other_id) or length > dataset.capacity:
                continue
            if length > room:
                break
            chosen.append(other_id)
            room -= length
        num_before = dataset.num_episodes
        for other_id in sorted(chosen):
            cut, episode = self.other.table.row_of(other_id)[3], self.other.arrays_of_id(other_id)
            info = _info_or_none(self.other, other_id)
            if episode is None or info is None:
                continue
            with dataset.prepared(episode) as fits:
                if not fits or dataset.lacks_room(dataset.start_of_next(_length(episode)), _length(episode)):
                    continue
                if self._is_accepted(dataset, episode, info):
                    self._note(dataset, other_id, dataset.table.next_id)
                    dataset.store(episode, cut, info)
        return dataset.num_episodes - num_before

    def _is_accepted(self, dataset: EpisodeDataset, episode: dict[str, np.ndarray], info: EpisodeInfo) -> bool:
        try:
            dataset.check(episode)
            dataset.check_info(info)
        except ValueError as error:
            self._warn("all", f"Episodes of the {type(self.other).__name__} cannot all be brought back: {error}")
            return False
        return True

    def _is_here(self, dataset: EpisodeDataset, other_id: int) -> bool:
        episode_id = self._ids_here.get(other_id)
        return episode_id is not None and dataset.table.position(episode_id) is not None

    def _note(self, dataset: EpisodeDataset, other_id: int, episode_id: int) -> None:
        if len(self._ids_here) > 2 * len(dataset.table) + _SPARE_IDS:
            self._ids_here = {key: value for key, value in self._ids_here.items() if self._is_here(dataset, key)}
        # Last, as its episode is not here yet.
        self._ids_here[other_id] = episode_id

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=5)

    def end_workers(self) -> None:
        """End the workers of the loader."""
        self._drawn = None
        self._loader.end_workers()


def _info_or_none(dataset: EpisodeDataset, episode_id: int) -> EpisodeInfo | None:
    """None if the episode is gone, or if this process does not know it."""
    with contextlib.suppress(ValueError, RuntimeError):
        return dataset.episode_info(episode_id)
    return None


def _length(episode: dict[str, np.ndarray]) -> int:
    return len(next(iter(episode.values())))


def _may_fail(dataset: EpisodeDataset) -> bool:
    """Whether storing an episode that fits may fail: by a full disk, or an error in a user's evictor."""
    return any(not d.evicts_before_writing or type(d.evictor) is not FIFOEvictor for d in _chain(dataset))


def _chain(dataset: EpisodeDataset) -> Iterator[EpisodeDataset]:
    """A dataset and those behind it."""
    yield dataset
    if dataset.extension is not None:
        yield from _chain(dataset.extension.other)


def _episode_loader(other: EpisodeDataset, batch_size: int, num_workers: int, seed: int | None) -> SequenceLoader:
    stream = SequenceStream(other, min(batch_size, _EPISODES_PER_ITEM), None, seed=seed, rank=0, world_size=1)
    stream.assemble = _what_was_drawn
    if num_workers == 0:
        return SequenceLoader(stream)
    per_worker = math.ceil(batch_size / stream.num_windows / num_workers)
    loader = SequenceLoader(stream, num_workers=num_workers, prefetch_factor=per_worker, persistent_workers=True)
    stream.num_slots += per_worker  # An addition holds these while the next are read.
    return loader


def _what_was_drawn(stream: SequenceStream, windows: Windows, out: dict[str, torch.Tensor]) -> Any:
    cuts = np.zeros(len(windows), np.int64) if windows.cut is None else windows.cut
    # Here, as a worker has the files at hand.
    other = cast("EpisodeDataset", stream.source)
    infos = [_info_or_none(other, episode_id) for episode_id in windows.episode.tolist()]
    return np.stack([windows.episode, windows.num_rows, cuts], 1).tolist(), infos, out
