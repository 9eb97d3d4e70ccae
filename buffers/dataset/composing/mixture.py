"""MixtureDataset: batches of several datasets, in exact shares.

A mixture may have mixtures as members. What is drawn from are their leaves, the datasets that hold episodes; a window's
`source` is the number of its leaf:

    member        0                1                            batch of 8
                 ring     mixture of two, 0.5 each              leaf 0  # # # #
    weight       0.5              0.5                           leaf 1  # #
    leaf          0            1       2                        leaf 2  # #
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, final

import numpy as np
import torch

from buffers.dataset.composing.mixture_fields import common_fields
from buffers.dataset.composing.weights import Float64Array, SharedWeights, shares
from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.printing import counts_line
from buffers.fields import Fields
from buffers.sampler import Sampler
from buffers.table import EpisodeTable, Int64Array, Windows

__all__ = ["MixtureDataset"]


@final
class MixtureDataset(EpisodeSource):
    """Several sources, of which every batch takes exact shares. It is read, never written to.

        >>> from buffers.dataset import RingBufferDataset
        >>> members = RingBufferDataset(capacity=1_000), RingBufferDataset(capacity=1_000)
        >>> for number, member in enumerate(members):
        ...     episode_id = member.add_episode({"number": np.full(50, number)})
        >>> mixture = MixtureDataset(members, weights=[0.25, 0.75])
        >>> next(iter(mixture.get_loader(batch_size=64, sequence_length=16)))["number"][:, 0].bincount()
        tensor([16, 48])

    Where a share is not whole, it is rounded up or down at random so that it is right on average, and the sum is the
    batch size. Within a member, the loader's sampler draws as it does from that member alone. Episodes are added to the
    members, and drawn from the next batch on. Workers see both, and changes of the weights.

    Args:
        datasets: The members: datasets of any kind, and other mixtures, on one device.
        weights: A number for each, at least 0; only their ratios matter.
        fields: Which fields batches have: None for all, which the members must agree on; "common" for those that all
            members have in the same shape and dtype; or their names, "obs" standing for all below it.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No members, other weights than members, or members whose fields differ: the error names the field.
    """

    has_members = True

    def __init__(
        self,
        datasets: Iterable[EpisodeSource],
        weights: Sequence[float],
        *,
        fields: Literal["common"] | Sequence[str] | None = None,
    ) -> None:
        self._members = list(datasets)
        for dataset in self._members:
            if not isinstance(dataset, EpisodeSource):
                raise TypeError(f"Members must be EpisodeDatasets, found {type(dataset).__name__}.")
        if not self._members:
            raise ValueError("A mixture needs at least one member, found none.")
        if len(devices := {str(dataset.device) for dataset in self._members}) > 1:
            raise ValueError(f"Members must be on one device, found {sorted(devices)}.")
        self._leaves: list[EpisodeSource] = []
        #: How an error calls each leaf: "1" for a member, "1.0" for the first leaf of one that is a mixture.
        self._names: list[str] = []
        for number, member in enumerate(self._members):
            if isinstance(member, MixtureDataset):
                self._leaves += member._leaves
                self._names += [f"{number}.{name}" for name in member._names]
            else:
                self._leaves.append(member)
                self._names.append(str(number))
        self._weights = SharedWeights(len(self._members))
        self._weights.set(weights)
        self._choice = fields if fields is None or isinstance(fields, str) else tuple(fields)
        super().__init__(sum(leaf.capacity for leaf in self._leaves))
        self.device = self._members[0].device
        self.table = _MixtureTable(self._leaves)
        self._find_fields()

    @property
    def datasets(self) -> tuple[EpisodeSource, ...]:
        """The members."""
        return tuple(self._members)

    @property
    def weights(self) -> Float64Array:
        """float64 `(members,)` of sum 1. Setting them takes effect with the next batch that is drawn, or read ahead."""
        return self._weights.get()

    @weights.setter
    def weights(self, weights: Sequence[float]) -> None:
        self._weights.set(weights)

    def _find_fields(self) -> None:
        fields = common_fields([member.fields for member in self._members], self._choice)
        # Members that do not know theirs lay out their storage, so that workers find it.
        if fields is None or self._choice is not None or self.tell_fields(fields):
            self._fields = fields

    def tell_fields(self, fields: Fields) -> bool:
        """Tell members the fields that do not know theirs."""
        unknown = [member for member in self._members if member.fields is None]
        return self._choice is None and all(member.tell_fields(fields) for member in unknown)

    def check_drawable(self) -> None:
        """RuntimeError while the fields are not known."""
        if self.fields is None:
            unknown = [n for n, member in enumerate(self._members) if member.fields is None]
            raise RuntimeError(
                f"The mixture cannot be drawn from: the fields of members {unknown} are not known yet. Add an "
                "episode to each, or state them with `info=EpisodeDatasetInfo(fields)`."
            )

    @property
    def longest_window(self) -> int:
        """Steps that an episode of a member can have at most."""
        return max(leaf.longest_window for leaf in self._leaves)

    def has_news(self) -> bool:
        """As `EpisodeSource.has_news`, of any member."""
        return any(leaf.has_news() for leaf in self._leaves)

    def draw(
        self,
        sampler: Sampler,
        num_windows: int,
        length: int | None,
        rng: np.random.Generator,
        again: Windows | None = None,
    ) -> Windows:
        """As `EpisodeSource.draw`, within each member."""
        if again is None:
            counts, weights = self._counts(num_windows, rng)
        else:
            # What was gone is drawn again from where it was.
            assert again.source is not None  # It was drawn here.
            counts = np.bincount(again.source, minlength=len(self._leaves))
            weights = counts.astype(np.float64)
        parts, leaves = [], []
        for number, leaf in enumerate(self._leaves):
            if weights[number] == 0:
                continue
            try:
                # Also where the share of this batch is 0, or an empty member would be an error now and then.
                part = leaf.draw(sampler, max(1, int(counts[number])), length, rng)
            except RuntimeError as error:
                name = f"{self._names[number]} ({type(leaf).__name__})"
                raise RuntimeError(f"Member {name} of the mixture: {error}") from error
            if counts[number]:
                parts.append(part)
                leaves.append(number)
        self.check_drawable()
        return _joined(parts, leaves)

    def _counts(self, num: int, rng: np.random.Generator) -> tuple[Int64Array, Float64Array]:
        """By leaf, the windows of a batch, and the weights."""
        weights = self.weights
        counts = shares(weights, num, rng)
        parts = []
        for n, member in enumerate(self._members):
            if isinstance(member, MixtureDataset):
                inner_counts, inner_weights = member._counts(int(counts[n]), rng)
                parts.append((inner_counts, inner_weights * weights[n]))
            else:
                parts.append((counts[n : n + 1], weights[n : n + 1]))
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def sources_of(self, windows: Windows) -> Int64Array:
        """The member of each window, int64 `(B,)`."""
        assert windows.source is not None  # It was drawn here.
        return np.array([int(name.partition(".")[0]) for name in self._names])[windows.source]

    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> np.ndarray | None:
        assert windows.source is not None  # It was drawn here.
        whole = np.ones(len(windows), np.bool_)
        bounds = [0, *(np.flatnonzero(np.diff(windows.source)) + 1).tolist(), len(windows)]
        for part in map(slice, bounds[:-1], bounds[1:]):
            leaf = self._leaves[windows.source[part.start]]
            was_read = _read_part(leaf, windows[part], {name: tensor[part] for name, tensor in out.items()})
            if was_read is not None:
                whole[part] = was_read
        return whole

    def episode_of_id(self, episode_id: int) -> dict[str, Any] | None:
        """A copy of an episode, by its position among those of all members; None if there are not so many."""
        for leaf in self._leaves:
            if episode_id < leaf.num_episodes:
                return leaf.get_episode(episode_id)
            episode_id -= leaf.num_episodes
        return None

    def episodes(self) -> Iterator[dict[str, Any]]:
        """Copies of all episodes, member by member."""
        for leaf in self._leaves:
            yield from leaf.episodes()

    @property
    def num_evicted(self) -> int:
        """Episodes that members have evicted so far."""
        return sum(leaf.num_evicted for leaf in self._leaves)

    @property
    def is_full(self) -> bool:
        """Whether all members are full."""
        return all(leaf.is_full for leaf in self._leaves)

    def check_workers(self) -> None:
        """ValueError where workers could not read from a member."""
        for leaf in self._leaves:
            leaf.check_workers()

    def __repr__(self) -> str:
        lines = [counts_line(self)]
        for number, (member, weight) in enumerate(zip(self._members, self.weights.tolist(), strict=True)):
            lines.append(f"  {number}: weight {weight:.3g}, {counts_line(member)}")
        return "\n".join(lines)


class _MixtureTable(EpisodeTable):
    """The episodes of all leaves, counted through in their order, which is their id here; only to be looked at."""

    def __init__(self, leaves: list[EpisodeSource]) -> None:
        self._leaves = leaves

    def __getstate__(self) -> dict[str, Any]:
        return {"_leaves": self._leaves}

    def __len__(self) -> int:
        return sum(len(leaf.table) for leaf in self._leaves)

    @property
    def num_steps(self) -> int:
        return sum(leaf.table.num_steps for leaf in self._leaves)

    @property
    def lengths(self) -> Int64Array:
        return np.concatenate([leaf.table.lengths for leaf in self._leaves])

    @property
    def ids(self) -> Int64Array:
        return np.arange(len(self))


def _joined(parts: list[Windows], leaves: list[int]) -> Windows:
    """Windows one after the other, with their leaves; those of whole episodes all get the length of the longest."""
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("start", "step", "episode", "episode_length")
    }
    weights = [np.ones(len(part), np.float32) if part.weight is None else part.weight for part in parts]
    source = np.repeat(np.array(leaves, np.int64), [len(part) for part in parts])
    return Windows(max(part.length for part in parts), **columns, weight=np.concatenate(weights), source=source)


def _read_part(leaf: EpisodeSource, windows: Windows, out: dict[str, torch.Tensor]) -> np.ndarray | None:
    longest = int(windows.num_rows.max())
    if longest == windows.length:
        return leaf.read(windows, out)[1]
    # Padded to an episode of another leaf, and this one may not even have room for so many rows.
    windows.length = longest
    rows = {name: tensor[:, :longest].contiguous() for name, tensor in out.items()}
    _, was_read = leaf.read(windows, rows)
    for name, tensor in out.items():
        tensor[:, :longest] = rows[name]
    return was_read
