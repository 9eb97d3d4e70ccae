"""flashbax on JAX, on the CPU: the trajectory buffer, and for transitions the flat buffer.

All is compiled and warm. A batch stays an array of JAX, and is waited for. Sequences are cut from the stream as it is,
over the ends of episodes: training on them needs a mask. XLA makes as many threads as there are processors when it
starts, so its process is started on one, or two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashbax
import jax
import numpy as np
from flashbax.vault import Vault

from benchmarks.contestant import Contestant, Rows
from benchmarks.workloads import Store, TaggedEnvs

assert jax.default_backend() == "cpu"
# The rows of workloads repeat: they would compress to a fiftieth, as those of no environment do.
_UNCOMPRESSED = {"id": "blosc", "cname": "lz4", "clevel": 0, "shuffle": 0}


class Flashbax(Contestant):
    """A row of the buffer an environment."""

    _saved_in: Path | None = None

    def make(self, store: Store) -> None:
        self._state: Any = None
        self._made = store
        template = {name: np.zeros(shape, dtype) for name, (shape, dtype) in store.fields.items()}
        buffer = self._buffer(1, 1)
        self._state = jax.block_until_ready(buffer.init(template))
        self._add = jax.jit(buffer.add, donate_argnums=0)

    def _buffer(self, batch_size: int, length: int) -> Any:
        store = self._made
        if store.transitions:
            return flashbax.make_flat_buffer(
                max_length=store.num_steps,
                min_length=2,
                sample_batch_size=batch_size,
                add_sequences=True,
                add_batch_size=store.num_envs,
            )
        return flashbax.make_trajectory_buffer(
            add_batch_size=store.num_envs,
            sample_batch_size=batch_size,
            sample_sequence_length=length,
            period=1,
            min_length_time_axis=length,
            max_length_time_axis=store.num_steps // store.num_envs,
        )

    def episode_adder(self, rows: Rows, length: int) -> Callable[[], Any]:
        return self._adder({name: values[None] for name, values in rows.items()})

    def step_adder(self, envs: TaggedEnvs) -> Callable[[], Any]:
        return self._adder({name: values[:, None] for name, values in envs.rows.items()})

    def _adder(self, rows: Rows) -> Callable[[], Any]:
        def add() -> None:
            self._state = jax.block_until_ready(self._add(self._state, rows))

        return add

    def drawer(self, batch_size: int, length: int) -> Callable[[], Any]:
        buffer = self._buffer(batch_size, length)

        @jax.jit
        def sample(state: Any, key: Any) -> tuple[Any, Any]:
            key, drawn = jax.random.split(key)
            return buffer.sample(state, drawn).experience, key

        key = jax.random.PRNGKey(0)

        def draw() -> Any:
            nonlocal key
            batch, key = sample(self._state, key)
            return jax.block_until_ready(batch)

        return draw

    def save(self, directory: Path) -> None:
        """A vault grows: what is new is added behind what it has, and the oldest rows stay in it."""
        if directory == self._saved_in:
            self._vault.write(self._state)
            return
        cursor, end = int(self._state.current_index), self._made.num_steps
        options = {"rel_dir": str(directory), "vault_uid": "saved", "compression": _UNCOMPRESSED}
        self._vault = Vault("vault", self._state.experience, **options)
        # Not told which rows, it would write none: of a full buffer, it sees only that the cursor is where it was.
        for interval in ((cursor, end), (0, cursor)):
            if interval != (0, 0):
                self._vault.write(self._state, interval)
        self._saved_in = directory

    def load(self, directory: Path) -> Any:
        vault = Vault("vault", rel_dir=str(directory), vault_uid="saved")
        return jax.block_until_ready(vault.read(timesteps=self._made.num_steps))

    def rows_of(self, loaded: Any) -> Rows:
        return {name: np.asarray(values)[0] for name, values in loaded.experience.items()}

    def arrays(self, batch: Any, batch_size: int, length: int) -> Rows:
        if not self._made.transitions:
            return {name: np.asarray(values) for name, values in batch.items()}
        rows = {name: np.asarray(values)[:, None] for name, values in batch.first.items()}
        return {**rows, "next_obs": np.asarray(batch.second["obs"])[:, None]}
