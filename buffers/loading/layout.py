"""What a batch holds of its windows: the same rows of every field, or rows of its own for each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_leaves

from buffers.fields import Fields
from buffers.loading.include import included
from buffers.loading.padding import pad
from buffers.table import Windows

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["OffsetLayout", "Rows", "SequenceLayout"]

Rows = dict[str, torch.Tensor]


class SequenceLayout:
    """The rows of the windows: `(B, T, *shape)` of every field.

    Args:
        is_padded: Whether windows may reach beyond their episodes.
        with_edge: Whether padding repeats the nearest real row, instead of being zero.
    """

    #: Whether a batch is made of episodes end to end, which are replaced together.
    is_packed = False
    #: What batches have besides fields and `include`.
    extra: tuple[str, ...] = ()

    def __init__(self, is_padded: bool, with_edge: bool) -> None:
        self.is_padded, self._with_edge = is_padded, with_edge
        self._masked: tuple[Windows, npt.NDArray[np.bool_]] | None = None

    def draw(self, num_windows: int, rng: np.random.Generator, draw: Callable[[int], Windows]) -> Windows:
        """The windows of a batch; `draw` draws as many as it is asked for."""
        return draw(num_windows)

    def leading(self, fields: Fields, windows: Windows) -> dict[str, tuple[int, int]]:
        """The first two sizes, (B, T), of each field's rows."""
        return dict.fromkeys(fields, (len(windows), windows.length))

    def read(self, source: EpisodeSource, windows: Windows, out: Rows | None) -> tuple[Rows, np.ndarray | None]:
        """As `EpisodeSource.read`, with padding."""
        rows, was_read = source.read(windows, out)
        if self.is_padded:
            pad(windows, rows, self._mask_of(windows), self._with_edge)
        return rows, was_read

    def included(self, name: str, source: EpisodeSource, windows: Windows) -> Any:
        """What `include` calls `name`: a tensor, or a nested dict of some."""
        if name == "mask":
            return torch.from_numpy(self._mask_of(windows))
        return torch.from_numpy(source.sources_of(windows)) if name == "source" else included(name, windows)

    def padding(self, source: EpisodeSource, windows: Windows) -> float:
        """The share of padding in the rows of a batch."""
        masks = tree_leaves(self.included("mask", source, windows))
        return 1.0 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def _mask_of(self, windows: Windows) -> npt.NDArray[np.bool_]:
        """`windows.mask`, made once a batch."""
        if self._masked is None or self._masked[0] is not windows:
            self._masked = windows, windows.mask
        return self._masked[1]


class _Group(NamedTuple):
    """Fields that are read at the same offsets."""

    names: tuple[str, ...]
    offsets: tuple[int, ...]


class OffsetLayout(SequenceLayout):
    """Each field at its own offsets from an anchor, a row of an episode: `(B, n, *shape)`.

    A window has all rows that any field may need:

        offsets  obs -1 0, action 0 1 2         anchor          a
        window of T = 4                         row     a - 1   a   a + 1   a + 2
                                                obs       #     #
                                                action          #     #       #

    Args:
        offsets: Of each field that is named, or of all below it; others are read at 0.
        with_edge: As in `SequenceLayout`.
    """

    def __init__(self, offsets: Mapping[str, Iterable[int]], with_edge: bool) -> None:
        super().__init__(is_padded=True, with_edge=with_edge)
        self._offsets = _checked_offsets(offsets)
        reached = [0, *(offset for group in self._offsets.values() for offset in group)]
        #: Rows before and after an anchor, as far as the offsets reach.
        self.before, self.after = -min(reached), max(reached)
        self._grouped: tuple[Fields, list[_Group]] | None = None

    @property
    def length(self) -> int:
        """T, rows of the windows that hold all offsets of an anchor."""
        return self.before + 1 + self.after

    def groups(self, fields: Fields) -> list[_Group]:
        """The fields by their offsets; ValueError for a name that is no field."""
        if self._grouped is None or self._grouped[0] is not fields:
            self._grouped = fields, _grouped(fields, self._offsets)
        return self._grouped[1]

    def leading(self, fields: Fields, windows: Windows) -> dict[str, tuple[int, int]]:
        """(B, n) of each field, for n offsets."""
        found = {name: len(offsets) for names, offsets in self.groups(fields) for name in names}
        return {name: (len(windows), found[name]) for name in fields}

    def read(self, source: EpisodeSource, windows: Windows, out: Rows | None) -> tuple[Rows, np.ndarray | None]:
        """As `EpisodeSource.read`: each field's rows, with padding."""
        fields, num_windows = source.fields, len(windows)
        assert fields is not None  # Windows are drawn from episodes, so there are fields.
        read: Rows = {}
        was_read = np.ones(num_windows, np.bool_)
        for names, offsets in self.groups(fields):
            num = len(offsets)
            part = _windows_at(windows, self.before, offsets)
            rows = source.empty_batch(names, num_windows, num) if out is None else {name: out[name] for name in names}
            read |= rows
            if part.length != num:
                rows = {name: tensor.view(-1, 1, *tensor.shape[2:]) for name, tensor in rows.items()}
            # Of a window without a real row, the nearest is read.
            _, found = source.read(part.moved_between(1 - part.length, part.episode_length - 1), rows)
            pad(part, rows, part.mask, self._with_edge)
            if found is not None:
                was_read &= found.reshape(num_windows, -1).all(1)
        return {name: read[name] for name in fields}, None if was_read.all() else was_read

    def included(self, name: str, source: EpisodeSource, windows: Windows) -> Any:
        """As in `SequenceLayout`, of the anchors, `(B, 1)`; "mask" is a nested dict like the fields, `(B, n)` each."""
        if name != "mask":
            return super().included(name, source, windows.shifted(self.before, 1))
        assert source.fields is not None  # Windows are drawn from episodes, so there are fields.
        masks: dict[str, torch.Tensor] = {}
        for names, offsets in self.groups(source.fields):
            mask = torch.from_numpy(_windows_at(windows, self.before, offsets).mask.reshape(-1, len(offsets)))
            masks |= {name: mask.clone() for name in names}
        return source.fields.unflatten(masks)


def _windows_at(windows: Windows, before: int, offsets: tuple[int, ...]) -> Windows:
    """The windows of one field: B of n rows where its offsets follow each other, else B * n of one row."""
    if offsets == tuple(range(offsets[0], offsets[0] + len(offsets))):
        return windows.shifted(before + offsets[0], len(offsets))
    repeated = windows[np.arange(len(windows)).repeat(len(offsets))]
    return repeated.shifted(before + np.tile(np.array(offsets, np.int64), len(windows)), 1)


def _checked_offsets(offsets: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...]]:
    if not isinstance(offsets, Mapping):
        raise TypeError(f"`offsets` must be a dict from fields to integers, found {type(offsets).__name__}.")
    checked = {}
    for name, group in offsets.items():
        try:
            checked[name] = tuple(operator.index(offset) for offset in group)
        except TypeError:
            raise TypeError(f"`offsets` of `{name}` must be integers, such as (-1, 0), found {group!r:.60}.") from None
        if not checked[name]:
            raise ValueError(f"`offsets` of `{name}` are empty: leave the field out to read it at 0.")
    return checked


def _grouped(fields: Fields, offsets: Mapping[str, tuple[int, ...]]) -> list[_Group]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in fields:
        # The most specific of "obs/image" and "obs".
        found = max((key for key in offsets if f"{name}/".startswith(f"{key}/")), key=len, default=None)
        groups.setdefault((0,) if found is None else offsets[found], []).append(name)
    unknown = [key for key in offsets if not any(f"{name}/".startswith(f"{key}/") for name in fields)]
    if unknown:
        raise ValueError(f"`offsets` names {unknown}, which are no fields. There are {list(fields)}.")
    return [_Group(tuple(names), offset) for offset, names in groups.items()]
