"""The arguments of a loader, and what those that say which rows are drawn mean together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch

from buffers.loading.layout import OffsetLayout, SequenceLayout
from buffers.loading.packing import PackedLayout
from buffers.table import Selection, Split
from buffers.utils import integer, one_of

if TYPE_CHECKING:
    from buffers.sampler import Sampler

__all__ = ["LoaderOptions", "StreamOptions", "rows_to_draw"]

Pad = Literal["zero", "edge"]


class StreamOptions(TypedDict, total=False):
    """As in `EpisodeSource.get_loader`."""

    sampler: Sampler | None
    transform: Callable[[dict[str, Any]], Any] | None
    include: Iterable[str]
    seed: int | None
    pad_before: int | None
    pad_after: int | None
    pad: Pad
    offsets: Mapping[str, Iterable[int]] | None
    pack: int | None
    split: tuple[str, float, int] | None
    epochs: int | None
    shuffle: bool | None
    drop_last: bool
    stride: int
    rank: int
    world_size: int


class LoaderOptions(StreamOptions, total=False):
    """As in `EpisodeSource.get_loader`, with the options of torch's `DataLoader` that have a use here."""

    output_device: torch.device | str | None
    collate_fn: Callable[[Any], Any] | None
    generator: torch.Generator | None
    in_order: bool
    multiprocessing_context: Any
    persistent_workers: bool
    pin_memory_device: str
    prefetch_factor: int | None
    timeout: float
    worker_init_fn: Callable[[int], None] | None


def rows_to_draw(
    sequence_length: int | None,
    *,
    pad_before: int | None = None,
    pad_after: int | None = None,
    pad: Pad = "zero",
    offsets: Mapping[str, Iterable[int]] | None = None,
    pack: int | None = None,
    split: tuple[str, float, int] | None = None,
    stride: int = 1,
) -> tuple[int | None, Selection, SequenceLayout]:
    """T, None for whole episodes, which windows there are, and how batches are laid out."""
    length = None if sequence_length is None else integer("sequence_length", sequence_length, 1)
    for name, given in (("offsets", offsets), ("pack", pack)):
        if given is not None and length not in (None, 1):
            raise ValueError(f"`{name}` says which rows are read: leave out `sequence_length`, found {length}.")
    with_edge = one_of("pad", pad, get_args(Pad)) == "edge"
    layout: SequenceLayout
    before = after = 0
    if offsets is not None:
        layout = OffsetLayout(offsets, with_edge)
        length, before, after = layout.length, layout.before, layout.after
        most = before, after
    else:
        length = None if pack is not None else length
        if length is None and (pad_before or pad_after):
            raise ValueError("Whole episodes are padded by themselves: leave out `pad_before` and `pad_after`.")
        most = (0, 0) if length is None else (length - 1, length - 1)
    before = before if pad_before is None else _padding("pad_before", pad_before, most[0])
    after = after if pad_after is None else _padding("pad_after", pad_after, most[1])
    if offsets is None:
        is_padded = length is None or before > 0 or after > 0
        layout = SequenceLayout(is_padded, with_edge) if pack is None else PackedLayout(integer("pack", pack, 1))
    return length, Selection(before, after, integer("stride", stride, 1), _checked_split(split)), layout


def _padding(name: str, value: int, most: int) -> int:
    value = integer(name, value, 0)
    if value > most:
        raise ValueError(
            f"`{name}` must be at most {most}, so that every window has a real row (or its anchor), found {value}."
        )
    return value


def _checked_split(split: Any) -> Split | None:
    if split is None:
        return None
    if not (isinstance(split, tuple | list) and len(split) == 3):
        raise TypeError(f"`split` must be (part, share, seed), such as ('train', 0.9, 0), found {split!r:.60}.")
    part, share, seed = split
    one_of("split", part, ("train", "val"))
    if not (isinstance(share, float) and 0.0 < share < 1.0):
        raise ValueError(f"The share of `split` must be between 0 and 1, found {share!r}.")
    return Split(part == "train", share, integer("seed", seed, 0))
