"""WindowDrawer: which windows batch n of a stream has."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import get_worker_info

from buffers.loading.layout import SequenceLayout
from buffers.loading.randomness import BatchRandom
from buffers.sampler import Geometry, Sampler, UniformSampler
from buffers.sampler.base import load_states
from buffers.table import DrawContext, Selection, Windows

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["WindowDrawer", "checked_sampler"]

# For an episode that another process has announced; writing it takes far less.
_SECONDS_TO_WAIT, _PAUSE = 10.0, 0.0005


class WindowDrawer:
    """Draws by a sampler, which is bound to each dataset of a source.

    Attributes:
        samplers: What the sampler is for each dataset.
    """

    def __init__(
        self,
        source: EpisodeSource,
        sampler: Sampler,
        length: int | None,
        selection: Selection,
        layout: SequenceLayout,
        has_weights: bool,
    ) -> None:
        self._source, self._sampler, self._length, self._selection = source, sampler, length, selection
        self._layout, self._has_weights = layout, has_weights
        # The last of a `DrawContext`: is_whole, has_weights, needs_density.
        self._constants = length is None, has_weights, has_weights and source.has_members
        self.samplers: list[Sampler] = []
        for leaf in source.leaves:
            bound = sampler.bind(leaf, Geometry(length, selection, layout.anchor))  # type: ignore[arg-type]
            leaf.listen(bound)
            self.samplers.append(bound)

    def draw(
        self, n: int, position: int, num_windows: int, random: BatchRandom, counters: Mapping[str, np.ndarray]
    ) -> Windows:
        """The windows of batch n, at a position of its stream, which is that of one rank."""
        context = self._context(position)
        if get_worker_info() is not None:
            pause = partial(_pause, counters, int(counters["iteration"][0]))
            context = context._replace(first=int(counters["first"][0]), pause=pause)
        try:
            return self._draw(n, 0, context, num_windows, random)
        except BaseException:
            # Workers that make later batches may wait for what a sampler says of this one.
            for sampler in self.samplers:
                sampler.skip(context)
            raise

    def draw_again(self, n: int, position: int, attempt: int, again: Windows, random: BatchRandom) -> Windows:
        """Others for windows of batch n that were gone before they were read; all, if it is packed."""
        context = self._context(position)
        if self._layout.num_packed is not None:
            return self._draw(n, attempt, context, len(again) // self._layout.num_packed, random)
        return self._draw(n, attempt, context._replace(again=again), len(again), random)

    def _context(self, position: int) -> DrawContext:
        # By position: names would take as long as all else.
        return DrawContext(position, None, self._layout.anchor, None, position, None, *self._constants)

    def _draw(self, n: int, attempt: int, context: DrawContext, num_windows: int, random: BatchRandom) -> Windows:
        deadline = 0.0

        def draw(num: int) -> Windows:
            return self._source.draw(self.samplers, num, self._length, rng, self._selection, context)

        while True:
            rng = random.generator(n, attempt)
            try:
                return self._layout.draw(num_windows, rng, draw)
            except RuntimeError:
                # All episodes may have been evicted for one that is being written.
                deadline = deadline or time.monotonic() + _SECONDS_TO_WAIT
                if not self._source.has_news() or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE)

    def can_draw(self) -> bool:
        """Whether there is a window now; of a mixture, one in each member with a weight."""
        return self._source.can_draw(self._length, self._selection, self.samplers)

    def weigh(self, windows: Windows) -> None:
        """Give windows the weights that follow from how likely each was."""
        if not self._has_weights:
            return
        beta = self._sampler.beta
        if beta is not None and windows.density is not None and windows.weight is None:
            density = windows.density
            if not np.isfinite(density).all():
                raise ValueError(f"{type(self._sampler).__name__} drew windows whose density is not finite.")
            # 0 is one that has become so since the draw.
            least = density.min(initial=np.inf, where=density > 0)
            windows.weight = (np.maximum(density / least, 1.0) ** -beta).astype(np.float32)

    def state(self, position: int) -> list[dict[str, Any]]:
        """The states of the samplers before the batch at a position; empty if none has one."""
        states = [sampler.state_dict(position) for sampler in self.samplers]
        return states if any(states) else []

    def load(self, states: list[dict[str, Any]]) -> None:
        """Load what `state` has returned; ValueError if it is of other samplers."""
        if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
            raise TypeError(f"`samplers` of a state must be a list of dicts, found {states!r:.60}.")
        if len(states) != len(self.samplers):
            raise ValueError(f"The state is one of {len(states)} datasets, and there are {len(self.samplers)}.")
        load_states(self.samplers, states)


def _pause(counters: Mapping[str, np.ndarray], iteration: int) -> None:
    time.sleep(_PAUSE)
    if counters["over"][0] >= iteration > 0:
        raise RuntimeError("The iteration is over.")


def checked_sampler(sampler: Any, layout: SequenceLayout, makes_batches: bool) -> Sampler:
    """The sampler, uniform by default; TypeError or ValueError for one that a layout cannot draw by."""
    if sampler is not None and not isinstance(sampler, Sampler):
        is_class = isinstance(sampler, type)
        found = f"the class {sampler.__name__}: pass {sampler.__name__}()" if is_class else type(sampler).__name__
        raise TypeError(f"`sampler` must be a Sampler, found {found}.")
    if sampler is not None and sampler.counts_batches and (layout.is_packed or not makes_batches):
        name = type(sampler).__name__
        raise ValueError(f"{name} counts batches of windows: use it with `get_loader`, and without `pack`.")
    return UniformSampler() if sampler is None else sampler
