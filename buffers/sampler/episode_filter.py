"""EpisodeFilter: only some episodes, chosen by what is known of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from buffers.sampler.base import Geometry, Sampler
from buffers.sampler.composite import CompositeSampler
from buffers.sharing import SharedArrays
from buffers.table import NO, UNKNOWN, YES, EpisodeTable, Int64Array, PartTable, TableRow, Windows

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["EpisodeFilter"]

# Ids of episodes that live are closer to each other than this. Only pages that are used take memory.
_NUM_FLAGS = 1 << 32
_NUM_KEPT = 1 << 16  # Flags of so many episodes that have left; they are released by as many.
_MAX_PARTS = 8


class EpisodeFilter(CompositeSampler):
    """Draws by another sampler, from the episodes that `accept` takes.

        >>> from buffers.dataset import RingBufferDataset
        >>> from buffers.sampler import UniformSampler
        >>> dataset = RingBufferDataset(capacity=1_000)
        >>> for success in (False, True):
        ...     episode_id = dataset.add_episode({"obs": np.zeros(10)}, info={"success": success})
        >>> sampler = EpisodeFilter(UniformSampler(), lambda info: info.get("success", False))
        >>> loader = dataset.get_loader(batch_size=64, sequence_length=4, sampler=sampler, include=("episode",))
        >>> next(iter(loader))["episode"].unique()
        tensor([1])

    `accept` is called once an episode, in the process that made the loader: with the `info` that the episode was added
    with, before anyone can draw it.

    Args:
        sampler: Draws among the episodes that are accepted.
        accept: A function of a dict, `EpisodeDataset.episode_info`; whether the episode is accepted.

    Raises:
        TypeError: An argument of the wrong type.
    """

    def __init__(self, sampler: Sampler, accept: Callable[[dict[str, Any]], bool]) -> None:
        if not isinstance(sampler, Sampler):
            raise TypeError(f"`sampler` must be a Sampler, found {type(sampler).__name__}.")
        if not callable(accept):
            raise TypeError(f"`accept` must be a function of an episode's info, found {type(accept).__name__}.")
        self.sampler, self.accept = sampler, accept
        self._dataset: EpisodeDataset | None = None
        self._memory: SharedArrays | None = None
        self._flags: npt.NDArray[np.int8] = np.zeros(1, np.int8)
        self._parts: dict[int, PartTable] = {}
        self._num_released = 0

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """The one sampler."""
        return (self.sampler,)

    def bind(self, dataset: EpisodeDataset, geometry: Geometry) -> Sampler:
        """As `Sampler.bind`: asks about the episodes that are stored."""
        part = EpisodeFilter(self.sampler.bind(dataset, geometry), self.accept)
        part._dataset = dataset
        part._open(SharedArrays({"flags": ((_NUM_FLAGS,), np.dtype(np.int8))}, sparse=True))
        part._judge(dataset.table.ids)
        return part

    def _open(self, memory: SharedArrays) -> None:
        self._memory, self._flags = memory, memory["flags"]

    def __deepcopy__(self, memo: dict[int, Any]) -> EpisodeFilter:
        """One that is not bound yet."""
        return EpisodeFilter(copy.deepcopy(self.sampler, memo), self.accept)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: what was decided, without the function, which may be a lambda."""
        return {**self.__dict__, "accept": None, "_dataset": None, "_parts": {}, "_flags": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._memory is not None:
            self._open(self._memory)

    def episode_added(self, row: TableRow, info: dict[str, Any]) -> None:
        """As `Sampler.episode_added`."""
        try:
            is_accepted = self.accept(info)
        except Exception as error:
            raise RuntimeError(
                f"`accept` of an EpisodeFilter failed for episode {row[2]}, whose info is {info!r:.200}: {error!r}."
            ) from error
        self._flags[row[2] % _NUM_FLAGS] = YES if is_accepted else NO
        if is_accepted:
            super().episode_added(row, info)

    def episode_removed(self, row: TableRow) -> None:
        """As `Sampler.episode_removed`."""
        assert self._dataset is not None and self._memory is not None  # Only the part that is bound here is told.
        if self._flags[row[2] % _NUM_FLAGS] == YES:
            super().episode_removed(row)
        # Readers may still have those that have just left.
        oldest = int(self._dataset.table.ids[0]) if len(self._dataset.table) else row[2]
        end = (oldest // _NUM_KEPT - 1) * _NUM_KEPT
        if end > self._num_released:
            self._memory.release("flags", self._num_released % _NUM_FLAGS, end % _NUM_FLAGS)
            self._num_released = end

    def num_to_draw(self, table: EpisodeTable, length: int | None) -> int:
        """As `Sampler.num_to_draw`, of the episodes that are accepted."""
        return self.sampler.num_to_draw(self._part(table), length)

    def _part(self, table: EpisodeTable) -> EpisodeTable:
        part = self._parts.get(id(table))
        if part is None:
            if len(self._parts) == _MAX_PARTS:
                del self._parts[next(iter(self._parts))]
            part = self._parts[id(table)] = PartTable(self._judge, "EpisodeFilter accepts none of the stored episodes.")
        part.show(table)
        part.selection, part.context = table.selection, table.context
        return part

    def _judge(self, ids: Int64Array) -> npt.NDArray[np.int8]:
        flags = self._flags.take(ids % _NUM_FLAGS)
        if self._dataset is not None:
            # Stored before this sampler was bound, or by another process.
            for i in (flags == UNKNOWN).nonzero()[0].tolist():
                row = self._dataset.table.row_of(int(ids[i]))
                if row[1]:
                    self.episode_added(row, self._dataset.episode_info(row[2]))
            flags = self._flags.take(ids % _NUM_FLAGS)
        return flags

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        """`Sampler.draw`, of the other sampler."""
        return self.sampler.draw(self._part(table), num_windows, length, rng)

    def density(self, table: EpisodeTable, windows: Windows) -> npt.NDArray[np.float64]:
        """As `Sampler.density`."""
        part, found = self._part(table), np.zeros(len(windows))
        length = None if table.context.is_whole else windows.length
        chosen = np.isin(windows.episode, part.ids).nonzero()[0]
        if len(chosen):
            density = self.sampler.density(part, windows[chosen])
            scale = table.num_to_draw(length) / part.num_to_draw(length)
            found[chosen] = scale * (1.0 if density is None else density)
        return found

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """That of the sampler."""
        return self.sampler.state_dict(batch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Sampler.load_state_dict`."""
        self.sampler.load_state_dict(state)
