"""A dataset as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from buffers.utils import aligned, format_bytes

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["bytes_per_step", "compression_of", "counts_line", "fields_table"]


def counts_line(source: EpisodeSource) -> str:
    """Type, episodes, steps, fill and lengths, on one line."""
    stored = f"{source.num_timesteps:,} of {source.capacity:,} steps ({source.num_timesteps / source.capacity:.0%})"
    # A reader of files sees all there are, whatever its own capacity.
    if source.longest_window > source.capacity:
        stored = f"{source.num_timesteps:,} steps (read-only)"
    elif (most := getattr(source, "capacity_bytes", None)) is not None:
        stored += f", {format_bytes(sum(source.compressed_bytes().values()))} of {format_bytes(most)} compressed"
    line = f"{type(source).__name__}: {source.num_episodes:,} episodes, {stored}"
    if not source.is_empty:
        lengths = source.table.lengths
        line += f", length {lengths.min()} to {lengths.max()}, mean {source.average_episode_length:.1f}"
    return line


def fields_table(source: EpisodeSource) -> str:
    """A table of the fields, a line each: type, dtype, shape, bytes."""
    if source.fields is None:
        return "(no fields yet: the first episode decides)"
    compressed = source.compressed_bytes()
    sizes, total_bytes = bytes_per_step(source, compressed), 0
    rows = [("field", "type", "dtype", "shape", "bytes a step", "bytes stored")]
    for name, field in source.fields.items():
        stored = field if name in compressed else source.stored_type(field)
        dtype = str(field.dtype).removeprefix("torch.")
        if stored.dtype != field.dtype:
            dtype += f" as {str(stored.dtype).removeprefix('torch.')}"
        raw = sizes[name] * source.num_timesteps
        num_bytes = compressed.get(name, raw)
        total_bytes += num_bytes
        said = format_bytes(num_bytes)
        if name in compressed:
            said += f", {raw / max(1, num_bytes):.1f} times smaller"
        rows.append((name, type(field).__name__, dtype, str(field.shape), f"{sizes[name]:,}", said))
    rows.append(("total", "", "", "", f"{sum(sizes.values()):,}", format_bytes(total_bytes)))
    return "\n".join(aligned(rows))


def compression_of(source: EpisodeSource) -> dict[str, float]:
    """What `ReplayBuffer.stats` says of compressed fields; {} if there are none."""
    compressed, fields = source.compressed_bytes(), source.fields
    if not compressed or fields is None:
        return {}
    size, raw = sum(compressed.values()), sum(fields[name].nbytes for name in compressed) * source.num_timesteps
    return {"compressed_bytes": size, "compression_ratio": raw / max(1, size)}


def bytes_per_step(source: EpisodeSource, compressed: Mapping[str, int]) -> dict[str, int]:
    """The bytes of a stored step, by the name of the field; of `compressed` ones, before they are."""
    return {
        name: (field if name in compressed else source.stored_type(field)).nbytes
        for name, field in (source.fields or {}).items()
    }
