"""Drawing batches from the ring, beside the memory copy of the batch and the bare gather of the same windows.

The bare gather is one `torch.index_select` a field over the window view, from random places that are given: no index,
no draw, no checks. The memory copy copies as many bytes from one place that stays warm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.timing import interleave, print_table
from benchmarks.workloads import EPISODE_LENGTH, SIZES, filled_ring, rows
from buffers.dataset import RingBufferDataset

NUM_PLACES = 8192


def bare_gather(ring: RingBufferDataset, batch_size: int, length: int) -> Callable[[], list[torch.Tensor]]:
    """A function that gathers `batch_size` random windows of every field."""
    rng = np.random.default_rng(1)
    views = []
    for column in ring._columns.values():
        # The fastest that torch offers: words of 8 bytes where rows allow it.
        flat = column.tensor.view(ring.capacity, -1)
        row = flat.shape[1]
        view = flat.as_strided((ring.capacity - length + 1, length * row), (row, 1))
        views.append(view)
        if column.tensor.dtype == torch.uint8 and row % 8 == 0:
            words = flat.view(torch.int64)
            row //= 8
            views[-1] = words.as_strided((ring.capacity - length + 1, length * row), (row, 1))
    places = itertools.cycle(
        [torch.from_numpy(rng.integers(0, ring.capacity - length, batch_size)) for _ in range(NUM_PLACES)]
    )

    def gather() -> list[torch.Tensor]:
        place = next(places)
        return [torch.index_select(view, 0, place) for view in views]

    return gather


def memory_copy(ring: RingBufferDataset, batch_size: int, length: int) -> Callable[[], None]:
    """A function that copies the bytes of a batch, field by field."""
    fields = ring.fields
    assert fields is not None
    pairs = []
    for field in fields.values():
        source = torch.zeros((batch_size, length, *field.shape), dtype=field.dtype)
        pairs.append((torch.empty_like(source), source))

    def copy() -> None:
        for target, source in pairs:
            target.copy_(source)

    return copy


def sampling(rounds: int) -> None:
    """The five sizes of state and pixels, one thread and two."""
    table = []
    for kind in ("state", "pixels"):
        ring = filled_ring(kind)
        for _, batch_size, length in [size for size in SIZES if size[0] == kind]:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                stream = ring.get_loader(batch_size, length, seed=0).stream
                found = interleave(
                    {
                        "copy": memory_copy(ring, batch_size, length),
                        "gather": bare_gather(ring, batch_size, length),
                        "ours": stream.take,
                    },
                    rounds,
                )
                copy, gather, ours = (found[name].median for name in ("copy", "gather", "ours"))
                table.append(
                    (
                        f"{kind} {batch_size} x {length}",
                        threads,
                        f"{copy:.0f}",
                        f"{gather:.0f}",
                        f"{ours:.0f} ({found['ours'].least:.0f} to {found['ours'].most:.0f})",
                        f"{ours / copy:.2f}",
                        f"{ours / gather:.2f}",
                        f"{ours - gather:+.0f}",
                    )
                )
        del ring
    header = (
        "batch",
        "threads",
        "memory copy",
        "bare gather",
        "ours (least to most)",
        "/ copy",
        "/ gather",
        "- gather",
    )
    print_table("Sampling, microseconds a batch", header, table)


def growth(rounds: int, num_episodes: tuple[int, ...] = (100, 1_000, 10_000, 100_000)) -> None:
    """The same batch from ever more stored episodes, an episode added before each batch. One thread."""
    torch.set_num_threads(1)
    table = []
    for num in num_episodes:
        length = 20
        ring = filled_ring("state", num * length, length)
        fields = ring.fields
        assert fields is not None
        episode = rows(fields, length)
        stream = ring.get_loader(256, 8, seed=0).stream
        gather = bare_gather(ring, 256, 8)

        def add_and_gather() -> None:
            ring.add_episode(episode)  # noqa: B023
            gather()  # noqa: B023

        def add_and_take() -> None:
            ring.add_episode(episode)  # noqa: B023
            stream.take()  # noqa: B023

        found = interleave({"gather": add_and_gather, "ours": add_and_take}, rounds)
        gather_time, ours = found["gather"].median, found["ours"].median
        table.append((f"{num:,}", f"{gather_time:.0f}", f"{ours:.0f}", f"{ours - gather_time:+.0f}"))
    print_table(
        "Growth: state 256 x 8, an episode of 20 steps added before each batch, microseconds",
        ("stored episodes", "add + bare gather", "add + ours", "difference"),
        table,
    )


assert max(length for _, _, length in SIZES) <= EPISODE_LENGTH
