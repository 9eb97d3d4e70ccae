"""Sampler: what chooses the windows of a batch."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from buffers.table import DrawContext, EpisodeTable, Int64Array, Selection, TableRow, Windows, context_of

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["Geometry", "Listeners", "Sampler", "integers_below", "load_states"]


class Geometry(NamedTuple):
    """The windows that a loader asks for."""

    length: int | None = 1  # T; None for whole episodes.
    selection: Selection = Selection()
    anchor: int | None = None  # As in `DrawContext`.

    def spaced(self, rows: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array, int]:
        """For episodes `(n, 4)`: the fewest windows that have every new row of them.

        Returns:
            How many windows each has, where the first and the last begin, int64 `(n,)`, and steps from one to the next.
        """
        num_rows, cut, length, zero = rows[:, 1], rows[:, 3], self.length, np.zeros(len(rows), np.int64)
        if length is None:
            return zero + 1, zero, zero, 1
        if self.anchor is not None:
            num, first = self.selection.num_windows(num_rows, cut, length), self.selection.first_steps(cut, length)
            return num, zero + first, first + num - 1, 1
        before, after = self.selection.room(cut)
        first = context_of(cut)
        num = -(-(num_rows - first) // length)
        last = first + (num - 1) * length
        last = np.where(last + length - num_rows <= after, last, num_rows - length)
        return num * (last >= -before), np.minimum(first, last), last, length


class Sampler(ABC):
    """Draws windows over a table of episodes.

    A sampler without state implements `draw` alone. One that has some keeps it in memory that processes share, as
    workers draw with copies of it: `bind` makes a part for each dataset that a loader draws from, which the dataset
    tells of its episodes.

    Attributes:
        beta: The exponent of importance weights; None where windows have none.
    """

    beta: float | None = None
    #: Windows that should have been drawn, but whose episode left before; None for a sampler that misses none.
    num_missed: int | None = None

    @abstractmethod
    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """Draw B = `num_windows` windows, with replacement, each within its episode.

        Args:
            table: The live episodes. Build the result with `table.windows(position, step, length)`. `table.context` has
                the late fields, and more.
            num_windows: B, at least 1.
            length: T, in steps; None for whole episodes (then T is that of the longest one drawn).
            rng: Source of randomness: a function of the loader's seed, the batch's number and the attempt.

        Raises:
            RuntimeError: No live episode has `length` rows.
        """

    def density(self, table: EpisodeTable, windows: Windows) -> npt.NDArray[np.float64] | None:
        """How likely each window is, float64 `(B,)`, relative to a uniform draw; None for ones."""
        return None

    #: Whether it must be asked once for each batch, which `pack` and single sequences do not.
    counts_batches = False

    def bind(self, dataset: EpisodeDataset, geometry: Geometry) -> Sampler:
        """The sampler that a loader uses for one dataset and such windows; itself, if it has no state."""
        return self

    def num_to_draw(self, table: EpisodeTable, length: int | None) -> int:
        """How many windows of `length` steps it draws from; with None, episodes. 0 if it cannot draw."""
        return table.num_to_draw(length)

    def skip(self, context: DrawContext) -> None:  # noqa: B027
        """Called when a batch takes no window from it, or could not be drawn."""

    def episode_added(self, row: TableRow, info: dict[str, Any]) -> None:  # noqa: B027  (most need neither)
        """Called before anyone can draw an episode, in the process that adds it, with its start, length, id and cut."""

    def episode_removed(self, row: TableRow) -> None:  # noqa: B027
        """Called when an episode has left, in the process that evicts it."""

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """What another needs to go on with batch number `batch`: plain numbers, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sampler stood; ValueError if the state is not one of such a sampler."""
        if state:
            raise ValueError(f"A {type(self).__name__} has no state, found {sorted(state)}.")


class Listeners:
    """Samplers that are told of episodes, as long as something else refers to them. A copy has none."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[Sampler]] = []

    def __reduce__(self) -> tuple[type[Listeners], tuple[()]]:
        return Listeners, ()

    def __bool__(self) -> bool:
        return bool(self._references)

    def __iter__(self) -> Iterator[Sampler]:
        return iter([sampler for reference in self._references if (sampler := reference()) is not None])

    def add(self, sampler: Sampler) -> None:
        """Tell a sampler, too, if it listens."""
        kind = type(sampler)
        listens = kind.episode_added is not Sampler.episode_added or kind.episode_removed is not Sampler.episode_removed
        if listens:
            self._references = [weakref.ref(other) for other in self if other is not sampler] + [weakref.ref(sampler)]


def load_states(samplers: Sequence[Sampler], states: Sequence[dict[str, Any]]) -> None:
    """Load a state into each sampler, or into none if one refuses its own."""
    loaded: list[tuple[Sampler, dict[str, Any]]] = []
    try:
        for sampler, state in zip(samplers, states, strict=True):
            before = sampler.state_dict()
            sampler.load_state_dict(state)
            loaded.append((sampler, before))
    except Exception:
        for sampler, before in loaded:
            sampler.load_state_dict(before)
        raise


def integers_below(rng: np.random.Generator, high: int | Int64Array, num: int) -> Int64Array:
    """Draw int64 `(num,)` uniformly from [0, high), faster than `rng.integers`; `high` is one number or `(num,)`.

        >>> integers_below(np.random.Generator(np.random.Philox(0)), 10, 5)
        array([7, 5, 6, 9, 2])

    They are remainders of 64-bit words, which favours small integers by less than high / 2**64.
    """
    divisor = high if isinstance(high, int) else high.view(np.uint64)
    return (rng.bit_generator.random_raw(num) % divisor).view(np.int64)
