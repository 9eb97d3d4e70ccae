"""Checks of flashbax."""

from __future__ import annotations

from typing import Any

import flashbax
import jax
import jax.numpy as jnp
import numpy as np
from flashbax.vault import Vault

from benchmarks.checks.common import LENGTH, killed_after
from benchmarks.verification import is_crossing
from benchmarks.workloads import tagged_rows, tags_of


def _buffer(length: int = 1) -> Any:
    return flashbax.make_trajectory_buffer(
        add_batch_size=1,
        sample_batch_size=4,
        sample_sequence_length=length,
        period=1,
        min_length_time_axis=length,
        max_length_time_axis=1_000,
    )


def _rows(first: int, number: int) -> Any:
    return {"obs": jnp.asarray(tagged_rows("state", first, number, LENGTH)["obs"][None])}


def _write(folder: str) -> Any:
    buffer = _buffer()
    state = buffer.init({"obs": jnp.zeros(24)})
    vault = Vault("killed", state.experience, rel_dir=folder, vault_uid="one")
    state = buffer.add(state, _rows(0, 3))
    vault.write(state)
    return vault, buffer.add(state, _rows(3, 2))


def survives_kill(folder: str) -> str:
    """A process adds three episodes, writes them to a vault, adds two more, and is killed."""
    killed_after(_write, folder)
    found = np.asarray(Vault("killed", rel_dir=folder, vault_uid="one").read().experience["obs"])
    return "what the last `Vault.write` wrote" if found.shape[1] == 3 * LENGTH else f"{found.shape[1]} rows"


def whole_episodes(folder: str) -> str:
    """Sequences of 9 from episodes of 2 to 9 rows, drawn often: all have 9 rows, whichever episode they begin in."""
    buffer = _buffer(9)
    state = buffer.init({"obs": jnp.zeros(24)})
    for length in range(2, 10):
        state = buffer.add(state, {"obs": jnp.asarray(tagged_rows("state", length, 1, length)["obs"][None])})
    for seed in range(20):
        episode, step = tags_of(np.asarray(buffer.sample(state, jax.random.PRNGKey(seed)).experience["obs"]))
        if is_crossing(episode, step).any():
            return "no, one length, over ends"
    return "no, one length"
