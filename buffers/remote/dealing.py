"""Dealer: which shard each batch comes from, in exact shares."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Dealer"]


class Dealer:
    """Deals batches to shards, so that each has had its share at any time, but for less than one batch.

    A shard with the share w of all windows has had n * w batches of any first n, rounded up or down. (Tijdeman's rule
    for the chairman assignment problem: of the shards that are owed enough, the one that would be owed a whole batch
    first.) Shares may change from batch to batch: then it is owed their sum. When shards come or go, what they are owed
    is forgotten, and it begins anew.

    Args:
        owed: To go on where another dealer stood, what it owed each shard.
    """

    def __init__(self, owed: Mapping[int, float] | None = None) -> None:
        self._owed = dict(owed or {})

    @property
    def owed(self) -> dict[int, float]:
        """What each shard is owed, in batches; negative if it has had more than its share."""
        return dict(self._owed)

    def next(self, weights: Mapping[int, float]) -> int:
        """The shard of the next batch, by weights of at least one shard, more than 0."""
        if self._owed.keys() != weights.keys():
            self._owed = dict.fromkeys(weights, 0.0)
        total = sum(weights.values())
        for shard, weight in weights.items():
            self._owed[shard] += weight / total
        enough = 1 / (2 * len(weights) - 2) if len(weights) > 1 else 1.0
        # Sums of floats may be a little less.
        ready = [shard for shard, owed in self._owed.items() if owed >= enough - 1e-9] or [
            max(self._owed, key=self._owed.__getitem__)
        ]
        chosen = min(ready, key=lambda shard: (1 - enough - self._owed[shard]) / weights[shard])
        self._owed[chosen] -= 1
        return chosen
