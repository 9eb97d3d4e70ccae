"""What writers, learners and shards send each other: numbers, texts, and contiguous arrays of numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from buffers.conversion import as_array
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.verification import VerificationMode
from buffers.fields import Fields
from buffers.remote.memory import NewArray

__all__ = [
    "Description",
    "Drawn",
    "News",
    "Pack",
    "Receipt",
    "Request",
    "Told",
    "copied",
    "from_wire",
    "num_bytes",
    "sizes_on_wire",
    "to_wire",
]


class Description(NamedTuple):
    """What a shard is.

    Attributes:
        number: Of the shard.
        fields: Those of its dataset, None before they are settled.
        episode_capacity: Steps of the longest episode that it takes.
        verification_mode: How closely rows are checked.
        is_saved: Whether it has a directory of saves.
    """

    number: int
    fields: Fields | None
    episode_capacity: int
    verification_mode: VerificationMode
    is_saved: bool


class Pack(NamedTuple):
    """Episodes of one writer for one shard, end to end.

    Attributes:
        writer: Of one process: another one that goes on in its place has another name.
        kept_from: Episodes with lower numbers will not be sent again.
        first: Number of the first episode here; the others follow. Each shard has numbers of its own, from 0 on.
        lengths: Rows of each episode; empty if the writer only asks for a receipt.
        cuts: As in `EpisodeSink.add`.
        infos: As in `EpisodeSink.add`.
        fields: Those of `rows`; None without episodes.
        rows: `name -> (sum of lengths, *shape)`.
        wants_save: The writer keeps much that is stored and not saved.
    """

    writer: str
    kept_from: int
    first: int
    lengths: list[int]
    cuts: list[int]
    infos: list[EpisodeInfo | None]
    fields: Fields | None
    rows: dict[str, np.ndarray]
    wants_save: bool


class Told(NamedTuple):
    """What a learner tells of itself.

    Attributes:
        loader: Its name, which it keeps when it is resumed.
        num_drawn: Steps of the batches that were delivered.
        batch_steps: Steps of one batch.
        can_draw: Whether some shard has a window for it.
    """

    loader: str
    num_drawn: int
    batch_steps: int
    can_draw: bool


class News(NamedTuple):
    """What every answer says of its shard.

    Attributes:
        life: Another number after each start.
        num_added: Steps that it has ever stored.
        loaders: What learners have told, by name.
        trouble: Why it cannot store or save, None if it can.
    """

    life: int
    num_added: int
    loaders: dict[str, Told]
    trouble: str | None


class Receipt(NamedTuple):
    """The answer to a pack.

    Attributes:
        next: All of the writer's episodes with lower numbers are stored, or refused.
        saved: All with lower numbers need not be kept any more: they are in a save, or the shard makes none.
        refused: Why episodes can never be stored, by their numbers.
    """

    next: int
    saved: int
    refused: dict[int, str]
    news: News


class Request(NamedTuple):
    """How a learner draws: the arguments of `EpisodeSource.get_loader`."""

    batch_size: int
    sequence_length: int | None
    options: dict[str, Any]


class Drawn(NamedTuple):
    """The answer to a learner.

    Attributes:
        is_known: Whether the shard knows the request. If not, it was started anew, and has to be told.
        num_windows: How many windows there are to draw.
        batch: By `to_wire`; None if none was asked for, or there is no window.
    """

    is_known: bool
    num_windows: int
    batch: Any
    news: News


class _Tensor:
    """A tensor as an array; bfloat16 as int16."""

    __slots__ = ("array", "dtype")

    def __init__(self, array: np.ndarray, dtype: torch.dtype) -> None:
        self.array, self.dtype = array, dtype


def to_wire(batch: Any) -> Any:
    """A batch with contiguous arrays in place of its tensors."""
    return tree_map_only(torch.Tensor, _as_array, batch)


def _as_array(tensor: torch.Tensor) -> _Tensor:
    plain = tensor.detach().cpu()
    plain = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
    return _Tensor(np.ascontiguousarray(as_array("batch", plain)).reshape(plain.shape), tensor.dtype)


def from_wire(batch: Any, new_array: NewArray) -> Any:
    """A batch with tensors again, which are copies: what was received is read-only, and shared with others.

    `new_array` gives them memory.
    """
    return tree_map_only(_Tensor, lambda leaf: _copied(leaf, new_array), batch)


def sizes_on_wire(batch: Any) -> list[int]:
    """The bytes of each tensor of a batch that travelled, in the order in which `from_wire` asks for memory."""
    return [leaf.array.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, _Tensor)]


def _copied(leaf: _Tensor, new_array: NewArray) -> torch.Tensor:
    tensor = torch.from_numpy(copied(leaf.array, new_array))
    return tensor.view(torch.bfloat16) if leaf.dtype == torch.bfloat16 else tensor


def copied(array: np.ndarray, new_array: NewArray) -> np.ndarray:
    """A contiguous copy, in memory that `new_array` gives."""
    copy = new_array(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy


def num_bytes(rows: Mapping[str, np.ndarray]) -> int:
    """Of all arrays."""
    return sum(array.nbytes for array in rows.values())
