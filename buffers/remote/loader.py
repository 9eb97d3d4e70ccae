"""RemoteLoader: batches drawn from shards."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from buffers.conversion import as_array
from buffers.late import PRIORITY
from buffers.loading.ranks import this_rank
from buffers.remote.draws import Delivery, Draws
from buffers.remote.limits import Balance, Limits, balance_of
from buffers.remote.memory import ReusedMemory
from buffers.remote.shards import Shards
from buffers.remote.transport import warn_of_new
from buffers.remote.updates import Updates, sources_of
from buffers.remote.wire import Request, Told, from_wire, sizes_on_wire
from buffers.utils import integer, number, usable_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from buffers.loading import StreamOptions

__all__ = ["RemoteLoader"]

_PAUSE = 0.1
_WITHOUT_END = ("epochs", "shuffle", "drop_last", "stride")


class RemoteLoader:
    """Iterates batches `field -> (B, T, *shape)` without end, which shards draw and send ahead of time.

        loader = RemoteLoader(shards, batch_size=256, sequence_length=8, include=("index", "source"))
        for batch in loader:
            ...

    What is drawn: batch n comes whole from one shard, which draws it as a local loader does, as a function of (seed, n)
    and of what it holds. Shards take turns in exact shares: one with the share w of all windows has had n * w of the
    first n batches, rounded up or down. So every window is equally likely over many batches, though the windows of one
    batch are of one shard. (A `PrioritizedSampler` draws by priorities within a shard, and its weights are those of the
    shard; shares follow numbers of windows, not sums of priorities.) A shard without a window has no share. A shard
    that dies or hangs loses its share to the others, in proportion, until it answers again; no share is made up for.
    While the shards stay the same and answer in time, the batches are a function of the seed alone, and a loader that
    was resumed (`state_dict`) gives those that had come next.

    Batches are delivered in order, in memory of the learner's own, which is used again once no tensor of a batch is
    left. Step ids (`index`) are numbers to be handed back to `update`: they are of one life of one shard, so a shard
    that has died and come back ignores those from before, and never takes them for other rows.

    Args:
        shards: As `start_shards` returns them.
        batch_size: B.
        sequence_length: T, in steps; None for whole episodes, padded to the longest of the batch, with a `mask`.
        output_device: Where batches are moved; None leaves them on the CPU.
        num_in_flight: Batches that are asked for ahead: 2 to 4 will do.
        deadline: Seconds after which a shard that has not answered is named, and its batches are asked of others.
        timeout: Seconds that `next` waits for a batch.
        **options: As for `EpisodeSource.get_loader`: `sampler`, `transform`, which shards apply, `include`, in which
            "source" is int64 `(B,)`, the number of the shard, `seed`, `pad_before`, `pad_after`, `pad`, `offsets`,
            `pack`, `split`, `rank`, `world_size`, which with a seed are by default those of `torch.distributed`.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range, or that does not fit the episodes.
        RuntimeError: No shard answers within the deadline.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        sequence_length: int | None = None,
        *,
        output_device: torch.device | str | None = None,
        num_in_flight: int = 3,
        deadline: float = 10.0,
        timeout: float = 60.0,
        **options: Unpack[StreamOptions],
    ) -> None:
        if not isinstance(shards, Shards):
            raise TypeError(f"`shards` must be what `start_shards` returns, found {type(shards).__name__}.")
        self._shards, self._deadline = shards, number("deadline", deadline, 0.1)
        self._timeout = number("timeout", timeout, 0.0)
        self._batch_size = integer("batch_size", batch_size, 1)
        self._device = None if output_device is None else usable_device("output_device", output_device)
        if unfit := [name for name in _WITHOUT_END if name in options]:
            raise ValueError(f"Batches of shards have no end: leave out {unfit}.")
        seed, include = options.get("seed"), options.get("include", ())
        #: Of all draws.
        self.seed = secrets.randbits(128) if seed is None else integer("seed", seed, 0)
        self._has_source = not isinstance(include, str) and "source" in include
        if self._has_source:
            include = tuple(name for name in include if name != "source")
        self._batch_steps = _steps_of(self._batch_size, sequence_length, options)
        if shards.limits is not None and self._batch_steps is None:
            raise ValueError(
                "The limiter counts the B x T steps of a batch, but whole episodes (`sequence_length=None`) have no "
                "fixed T: give a `sequence_length`, or `pack`."
            )
        ranks = options.get("rank"), options.get("world_size")
        self._rank, self._world_size = this_rank(*ranks, are_shared_out=seed is not None)
        # Shards are told the number that a batch has in the stream of all ranks.
        sent = {**options, "include": include, "rank": 0, "world_size": 1}
        self._request = Request(self._batch_size, sequence_length, sent)
        self._name, self._num_drawn = secrets.token_hex(8), 0
        self._num_in_flight = integer("num_in_flight", num_in_flight, 1)
        self._updates = Updates(shards.transport, self._deadline)
        self._memory = ReusedMemory(most_free=4, most_ratio=2.0)
        self._named: set[int] = set()
        self._is_closed = False
        self._begin(0, {}, (), 0)

    def _begin(self, position: int, owed: Mapping[int, float], dealt: Sequence[int], offset: int) -> None:
        """Ask for batches from a position on; the others are as for `SequenceStream` and `Draws`."""
        self._offset = offset
        request = self._request._replace(options={**self._request.options, "seed": self.seed})
        numbers = offset + self._rank, self._world_size
        transport, told, asked_ahead = self._shards.transport, self._told, self._num_in_flight
        self._draws = Draws(transport, request, told, self._deadline, asked_ahead, position, owed, dealt, *numbers)
        self._draws.is_listening = self._shards.limits is not None
        self._meet()

    def _told(self) -> Told:
        return Told(self._name, self._num_drawn, self._batch_steps or 0, self._draws.can_draw)

    def _meet(self) -> None:
        """Wait until a shard has answered."""
        end = self._now() + self._deadline
        while not self._draws.has_heard:
            if self._draws.error is not None:
                raise self._draws.error
            if self._now() >= end:
                found = "; ".join(self._draws.troubles.values()) or f"nothing within {self._deadline:g} s"
                raise RuntimeError(f"No shard answers: {found}.")
            self._draws.advance(_PAUSE)

    def _now(self) -> float:
        return self._shards.transport.now()

    # Batches.

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch, or what `transform` made of it.

        Raises:
            RuntimeError: No batch came within the timeout: says what each shard lacks. With a limiter, none was due.
            Exception: What `transform` or the sampler has raised on the shard. The next call goes on.
        """
        self._check_open()
        self._advance(0.0)
        self._wait_until_due()
        end = self._now() + self._timeout
        while (delivery := self._draws.take()) is None:
            if self._now() >= end:
                raise RuntimeError(self._why_none())
            self._advance(_PAUSE)
        return self._deliver(delivery)

    def _advance(self, seconds: float) -> None:
        self._draws.advance(seconds)
        self._updates.advance()
        for holder in (self._draws, self._updates):
            if holder.error is not None:
                error, holder.error = holder.error, None
                raise error
        consequence = "Its share of the batches goes to the others."
        self._named = warn_of_new(self._draws.troubles, self._named, consequence, stacklevel=4)

    def _deliver(self, delivery: Delivery) -> Any:
        # The shards go on while the batch is copied.
        self._draws.ask_ahead()
        if delivery.error is not None:
            if isinstance(delivery.error, StopIteration):
                raise RuntimeError("`transform` or the sampler has raised StopIteration.") from delivery.error
            raise delivery.error
        self._num_drawn += self._batch_steps or 0
        batch = from_wire(delivery.batch, self._memory.begin(sizes_on_wire(delivery.batch)))
        if self._has_source:
            if not isinstance(batch, dict):
                raise TypeError(f"'source' of `include` needs a dict, but `transform` made a {type(batch).__name__}.")
            batch["source"] = torch.full((self._batch_size,), delivery.shard)
        return batch if self._device is None else tree_map_only(torch.Tensor, lambda t: t.to(self._device), batch)

    def _why_none(self) -> str:
        troubles, weights = self._draws.troubles, self._draws.weights
        found = [
            troubles.get(n, f"shard {n} " + ("has sent none" if n in weights else "has no episode that is long enough"))
            for n in range(len(self._shards))
        ]
        return f"No batch came within `timeout`={self._timeout:g} s: {'; '.join(found)}."

    def _wait_until_due(self) -> None:
        limits = self._shards.limits
        if limits is None:
            return
        end = self._now() + limits.timeout
        while not self._num_due(limits):
            if self._now() >= end:
                balance = self._balance()
                raise RuntimeError(
                    f"`next` waited {limits.timeout:g} s for steps to be added: {balance.num_added:,} were added and "
                    f"{balance.num_drawn:,} drawn, {balance.batch_steps:,} a batch (`ratio`={float(limits.ratio):g}, "
                    f"`min_steps`={limits.min_steps})."
                )
            self._advance(_PAUSE)

    def _balance(self) -> Balance:
        # What shards tell of this learner is older than what it knows itself.
        own = self._told()
        news = [found._replace(loaders={**found.loaders, own.loader: own}) for found in self._draws.news]
        return balance_of(news)

    @property
    def num_batches_due(self) -> int:
        """How many batches the limiter lets be drawn now; a loop that draws so many never waits for it.

        RuntimeError if the shards have no limiter.
        """
        self._check_open()
        limits = self._shards.limits
        if limits is None:
            raise RuntimeError(
                "Only a limiter knows what is due: `start_shards(..., limiter=SamplesPerInsert(ratio))`."
            )
        self._advance(0.0)
        return self._num_due(limits)

    def _num_due(self, limits: Limits) -> int:
        return limits.num_batches_due(self._balance()) if self._draws.weights else 0

    @property
    def can_sample(self) -> bool:
        """Whether a shard that answers has a window."""
        self._check_open()
        self._advance(0.0)
        return bool(self._draws.weights)

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """What another loader needs to go on with the next batch: numbers, strings and lists.

        `seed`, and `position`, the number of batches delivered; `dealt`, the shards that were asked for batches under
        way, and `deal`, what each shard is owed after them; with a limiter, it knows the `learner` by name, and that it
        has drawn `num_drawn` steps. `rank`, `world_size` and `offset` say which batches of one stream these were, where
        several ranks have shared them out.
        """
        deal = [[shard, owed] for shard, owed in self._draws.deal.items()]
        state = {"seed": self.seed, "position": self.position, "deal": deal, "dealt": self._draws.dealt}
        state |= {"learner": self._name, "num_drawn": self._num_drawn}
        if self._world_size > 1 or self._offset:
            state |= {"rank": self._rank, "world_size": self._world_size, "offset": self._offset}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stood, made with the same arguments; batches that were under way are drawn again.

        There may have been another number of ranks, all at this position, and another number of shards. A limiter takes
        the loader for that learner, if it is of the same rank, so they must not both go on.

        Raises:
            TypeError: The state, or a value of it, is of another type. Nothing has changed.
            ValueError: The state is not one of such a loader. Nothing has changed.
            RuntimeError: No shard answers within the deadline.
        """
        names = ["deal", "dealt", "learner", "num_drawn", "position", "seed"]
        if not isinstance(state, Mapping):
            raise TypeError(f"`state` must be a dict, as `state_dict()` gives it, found {type(state).__name__}.")
        if not state.keys() >= {*names}:
            raise ValueError(
                f"The state of this loader has {names}, as `state_dict()` gives them, found {sorted(state)}."
            )
        seed, position, num_drawn = (integer(name, state[name], 0) for name in ("seed", "position", "num_drawn"))
        owed = {integer("deal", shard, 0): number("deal", value, -math.inf) for shard, value in state["deal"]}
        dealt, learner = [integer("dealt", shard, -1) for shard in state["dealt"]], state["learner"]
        if not isinstance(learner, str):
            raise TypeError(f"`learner` must be a string, found {type(learner).__name__}.")
        rank, world_size = this_rank(state.get("rank", 0), state.get("world_size", 1), False)
        offset = integer("offset", state.get("offset", 0), -position * world_size)
        self.seed = seed
        if rank == self._rank:
            self._name, self._num_drawn = learner, num_drawn
        self._begin(position, owed, dealt, offset + position * (world_size - self._world_size))

    # Late fields.

    def update(self, index: Any, values: Mapping[str, Any], source: Any = None) -> None:
        """Give rows new values of late fields, on the shards that hold them. Does not wait.

        Each shard takes them between two batches, so batches that were asked for before have the old ones. An update
        that is lost with its shard is not repeated; `stats()` counts it.

        Args:
            index: Step ids, int64 `(B, ...)`, as `include=("index",)` gives them; -1 for padding.
            values: `name -> (B, ...)`, as for `EpisodeDataset.update`.
            source: The shard, a number or `(B,)`, as `include=("source",)` gives it. May be left out if there is one.

        Raises:
            TypeError: `index` is not of integers.
            ValueError: Other sizes, or no such shard. What a shard refuses is raised by a later call.
        """
        self._check_open()
        ids = as_array("index", index)
        rows = {name: as_array(name, _float(value)) for name, value in values.items()}
        if unfit := [name for name, value in rows.items() if value.shape[: ids.ndim] != ids.shape]:
            raise ValueError(f"`index` has shape {ids.shape}, and so must {unfit} begin.")
        sources = sources_of(ids, source, len(self._shards))
        for shard in np.unique(sources).tolist():
            is_its = sources == shard
            self._updates.send(shard, ids[is_its], {name: value[is_its] for name, value in rows.items()})
        self._advance(0.0)

    def update_priorities(self, index: Any, values: Any, source: Any = None) -> None:
        """Give rows the priorities that a `PrioritizedSampler` draws by.

        Args:
            index: As for `update`, `(B, T)`.
            values: `(B, T)`; or `(B,)`, one for all rows of a window. Finite, and not negative.
            source: As for `update`.

        Raises:
            ValueError: Priorities that are negative or not finite, or of another shape. Nothing has changed.
        """
        ids, priorities = as_array("index", index), as_array("values", _float(values))
        if priorities.ndim < ids.ndim and priorities.shape == ids.shape[:1]:
            priorities = np.broadcast_to(priorities[:, None], ids.shape)
        if not (np.isfinite(priorities).all() and (priorities >= 0).all()):
            raise ValueError("Priorities must be finite, and not negative.")
        self.update(ids, {PRIORITY: priorities.astype(np.float32)}, source)

    # What there is.

    @property
    def position(self) -> int:
        """The number of the next batch."""
        return self._draws.position

    @property
    def troubles(self) -> dict[int, str]:
        """What is wrong with shards, by number: a shard that hangs, or is lost. `next` warns of each, once."""
        return self._draws.troubles

    def stats(self) -> dict[str, float]:
        """`Shards.stats()`, and what this loader has done.

        `num_batches` that were taken, `num_lost_updates`, and `num_ignored_ids`, step ids of rows that were gone; with
        a limiter, `samples_per_insert`.
        """
        found = self._shards.stats(self._deadline)
        found["num_batches"] = self._draws.position
        found["num_lost_updates"] = self._updates.num_lost
        found["num_ignored_ids"] = self._updates.num_ignored
        balance = self._balance()
        if self._shards.limits is not None and balance.num_added:
            found["samples_per_insert"] = balance.num_drawn / balance.num_added
        return found

    def close(self) -> None:
        """Take no further batch. The shards stay."""
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("The loader is closed.")

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A RemoteLoader belongs to its process: pass the Shards, and make a loader where it draws.")

    def __enter__(self) -> RemoteLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _steps_of(batch_size: int, sequence_length: int | None, options: Mapping[str, Any]) -> int | None:
    """The steps of a batch, as a limiter counts them; None for whole episodes."""
    length = 1 if options.get("offsets") is not None else options.get("pack") or sequence_length
    return None if length is None else math.prod((batch_size, length))


def _float(value: Any) -> Any:
    # numpy has no bfloat16.
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
