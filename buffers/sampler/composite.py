"""CompositeSampler: a sampler that draws by others."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from buffers.sampler.base import Sampler
from buffers.table import DrawContext, TableRow

__all__ = ["CompositeSampler"]


class CompositeSampler(Sampler):
    """What it is asked or told goes to the samplers that it draws by."""

    @property
    @abstractmethod
    def samplers(self) -> tuple[Sampler, ...]:
        """The samplers that it draws by, in their order."""

    @property
    def beta(self) -> float | None:  # type: ignore[override]
        """That of the first sampler that has one."""
        return next((sampler.beta for sampler in self.samplers if sampler.beta is not None), None)

    @property
    def num_missed(self) -> int | None:  # type: ignore[override]
        """Those of all samplers."""
        found = [sampler.num_missed for sampler in self.samplers if sampler.num_missed is not None]
        return sum(found) if found else None

    @property
    def counts_batches(self) -> bool:  # type: ignore[override]
        """Whether one does."""
        return any(sampler.counts_batches for sampler in self.samplers)

    def skip(self, context: DrawContext) -> None:
        """As `Sampler.skip`, of all samplers."""
        for sampler in self.samplers:
            sampler.skip(context)

    def episode_added(self, row: TableRow, info: dict[str, Any]) -> None:
        """As `Sampler.episode_added`, of all samplers."""
        for sampler in self.samplers:
            sampler.episode_added(row, info)

    def episode_removed(self, row: TableRow) -> None:
        """As `Sampler.episode_removed`, of all samplers."""
        for sampler in self.samplers:
            sampler.episode_removed(row)
