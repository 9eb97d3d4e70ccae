"""A small dataset extended by a large one: a sink that stores every episode in both, and brings old ones back.

An addition, in the order in which things happen, so that an error leaves both as they were:

    1. draw     whole episodes that the loader of `other` has read beforehand       what fails here will not come
    2. other    store the new episode there                                         may fail: nothing has changed
    3. here     store it here, evicting the oldest                                  if it fails, it leaves `other` too
    4. bring    store here what was drawn, evicting the oldest, never the newest    what fails here has just not come

A ring can only evict its oldest episode. So where `other` cannot fail and this one can, 3 comes before 2.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.evictor import FIFOEvictor
from buffers.fields import Fields
from buffers.loading import SequenceLoader, SequenceStream
from buffers.table import Windows
from buffers.utils import integer

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["Extension"]

_SPARE_IDS = 64
# An item that crosses from a worker has a cost of its own, however little it holds.
_EPISODES_PER_ITEM = 8


class Extension:
    """What a dataset knows of the larger one behind it, `other`; the arguments are those of `EpisodeDataset.extend`."""

    def __init__(
        self,
        dataset: EpisodeDataset,
        other: EpisodeDataset,
        batch_size: int,
        num_workers: int | None,
        every: int,
        seed: int | None,
    ) -> None:
        _check_chain(dataset, other)
        self.other = other
        self._batch_size = integer("other_batch_size", batch_size, 1)
        self._every = integer("fetch_from_other_every", every, 1)
        num_workers = 0 if num_workers is None else integer("other_num_workers", num_workers, 0)
        self._loader = _episode_loader(other, self._batch_size, num_workers, seed)
        self._rng = np.random.default_rng(None if seed is None else integer("seed", seed, 0))
        self._drawn: Iterator[Any] | None = None
        #: Episodes that were drawn and have not come, oldest first: there was no room for them yet.
        self._waiting: deque[_Episode] = deque()
        #: Episode ids in `other` of episodes here -> their ids here. Some have left: `_is_here` looks.
        self._ids_here: dict[int, int] = {}
        self._num_additions = 0
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # A copy of the dataset, or one in a worker, is not extended.
        return _nothing, ()

    def begin(self, dataset: EpisodeDataset) -> None:
        """Agree on the fields; copy what is here to an empty `other`."""
        self.agree(dataset, dataset.fields)
        if len(self.other.table) or not len(dataset.table):
            return
        longest = int(dataset.table.lengths.max())
        if longest > self.other.episode_capacity:
            raise ValueError(
                f"An episode of {longest} steps is here, which does not fit the `capacity` of {self.other.capacity} "
                "steps of `other`. Raise that."
            )
        try:
            for episode_id in dataset.table.ids.tolist():
                episode = dataset.episode_of_id(episode_id)
                if episode is not None:
                    self._note(dataset, self.other.add_episode(episode), episode_id)
        except Exception:
            while len(self.other.table):
                self.other.evict(0)
            raise

    def agree(self, dataset: EpisodeDataset, mine: Fields | None) -> None:
        """Give the fields of one to the other; those of both, where there are some, must be the same."""
        theirs = self.other.fields
        if theirs is not None:
            dataset.settle_fields(theirs)
        elif mine is not None:
            self.other.settle_fields(mine)

    def add(self, dataset: EpisodeDataset, episode: dict[str, np.ndarray]) -> int:
        """Store an episode in both; its id here, -1 if it is too long to be here."""
        length = len(next(iter(episode.values())))
        if length > dataset.capacity:
            self._warn(
                "too long",
                f"An episode of {length} steps is longer than the `capacity` of {dataset.capacity} steps: it, and "
                f"others like it, are kept by the {type(self.other).__name__} only.",
            )
            self.other.add(episode)
            return -1
        dataset.check(episode)
        evicts = dataset.is_full or dataset.lacks_room(dataset.start_of_next(length), length)
        is_due = evicts and (self._num_additions + 1) % self._every == 0
        drawn = self._draw(dataset, dataset.capacity - length) if is_due else []
        newest = self._add_to_both(dataset, episode)
        self._num_additions += evicts
        self._bring_all(dataset, drawn, newest)
        return newest

    def _add_to_both(self, dataset: EpisodeDataset, episode: dict[str, np.ndarray]) -> int:
        other = self.other
        there = [(member, member.table.next_id) for member in _chain(other)]
        if _may_fail(dataset) and not _may_fail(other):
            episode_id = dataset.store(episode)
            other_id = other.add(episode)
        else:
            other_id = other.add(episode)
            try:
                episode_id = dataset.store(episode)
            except Exception:
                # A ring may keep it. So shall those behind.
                all(_evicted(member, added_id) for member, added_id in there)
                raise
        self._note(dataset, other_id, episode_id)
        return episode_id

    # What comes back.

    def _draw(self, dataset: EpisodeDataset, room: int) -> list[_Episode]:
        """Draw episodes; those of them that are not here and have room, all together, beside the newest."""
        chosen: dict[int, _Episode] = {}
        for _ in range(self._batch_size):
            if not len(self.other.table):
                break
            try:
                episode = self._waiting.popleft() if self._waiting else self._next()
            except Exception as error:
                self._warn("unread", f"Episodes of the {type(self.other).__name__} cannot be read: {error!r}")
                break
            if self._is_here(dataset, episode.id) or episode.id in chosen or not self._can_store(dataset, episode):
                continue
            if episode.length <= room:
                chosen[episode.id] = episode
                room -= episode.length
            elif chosen:  # Its turn is next time. Alone it would have come now, if it can at all beside the newest.
                self._waiting.appendleft(episode)
                break
        return list(chosen.values())

    def _next(self) -> _Episode:
        """The next episode that the loader has drawn."""
        if self._drawn is None:
            self._drawn = iter(self._loader)
        try:
            episode_ids, lengths, rows = next(self._drawn)
        except BaseException:
            self._drawn = None  # Workers may be gone: the next addition starts others.
            raise
        arrays = {name: as_array(name, tensor) for name, tensor in rows.items()}
        for b, (episode_id, length) in enumerate(zip(episode_ids, lengths, strict=True)):
            self._waiting.append(_Episode(episode_id, {name: array[b, :length] for name, array in arrays.items()}))
        return self._waiting.popleft()

    def _can_store(self, dataset: EpisodeDataset, episode: _Episode) -> bool:
        reason = dataset.refuse(episode.arrays)
        if reason is not None:
            self._warn("refused", f"Episodes of the {type(self.other).__name__} cannot all be brought back: {reason}")
        return reason is None

    def _bring_all(self, dataset: EpisodeDataset, drawn: list[_Episode], newest: int) -> None:
        """Store what was drawn. The addition is done, so what cannot be stored is no error of it."""
        try:
            for number, episode in enumerate(drawn):
                if not dataset.make_room(dataset.start_of_next(episode.length), episode.length, keep=newest):
                    self._waiting.extendleft(reversed(drawn[number:]))
                    return
                self._note(dataset, episode.id, dataset.store(episode.arrays))
        except Exception as error:
            self._warn("failed", f"Episodes of the {type(self.other).__name__} cannot be brought back: {error!r}")

    def refill(self, dataset: EpisodeDataset) -> int:
        """Fill what room there is with episodes of `other`, its newest among them, in the order of their ids."""
        self.agree(dataset, dataset.fields)
        lengths, ids = self.other.table.lengths, self.other.table.ids
        if not len(ids):
            return 0
        newest = len(ids) - 1
        positions = self._rng.permutation(len(ids))
        chosen, room = [], dataset.capacity - dataset.table.num_steps
        for position in [newest, *positions[positions != newest].tolist()]:
            length, other_id = int(lengths[position]), int(ids[position])
            if self._is_here(dataset, other_id) or length > dataset.capacity:
                continue
            if length > room:
                break
            chosen.append(other_id)
            room -= length
        return sum(self._refill_with(dataset, other_id) for other_id in sorted(chosen))

    def _refill_with(self, dataset: EpisodeDataset, other_id: int) -> bool:
        """Bring an episode if it is still there and has room."""
        found, fields = self.other.episode_of_id(other_id), dataset.fields
        if found is None or fields is None:
            return False
        episode = _Episode(other_id, dict(zip(fields.names, fields.arrays(found), strict=True)))
        start = dataset.start_of_next(episode.length)
        if dataset.lacks_room(start, episode.length) or not self._can_store(dataset, episode):
            return False
        self._note(dataset, other_id, dataset.store(episode.arrays))
        return True

    # Which episodes are here.

    def _is_here(self, dataset: EpisodeDataset, other_id: int) -> bool:
        episode_id = self._ids_here.get(other_id)
        return episode_id is not None and dataset.table.position(episode_id) is not None

    def _note(self, dataset: EpisodeDataset, other_id: int, episode_id: int) -> None:
        if other_id < 0:  # Too long for `other`, which has passed it on.
            return
        self._ids_here[other_id] = episode_id
        if len(self._ids_here) > 2 * len(dataset.table) + _SPARE_IDS:
            self._ids_here = {key: value for key, value in self._ids_here.items() if self._is_here(dataset, key)}

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=5)

    def end_workers(self) -> None:
        """End the workers of the loader."""
        self._drawn = None
        self._loader.end_workers()


class _Episode(NamedTuple):
    """An episode of `other`."""

    id: int
    arrays: dict[str, np.ndarray]

    @property
    def length(self) -> int:
        return len(next(iter(self.arrays.values())))


def _may_fail(dataset: EpisodeDataset) -> bool:
    """Whether an episode that fits may be refused all the same: by a full disk, or an evictor of the user's own."""
    return any(not d.evicts_before_writing or type(d.evictor) is not FIFOEvictor for d in _chain(dataset))


def _chain(dataset: EpisodeDataset) -> Iterator[EpisodeDataset]:
    """A dataset, and what is behind it."""
    behind: EpisodeDataset | None = dataset
    while behind is not None:
        yield behind
        behind = None if behind.extension is None else behind.extension.other


def _evicted(dataset: EpisodeDataset, episode_id: int) -> bool:
    """Remove an episode that was just added, if it was; whether it is gone."""
    # Whatever comes of it, the error that made it necessary is the one to be seen.
    with contextlib.suppress(Exception):
        position = dataset.table.position(episode_id)
        if position is not None:
            dataset.evict(position)
    return dataset.table.position(episode_id) is None


def _check_chain(dataset: EpisodeDataset, other: EpisodeDataset) -> None:
    if dataset.extension is not None:
        raise RuntimeError(f"It is extended already, by a {type(dataset.extension.other).__name__}.")
    if any(behind is dataset for behind in _chain(other)):
        raise ValueError("`other` is the dataset itself, or leads back to it.")
    if dataset.is_behind:
        raise RuntimeError(
            "It is behind another dataset already. Extend the largest first: `b.extend(c)`, `a.extend(b)`."
        )


def _episode_loader(other: EpisodeDataset, batch_size: int, num_workers: int, seed: int | None) -> SequenceLoader:
    """A loader of a few whole episodes at a time."""
    stream = SequenceStream(other, min(batch_size, _EPISODES_PER_ITEM), None, seed=seed)
    stream.assemble = _episodes_of
    if num_workers == 0:
        return SequenceLoader(stream)
    per_worker = math.ceil(batch_size / stream.num_windows / num_workers)
    loader = SequenceLoader(stream, num_workers=num_workers, prefetch_factor=per_worker, persistent_workers=True)
    stream.num_slots += per_worker  # An addition holds as many as it draws, while the next are being read.
    return loader


def _episodes_of(stream: SequenceStream, windows: Windows, out: dict[str, torch.Tensor]) -> Any:
    """Ids, lengths, and the rows `name -> (episodes, longest, *shape)`, with anything behind the end of each."""
    return windows.episode.tolist(), windows.num_rows.tolist(), out


def _nothing() -> None:
    return None
