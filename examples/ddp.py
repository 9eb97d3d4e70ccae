"""Two ranks train one model on one ring in memory: `torchrun --nproc-per-node 2 examples/ddp.py`.

Rank 0 steps the environments and adds to the ring. The other ranks attach to it by name, and read the same memory.
Each draws its own share of the batches, and `DistributedDataParallel` averages their gradients.
"""

from __future__ import annotations

import argparse
import os

import gymnasium
import numpy as np
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.transforms import to_transitions
from buffers.wrappers import VectorRecordEpisodes

NUM_ENVS, BATCH_SIZE, SEED = 8, 64, 0


class Dynamics(nn.Module):
    """Predicts by how much an observation changes: (B, T, 4) and actions (B, T) -> (B, T, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 4))

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([obs, nn.functional.one_hot(action.long(), 2)], -1))


def main(num_steps: int) -> None:
    """Train for so many steps, of which all ranks make each."""
    torch.distributed.init_process_group("gloo")
    rank, name = torch.distributed.get_rank(), f"ddp-{os.environ['MASTER_PORT']}"
    if rank == 0:
        dataset = RingBufferDataset(capacity=100_000)
        dataset.share(name)
        envs = VectorRecordEpisodes(
            gymnasium.make_vec("CartPole-v1", NUM_ENVS), ReplayBuffer(dataset, 1, num_envs=NUM_ENVS)
        )
        envs.action_space.seed(SEED)
        envs.reset(seed=SEED)
        for _ in range(200):
            envs.step(envs.action_space.sample())
    else:
        dataset = RingBufferDataset.attach(name)
    # Rank and world size are those of `torch.distributed`; the seed is the same everywhere.
    loader = dataset.get_loader(BATCH_SIZE, sequence_length=9, seed=SEED, transform=to_transitions)
    torch.manual_seed(SEED)
    model = DistributedDataParallel(Dynamics())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    torch.distributed.barrier()  # Until there is something to draw.
    losses = []
    for step, batch in zip(range(num_steps), loader, strict=False):
        if rank == 0:
            envs.step(envs.action_space.sample())
        loss = nn.functional.mse_loss(model(batch["obs"], batch["action"]), batch["next_obs"] - batch["obs"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if rank == 0 and step % 100 == 99:
            print(f"step {step + 1}: loss {np.mean(losses[-100:]):.5f}, {len(dataset)} rows")
    print(f"rank {rank}: loss {np.mean(losses[:10]):.4f} -> {np.mean(losses[-10:]):.4f}", flush=True)
    # The ring is gone when rank 0 ends.
    torch.distributed.barrier()
    del model, optimizer, loss  # What uses the process group goes before it.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    main(parser.parse_args().steps)
