"""Checks of flashbax."""

from __future__ import annotations

from typing import Any

import flashbax
import jax.numpy as jnp
import numpy as np
from flashbax.vault import Vault

from benchmarks.checks.common import LENGTH, killed_after
from benchmarks.workloads import tagged_rows


def _buffer() -> Any:
    return flashbax.make_trajectory_buffer(
        add_batch_size=1,
        sample_batch_size=4,
        sample_sequence_length=1,
        period=1,
        min_length_time_axis=1,
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
