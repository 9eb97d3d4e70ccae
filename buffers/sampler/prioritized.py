"""PrioritizedSampler: windows by the priorities of their rows."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from buffers.late import LARGEST_PRIORITY, PRIORITY
from buffers.sampler.base import Geometry, Sampler
from buffers.sampler.priority_index import EpisodeIndex, PriorityIndex, WindowIndex
from buffers.sharing.weights import SharedNumbers
from buffers.table import EpisodeTable, Int64Array, Windows
from buffers.utils import number

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["PrioritizedSampler"]

_MAX_INDEXES = 8
_SPARE, _MIN_PROPOSALS = 1.2, 16
_MAX_PROPOSALS = 1 << 14  # At a time.
_ROUNDS, _MAX_ROUNDS = 64, 10_000
_LARGEST_ALPHA = 4.0  # Powers of the largest priority stay finite.


class PrioritizedSampler(Sampler):
    """A window is drawn with probability proportional to `p ** alpha`, where p comes from its rows' priorities.

        p = eta * max + (1 - eta) * mean          (Kapturowski et al., 2019: R2D2)

    With T = 1 that is prioritized experience replay (Schaul et al., 2016). Padding does not count; of whole episodes,
    all rows do; with `offsets`, the anchor alone. Rows get priorities by `ReplayBuffer.update_priorities` or
    `EpisodeDataset.update`; new ones have the largest so far, at first 1.

        >>> from buffers.dataset import RingBufferDataset
        >>> dataset = RingBufferDataset(capacity=1_000)
        >>> loader = dataset.get_loader(1_000, 1, sampler=PrioritizedSampler(alpha=1.0), include=("index",), seed=0)
        >>> episode_id = dataset.add_episode({"obs": np.arange(4)})
        >>> dataset.update([0, 1, 2, 3], {"priority": [0.0, 1.0, 0.0, 4.0]})
        0
        >>> (np.bincount(next(iter(loader))["obs"][:, 0]) / 1_000).round(1)
        array([0. , 0.2, 0. , 0.8])

    With `include=("weight",)`, a batch has importance weights: of N windows, one of probability P has `(N P) ** -beta`,
    divided by the largest of the batch. `beta` may be set at any time; workers see it.

    Args:
        alpha: 0 for a uniform draw, 1 for one in proportion to p.
        beta: 0 for weights of 1, 1 for weights that make up for the draw.
        eta: The share of the largest priority of a window's rows, beside their mean.
        initial: The priority of new rows: "max", or a number.

    Raises:
        TypeError: An argument that is no number.
        ValueError: An argument out of its range.
    """

    def __init__(self, alpha: float = 0.6, beta: float = 0.4, eta: float = 0.9, initial: float | str = "max") -> None:
        self._alpha = number("alpha", alpha, 0.0, _LARGEST_ALPHA)
        self._eta = number("eta", eta, 0.0, 1.0)
        if initial != "max":
            initial = number("initial", initial, 0.0, LARGEST_PRIORITY)
        self._initial = initial
        self._beta = SharedNumbers(1)
        self.beta = beta
        self._indexes: dict[Any, PriorityIndex] = {}

    @property
    def alpha(self) -> float:
        """As it was given; so are `eta` and `initial`."""
        return self._alpha

    @property
    def eta(self) -> float:
        """As it was given."""
        return self._eta

    @property
    def initial(self) -> float | str:
        """As it was given."""
        return self._initial

    @property
    def beta(self) -> float:
        """The exponent of the weights."""
        return float(self._beta.get()[0])

    @beta.setter
    def beta(self, beta: float) -> None:
        self._beta.set([number("beta", beta, 0.0)])

    def bind(self, dataset: EpisodeDataset, geometry: Geometry) -> Sampler:
        """As `Sampler.bind`: with the priorities of the dataset, which gets such a late field if it has none."""
        part = copy.copy(self)
        part._indexes = {}
        dataset.add_priorities(self._initial)
        return part

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """`beta`. Priorities are kept with their dataset."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Sampler.load_state_dict`."""
        if sorted(state) != ["beta"]:
            raise ValueError(f"The state is not one of a PrioritizedSampler, found {sorted(state)}.")
        self.beta = state["beta"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": {}}

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """`Sampler.draw`: proposals, of which those that are accepted are taken in their order."""
        index = self._index(table, length)
        index.follow(table)
        parts, num_proposed = [], 0
        missing = num_proposals = num_windows
        if not index.is_exact:
            num_proposals = int(_SPARE * num_windows) + _MIN_PROPOSALS
        for n in range(1, _MAX_ROUNDS):
            parts.append(self._propose(table, index, length, num_proposals, missing, rng))
            missing -= len(parts[-1][1])
            if not missing:
                break
            if n % _ROUNDS == 0:
                index.follow(table)  # All may have become 0.
            # As many as the share that was accepted so far asks for.
            num_proposed += num_proposals
            share = (num_windows - missing + 1) / (num_proposed + 1)
            num_proposals = min(int(_SPARE * missing / share), _MAX_PROPOSALS) + _MIN_PROPOSALS
        else:
            raise RuntimeError(f"Of {num_proposed} windows that were tried, {missing} too few have a priority.")
        episode, step, density = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        if table.context.needs_density:
            density = density * self._scale(table, index, length)
        return _windows(table, length, episode, step, density)

    def density(self, table: EpisodeTable, windows: Windows) -> npt.NDArray[np.float64]:
        """As `Sampler.density`."""
        length = None if table.context.is_whole else windows.length
        index = self._index(table, length)
        index.follow(table)
        number, _ = table.numbers_of(windows.first_steps)
        density = index.weights(table.state.rows.take(number, axis=0), windows.step)
        return density * self._scale(table, index, length)

    def _scale(self, table: EpisodeTable, index: PriorityIndex, length: int | None) -> float:
        total = index.total(table)
        return table.num_to_draw(length) / total if total else 0.0  # All may have become 0 since the draw.

    def _propose(
        self,
        table: EpisodeTable,
        index: PriorityIndex,
        length: int | None,
        num: int,
        most: int,
        rng: np.random.Generator,
    ) -> tuple[Int64Array, Int64Array, npt.NDArray[np.float64]]:
        """Of `num` proposals, up to `most` that are accepted: rows of the table, first steps and densities."""
        u = rng.random((1 if index.is_exact else 3, num))
        numbers = index.tree.locate(u[0])
        if numbers is None:
            if table.num_to_draw(length) == 0:
                raise RuntimeError(table.no_window_message(length))
            raise RuntimeError(
                "All priorities are 0, so no window can be drawn. Give rows a larger one by `update_priorities`."
            )
        pieces = index.pieces(table, numbers)
        if index.is_exact:
            step = pieces.step
            density = index.weights(pieces.episode, step)
            # By rounding, one may have priority 0.
            chosen = density.nonzero()[0]
            if len(chosen) == num == most:
                return pieces.episode, step, density
        else:
            num_windows = np.minimum(pieces.num, index.size)
            step = pieces.step + (u[1] * num_windows).astype(np.int64)
            density = index.weights(pieces.episode, step)
            chosen = (u[2] * index.tree.weights.take(pieces.number) < density * num_windows).nonzero()[0]
        chosen = chosen[:most]
        return pieces.episode.take(chosen, axis=0), step.take(chosen), density.take(chosen)

    def _index(self, table: EpisodeTable, length: int | None) -> PriorityIndex:
        late = table.context.late
        if late is None or PRIORITY not in late:
            raise RuntimeError("A PrioritizedSampler draws for a loader, which gives its dataset priorities.")
        field, key = late[PRIORITY], (id(table), length, table.selection, table.context.anchor)
        index = self._indexes.get(key)
        if index is None or index.field is not field:
            if len(self._indexes) == _MAX_INDEXES:
                del self._indexes[next(iter(self._indexes))]
            if length is None:
                index = EpisodeIndex(field, self._alpha, self._eta)
            else:
                index = WindowIndex(field, self._alpha, self._eta, length, table.context.anchor)
            self._indexes[key] = index
        return index


def _windows(
    table: EpisodeTable, length: int | None, episode: Int64Array, step: Int64Array, density: npt.NDArray[np.float64]
) -> Windows:
    length = int(episode[:, 1].max()) if length is None else length
    cut = episode[:, 3] if table.has_cuts else None
    start, oldest_step = episode[:, 0] + step, table.oldest_start
    return Windows(length, start, step, episode[:, 2], episode[:, 1], None, None, True, oldest_step, cut, density)
