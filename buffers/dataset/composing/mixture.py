"""MixtureDataset: batches of several datasets, in exact shares.

A mixture may have mixtures as members. Windows are drawn from the leaves, the datasets that hold episodes:

    member        0                1                            batch of 8
                 ring     mixture of two, 0.5 each              leaf 0  # # # #
    weight       0.5              0.5                           leaf 1  # #
    leaf          0            1       2                        leaf 2  # #
    its weight   0.5         0.25    0.25

`Windows.source` is the number of a leaf, `source` of a batch that of a member.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset.composing.mixture_fields import common_fields
from buffers.dataset.episode_source import EpisodeSource, Rows
from buffers.dataset.printing import counts_line
from buffers.fields import Fields, TensorType
from buffers.sampler import Sampler
from buffers.sharing.weights import Float64Array, SharedWeights, shares
from buffers.table import DrawContext, EpisodeTable, Int64Array, Selection, Windows, joined

if TYPE_CHECKING:
    from buffers.dataset.episode_dataset import EpisodeDataset

__all__ = ["MixtureDataset"]


@final
class MixtureDataset(EpisodeSource):
    """Several sources, of which every batch takes exact shares. Episodes are added to the members.

        >>> from buffers.dataset import RingBufferDataset
        >>> members = RingBufferDataset(capacity=1_000), RingBufferDataset(capacity=1_000)
        >>> for number, member in enumerate(members):
        ...     episode_id = member.add_episode({"number": np.full(50, number)})
        >>> mixture = MixtureDataset(members, weights=[0.25, 0.75])
        >>> next(iter(mixture.get_loader(batch_size=64, sequence_length=16)))["number"][:, 0].bincount()
        tensor([16, 48])

    A share that is not whole is rounded up or down at random, so that it is exact on average and the sum is the batch
    size. Within each member, the loader's sampler draws as it does from that member alone. Workers see episodes that
    members get later, and changes of the weights.

    Args:
        datasets: The members: datasets of any kind, and other mixtures, on one device.
        weights: A number for each, at least 0; only their ratios matter.
        fields: Which fields batches have: None for all, and members must not differ; "common" for those that all
            members have with the same shape and dtype; or names, where "obs" stands for all fields below it.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No members, not as many weights as members, members on several devices, or fields that differ.
    """

    has_members = reads_before_episodes = True

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
        # What errors call each leaf: "1" for a member, "1.0" for the first leaf of a member that is a mixture.
        self._names: list[str] = []
        member_of_leaf: list[int] = []
        for number, member in enumerate(self._members):
            if isinstance(member, MixtureDataset):
                self._leaves += member._leaves
                self._names += [f"{number}.{name}" for name in member._names]
            else:
                self._leaves.append(member)
                self._names.append(str(number))
            member_of_leaf += [number] * (len(self._leaves) - len(member_of_leaf))
        self._member_of_leaf = np.array(member_of_leaf)
        self._weights = SharedWeights(len(self._members))
        self._weights.set(weights)
        self._late: Fields | None = None
        self._choice = fields if fields is None or isinstance(fields, str) else tuple(fields)
        super().__init__(sum(leaf.capacity for leaf in self._leaves))
        self.device = self._members[0].device
        self.reads_in_chunks = all(leaf.reads_in_chunks for leaf in self._leaves)
        self.table = _MixtureTable(self._leaves)
        self._find_fields()

    @property
    def datasets(self) -> tuple[EpisodeSource, ...]:
        """The members."""
        return tuple(self._members)

    @property
    def weights(self) -> Float64Array:
        """float64 `(members,)` of sum 1. Setting them affects batches that are drawn later, by workers too."""
        return self._weights.get()

    @weights.setter
    def weights(self, weights: Sequence[float]) -> None:
        self._weights.set(weights)

    def _find_fields(self) -> None:
        fields = common_fields([member.fields for member in self._members], self._choice)
        if fields is not None:
            # Members without fields lay out their storage now, so that workers find it.
            self.tell_fields(fields)
            if all(member.fields is not None for member in self._members):
                self._fields = fields

    def tell_fields(self, fields: Fields) -> None:
        """Settle the fields of members that have none yet, unless this mixture restricts them."""
        if self._choice is None:
            for member in self._members:
                if member.fields is None:
                    member.tell_fields(fields)

    def check_drawable(self) -> None:
        """RuntimeError while the fields are not known."""
        if self.fields is None:
            for leaf in self._leaves:
                leaf.can_draw(None, Selection())  # So readers know their fields.
        if self.fields is None:
            unknown = [n for n, member in enumerate(self._members) if member.fields is None]
            raise RuntimeError(
                f"The mixture cannot be drawn from: the fields of members {unknown} are not known yet. Add an "
                "episode to each, or state them with `info=EpisodeDatasetInfo(fields)`."
            )

    @property
    def late_fields(self) -> Fields | None:
        """The late fields that all leaves have, of the same type."""
        found = [leaf.late_fields for leaf in self._leaves]
        first = found[0]
        if first is None or any(late is None for late in found):
            return None
        names = [n for n, kind in first.items() if all(late is not None and late.get(n) == kind for late in found)]
        if self._late is None or list(self._late) != names:
            self._late = first.select(names) if names else None
        return self._late

    @property
    def leaves(self) -> list[EpisodeSource]:
        """The datasets that hold the episodes."""
        return self._leaves

    def compressed_bytes(self) -> dict[str, int]:
        """As `EpisodeReader.compressed_bytes`, with the bytes that a field takes where it is not compressed."""
        found = [(leaf.compressed_bytes(), leaf.num_timesteps) for leaf in self._leaves]
        return {
            name: sum(sizes.get(name, num_steps * kind.nbytes) for sizes, num_steps in found)
            for name, kind in (self.fields or {}).items()
            if any(name in sizes for sizes, _ in found)
        }

    @property
    def stores(self) -> list[EpisodeDataset]:
        """As `EpisodeSource.stores`, of all members."""
        found = {id(store): store for leaf in self._leaves for store in leaf.stores}
        return list(found.values())

    def describe(self, stores: Sequence[object]) -> dict[str, Any]:
        """As `EpisodeSource.describe`."""
        members = [member.describe(stores) for member in self._members]
        return {
            "kind": type(self).__name__,
            "members": members,
            "weights": self.weights.tolist(),
            "fields": self._choice,
        }

    def restore(self, described: Mapping[str, Any]) -> None:
        """As `EpisodeSource.restore`: with the weights."""
        for member, part in zip(self._members, described["members"], strict=True):
            member.restore(part)
        self.weights = described["weights"]
        self.fields  # noqa: B018  (found now, for workers)

    @property
    def longest_window(self) -> int:
        """Steps that an episode of a member can have at most."""
        return max(leaf.longest_window for leaf in self._leaves)

    def has_news(self) -> bool:
        """As `EpisodeSource.has_news`, of any member."""
        return any(leaf.has_news() for leaf in self._leaves)

    def can_draw(self, length: int | None, selection: Selection, samplers: Sequence[Sampler] | None = None) -> bool:
        """As `EpisodeSource.can_draw`, of every member with a weight."""
        for number, weight in enumerate(self._leaf_weights()):
            own = None if samplers is None else samplers[number : number + 1]
            if weight and not self._leaves[number].can_draw(length, selection, own):
                return False
        return self.fields is not None  # Readers know their fields only after they have looked for episodes.

    def draw(
        self,
        samplers: Sequence[Sampler],
        num_windows: int,
        length: int | None,
        rng: np.random.Generator,
        selection: Selection,
        context: DrawContext,
    ) -> Windows:
        """As `EpisodeSource.draw`, within each member."""
        again = context.again
        if again is None:
            weights = self._leaf_weights()
            counts = shares(weights, num_windows, rng)
        else:
            # Each is replaced by a window of the same leaf.
            assert again.source is not None  # It was drawn here.
            counts = np.bincount(again.source, minlength=len(self._leaves))
            weights = counts.astype(np.float64)
        parts, leaves = [], []
        for number, leaf in enumerate(self._leaves):
            own = samplers[number : number + 1]
            if weights[number] == 0:
                own[0].skip(context)
                continue
            try:
                if not counts[number] and leaf.can_draw(length, selection, own):
                    own[0].skip(context)
                    continue
                # An empty member that gets no window this time shall be an error, too.
                part = leaf.draw(own, max(1, int(counts[number])), length, rng, selection, context)
                if context.needs_density:
                    num = leaf.num_to_draw(length, selection, own[0])
                    density = np.ones(len(part)) if part.density is None else part.density
                    part.density = density * self._leaf_weights()[number] / num
            except RuntimeError as error:
                name = f"{self._names[number]} ({type(leaf).__name__})"
                raise RuntimeError(f"Member {name} of the mixture: {error}") from error
            if counts[number]:
                parts.append(part)
                leaves.append(number)
        self.check_drawable()
        return joined(parts, leaves)

    def _leaf_weights(self) -> Float64Array:
        """float64 `(leaves,)` of sum 1."""
        parts = [
            weight * (member._leaf_weights() if isinstance(member, MixtureDataset) else np.ones(1))
            for weight, member in zip(self.weights, self._members, strict=True)
        ]
        return np.concatenate(parts)

    def add_late_field(self, name: str, type: TensorType, default: Any = 0) -> None:
        """`EpisodeDataset.add_late_field`, of all members."""
        for leaf in self._leaves:
            leaf.add_late_field(name, type, default)

    def update(self, index: Any, values: Mapping[str, Any], source: Any = None) -> int:
        """`EpisodeDataset.update` of the members: `source` int64 `(B,)` has each window's, as `include` gives them."""
        if any(member.has_members for member in self._members):
            raise ValueError("A member is a mixture, whose members `source` does not tell apart: use one mixture.")
        if source is None:
            raise ValueError("Step ids are those of a member: `include` 'source', and pass it on.")
        ids, numbers = as_array("index", index), as_array("source", source)
        # numpy has no bfloat16.
        arrays = {n: value if isinstance(value, torch.Tensor) else as_array(n, value) for n, value in values.items()}
        if numbers.shape != ids.shape[:1] or not np.isin(numbers, range(len(self._members))).all():
            expected = f"{ids.shape[:1]} numbers of members, 0 to {len(self._members) - 1}"
            raise ValueError(f"`source` must be {expected}, found {source!r:.80}.")
        parts = []
        for number in np.unique(numbers).tolist():
            leaf, chosen = self._leaves[number], numbers == number
            assert leaf.late is not None  # It is no mixture.
            # Those of another length are refused as they are.
            part = {n: array[chosen] if len(array) == len(ids) else array for n, array in arrays.items()}
            parts.append((leaf, leaf.late.checked(ids[chosen], part)))
        return sum(leaf.late.write(leaf.table, *checked) for leaf, checked in parts if leaf.late is not None)

    def sources_of(self, windows: Windows) -> Int64Array:
        """The member of each window, int64 `(B,)`."""
        return self._member_of_leaf[windows.source]

    def _read(self, windows: Windows, out: Rows) -> np.ndarray | None:
        assert windows.source is not None  # It was drawn here.
        whole = np.ones(len(windows), np.bool_)
        bounds = [0, *(np.flatnonzero(np.diff(windows.source)) + 1).tolist(), len(windows)]
        for part in map(slice, bounds[:-1], bounds[1:]):
            leaf = self._leaves[windows.source[part.start]]
            was_read = leaf.read(windows[part], {name: tensor[part] for name, tensor in out.items()})[1]
            if was_read is not None:
                whole[part] = was_read
        return whole

    def episode_of_id(self, episode_id: int) -> dict[str, Any] | None:
        """A copy of an episode, by its position among those of all members; None if it is out of range."""
        for leaf in self._leaves:
            if episode_id < leaf.num_episodes:
                return leaf.get_episode(episode_id)
            episode_id -= leaf.num_episodes
        return None

    def episode_info(self, episode_id: int) -> dict[str, Any]:
        """RuntimeError: members number their episodes by themselves."""
        raise RuntimeError(
            "A mixture does not keep the info of episodes. Ask the member: `mixture.datasets[n].episode_info(id)`, "
            "with `source` and `episode` of a batch for n and id."
        )

    def episodes(self) -> Iterator[dict[str, Any]]:
        """Copies of all episodes, in the order of the members."""
        for leaf in self._leaves:
            yield from leaf.episodes()

    @property
    def num_evicted(self) -> int:
        """Episodes evicted so far, of all members."""
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
    """The episodes of all leaves in their order; an episode's id here is its position. Read-only."""

    def __init__(self, leaves: list[EpisodeSource]) -> None:
        self._leaves = leaves
        self.has_cuts = True  # Of an episode that a member may get.

    def __len__(self) -> int:
        return sum(len(leaf.table) for leaf in self._leaves)

    @property
    def num_steps(self) -> int:
        return sum(leaf.table.num_steps for leaf in self._leaves)

    @property
    def ids(self) -> Int64Array:
        return np.arange(len(self))

    @property
    def rows(self) -> Int64Array:
        return np.concatenate([leaf.table.rows for leaf in self._leaves])
