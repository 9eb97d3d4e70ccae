"""Prioritized replay by hand: loose rows in arrays, and a binary tree of sums that numpy walks level by level."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contestant import Contestant, Rows
from benchmarks.workloads import ALPHA, BETA, Store, Workload


class SumTree(Contestant):
    """Leaf `num_leaves + i` is row i's `priority ** alpha`; node n is the sum of 2 n and 2 n + 1; the root is 1."""

    draws_sequences, priority_rule = False, "each row by its own"

    def takes(self, workload: Workload) -> bool:
        return super().takes(workload) and workload.length == 1

    def make(self, store: Store) -> None:
        self._arrays = {n: np.zeros((store.num_steps, *shape), dtype) for n, (shape, dtype) in store.fields.items()}
        self._num_rows, self._capacity, self._largest = 0, store.num_steps, 1.0
        self._num_leaves = 1 << (store.num_steps - 1).bit_length()
        self._tree = np.zeros(2 * self._num_leaves)

    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        def add() -> None:
            index = (self._num_rows + np.arange(len(rows["reward"]))) % self._capacity
            for name, values in rows.items():
                self._arrays[name][index] = values
            self._num_rows += len(index)
            self.update(index, np.full(len(index), self._largest))

        return add

    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        tree, rng, num = self._tree, np.random.default_rng(0), batch_size * length

        def draw() -> Rows:
            node, mass = np.ones(num, np.int64), rng.random(num) * tree[1]
            while node[0] < self._num_leaves:
                left = tree[node := 2 * node]
                is_right = mass >= left
                node, mass = node + is_right, np.where(is_right, mass - left, mass)
            weight = (min(self._num_rows, self._capacity) * tree[node] / tree[1]) ** -BETA
            rows = {name: values[node - self._num_leaves] for name, values in self._arrays.items()}
            return {**rows, "index": node - self._num_leaves, "weight": weight / weight.max()}

        return draw

    prioritized_drawer = drawer

    def update(self, index: Any, priorities: Any) -> None:
        self._largest = max(self._largest, priorities.max())
        self._tree[node := index + self._num_leaves] = priorities**ALPHA
        while (node := node >> 1)[0]:
            self._tree[node] = self._tree[2 * node] + self._tree[2 * node + 1]

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        return {name: batch[name].reshape(batch_size, length, *self._arrays[name].shape[1:]) for name in self._arrays}
