"""Checks of cpprb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cpprb

from benchmarks.checks.common import LENGTH, child_sees_additions, killed_after
from benchmarks.peers.cpprb_buffer import Cpprb
from benchmarks.workloads import tagged_rows

_FIELDS = {"obs": {"shape": 24}}


def live_data(folder: str) -> str:
    """A forked process, of the buffer and of its kin for several processes."""
    plain = child_sees_additions(Cpprb())
    shared = child_sees_additions(Cpprb("MPReplayBuffer"))
    if plain == shared:
        return "yes" if plain else "no"
    return f"{'yes' if plain else 'no'}; `MPReplayBuffer` {'yes' if shared else 'no'}"


def _write(folder: str) -> Any:
    buffer = cpprb.ReplayBuffer(1_000, _FIELDS, mmap_prefix=str(Path(folder) / "killed"))
    buffer.add(obs=tagged_rows("state", 0, 3, LENGTH)["obs"])
    buffer.save_transitions(str(Path(folder) / "saved.npz"))
    buffer.add(obs=tagged_rows("state", 3, 2, LENGTH)["obs"])
    return buffer


def survives_kill(folder: str) -> str:
    """A process adds three episodes to mapped files, saves, adds two more, and is killed."""
    killed_after(_write, folder)
    alone = cpprb.ReplayBuffer(1_000, _FIELDS, mmap_prefix=str(Path(folder) / "killed")).get_stored_size()
    restored = cpprb.ReplayBuffer(1_000, _FIELDS)
    restored.load_transitions(str(Path(folder) / "saved.npz"))
    if alone == 5 * LENGTH:
        return "yes"
    number = restored.get_stored_size()
    return "what the last `save_transitions` wrote" if number == 3 * LENGTH else f"{alone} and {number} rows"
