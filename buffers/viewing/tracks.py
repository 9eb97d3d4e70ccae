"""Prepare a sequence of a batch for drawing: a track for each field, and the timeline that they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from buffers.fields import Fields, PaddedPointcloud, TensorType
from buffers.loading.include import INCLUDABLE
from buffers.utils import integer, to_torch

__all__ = ["DrawnSequence", "Timeline", "Track", "evenly_spaced", "joined", "read_sequence", "to_numpy"]

BoolArray = npt.NDArray[np.bool_]
# `to_transitions` and `n_step_returns` make these out of fields, whose types they keep.
_DERIVED_FROM = {"next_obs": "obs", "bootstrap_obs": "obs"}


@dataclass(frozen=True)
class Timeline:
    """The T steps of a sequence.

    Attributes:
        x: int64 `(T,)`, ascending by 1: the position of step t on the axis.
        label: What x counts: steps of the episode or of the sequence.
        is_real: bool `(T,)`, False for padding.
        is_first: bool `(T,)`, True for the first step of an episode; all False if the batch does not say.
        is_last: bool `(T,)`, the same for the last step.
    """

    x: npt.NDArray[np.int64]
    label: str
    is_real: BoolArray
    is_first: BoolArray
    is_last: BoolArray

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Track:
    """One field of a sequence.

    Attributes:
        name: Its path.
        kind: Shape and dtype of a row in the batch, as the type that decides on the panel.
        values: `(T, *shape)` on any device; it shares the memory of the batch.
        has_mask: Whether the fourth number of each point of a cloud is its mask: 0 where there is no point.
    """

    name: str
    kind: TensorType
    values: torch.Tensor
    has_mask: bool = False

    def rows(self, positions: npt.NDArray[np.int64] | slice = slice(None)) -> np.ndarray:
        """A copy of some steps, `(n, *shape)`, in dtypes that numpy can calculate with (see `to_numpy`)."""
        picked = slice(None) if isinstance(positions, slice) else torch.from_numpy(positions).to(self.values.device)
        return to_numpy(self.values[picked])

    def describe(self, *notes: str) -> str:
        """Type, dtype, shape, and some notes, on one line."""
        kind = "" if type(self.kind) is TensorType else type(self.kind).__name__ + " "
        dtype = str(self.values.dtype).removeprefix("torch.")
        return ", ".join([f"{kind}{dtype} {self.kind.shape}", *(note for note in notes if note)])


def joined(tracks: Sequence[Track]) -> Track:
    """The first track, under the names of all."""
    return replace(tracks[0], name=", ".join(track.name for track in tracks))


@dataclass
class DrawnSequence:
    """One sequence of a batch.

    Attributes:
        tracks: The fields to draw, in the order of the batch.
        timeline: Its steps.
        facts: Parts of the title.
    """

    tracks: list[Track]
    timeline: Timeline
    facts: list[str] = field(default_factory=list)


def read_sequence(
    batch: Any, batch_index: int, fields: Fields | None, pointclouds: Collection[str] = ()
) -> DrawnSequence:
    """Take one sequence out of a batch, without changing it.

    Args:
        batch: `field -> (B, T, *shape)`, tensors or arrays, nested like the steps, with or without what `include` adds.
            Values of other shapes are named in the facts.
        batch_index: Which sequence; negative numbers count from the end.
        fields: The fields of the dataset; keys of the same name have the same type.
        pointclouds: Names of fields that are point clouds `(n, 3)`, or `(n, 4)` with a mask.

    Raises:
        TypeError: `batch` is not a batch.
        ValueError: `batch_index` is out of range, sequences have no steps, or a named field is no point cloud.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"`batch` must be a dict from field to tensor, found {type(batch).__name__}.")
    known: Mapping[str, TensorType] = {} if fields is None else fields
    leaves = {name: to_torch(value) for name, value in _walk(batch)}
    tensors = {name: value for name, value in leaves.items() if isinstance(value, torch.Tensor)}
    num_sequences, length = _leading_sizes(tensors, known)
    b = integer("batch_index", batch_index, -num_sequences)
    if b >= num_sequences:
        raise ValueError(f"`batch_index`={b} is out of range: the batch has {num_sequences} sequences.")
    if length == 0:
        raise ValueError("The batch has sequences of no steps: there is nothing to draw.")
    b %= num_sequences
    leading = (num_sequences, length)
    included = {name: tensors[name] for name in INCLUDABLE if name in tensors and name not in known}
    timeline = _read_timeline(tensors, included, b, leading)
    drawn = {
        name: value for name, value in tensors.items() if name not in included and tuple(value.shape[:2]) == leading
    }
    unknown = [name for name in pointclouds if name not in drawn]
    if unknown:
        raise ValueError(f"`pointclouds` names `{unknown[0]}`, expected fields of the batch: {list(drawn)}.")
    tracks = [
        _as_pointcloud(name, value[b].detach())
        if name in pointclouds or _origin(name) in pointclouds
        else Track(name, _kind_of(name, value, known), value[b].detach())
        for name, value in drawn.items()
    ]
    rest = {name: value for name, value in leaves.items() if name not in drawn and name not in included}
    return DrawnSequence(tracks, timeline, _facts(b, num_sequences, included, timeline, rest))


def evenly_spaced(positions: npt.NDArray[np.int64], num: int) -> npt.NDArray[np.int64]:
    """At most `num` of the positions, evenly spaced, including the first and the last."""
    if len(positions) <= num:
        return positions
    return positions[np.linspace(0, len(positions) - 1, num).round().astype(np.int64)]


def _walk(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _leading_sizes(tensors: Mapping[str, torch.Tensor], known: Mapping[str, TensorType]) -> tuple[int, int]:
    """B and T: the leading sizes of most of the dataset's fields, or of most tensors if it has none of them."""
    for name, value in tensors.items():
        if name in known and value.dim() == len(known[name].shape) + 1:
            expected = ", ".join(["B", "T", *map(str, known[name].shape)])
            raise TypeError(
                f"`batch` is not a batch: `{name}` has shape {tuple(value.shape)}, expected ({expected}). "
                "Add a batch axis to each value of a single sequence or episode: value[None]."
            )
    whole = [tuple(value.shape[:2]) for name, value in tensors.items() if _has_shape_of(value, known.get(name))]
    shapes = whole or [tuple(value.shape[:2]) for value in tensors.values() if value.dim() >= 2]
    if not shapes:
        raise TypeError(
            f"`batch` is not a batch: it has no tensor of shape (B, T, ...). Its keys: {list(tensors)!r:.200}."
        )
    num_sequences, length = Counter(shapes).most_common(1)[0][0]
    return num_sequences, length


def _has_shape_of(value: torch.Tensor, kind: TensorType | None) -> bool:
    return kind is not None and value.dim() >= 2 and tuple(value.shape[2:]) == kind.shape


def _kind_of(name: str, value: torch.Tensor, known: Mapping[str, TensorType]) -> TensorType:
    """The type that the dataset states, with the dtype and shape found; inferred from these if they do not fit it."""
    shape, dtype = tuple(value.shape[2:]), _drawn_dtype(value.dtype)
    stated = known.get(name, known.get(_origin(name)))
    if stated is not None:
        try:
            return type(stated)(shape, dtype)
        except (TypeError, ValueError):
            pass
    return TensorType.infer(shape, dtype)


def _origin(name: str) -> str:
    """The name of the field that this one was made of; its own, if of none."""
    first, slash, rest = name.partition("/")
    return _DERIVED_FROM.get(first, first) + slash + rest


def _as_pointcloud(name: str, values: torch.Tensor) -> Track:
    shape = tuple(values.shape[1:])
    if len(shape) != 2 or shape[1] not in (3, 4) or not values.is_floating_point():
        found = f"{str(values.dtype).removeprefix('torch.')} {shape}"
        raise ValueError(f"`pointclouds` names `{name}`, expected a float field (n, 3) or (n, 4), found {found}.")
    return Track(name, PaddedPointcloud(shape, _drawn_dtype(values.dtype)), values, has_mask=shape[1] == 4)


def _drawn_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize < 4):
        return torch.float32
    return dtype


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy on the CPU: floats of less than 32 bits as float32, complex numbers as their absolute values."""
    tensor = tensor.detach().cpu()
    if tensor.dtype.is_complex:
        tensor = tensor.abs()
    return np.array(tensor.to(_drawn_dtype(tensor.dtype)).numpy())


def _read_timeline(
    tensors: Mapping[str, torch.Tensor], included: Mapping[str, torch.Tensor], b: int, leading: tuple[int, int]
) -> Timeline:
    # `is_first` means the same as a field (a Recorder stores it). A field named `mask` or `step` may mean anything.
    is_first, is_last = (_flags(tensors.get(name), b, leading) for name in ("is_first", "is_last"))
    is_real = _flags(included.get("mask"), b, leading)
    length = leading[1]
    none = np.zeros(length, np.bool_)
    is_real = np.ones(length, np.bool_) if is_real is None else is_real
    x, label = np.arange(length), "step of the sequence"
    if "step" in included and tuple(included["step"].shape) == leading and is_real.any():
        # `step` is -1 in padding, where the axis continues. A transform that drops steps makes gaps it cannot show.
        shifts = (to_numpy(included["step"][b]).astype(np.int64) - x)[is_real]
        if (shifts == shifts[0]).all():
            x, label = x + shifts[0], "step of the episode"
    return Timeline(x, label, is_real, *(none if flags is None else flags for flags in (is_first, is_last)))


def _flags(value: torch.Tensor | None, b: int, leading: tuple[int, int]) -> BoolArray | None:
    if value is None or tuple(value.shape) != leading:
        return None
    return to_numpy(value[b]).astype(np.bool_)


def _facts(
    b: int, num_sequences: int, included: Mapping[str, torch.Tensor], timeline: Timeline, rest: Mapping[str, Any]
) -> list[str]:
    facts = [f"sequence {b} of {num_sequences}"]
    if "episode" in included and included["episode"].shape == (num_sequences,):
        facts.append(f"episode {included['episode'][b]}")
    if "source" in included and included["source"].shape == (num_sequences,):
        facts.append(f"member {included['source'][b]} of the mixture")
    real = timeline.x[timeline.is_real]
    if len(real):
        facts.append(f"{timeline.label.partition(' ')[0]}s {real[0]} to {real[-1]} {timeline.label.partition(' ')[2]}")
    if len(real) < len(timeline):
        facts.append(f"{len(timeline) - len(real)} of {len(timeline)} rows are padding")
    if "weight" in included and included["weight"].shape == (num_sequences,):
        facts.append(f"weight {float(included['weight'][b]):.3g}")
    ignored = []
    for name, value in rest.items():
        if isinstance(value, torch.Tensor) and value.shape == (num_sequences,):
            facts.append(f"{name} {value[b].item():.4g}")
        else:
            ignored.append(f"{name} {tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__}")
    if ignored:
        more = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
        facts.append(f"not drawn, as their shapes are not (B, T, ...): {', '.join(ignored[:3])}{more}")
    return facts
