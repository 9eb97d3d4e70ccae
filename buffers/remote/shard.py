"""Shard: a dataset that takes episodes from writers far away, and draws batches for learners far away."""

from __future__ import annotations

import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.saving import SavedBeside
from buffers.fields import Fields
from buffers.loading import SequenceStream
from buffers.remote.ledger import Ledger
from buffers.remote.wire import Description, Drawn, News, Pack, Receipt, Request, Told, to_wire
from buffers.saving import Snapshot, is_save_directory
from buffers.table import context_of
from buffers.utils import ThreadLock

__all__ = ["Shard", "local_ids", "place_of", "remote_ids"]

# Whose requests are known. There may be 64 learners, and loaders that have ended are not heard of.
_MOST_LOADERS = 128
#: Step ids of a batch say which life of the shard they are of: after a restart, the same ids may be of other rows.
_LIFE_BITS, _ID_BITS = 18, 44
_NO_STEP = -2
_SECONDS_AFTER_A_FAILURE = 5.0
#: The last one, and the one before, should it be damaged.
_NUM_SAVES = 2


def remote_ids(ids: np.ndarray, life: int) -> np.ndarray:
    """Step ids of a shard as batches have them; -1 stays."""
    return np.where(ids < 0, ids, ids | (life << _ID_BITS))


def local_ids(ids: np.ndarray, life: int) -> np.ndarray:
    """The inverse of `remote_ids`; -2, which no row has, for ids of another life."""
    return np.where(ids < 0, ids, np.where(ids >> _ID_BITS == life, ids & ((1 << _ID_BITS) - 1), _NO_STEP))


def place_of(directory: str, number: int) -> str:
    """Where a shard saves."""
    return os.path.join(directory, f"shard-{number:04d}")


class Shard:
    """One shard. All methods are called in turn, by one thread.

    Args:
        number: Of the shard.
        make_dataset: Called with the number; returns an empty dataset, or one of files.
        directory: Where it saves, and goes on from after a restart; None for a shard that does not save.
        save_every: Seconds from one save to the next, if something was added. Writers whose windows fill ask earlier.
        clock: Seconds.

    Raises:
        TypeError: `make_dataset` returns something else.
        ValueError: The dataset is of files, which are there after a restart, and `directory` is None.
    """

    def __init__(
        self,
        number: int,
        make_dataset: Callable[[int], EpisodeDataset],
        directory: str | None = None,
        save_every: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.number, self._save_every, self._clock = number, save_every, clock
        self.dataset = make_dataset(number)
        if not isinstance(self.dataset, EpisodeDataset):
            raise TypeError(f"`make_dataset` must return an EpisodeDataset, found {type(self.dataset).__name__}.")
        if directory is None and self.dataset.has_files:
            raise ValueError("Shards with datasets of files need a `directory`, to save which episodes these hold.")
        self._ledger, self._lock = Ledger(), ThreadLock()
        self._directory = None if directory is None else place_of(directory, number)
        self._streams: OrderedDict[str, SequenceStream] = OrderedDict()
        # What samplers of those have raised for new episodes.
        self._failed: dict[str, Exception] = {}
        self.life = secrets.randbits(_LIFE_BITS)
        self._saving: tuple[Future[str], dict[str, int]] | None = None
        self._saved: dict[str, int] = {}
        self._num_saves, self._last_save, self._is_changed = 0, clock(), False
        self._save_failure: str | None = None
        self._store_failure: str | None = None
        if self._directory is not None:
            self._load(self._directory)

    def _load(self, directory: str) -> None:
        if is_save_directory(directory):
            save = EpisodeDataset.open_save(directory, newest_whole=True)
            self.dataset = EpisodeDataset.load_save(save, self.dataset, False)
            self._ledger.load_state_dict(save.state("ledger"))
            self._saved = self._ledger.marks()
        else:
            # So that there is always a save, and files that no save knows are never taken for stored ones.
            self.save()

    def describe(self) -> Description:
        """What it is."""
        dataset = self.dataset
        is_saved = self._directory is not None
        return Description(self.number, dataset.fields, dataset.episode_capacity, dataset.verification_mode, is_saved)

    def settle(self, fields: Fields) -> Description:
        """Lay out storage; ValueError for other fields than those that are there."""
        self.dataset.settle_fields(fields)
        return self.describe()

    # Episodes in.

    def add(self, pack: Pack) -> Receipt:
        """Store the episodes that are not stored yet, each whole, in order, up to the first that fails.

        A pack that begins behind the next number stores nothing: the one before it is missing.
        """
        self._store_failure = None
        next_number = self._ledger.open(pack.writer, pack.kept_from)
        if pack.lengths and pack.first <= next_number < pack.first + len(pack.lengths):
            try:
                self._store(pack, next_number - pack.first)
            except Exception as error:
                self._store_failure = f"{type(error).__name__}: {error}"
        self._save_if_due(pack.wants_save)
        number = self._ledger.marks()[pack.writer]
        saved = number if self._directory is None else self._saved.get(pack.writer, 0)
        return Receipt(number, saved, self._ledger.refused(pack.writer), self._news())

    def _store(self, pack: Pack, position: int) -> None:
        """Store those of a pack from a position on."""
        ends = np.cumsum(pack.lengths).tolist()
        for n in range(position, len(ends)):
            span = slice(ends[n] - pack.lengths[n], ends[n])
            rows = {name: values[span] for name, values in pack.rows.items()}
            cut, info = pack.cuts[n], pack.infos[n]
            try:
                if pack.fields is not None:
                    self.dataset.settle_fields(pack.fields)
                self.dataset.check_info(info or {})
                self.dataset.add(rows, cut, info)
            except (ValueError, TypeError) as error:
                self._ledger.refuse(pack.writer, str(error))
            else:
                self._ledger.stored(pack.writer, pack.lengths[n] - context_of(cut))
            self._is_changed = True

    # Batches out.

    def draw(
        self, told: Told, name: str, request: Request | None, n: int | None, heard: tuple[int, int] | None = None
    ) -> Drawn:
        """Batch n of what is known by a name; with None, only how many windows there are.

        Asked again, it draws again, by the same random numbers. `request` makes the name known. `heard` is a life of
        this shard, and the steps that were stored by then.
        """
        self._ledger.loaders[told.loader] = told
        if heard is not None and heard[0] != self.life and self._directory is None:
            # Learners have drawn for these steps: a limiter that forgot them would hold learners up for as many more.
            self._ledger.count_before(heard[1])
        if request is not None and name not in self._streams:
            self._open_stream(name, request)
        stream = self._streams.get(name)
        if stream is None:
            return Drawn(False, 0, None, self._news())
        self._streams.move_to_end(name)
        self._save_if_due(False)
        if name in self._failed:
            raise self._failed[name]
        dataset, sampler = self.dataset, stream.drawer.samplers[0]
        num_windows = dataset.num_to_draw(stream.sequence_length, stream.selection, sampler)
        batch = None
        if n is not None and num_windows:
            batch = to_wire(stream.batch(n))
        return Drawn(True, num_windows, batch, self._news())

    def _open_stream(self, name: str, request: Request) -> None:
        loader = self.dataset.get_loader(request.batch_size, request.sequence_length, **request.options)
        loader.stream.assemble = partial(_assembled, loader.stream.assemble, self.life)
        for sampler in loader.stream.drawer.samplers:
            # An episode for which it fails is an error of its learner: writers must not wait until that has gone.
            sampler.episode_added = partial(self._try, name, sampler.episode_added)  # type: ignore[method-assign]
        self._streams[name] = loader.stream
        if len(self._streams) > _MOST_LOADERS:
            self._failed.pop(self._streams.popitem(last=False)[0], None)

    def _try(self, name: str, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self._failed.setdefault(name, error)

    def update(self, index: np.ndarray, values: Mapping[str, np.ndarray]) -> int:
        """Give rows new values of late fields; returns how many of the step ids are of no row that is stored."""
        ids = local_ids(index, self.life)
        if not (ids >= 0).any():
            # The dataset need not even have the field: its loader may not be known since the last start.
            return int((ids == _NO_STEP).sum())
        self._is_changed = True
        return self.dataset.update(ids, values)

    # Saves.

    def save(self) -> int:
        """Save now, and return the number of steps that are stored."""
        self._settle_save(block=True)
        self._begin_save(block=True)
        self._settle_save(block=True)
        return self.dataset.num_timesteps

    def _save_if_due(self, is_wanted: bool) -> None:
        if self._directory is None:
            return
        self._settle_save(block=False)
        seconds = self._clock() - self._last_save
        if self._saving is not None or not self._is_changed:
            return
        if self._save_failure is not None and seconds < min(_SECONDS_AFTER_A_FAILURE, self._save_every):
            return
        if is_wanted or seconds >= self._save_every:
            try:
                self._begin_save(block=False)
            except (OSError, RuntimeError) as error:
                self._save_failure = str(error)

    def _begin_save(self, block: bool) -> None:
        if self._directory is None:
            raise RuntimeError("The shards do not save: give `start_shards` a `directory`.")
        marks = self._ledger.marks()
        self._last_save, self._is_changed = self._clock(), False
        try:
            beside = SavedBeside(self._lock, self._put_ledger)
            future = self.dataset.save_with([beside], self._directory, _NUM_SAVES, block, False)
        except BaseException:
            self._is_changed = True
            raise
        self._saving = future, marks

    def _put_ledger(self, snapshot: Snapshot) -> None:
        snapshot.state("ledger", self._ledger.state_dict())

    def _settle_save(self, block: bool) -> None:
        """Take note of a save that is over."""
        if self._saving is None or not (block or self._saving[0].done()):
            return
        (future, marks), self._saving = self._saving, None
        error = future.exception()
        if error is None:
            self._saved, self._save_failure = marks, None
            self._num_saves += 1
        else:
            self._save_failure, self._is_changed = str(error), True

    # What there is.

    def _news(self) -> News:
        trouble = self._store_failure or self._save_failure
        return News(self.life, self._ledger.num_added, dict(self._ledger.loaders), trouble)

    def stats(self) -> dict[str, float]:
        """Numbers that can be summed over shards."""
        dataset = self.dataset
        return {
            "num_episodes": dataset.num_episodes,
            "num_timesteps": dataset.num_timesteps,
            "capacity": dataset.capacity,
            "num_evicted": dataset.num_evicted,
            "num_added": self._ledger.num_added,
            "num_missing": self._ledger.num_missing,
            "num_refused": self._ledger.num_refused,
            "num_saves": self._num_saves,
        }

    def episodes(self) -> list[dict[str, np.ndarray]]:
        """All episodes, oldest first, `name -> (L, *shape)`: for tests and small datasets."""
        return [self.dataset.arrays_of_id(number) or {} for number in self.dataset.table.ids.tolist()]

    def close(self) -> None:
        """Save if it saves, and close the dataset."""
        if self._directory is not None:
            self.save()
        close = getattr(self.dataset, "close", None)
        if close is not None:
            close()


def _assembled(assemble: Callable[..., Any], life: int, *arguments: Any) -> Any:
    """A batch whose step ids say which life they are of."""
    batch = assemble(*arguments)
    if "index" in batch and "index" in arguments[0].include:
        batch["index"] = torch.from_numpy(remote_ids(as_array("index", batch["index"].cpu()), life))
    return batch
