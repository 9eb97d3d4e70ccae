"""The arguments of a loader, and what those that say which rows are drawn mean together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import numpy as np
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
    """Which rows are drawn, and what is made of them; `docs/windows.md` draws what these mean.

    Attributes:
        sampler: Chooses the windows; uniformly over all by default.
        transform: A function of the batch, called in the worker.
        include: What else a batch holds, see `SequenceStream`.
        seed: Of all draws; None takes one from the operating system.
        pad_before: How many rows before its episode a window may begin, 0 to T - 1. Padded batches have a `mask`.
        pad_after: How many rows behind its episode a window may end.
        pad: What padding is: "zero", or "edge" for the nearest real row.
        offsets: In place of `sequence_length`: the n rows of each field that are read, relative to an anchor,
            `(B, n, *shape)`; 0 for fields that are not named. Every row is an anchor, unless `pad_before` or
            `pad_after` is less than the offsets reach.
        pack: In place of `sequence_length`: episodes end to end in long rows, `(B, pack, *shape)`, with `episode`,
            `step` int64 `(B, pack)` and `cu_seqlens` int32 `(n + 1,)`: where, in all rows, each of the n begins.
        split: ("train", 0.9, seed) or ("val", 0.9, seed): the episodes of one part, each of which is in one by its
            id, for ever. Pieces of a stream count as episodes.
        epochs: An iteration has every window so many times, in so many passes over what is stored as it begins,
            whatever the weights of a mixture.
        shuffle: With `epochs`: whether each pass has an order of its own; True by default.
        drop_last: With `epochs`: leave out what does not fill a batch for every rank.
        stride: With `epochs`: only every so many-th window of an episode.
        rank: Which of the processes that share out the batches: this has number rank, rank + `world_size`, ...
        world_size: How many they are; they must give the same `seed`.
    """

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
    """`StreamOptions`, and options of torch's `DataLoader` that have a use here.

    Attributes:
        output_device: Where batches are moved after `transform`; by default they are where the episodes are.
    """

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
    **unknown: Any,
) -> tuple[int | None, Selection, SequenceLayout]:
    """T, None for whole episodes, which windows there are, and how batches are laid out."""
    if unknown:
        raise TypeError(f"There is no argument `{min(unknown)}`.")
    length = None if sequence_length is None else integer("sequence_length", sequence_length, 1)
    for name, given in (("offsets", offsets), ("pack", pack)):
        if given is not None and length not in (None, 1):
            raise ValueError(f"`{name}` says which rows are read: leave out `sequence_length`, found {length}.")
    if pack is not None and (offsets is not None or pad != "zero"):
        raise ValueError("`pack` takes whole episodes as they are: leave out `offsets` and `pad`.")
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
    if length is None and stride != 1:
        raise ValueError("Whole episodes begin at their first row: leave out `stride`.")
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
    if not (isinstance(share, float | np.floating) and 0.0 < share < 1.0):
        raise ValueError(f"The share of `split` must be between 0 and 1, found {share!r}.")
    return Split(part == "train", float(share), integer("seed", seed, 0))
