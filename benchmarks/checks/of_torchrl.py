"""Checks of TorchRL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict import TensorDict
from torch.utils.data import DataLoader, IterableDataset
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer, SliceSampler
from torchrl.envs import GymWrapper

from benchmarks.checks.common import LENGTH, child_sees_additions, killed_after, same, tagged_env
from benchmarks.peers.torchrl_buffer import TorchRL
from benchmarks.workloads import tagged_rows, tags_of


def live_data(folder: str) -> str:
    """A forked process, of a storage in memory and of one that is memory-mapped."""
    found = []
    for memmap in (False, True):
        contestant = TorchRL(memmap=memmap)
        contestant.folder = folder
        found.append("yes" if child_sees_additions(contestant) else "no")
    return found[0] if found[0] == found[1] else f"in memory {found[0]}, memory-mapped {found[1]}"


def _buffer(folder: str, name: str) -> Any:
    return ReplayBuffer(storage=LazyMemmapStorage(1_000, scratch_dir=Path(folder) / name, existsok=True), batch_size=4)


def _episodes(first: int, number: int) -> TensorDict:
    rows = tagged_rows("state", first, number, LENGTH)
    return TensorDict({name: torch.from_numpy(rows[name]) for name in rows}, [len(rows["reward"])])


def _write(folder: str) -> Any:
    buffer = _buffer(folder, "killed")
    buffer.extend(_episodes(0, 3))
    buffer.dumps(Path(folder) / "dumped")
    buffer.extend(_episodes(3, 2))
    return buffer


def survives_kill(folder: str) -> str:
    """A process adds three episodes to memory-mapped files, dumps, adds two more, and is killed."""
    killed_after(_write, folder)
    alone = len(_buffer(folder, "killed"))
    restored = ReplayBuffer(storage=LazyMemmapStorage(1_000), batch_size=4)
    restored.loads(Path(folder) / "dumped")
    if alone == 5 * LENGTH:
        return "yes"
    return "what the last `dumps` wrote" if len(restored) == 3 * LENGTH else f"{alone} and {len(restored)} rows"


class _Batches(IterableDataset):
    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            yield self._buffer.sample()["obs"].numpy()


def same_batches(folder: str) -> str:
    """The first batches of a DataLoader over the buffer, everything seeded alike, for 0, 1 and 2 workers."""
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(1_000), batch_size=32, sampler=SliceSampler(num_slices=8, end_key="terminated")
    )
    buffer.extend(_episodes(0, 20))
    found = []
    for num_workers in (0, 1, 2):
        torch.manual_seed(3)
        loader = DataLoader(_Batches(buffer), batch_size=None, num_workers=num_workers)
        batches = iter(loader)
        found.append([np.array(next(batches)) for _ in range(6)])
    return "yes" if same(found[0], found[1]) and same(found[0], found[2]) else "no"


def final_observation(folder: str) -> str:
    """Two environments in TorchRL's wrapper, under each of Gymnasium's modes that reset by themselves."""
    found = {mode: _keeps_final_observation(mode) for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)}
    if len(set(found.values())) == 1:
        return found[AutoresetMode.SAME_STEP]
    return f"same step: {found[AutoresetMode.SAME_STEP]}; next step: {found[AutoresetMode.NEXT_STEP]}"


def _keeps_final_observation(mode: AutoresetMode) -> str:
    envs = SyncVectorEnv([lambda: tagged_env(7), lambda: tagged_env(4)], autoreset_mode=mode)
    try:
        data = GymWrapper(envs).rollout(60, break_when_any_done=False)
    except RuntimeError as error:
        if "AutoresetMode" not in str(error):
            raise
        return "refused"
    buffer = ReplayBuffer(storage=LazyTensorStorage(1_000), batch_size=60)
    buffer.extend(data.reshape(-1))
    stored = buffer[:]
    lasts = stored["next", "observation"][stored["next", "done"].squeeze(-1)]
    return "yes" if len(lasts) > 10 and set(lasts.ravel().tolist()) == {4.0, 7.0} else "no"


def whole_episodes(folder: str) -> str:
    """Slices as long as the longest episode, padded: what the mask says is real is looked at."""
    sampler = SliceSampler(slice_len=9, end_key="terminated", strict_length=False, pad_output=True)
    buffer = ReplayBuffer(storage=LazyTensorStorage(44), batch_size=16 * 9, sampler=sampler)
    for length in range(2, 10):
        rows = tagged_rows("state", length, 1, length)
        buffer.extend(TensorDict({name: torch.from_numpy(rows[name]) for name in rows}, [length]))
    for _ in range(10):
        batch, info = buffer.sample(return_info=True)
        mask = batch.get(("collector", "mask"), None)
        if mask is None:
            mask = info[("collector", "mask")]
        episode, step = tags_of(batch["obs"].reshape(16, 9, 24).numpy())
        for b, is_real in enumerate(mask.reshape(16, 9).numpy()):
            if is_real.sum() != episode[b, 0] or step[b][is_real].tolist() != list(range(is_real.sum())):
                return "no"
    return "yes, padded by repeating the last row"
