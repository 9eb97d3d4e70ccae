"""A small dataset extended by a large one: every episode goes to both, and old ones come back.

An addition, in the order in which things happen, so that an error leaves both as they were:

    1. draw     whole episodes that the loader of `other` has read beforehand       what fails here will not come
    2. other    store the new episode there                                         may fail: nothing has changed
    3. here     store it here, evicting the oldest                                  if it fails, it leaves `other` too
    4. bring    store here what was drawn, evicting the oldest, never the newest    what fails here has just not come

A ring gives back only its oldest episode. So where `other` cannot fail and this one can, 3 comes before 2.
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

from buffers.dataset.fields import Fields, as_array
from buffers.dataset.index import Windows
from buffers.evictor.fifo import FIFOEvictor
from buffers.utils import integer

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset
    from buffers.loader import SequenceLoader
    from buffers.stream import SequenceStream

__all__ = ["Extension"]

_SPARE_IDS = 64
#: A dataset, and the id that the next episode has there.
_Place = tuple["EpisodeDataset", int]
# What crosses from a worker costs some 100 us, however little it is.
_EPISODES_PER_ITEM = 8


class Extension:
    """What a dataset knows of the larger one behind it, `other`.

    Args:
        dataset: The one that is extended.
        other: The larger one.
        batch_size: Episodes that one addition draws.
        num_workers: Processes that read them beforehand.
        every: An addition in so many draws.
        seed: Of the draws.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range, or fields that differ.
        RuntimeError: One of the two cannot be added to, or is extended in a way that does not fit.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        other: EpisodeDataset,
        batch_size: int,
        num_workers: int | None,
        every: int,
        seed: int | None,
    ) -> None:
        _check_pair(dataset, other)
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
        self.agree(dataset)
        if not self.other.is_empty or dataset.is_empty:
            return
        longest = int(dataset.index.lengths.max())
        if longest > self.other.episode_capacity:
            raise ValueError(
                f"An episode of {longest} steps is here, which does not fit the `capacity` of {self.other.capacity} "
                "steps of `other`. Raise that."
            )
        try:
            for position, episode_id in enumerate(dataset.index.ids.tolist()):
                episode = dataset._whole(position)
                if episode is not None:
                    self._note(dataset, self.other.add_episode(episode), episode_id)
        except BaseException:
            while not self.other.is_empty:
                self.other._evict(0)
            raise

    def agree(self, dataset: EpisodeDataset) -> None:
        """Give the fields of one to the other; those of both, where there are some, must be the same."""
        mine, theirs = dataset._fields, self.other.fields
        if mine is None and theirs is not None:
            dataset.settle_fields(theirs)
        elif mine is not None and theirs is None:
            self.other.settle_fields(mine)
        elif mine is not None and theirs is not None:
            conflict = mine.conflict_with(theirs)
            if conflict is not None:
                raise ValueError(f"The fields differ from those of `other`: {conflict}. Episodes must fit both.")

    def add(self, dataset: EpisodeDataset, fields: Fields, arrays: dict[str, np.ndarray]) -> int:
        """Store an episode in both; its id here, -1 if it is too long to be here."""
        length = len(arrays[fields.names[0]])
        if length > dataset.capacity:
            if dataset.fields is None:
                dataset.settle_fields(fields)
            self._warn(
                "too long",
                f"An episode of {length} steps is longer than the `capacity` of {dataset.capacity} steps: it, and "
                f"others like it, are kept by the {type(self.other).__name__} only.",
            )
            self.other._take(fields, arrays)
            return -1
        dataset._check(arrays)
        evicts = dataset._has_evicted or dataset.num_timesteps + length > dataset.capacity
        is_due = evicts and (self._num_additions + 1) % self._every == 0
        drawn = self._draw(dataset, dataset.capacity - length) if is_due else []
        try:
            newest = self._add_to_both(dataset, fields, arrays)
        except BaseException:
            self._waiting.extendleft(reversed(drawn))
            raise
        self._num_additions += evicts
        self._bring_all(dataset, fields, drawn, newest)
        return newest

    def _add_to_both(self, dataset: EpisodeDataset, fields: Fields, arrays: dict[str, np.ndarray]) -> int:
        other = self.other
        here = dataset, dataset.index.next_id
        there = [(member, member.index.next_id) for member in _chain(other)]
        try:
            if _may_fail(dataset) and not _may_fail(other):
                other.check(arrays)
                episode_id = dataset._add(fields, arrays)
                other_id = other._take(fields, arrays)
            else:
                other_id = other._take(fields, arrays)
                episode_id = dataset._add(fields, arrays)
            self._note(dataset, other_id, episode_id)
        except Exception:
            self._take_back(here, there)
            raise
        except BaseException:
            self._complete(fields, arrays, here, there)
            raise
        return episode_id

    def _take_back(self, here: _Place, there: list[_Place]) -> None:
        """After an error, remove the episode wherever it is already."""
        for dataset, episode_id in (here, *there):
            _evict(dataset, episode_id)
            if dataset is not here[0] and _has(dataset, episode_id):
                return  # A ring keeps it. So shall those behind.

    def _complete(self, fields: Fields, arrays: dict[str, np.ndarray], here: _Place, there: list[_Place]) -> None:
        """After Ctrl-C, which may come at any moment, see to it that both have the episode or neither."""
        dataset, episode_id = here
        if not _has(*there[-1]):
            _evict(*here)
        elif not _has(*here):
            with contextlib.suppress(Exception):
                dataset._add(fields, arrays)
        if _has(*here) and _has(*there[0]):
            self._note(dataset, there[0][1], episode_id)

    @property
    def last(self) -> EpisodeDataset:
        """The one behind all others, which has every episode that was added."""
        *_, last = _chain(self.other)
        return last

    # What comes back.

    def _draw(self, dataset: EpisodeDataset, room: int) -> list[_Episode]:
        """Draw episodes; those of them that are not here and have room, all together, beside the newest."""
        chosen: dict[int, _Episode] = {}
        for _ in range(self._batch_size):
            if self.other.is_empty:
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
        try:
            dataset._check(episode.arrays)
        except ValueError as error:
            self._warn("refused", f"Episodes of the {type(self.other).__name__} cannot all be brought back: {error}")
            return False
        return True

    def _bring_all(self, dataset: EpisodeDataset, fields: Fields, drawn: list[_Episode], newest: int) -> None:
        """Store what was drawn. The addition is done, so what cannot be stored is no error of it."""
        for number, episode in enumerate(drawn):
            try:
                self._bring(dataset, fields, episode, newest)
            except Exception as error:
                self._waiting.extendleft(reversed(drawn[number:]))
                self._warn("failed", f"Episodes of the {type(self.other).__name__} cannot be brought back: {error!r}")
                return

    def _bring(self, dataset: EpisodeDataset, fields: Fields, episode: _Episode, newest: int) -> None:
        """Store an episode that was drawn, evicting others than the newest."""
        dataset._announce()
        while dataset.num_timesteps + episode.length > dataset.capacity:
            position = dataset._choose_who_leaves()
            if int(dataset.index.ids[position]) == newest:  # Never the choice of a first-in-first-out evictor.
                position = 1 if position == 0 else 0
            dataset._evict(position)
        dataset._has_evicted = True
        self._add_from_other(dataset, fields, episode)

    def _add_from_other(self, dataset: EpisodeDataset, fields: Fields, episode: _Episode) -> None:
        episode_id = dataset.index.next_id
        try:
            dataset._add(fields, episode.arrays)
            self._note(dataset, episode.id, episode_id)
        except BaseException:
            if _has(dataset, episode_id):  # Ctrl-C came just then: it must not come a second time.
                self._note(dataset, episode.id, episode_id)
            raise

    def refill(self, dataset: EpisodeDataset) -> int:
        """Fill what room there is with episodes of `other` at random; its newest comes last, so that it stays."""
        self.agree(dataset)
        fields, others = dataset.fields, self.other.index
        newest = self.other.num_episodes - 1
        positions = self._rng.permutation(self.other.num_episodes)
        chosen, room = [], dataset.capacity - dataset.num_timesteps
        for position in [newest, *positions[positions != newest].tolist()]:
            _, length, other_id = others.episode(position)
            if self._is_here(dataset, other_id) or length > dataset.capacity:
                continue
            if length > room:
                break
            chosen.append(other_id)
            room -= length
        num_before = dataset.num_episodes
        for other_id in reversed(chosen):
            position = others.position(other_id)
            episode = None if position is None else self.other._whole(position)
            if episode is not None and fields is not None:
                arrays = dict(zip(fields.names, fields.arrays(episode), strict=True))
                if self._can_store(dataset, _Episode(other_id, arrays)):
                    self._add_from_other(dataset, fields, _Episode(other_id, arrays))
        return dataset.num_episodes - num_before

    # Which episodes are here.

    def _is_here(self, dataset: EpisodeDataset, other_id: int) -> bool:
        episode_id = self._ids_here.get(other_id)
        return episode_id is not None and dataset.index.position(episode_id) is not None

    def _note(self, dataset: EpisodeDataset, other_id: int, episode_id: int) -> None:
        if other_id < 0:  # Too long for `other`, which has handed it on.
            return
        self._ids_here[other_id] = episode_id
        if len(self._ids_here) > 2 * dataset.num_episodes + _SPARE_IDS:
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
    behind = dataset._extension is not None and _may_fail(dataset._extension.other)
    return behind or not dataset._evicts_before_writing or type(dataset.evictor) is not FIFOEvictor


def _chain(dataset: EpisodeDataset) -> Iterator[EpisodeDataset]:
    """A dataset, and what is behind it."""
    behind: EpisodeDataset | None = dataset
    while behind is not None:
        yield behind
        behind = None if behind._extension is None else behind._extension.other


def _has(dataset: EpisodeDataset, episode_id: int) -> bool:
    return dataset.index.position(episode_id) is not None


def _evict(dataset: EpisodeDataset, episode_id: int) -> None:
    """Remove an episode that was just added, if it was."""
    position = dataset.index.position(episode_id)
    # Whatever comes of it, the error that made it necessary is the one to be seen.
    with contextlib.suppress(Exception):
        if position is not None:
            dataset._evict(position)


def _check_pair(dataset: EpisodeDataset, other: EpisodeDataset) -> None:
    from buffers.dataset.episode_dataset import EpisodeDataset

    if not isinstance(other, EpisodeDataset):
        raise TypeError(f"`other` must be an EpisodeDataset, found {type(other).__name__}.")
    if dataset._extension is not None:
        raise RuntimeError(f"It is extended already, by a {type(dataset._extension.other).__name__}.")
    dataset.check_writable()
    other.check_writable()
    if any(behind is dataset for behind in _chain(other)):
        raise ValueError("`other` is the dataset itself, or leads back to it.")
    if dataset._is_behind:
        raise RuntimeError(
            "It is behind another dataset already. Extend the largest first: `b.extend(c)`, `a.extend(b)`."
        )


def _episode_loader(other: EpisodeDataset, batch_size: int, num_workers: int, seed: int | None) -> SequenceLoader:
    """A loader of a few whole episodes at a time."""
    from buffers.loader import SequenceLoader
    from buffers.stream import SequenceStream

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
