"""Which of the processes of a job this one is, and how they share out one stream of batches."""

from __future__ import annotations

import torch.distributed

from buffers.utils import integer

__all__ = ["this_rank"]


def this_rank(rank: int | None, world_size: int | None, are_shared_out: bool) -> tuple[int, int]:
    """The rank r and the number of ranks W: batch n of rank r is batch `n * W + r` of one stream.

    Those that are given, or else those of `torch.distributed` if that is initialized. 0 and 1 if there is nothing that
    the ranks could share out: without a seed, each draws its own batches at random.

    Raises:
        ValueError: `rank` is not less than `world_size`.
    """
    is_of_a_job = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None and world_size is None and are_shared_out and is_of_a_job:
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    world_size = 1 if world_size is None else integer("world_size", world_size, 1)
    rank = 0 if rank is None else integer("rank", rank, 0)
    if rank >= world_size:
        raise ValueError(f"`rank` must be less than `world_size`={world_size}, found {rank}.")
    return rank, world_size
