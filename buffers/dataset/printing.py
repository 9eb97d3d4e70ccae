"""A dataset as a table, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buffers.utils import format_bytes

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["counts_line", "fields_table"]


def counts_line(dataset: EpisodeSource) -> str:
    """What a dataset holds, in a line."""
    share = dataset.num_timesteps / dataset.capacity
    line = (
        f"{type(dataset).__name__}: {dataset.num_episodes:,} episodes, "
        f"{dataset.num_timesteps:,} of {dataset.capacity:,} steps ({share:.0%})"
    )
    if not dataset.is_empty:
        lengths = dataset.table.lengths
        line += f", length {lengths.min()} to {lengths.max()}, mean {dataset.average_episode_length:.1f}"
    return line


def fields_table(dataset: EpisodeSource) -> str:
    """The fields of a dataset, a line each."""
    if dataset.fields is None:
        return "(no fields yet: the first episode decides)"
    rows = [("field", "type", "dtype", "shape", "bytes a step", "bytes stored")]
    for name, field in dataset.fields.items():
        stored = dataset.stored_type(field)
        dtype = str(field.dtype).removeprefix("torch.")
        if stored.dtype != field.dtype:
            dtype += f" as {str(stored.dtype).removeprefix('torch.')}"
        num_bytes = format_bytes(stored.nbytes * dataset.num_timesteps)
        rows.append((name, type(field).__name__, dtype, str(field.shape), f"{stored.nbytes:,}", num_bytes))
    total = sum(dataset.stored_type(field).nbytes for field in dataset.fields.values())
    rows.append(("total", "", "", "", f"{total:,}", format_bytes(total * dataset.num_timesteps)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])
