"""torch's DataLoader over a stream: its workers, and their lifetime."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from buffers.loading.options import check_names
from buffers.loading.randomness import BatchRandom
from buffers.loading.ranks import this_rank
from buffers.loading.slots import forget
from buffers.loading.stream import SequenceStream
from buffers.utils import integer, usable_device

__all__ = ["SequenceLoader"]


class SequenceLoader(DataLoader):
    """torch's `DataLoader`, with its options, over a `SequenceStream`.

    A new iteration goes on where the last one stopped. So does a loader that has loaded the `state_dict()` of another.
    Only with `epochs` does an iteration end, and is there a `len(loader)`, in batches of this rank.
    """

    def __init__(
        self,
        stream: SequenceStream,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        output_device: torch.device | str | None = None,
        **loader_options: Any,
    ) -> None:
        #: Where batches are moved; None leaves them where the source is.
        self.output_device = None if output_device is None else usable_device("output_device", output_device)
        is_on_gpu = self.output_device is not None and self.output_device.type == "cuda"
        # Whether to copy from pinned memory, while the trainer goes on. A copy to the CPU must be complete.
        self._is_async = is_on_gpu and pin_memory is not False
        pin_memory = pin_memory or (self._is_async and bool(num_workers))
        check_names(loader_options, inspect.signature(DataLoader).parameters)
        num_workers = 0 if num_workers is None else integer("num_workers", num_workers, 0)
        if not loader_options.get("in_order", True):
            raise ValueError("Batches come in the order of their numbers, which `state_dict` counts: drop `in_order`.")
        collate_fn = loader_options.pop("collate_fn", None) or _as_it_is
        if num_workers:
            stream.source.check_workers()
            stream.share()
            # Batches that wait for the trainer, the one that it uses, and the one that is being made.
            stream.num_slots = (loader_options.get("prefetch_factor") or 2) + 2
            collate_fn = partial(stream.collate_and_pack, collate_fn)
        # Without a generator, torch would draw its workers' seed from the global one.
        loader_options.setdefault("generator", torch.Generator("cpu").manual_seed(stream.random.seed % 2**63))
        loader_options |= {"num_workers": num_workers, "pin_memory": bool(pin_memory), "collate_fn": collate_fn}
        super().__init__(stream, batch_size=None, **loader_options)
        self.stream = stream
        #: Counts up when earlier iterators become invalid.
        self.generation = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has workers and counters of its own."""
        self.__dict__.update(state, _iterator=None)
        self.stream.bind()
        if self.num_workers:
            self.stream.share()

    def deliver(self, batch: Any) -> Any:
        """Move the tensors of a batch to `output_device`."""
        return batch if self.output_device is None else tree_map_only(torch.Tensor, self._moved, batch)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._is_async and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # As it is if a DataLoader has pinned it.
        return tensor.to(self.output_device, non_blocking=self._is_async)

    def __iter__(self) -> Any:
        # On another default device, torch could not draw its workers' seed by a generator of the CPU.
        is_cpu_default = torch.get_default_device().type == "cpu"
        self.stream.is_counted = True
        try:
            with nullcontext() if is_cpu_default else torch.device("cpu"):
                return self._iterate()
        finally:
            self.stream.is_counted = False

    def _iterate(self) -> Any:
        self.stream.begin()
        if self.num_workers == 0:
            return super().__iter__() if self.output_device is None else map(self.deliver, super().__iter__())
        self.stream.source.check_drawable()
        self.stream.trainer = os.getpid()
        self.stream.counters["first"][0] = self.stream.position
        self.stream.counters["iteration"][0] += 1
        if self._iterator is not None and not _all_alive(self._iterator):
            self.end_workers()  # A persistent worker was killed since the last iteration.
        try:
            return _BatchesOfWorkers(self, super().__iter__())
        except RuntimeError:
            if self._iterator is None:
                raise
            self.end_workers()  # A worker was killed, but had not ended when it was asked.
            return _BatchesOfWorkers(self, super().__iter__())

    def __len__(self) -> int:
        if self.stream.one_pass is None:
            raise TypeError("Batches are drawn without end: only a loader with `epochs` has a length.")
        return self.stream.one_pass.num_batches_from(self.stream.position)

    def end_workers(self) -> None:
        """End persistent workers, if any; the next iteration starts new ones."""
        self._iterator = None
        self.generation += 1

    def state_dict(self) -> dict[str, Any]:
        """`seed`, and `position`, the number of batches taken; with `epochs`, also `pass`: which these are.

        `samplers` has the state of the sampler for each dataset, where it has one. `rank`, `world_size` and `offset`
        say which batches of one stream these were, where several ranks have shared them out.

        RuntimeError if another DataLoader has taken some.
        """
        if self.stream.counters["uncounted"][0]:
            raise RuntimeError(
                "Another DataLoader has taken batches, such as the one that accelerate's `prepare` makes, and may be "
                "ahead of what it has delivered. Iterate this loader itself, without `prepare`; or count the batches, "
                f"and load {{'seed': {self.stream.random.seed}, 'position': their number}}."
            )
        stream = self.stream
        state: dict[str, Any] = {"seed": stream.random.seed, "position": stream.position}
        if stream.world_size > 1 or stream.offset:
            state |= {"rank": stream.rank, "world_size": stream.world_size, "offset": stream.offset}
        if samplers := self.stream.drawer.state(self.stream.position):
            state["samplers"] = samplers
        one_pass = self.stream.one_pass
        return state if one_pass is None else {**state, "pass": one_pass.state.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader stood, from the next iteration on.

        There may have been another number of ranks, all at this position. Together, the ranks go on with what those
        have not drawn.
        """
        one_pass = self.stream.one_pass
        names = ["position", "seed"] if one_pass is None else ["pass", "position", "seed"]
        if not state.keys() >= {*names} or (one_pass is None and "pass" in state):
            raise ValueError(
                f"The state of this loader has {names}, as `state_dict()` gives them, found {sorted(state)}."
            )
        random, position = BatchRandom(integer("seed", state["seed"], 0)), integer("position", state["position"], 0)
        if one_pass is not None:
            one_pass.check(state["pass"])
        rank, world_size = this_rank(state.get("rank", 0), state.get("world_size", 1), False)
        offset = integer("offset", state.get("offset", 0), -position * world_size)
        first = np.int64(position)  # Before anything changes, as it may be too large.
        if "samplers" in state:
            self.stream.drawer.load(state["samplers"])
        self.stream.counters["first"][0], self.stream.counters["uncounted"][0] = first, 0
        if one_pass is not None:
            one_pass.load(state["pass"], position, rank, world_size)
        self.end_workers()
        self.stream.random, self.stream.position = random, position
        self.stream.offset = offset + position * (world_size - self.stream.world_size)


def _as_it_is(batch: Any) -> Any:
    return batch


def _end(over: np.ndarray, iteration: int) -> None:
    over[0] = max(over[0], iteration)


def _all_alive(batches: Any) -> bool:
    return all(worker.is_alive() for worker in batches._workers)


class _BatchesOfWorkers(Iterator[Any]):
    """Counts the batches that the trainer takes from its workers, so that the next iteration starts after them."""

    def __init__(self, loader: SequenceLoader, batches: Any) -> None:
        self._loader, self._batches = loader, batches
        counters = loader.stream.counters
        # Before torch waits for its workers to end, which may wait for each other.
        weakref.finalize(self, _end, counters["over"], int(counters["iteration"][0])).atexit = False
        weakref.finalize(batches, forget, [worker.pid for worker in batches._workers]).atexit = False

    def __next__(self) -> Any:
        for leaf in self._loader.stream.source.leaves:
            leaf.catch_up()
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except BaseException:
            if _all_alive(self._batches):
                self._loader.stream.position += 1  # A batch that failed counts.
            else:
                self._loader.end_workers()  # torch does not restart a persistent worker that has ended.
            raise
        self._loader.stream.position += 1
        return self._loader.deliver(batch)
