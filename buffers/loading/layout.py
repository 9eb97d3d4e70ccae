"""What a batch holds of its windows: the same rows of every field, or rows of its own for each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from buffers.fields import Fields
from buffers.loading.include import included
from buffers.loading.padding import pad
from buffers.table import Windows

if TYPE_CHECKING:
    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["OffsetLayout", "Rows", "SequenceLayout"]

Rows = dict[str, torch.Tensor]

_FARTHEST = 2**31


class SequenceLayout:
    """The rows of the windows: `(B, T, *shape)` of every field.

    Args:
        is_padded: Whether windows may reach beyond their episodes.
        with_edge: Whether padding repeats the nearest real row, instead of being zero.
    """

    #: Rows of a long row of episodes end to end; None where a batch is made of windows.
    num_packed: int | None = None
    #: The row of a window that stands for it; None where all rows do.
    anchor: int | None = None
    #: What batches have besides fields and `include`.
    extra: tuple[str, ...] = ()

    @property
    def is_packed(self) -> bool:
        """Whether a batch is made of episodes end to end, which are drawn together."""
        return self.num_packed is not None

    def __init__(self, is_padded: bool, with_edge: bool) -> None:
        self.is_padded, self._with_edge = is_padded, with_edge
        self._masked: tuple[Windows, npt.NDArray[np.bool_]] | None = None

    def check(self, fields: Fields) -> None:
        """ValueError for names that are no fields."""

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
        return 1.0 - float(windows.num_rows.sum()) / (len(windows) * windows.length)

    def _mask_of(self, windows: Windows) -> npt.NDArray[np.bool_]:
        """`windows.mask`, made once a batch."""
        masked = self._masked
        if masked is None or masked[0] is not windows:
            self._masked = masked = windows, windows.mask
        return masked[1]


class _Part(NamedTuple):
    """Fields that are read at the same n offsets: as windows of n rows if these follow each other, else of one row."""

    names: tuple[str, ...]
    num: int
    windows: Windows
    mask: npt.NDArray[np.bool_]  # `(B, n)`
    has_anchor: bool  # Whether each window has its anchor's row.


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
        self.anchor = self.before
        # The names of fields by their offsets, and the parts of a batch, made once.
        self._grouped: tuple[Fields, dict[tuple[int, ...], list[str]]] | None = None
        self._parts: tuple[Windows, list[_Part]] | None = None

    @property
    def length(self) -> int:
        """T, rows of the windows that hold all offsets of an anchor."""
        return self.before + 1 + self.after

    def check(self, fields: Fields) -> None:
        """ValueError for names that are no fields."""
        self._groups(fields)

    def _groups(self, fields: Fields) -> dict[tuple[int, ...], list[str]]:
        if self._grouped is None or self._grouped[0] is not fields:
            self._grouped = fields, _grouped(fields, self._offsets)
        return self._grouped[1]

    def _parts_of(self, source: EpisodeSource, windows: Windows) -> list[_Part]:
        parts = self._parts
        if parts is None or parts[0] is not windows:
            assert source.batch_fields is not None  # Windows are drawn from episodes, so there are fields.
            groups = self._groups(source.batch_fields).items()
            self._parts = parts = windows, [self._part(windows, offsets, tuple(names)) for offsets, names in groups]
        return parts[1]

    def _part(self, windows: Windows, offsets: tuple[int, ...], names: tuple[str, ...]) -> _Part:
        num = len(offsets)
        if offsets == tuple(range(offsets[0], offsets[0] + num)):
            part = windows.shifted(self.before + offsets[0], num)
            has_anchor = offsets[0] <= 0 <= offsets[-1]
        else:
            repeated = windows[np.arange(len(windows)).repeat(num)]
            part, has_anchor = repeated.shifted(self.before + np.tile(np.array(offsets), len(windows)), 1), False
        # The row of an anchor is real.
        mask = np.ones((len(windows), 1), np.bool_) if offsets == (0,) else part.mask.reshape(-1, num)
        return _Part(names, num, part, mask, has_anchor)

    def padding(self, source: EpisodeSource, windows: Windows) -> float:
        """The share of padding in the rows of a batch, where a row of each field counts."""
        parts = [(len(part.names), part.mask) for part in self._parts_of(source, windows)]
        return 1.0 - sum(num * int(mask.sum()) for num, mask in parts) / sum(num * mask.size for num, mask in parts)

    def leading(self, fields: Fields, windows: Windows) -> dict[str, tuple[int, int]]:
        """(B, n) of each field, for n offsets."""
        found = {name: len(offsets) for offsets, names in self._groups(fields).items() for name in names}
        return {name: (len(windows), found[name]) for name in fields}

    def read(self, source: EpisodeSource, windows: Windows, out: Rows | None) -> tuple[Rows, np.ndarray | None]:
        """As `EpisodeSource.read`: each field's rows, with padding."""
        read: Rows = {}
        was_read: np.ndarray | None = None
        for names, num, part, mask, has_anchor in self._parts_of(source, windows):
            is_padded, into = not mask.all(), None
            moved = part
            if is_padded and not has_anchor:
                # Of a window without a real row, the nearest is read.
                moved = part.moved_between(1 - part.length, part.episode_length - 1)
            if out is not None:
                into = {name: out[name].view(len(part), part.length, *out[name].shape[2:]) for name in names}
            rows, found = source.read(moved, into, names)
            if is_padded:
                pad(part, rows, mask, self._with_edge)
            if part.length != num:
                rows = {name: tensor.view(len(windows), num, *tensor.shape[2:]) for name, tensor in rows.items()}
            read |= rows
            if found is not None:
                was_read = found.reshape(len(windows), -1).all(1) & (True if was_read is None else was_read)
        return {name: read[name] for name in source.batch_fields or ()}, was_read

    def included(self, name: str, source: EpisodeSource, windows: Windows) -> Any:
        """As in `SequenceLayout`, of the anchors, `(B, 1)`; "mask" is a nested dict like the fields, `(B, n)` each."""
        if name != "mask":
            return super().included(name, source, windows.shifted(self.before, 1))
        assert source.batch_fields is not None  # Windows are drawn from episodes, so there are fields.
        masks: dict[str, torch.Tensor] = {}
        for part in self._parts_of(source, windows):
            masks |= {name: torch.from_numpy(part.mask.copy()) for name in part.names}
        return source.batch_fields.unflatten(masks)


def _checked_offsets(offsets: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...]]:
    if not isinstance(offsets, Mapping):
        raise TypeError(f"`offsets` must be a dict from fields to integers, found {type(offsets).__name__}.")
    checked = {}
    for name, group in offsets.items():
        try:
            checked[name] = tuple(operator.index(offset) for offset in group)
        except TypeError:
            raise TypeError(f"`offsets` of `{name}` must be integers, such as (-1, 0), found {group!r:.60}.") from None
        if checked[name] and max(map(abs, checked[name])) > _FARTHEST:
            raise ValueError(f"`offsets` of `{name}` must be within {_FARTHEST} rows, found {checked[name]!r:.60}.")
        if not checked[name]:
            raise ValueError(f"`offsets` of `{name}` are empty: leave the field out to read it at 0.")
    return checked


def _grouped(fields: Fields, offsets: Mapping[str, tuple[int, ...]]) -> dict[tuple[int, ...], list[str]]:
    """The fields by their offsets; ValueError for a name that is no field."""
    unknown = [key for key in offsets if not fields.below(key)]
    if unknown:
        raise ValueError(f"`offsets` names {unknown}, which are no fields. There are {list(fields)}.")
    found: dict[str, tuple[int, ...]] = dict.fromkeys(fields, (0,))
    # "obs/image" after "obs", as it says more.
    for key in sorted(offsets, key=len):
        found |= dict.fromkeys(fields.below(key), offsets[key])
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, offset in found.items():
        groups.setdefault(offset, []).append(name)
    return groups
