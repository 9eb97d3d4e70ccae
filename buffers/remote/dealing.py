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
    """

    def __init__(self) -> None:
        self._owed: dict[int, float] = {}

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
