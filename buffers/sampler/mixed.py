"""MixedSampler: exact shares of a batch from several samplers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from buffers.sampler.base import Geometry, Sampler, load_states
from buffers.sampler.composite import CompositeSampler
from buffers.sharing.weights import Float64Array, SharedWeights, shares
from buffers.table import EpisodeTable, Windows, joined

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["MixedSampler"]


class MixedSampler(CompositeSampler):
    """Of every batch, each sampler draws its share.

    A share that is not whole is rounded up or down at random, so that it is exact on average. Weights (`include`) are
    those of the distribution that all make together, by the `beta` of the first sampler that has one.

        >>> from buffers.sampler import RecencySampler, UniformSampler
        >>> sampler = MixedSampler({UniformSampler(): 0.5, RecencySampler(half_life=1_000): 0.5})
        >>> sampler.shares = [0.9, 0.1]  # Also while workers run.

    Args:
        samplers: Share of each sampler, a number of at least 0; only their ratios matter.

    Raises:
        TypeError: What is no sampler, or a share that is no number.
        ValueError: No samplers, or shares that are negative or all 0.
    """

    def __init__(self, samplers: Mapping[Sampler, float]) -> None:
        if not isinstance(samplers, Mapping):
            raise TypeError(f"`samplers` must be a dict from samplers to shares, found {type(samplers).__name__}.")
        for sampler in samplers:
            if not isinstance(sampler, Sampler):
                raise TypeError(f"`samplers` must be a dict from samplers to shares, found the key {sampler!r:.60}.")
        if not samplers:
            raise ValueError("A MixedSampler needs at least one sampler, found none.")
        self._samplers = list(samplers)
        self._shares = SharedWeights(len(samplers))
        self.shares = list(samplers.values())

    @property
    def shares(self) -> Float64Array:
        """float64 `(samplers,)` of sum 1, in their order. Setting them affects batches that are drawn later."""
        return self._shares.get()

    @shares.setter
    def shares(self, shares: Sequence[float]) -> None:
        self._shares.set(shares)

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """The samplers, in their order."""
        return tuple(self._samplers)

    def bind(self, dataset: EpisodeDataset, geometry: Geometry) -> Sampler:
        """As `Sampler.bind`, of all samplers."""
        part = copy.copy(self)
        part._samplers = [sampler.bind(dataset, geometry) for sampler in self._samplers]
        return part

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """`Sampler.draw`: by each sampler in turn."""
        counts, drawn, context = shares(self._shares.get(), num_windows, rng), [], table.context
        for sampler, count in zip(self._samplers, counts.tolist(), strict=True):
            if count:
                drawn.append(sampler.draw(table, count, length, rng))
            elif context.again is None:
                sampler.skip(context)
        windows = joined(drawn)
        windows.oldest_step = min(part.oldest_step for part in drawn)
        windows.density = self.density(table, windows) if table.context.has_weights and self.beta is not None else None
        return windows

    def num_to_draw(self, table: EpisodeTable, length: int | None) -> int:
        """As `Sampler.num_to_draw`: all windows, if each sampler with a share can draw."""
        weighted = zip(self._samplers, self._shares.get(), strict=True)
        can_draw = all(sampler.num_to_draw(table, length) for sampler, share in weighted if share)
        return table.num_to_draw(length) if can_draw else 0

    def density(self, table: EpisodeTable, windows: Windows) -> npt.NDArray[np.float64]:
        """As `Sampler.density`."""
        found = np.zeros(len(windows))
        for sampler, weight in zip(self._samplers, self._shares.get(), strict=True):
            density = sampler.density(table, windows) if weight else 0.0
            found += weight * (1.0 if density is None else density)
        return found

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """The shares, and the states of the samplers."""
        return {"shares": self.shares.tolist(), "samplers": [sampler.state_dict(batch) for sampler in self._samplers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Sampler.load_state_dict`."""
        if sorted(state) != ["samplers", "shares"] or len(state["samplers"]) != len(self._samplers):
            raise ValueError(f"The state is not one of a MixedSampler of {len(self._samplers)}, found {sorted(state)}.")
        before = self._shares.get()
        self.shares = state["shares"]
        try:
            load_states(self._samplers, state["samplers"])
        except Exception:
            self._shares.set(before)
            raise
