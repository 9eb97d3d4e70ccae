"""TorchRL's `RayReplayBuffer`, in a process of its own, for `benchmarks/remote.py`.

    python -m benchmarks.peers.torchrl_ray STEPS BATCH_SIZE LENGTH NUM_BATCHES

For each line on stdin it draws `NUM_BATCHES` of pixels, and prints the seconds. Threads of the actor make batches ahead
(`prefetch`), but `sample` waits for one answer after the other.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

import ray
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, RayReplayBuffer, SliceSampler

from benchmarks.workloads import Store, blocks

NUM_WARM = 5


def main() -> None:
    num_steps, batch_size, length, num_batches = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
    ray.init(address="local", num_cpus=1, object_store_memory=500_000_000, include_dashboard=False, log_to_driver=False)
    slices = partial(
        SliceSampler, num_slices=batch_size, end_key="terminated", cache_values=True, truncated_key=None, init_key=None
    )
    buffer = RayReplayBuffer(
        storage=partial(LazyTensorStorage, num_steps),
        sampler=slices,
        batch_size=batch_size * length,
        prefetch=3,
        remote_config={"num_cpus": 0},
    )
    for rows in blocks(Store("pixels", num_steps)):
        tensors = {name: torch.from_numpy(values) for name, values in rows.items()}
        buffer.extend(TensorDict(tensors, batch_size=[len(rows["reward"])]))
    assert len(buffer) == num_steps and buffer.sample()["obs"].shape == (batch_size * length, 64, 64, 3)
    print("ready", flush=True)
    for _ in sys.stdin:
        for _ in range(NUM_WARM):
            buffer.sample()
        begin = time.perf_counter()
        for _ in range(num_batches):
            buffer.sample()
        print(time.perf_counter() - begin, flush=True)
    buffer.close()
    ray.shutdown()


if __name__ == "__main__":
    main()
