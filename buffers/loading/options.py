"""What the arguments of a loader that say which rows are drawn mean together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from buffers.loading.layout import OffsetLayout, SequenceLayout
from buffers.loading.packing import PackedLayout
from buffers.table import Selection, Split
from buffers.utils import integer, one_of

__all__ = ["Pad", "RowOptions"]

Pad = Literal["zero", "edge"]


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """As in `EpisodeSource.get_loader`."""

    pad_before: int | None = None
    pad_after: int | None = None
    pad: Pad = "zero"
    offsets: Mapping[str, Iterable[int]] | None = None
    pack: int | None = None
    split: tuple[str, float, int] | None = None
    stride: int = 1

    def resolved(self, sequence_length: int | None) -> tuple[int | None, Selection, SequenceLayout]:
        """T, None for whole episodes, which windows there are, and how batches are laid out."""
        length = None if sequence_length is None else integer("sequence_length", sequence_length, 1)
        with_edge = one_of("pad", self.pad, get_args(Pad)) == "edge"
        most_before = most_after = 0 if length is None else length - 1
        layout = SequenceLayout(is_padded=length is None, with_edge=with_edge)
        before = after = 0
        if self.offsets is not None:
            if length not in (None, 1):
                raise ValueError(f"`offsets` say which rows are read: leave out `sequence_length`, found {length}.")
            layout = OffsetLayout(self.offsets, with_edge)
            length, before, after = layout.length, layout.before, layout.after
            most_before, most_after = before, after
        elif self.pack is not None:
            if length not in (None, 1):
                raise ValueError(f"`pack` takes whole episodes: leave out `sequence_length`, found {length}.")
            layout, length = PackedLayout(integer("pack", self.pack, 1)), None
        if length is None and (self.pad_before or self.pad_after):
            raise ValueError("Whole episodes are padded by themselves: leave out `pad_before` and `pad_after`.")
        if self.pad_before is not None:
            before = _padding("pad_before", self.pad_before, most_before)
        if self.pad_after is not None:
            after = _padding("pad_after", self.pad_after, most_after)
        selection = Selection(before, after, integer("stride", self.stride, 1), _checked_split(self.split))
        if selection.is_padded and not layout.is_padded:
            layout = SequenceLayout(is_padded=True, with_edge=with_edge)
        return length, selection, layout


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
