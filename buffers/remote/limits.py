"""Limits: a `SamplesPerInsert` over all shards, of which every writer and every learner asks what it may do."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from buffers.limiter import SamplesPerInsert
from buffers.remote.wire import News, Told

__all__ = ["Balance", "Limits", "balance_of"]

_STEPS_AHEAD = 1_000


class Balance(NamedTuple):
    """What is known of all writers and learners.

    Attributes:
        num_added: Steps that shards have stored.
        num_drawn: Steps of the batches that learners were delivered.
        batch_steps: Steps of a batch; 0 before there is a learner.
        can_draw: Whether a learner has found a window.
    """

    num_added: int
    num_drawn: int
    batch_steps: int
    can_draw: bool


def balance_of(news: Iterable[News]) -> Balance:
    """What shards tell, each of itself, and of learners, whose counts only grow."""
    learners: dict[str, Told] = {}
    num_added = 0
    for found in news:
        num_added += found.num_added
        for name, told in found.loaders.items():
            if name not in learners or told.num_drawn >= learners[name].num_drawn:
                learners[name] = told
    told_by_all = learners.values()
    return Balance(
        num_added,
        sum(told.num_drawn for told in told_by_all),
        max((told.batch_steps for told in told_by_all), default=0),
        any(told.can_draw for told in told_by_all),
    )


class Limits(NamedTuple):
    """The arguments of a `SamplesPerInsert`, and its rules; nothing waits here.

    Without a tolerance, it is a batch and what 1,000 steps are worth: each side sees the counts of the other some time
    later, and with less, both would wait for news most of the time.
    """

    ratio: Fraction
    tolerance: Fraction | None
    min_steps: int
    timeout: float

    @classmethod
    def of(cls, limiter: SamplesPerInsert) -> Limits:
        """Those of a limiter that belongs to no buffer."""
        if not isinstance(limiter, SamplesPerInsert):
            raise TypeError(f"`limiter` must be a SamplesPerInsert, found {type(limiter).__name__}.")
        return cls(limiter.ratio, limiter.given_tolerance, limiter.min_steps, limiter.timeout)

    def num_batches_due(self, balance: Balance) -> int:
        """How many batches may be drawn now."""
        if not balance.batch_steps or balance.num_added < self.min_steps:
            return 0
        return max(0, (self._due(balance, 0) + self._slack(balance)) // balance.batch_steps)

    def may_add(self, balance: Balance, num_steps: int) -> bool:
        """Whether so many steps may be added now: within the tolerance, or as no batch may be drawn."""
        is_within = self._due(balance, num_steps) <= self._slack(balance)
        return is_within or not (balance.can_draw and self.num_batches_due(balance))

    def _due(self, balance: Balance, num_more: int) -> Fraction:
        return self.ratio * (balance.num_added + num_more - self.min_steps) - balance.num_drawn

    def _slack(self, balance: Balance) -> Fraction:
        return balance.batch_steps + _STEPS_AHEAD * self.ratio if self.tolerance is None else self.tolerance
