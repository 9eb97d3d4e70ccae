"""The arguments of a loader, and what those that say which rows are drawn mean together."""

from __future__ import annotations

import difflib
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

__all__ = ["LoaderOptions", "StreamOptions", "check_names", "rows_to_draw"]

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
        split: ("train", 0.9, seed) or ("val", 0.9, seed): the episodes of one of two parts. Each is in the first with
            probability 0.9, by its id, whatever else is stored. Pieces of a stream count as episodes.
        epochs: How many passes an iteration makes. Each brings every window once, of what was stored when the iteration
            began. Weights of a mixture do not count.
        shuffle: With `epochs`: whether each pass has a random order of its own; True by default.
        drop_last: With `epochs`: leave out the last batches, so that all are full and all ranks have equally many.
        stride: With `epochs`: s, only every s-th window of each episode.
        rank: The number of this process, from 0. It gets the batches rank, rank + `world_size`, ... By default that of
            `torch.distributed`, if that is initialized and there is a `seed`, or `epochs`.
        world_size: How many processes share out the batches; they must give the same `seed`. By default as `rank`.
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
    rank: int | None
    world_size: int | None


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
    check_names(unknown, ())
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
        why = "as far as `offsets` reach"
    else:
        length = None if pack is not None else length
        if length is None and (pad_before or pad_after):
            what = "`pack` has no padding" if pack is not None else "Whole episodes are padded by themselves"
            raise ValueError(f"{what}: leave out `pad_before` and `pad_after`.")
        most = (0, 0) if length is None else (length - 1, length - 1)
        why = "so that every window has a real row"
    if length is None and stride != 1:
        raise ValueError("Whole episodes begin at their first row: leave out `stride`.")
    before = before if pad_before is None else _padding("pad_before", pad_before, most[0], why)
    after = after if pad_after is None else _padding("pad_after", pad_after, most[1], why)
    if offsets is None:
        is_padded = length is None or before > 0 or after > 0
        layout = SequenceLayout(is_padded, with_edge) if pack is None else PackedLayout(integer("pack", pack, 1))
    return length, Selection(before, after, integer("stride", stride, 1), _checked_split(split)), layout


def check_names(options: Iterable[str], others: Iterable[str]) -> None:
    """TypeError for a name that is neither an option of a loader nor one of these others."""
    known = {*StreamOptions.__annotations__, *LoaderOptions.__annotations__, *others}
    for name in options:
        if name not in others:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean `{close[0]}`?" if close and close[0] != name else ""
            raise TypeError(f"There is no argument `{name}` here.{hint}")


def _padding(name: str, value: int, most: int, why: str) -> int:
    value = integer(name, value, 0)
    if value > most:
        raise ValueError(f"`{name}` must be at most {most}, {why}, found {value}.")
    return value


def _checked_split(split: Any) -> Split | None:
    if split is None:
        return None
    if not (isinstance(split, tuple | list) and len(split) == 3):
        raise TypeError(f"`split` must be (part, share, seed), such as ('train', 0.9, 0), found {split!r:.60}.")
    part, share, seed = split
    one_of("split", part, ("train", "val"))
    if not (isinstance(share, float | np.floating) and 0.0 < share < 1.0):
        raise ValueError(f"The share of `split` must be more than 0 and less than 1, found {share!r}.")
    return Split(part == "train", float(share), integer("seed", seed, 0))
