"""Functions on a batch of recorded rows, for the `transform=` of a loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from buffers.utils import integer, one_of

__all__ = ["action_chunks", "n_step_returns", "split_burn_in", "stack_frames", "to_transitions"]

_ROW_FIELDS = ("obs", "action", "reward", "terminated", "truncated")
# From the row before a transition.
_BEFORE = ("obs", "is_first", "index", "step")
# One value a sequence, not one a row.
_PER_SEQUENCE = ("episode", "weight", "source")
# One value a row: they tell batches from single sequences.
_PER_ROW = ("mask", "index", "step", "is_first", "is_last", "terminated", "truncated")


def stack_frames(
    batch: Mapping[str, Any], field: str, n: int, channels: Literal["first", "last"] | None = None
) -> dict[str, Any]:
    """Stack each frame with the n - 1 before it, as a view of the batch: no frame is stored or copied twice.

    The first n - 1 rows serve as history only. So for T stacks, of all rows from an episode's first on, draw
    `sequence_length=T + n - 1, pad_before=n - 1`. Before the first frame, stacks repeat it with `pad="edge"`, and are
    zero with `pad="zero"`.

        n = 3      rows       o0 o0 o0 o1 o2           the first two are padding, by `pad="edge"`
                   stacks     o0 o0 o0
                                 o0 o0 o1
                                    o0 o1 o2

        >>> stack_frames({"obs": torch.tensor([[0, 0, 0, 1, 2]])}, "obs", n=3)["obs"].tolist()
        [[[0, 0, 0], [0, 0, 1], [0, 1, 2]]]

    For transitions of stacks, call `to_transitions` afterwards.

    Args:
        batch: `field -> (B, T + n - 1, *shape)`, or `(T + n - 1, *shape)` for a single sequence: `mask`, `step` or
            another of the names with one value a row tells which. Without them, a field of one axis does.
        field: Its name, "obs/image" in nested dicts; "obs" stands for all fields below it.
        n: Frames in a stack, at least 1.
        channels: "first" joins the frames in the first axis of `shape`, `(C, H, W)` to `(n * C, H, W)`; "last" in its
            last, `(H, W, C)` to `(H, W, n * C)`, which copies, as there is no such view.

    Returns:
        The batch, with the field as `(B, T, n, *shape)`, or joined, the oldest frame first, and the last T rows of all
        else. `episode`, `weight` and `source` `(B,)` are unchanged. Stacks share frames: do not change them in place.

    Raises:
        ValueError: An argument out of its range, no such field, or fewer than n rows.
    """
    integer("n", n, 1)
    if channels is not None:
        one_of("channels", channels, ("first", "last"))
    axis, length = _time(batch)
    parent, key = _parent(batch, field)
    if length < n:
        raise ValueError(f"Stacks of `n`={n} frames need as many rows, found sequences of {length}.")

    def stack(frames: torch.Tensor) -> torch.Tensor:
        stacks = _sliding(frames, axis, n)
        if channels is None:
            return stacks
        if frames.dim() == axis + 1:
            raise ValueError(f"`{field}` is one number a row: it has no axis for `channels`={channels!r}.")
        return stacks.flatten(axis + 1, axis + 2) if channels == "first" else stacks.movedim(axis + 1, -2).flatten(-2)

    stacked = _narrow_all(batch, axis, n - 1, length - n + 1)
    _parent(stacked, field)[0][key] = _apply(stack, parent[key])
    return stacked


def split_burn_in(batch: Mapping[str, Any], burn_in: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split sequences into the rows that warm up a recurrent state and those to learn from, as views of the batch.

    As in R2D2. To learn from all rows, from an episode's first on, draw `sequence_length=burn_in + T,
    pad_before=burn_in`.

        >>> warm_up, batch = split_burn_in({"obs": torch.arange(5)[None], "weight": torch.ones(1)}, burn_in=2)
        >>> warm_up["obs"], batch["obs"]
        (tensor([[0, 1]]), tensor([[2, 3, 4]]))

    Args:
        batch: As for `stack_frames`.
        burn_in: From 0 to one less than the rows of a sequence.

    Returns:
        The first `burn_in` rows of all fields, and the others. Both have `episode`, `weight` and `source` `(B,)`.

    Raises:
        ValueError: `burn_in` is negative, or leaves no row.
    """
    integer("burn_in", burn_in, 0)
    axis, length = _time(batch)
    if length <= burn_in:
        raise ValueError(f"A `burn_in` of {burn_in} rows leaves none to learn from, found sequences of {length}.")
    return _narrow_all(batch, axis, 0, burn_in), _narrow_all(batch, axis, burn_in, length - burn_in)


def action_chunks(batch: Mapping[str, Any], h: int, field: str = "action", first: int = 0) -> dict[str, Any]:
    """Give each row the h actions from it on, as a view of the batch: for policies that predict chunks of actions.

    Where a row holds an observation and the action that was taken then, draw `sequence_length=T + h - 1,
    pad_after=h - 1`. Rows of a Recorder are aligned on arrival, so the action that was taken at o_t is in row t + 1:
    draw `sequence_length=T + h, pad_after=h - 1`, and take `first=1`.

        first = 1, h = 2, T = 3      rows     o0    o1    o2    o3
                                              -     a0    a1    a2
                                     chunks   a0 a1
                                                    a1 a2
                                                          a2 -        padding behind the end of the episode

        >>> batch = {"action": torch.tensor([[-1, 0, 1, 2, 0]]), "mask": torch.tensor([[True] * 4 + [False]])}
        >>> chunks = action_chunks(batch, h=2, first=1)
        >>> chunks["action"].tolist(), chunks["action_mask"][0, 2].tolist()
        ([[[0, 1], [1, 2], [2, 0]]], [True, False])

    Args:
        batch: `field -> (B, T + h - 1 + first, *shape)`; also single sequences, as for `stack_frames`.
        h: Actions in a chunk, at least 1.
        field: Of the actions, by name as for `stack_frames`.
        first: The row of a chunk's first action, relative to the row of its observation, at least 0.

    Returns:
        The batch, with the field as `(B, T, h, *shape)`: chunk t has rows t + first to t + first + h - 1. Beside it is
        `<field>_mask`, bool `(B, T, h)`: which of a chunk's actions are real, by `mask`; all are, without one. All else
        is of the first T rows; `episode`, `weight` and `source` are unchanged.

    Raises:
        ValueError: An argument out of its range, no such field, a field of that name, or too few rows.
    """
    integer("h", h, 1)
    integer("first", first, 0)
    axis, length = _time(batch)
    parent, key = _parent(batch, field)
    _check_free(parent, f"{key}_mask")
    if length < h + first:
        raise ValueError(f"`h`={h} with `first`={first} needs {h + first} rows, found sequences of {length}.")

    def chunk(rows: torch.Tensor) -> torch.Tensor:
        return _sliding(rows.narrow(axis, first, length - first), axis, h)

    is_real = _mask(batch, _leaves(parent[key])[0], axis)
    chunked = _narrow_all(batch, axis, 0, length - h + 1 - first)
    _parent(chunked, field)[0].update({key: _apply(chunk, parent[key]), f"{key}_mask": chunk(is_real)})
    return chunked


def to_transitions(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Make T transitions of T + 1 rows aligned on arrival, as views of the batch.

        rows            o0        o1        o2             row t holds what led to o_t
                        -    a0 r1 d1   a1 r2 d2
        transitions     o0 a0 r1 d1 o1     o1 a1 r2 d2 o2

    With `sequence_length=2`, every stored transition is one window, and all are equally likely.

        >>> rows = {"obs": torch.tensor([0.0, 0.1, 0.2]), "action": torch.tensor([0, 1, 0])}
        >>> rows |= {"reward": torch.tensor([0.0, 0.5, 0.7]), "terminated": torch.tensor([False, False, True])}
        >>> transitions = to_transitions(rows | {"truncated": torch.zeros(3, dtype=torch.bool)})
        >>> transitions["obs"], transitions["action"], transitions["next_obs"]
        (tensor([0.0000, 0.1000]), tensor([1, 0]), tensor([0.1000, 0.2000]))

    Args:
        batch: As recorded, `field -> (B, T + 1, *shape)`, or `(T + 1, *shape)` for a single sequence, T at least 1.

    Returns:
        `field -> (B, T, *shape)`: `obs`, `is_first`, `index` and `step` from the row before the transition, with which
        the window begins; `next_obs` and all else from the row on arrival. `episode`, `weight` and `source` `(B,)` are
        unchanged. By `mask`, a transition is real if both of its rows are; else its `index` and `step` are -1.

    Raises:
        ValueError: A field is missing, `next_obs` exists already, or sequences have one row.
    """
    missing = [name for name in _ROW_FIELDS if name not in batch]
    if missing:
        raise ValueError(
            f"The batch has no {missing}: `to_transitions` takes what a Recorder has recorded. If the data does not "
            "say, add them to the batch before, as docs/formats.md shows."
        )
    _check_free(batch, "next_obs")
    _check_sequences(batch)
    axis = batch["terminated"].dim() - 1
    length = batch["terminated"].shape[axis]
    if length < 2:
        raise ValueError("A transition needs two rows, found sequences of 1. Draw with `sequence_length=2` or more.")
    transitions = _narrow_all(batch, axis, 1, length - 1, one_before=_BEFORE)
    transitions["next_obs"] = _narrow(batch["obs"], axis, 1, length - 1)
    if _has_mask(batch, axis):
        is_real = batch["mask"][..., :-1] & batch["mask"][..., 1:]
        # The row before padding is real, but no transition begins with it.
        ids = {name: transitions[name].masked_fill(~is_real, -1) for name in ("index", "step") if name in batch}
        transitions |= {**ids, "mask": is_real}
    return transitions


def n_step_returns(batch: Mapping[str, Any], n: int, gamma: float) -> dict[str, Any]:
    """Add discounted sums of up to n rewards, and the observations to bootstrap from after them.

        target = batch["return"] + batch["discount"] * value(batch["bootstrap_obs"])

    From transition t on, m rewards are summed: n, or fewer if the episode or the sequence ends before. Only after
    `terminated` is there nothing to bootstrap from.

        n = 3, T = 5       t     0 1 2 3 4
                           m     3 3 3 2 1            if an episode ends at t = 2:    3 2 1 2 1

        >>> no, reward = torch.zeros(1, 5, dtype=torch.bool), torch.ones(1, 5)
        >>> batch = {"reward": reward, "terminated": no, "truncated": no, "next_obs": torch.arange(1, 6)[None]}
        >>> found = n_step_returns(batch, n=3, gamma=1.0)
        >>> found["return"], found["bootstrap_obs"]
        (tensor([[3., 3., 3., 2., 1.]]), tensor([[3, 4, 5, 5, 5]]))

    To sum n rewards always, draw `sequence_length=n + 1` and use t = 0 alone, which is never one of an episode's last
    n - 1 transitions.

    Args:
        batch: Transitions of `to_transitions`, `(B, T, *shape)`, with `reward` `(B, T)`. What its `mask` marks as
            padding, before or after, is left out: it has a return and a discount of 0.
        n: At least 1.
        gamma: Discount of a step, 0 to 1.

    Returns:
        The batch, with `return` `(B, T)`: the sum over k < m of gamma**k * reward[t + k]; `discount` `(B, T)`:
        gamma**m, or 0 if the last of the m terminated; `bootstrap_obs` `(B, T, *shape)`: the observation after it.

    Raises:
        ValueError: `n` or `gamma` out of range, no transitions, fields of these names, or rewards of another shape.
    """
    if n < 1 or not 0.0 <= gamma <= 1.0:
        raise ValueError(f"`n` must be at least 1 and `gamma` from 0 to 1, found {n} and {gamma}.")
    if "next_obs" not in batch:
        raise ValueError("The batch has no `next_obs`: call `to_transitions` first.")
    _check_free(batch, "return", "discount", "bootstrap_obs")
    reward, terminated = batch["reward"], batch["terminated"]
    if reward.shape != (shape := terminated.shape):
        raise ValueError(f"`reward` has shape {tuple(reward.shape)}, expected {tuple(shape)}: one number each.")
    if not reward.is_floating_point():
        reward = reward.float()
    is_real = _mask(batch, terminated, terminated.dim() - 1)
    # Whether the sum may continue from a transition to the next.
    continues = ~(terminated | batch["truncated"]) & _shifted(is_real, 1)
    returns, count = torch.zeros_like(reward), torch.zeros_like(reward, dtype=torch.int64)
    is_summed = is_real
    for k in range(min(n, reward.shape[-1])):
        returns = returns + gamma**k * torch.where(is_summed, _shifted(reward, k), 0)
        count = count + is_summed
        is_summed = is_summed & _shifted(continues, k)
    last = torch.arange(reward.shape[-1], device=reward.device) + (count - 1).clamp(min=0)
    stops = terminated.gather(-1, last) | ~is_real
    discount = torch.where(stops, 0, torch.pow(torch.as_tensor(gamma, dtype=reward.dtype, device=reward.device), count))
    return {**batch, "return": returns, "discount": discount, "bootstrap_obs": _take(batch["next_obs"], last)}


def _check_free(batch: Mapping[str, Any], *names: str) -> None:
    taken = [name for name in names if name in batch]
    if taken:
        raise ValueError(f"The batch already has {taken}, which this would overwrite. Rename the field.")


def _time(batch: Mapping[str, Any]) -> tuple[int, int]:
    """The time axis, 0 for a single sequence and 1 for a batch, and its size."""
    _check_sequences(batch)
    rows = _leaves({name: batch[name] for name in _PER_ROW if name in batch})
    rows = rows or _leaves({name: value for name, value in batch.items() if name not in _PER_SEQUENCE})
    # A field of the user's own may have such a name and further axes.
    fewest = min(rows, key=torch.Tensor.dim)
    axis = min(fewest.dim() - 1, 1)
    return axis, fewest.shape[axis]


def _check_sequences(batch: Mapping[str, Any]) -> None:
    if "cu_seqlens" in batch or isinstance(batch.get("mask"), Mapping):
        raise ValueError("This takes sequences: not packed episodes, nor fields that `offsets` read at different rows.")


def _has_mask(batch: Mapping[str, Any], axis: int) -> bool:
    """Whether `mask` says which rows are real, and is no field of the user's own with that name."""
    mask = batch.get("mask")
    return isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.dim() == axis + 1


def _mask(batch: Mapping[str, Any], like: torch.Tensor, axis: int) -> torch.Tensor:
    """Which rows are real, bool `(B, T)`: all of those of `like`, if the batch has no mask."""
    if _has_mask(batch, axis):
        return batch["mask"]
    return torch.ones(like.shape[: axis + 1], dtype=torch.bool, device=like.device)


def _parent(tree: Any, field: str) -> tuple[Any, str]:
    """The dict that has a field, and its key there; ValueError if there is none."""
    if field in tree:
        return tree, field
    for key, item in tree.items():
        if isinstance(item, Mapping) and field.startswith(f"{key}/"):
            return _parent(item, field.removeprefix(f"{key}/"))
    raise ValueError(f"There is no field `{field}`, found {list(tree)}.")


def _apply(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    # The cheaper test first.
    if type(value) is not torch.Tensor and isinstance(value, Mapping):
        return {key: _apply(function, item) for key, item in value.items()}
    return function(value)


def _leaves(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _apply(found.append, value)
    return found


def _narrow(value: Any, axis: int, start: int, length: int) -> Any:
    return _apply(lambda rows: rows.narrow(axis, start, length), value)


def _narrow_all(
    batch: Mapping[str, Any], axis: int, start: int, length: int, one_before: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`_narrow` of all fields that have the time axis; some begin a row earlier."""
    narrowed = {}
    for name, value in batch.items():
        # A field of the rows with such a name has the time axis.
        is_per_sequence = name in _PER_SEQUENCE and isinstance(value, torch.Tensor) and value.dim() <= axis
        narrowed[name] = value if is_per_sequence else _narrow(value, axis, start - (name in one_before), length)
    return narrowed


def _sliding(rows: torch.Tensor, axis: int, n: int) -> torch.Tensor:
    """`(..., T + n - 1, *shape)` as a view `(..., T, n, *shape)`: rows t to t + n - 1 at t."""
    return rows.unfold(axis, n, 1).movedim(-1, axis + 1)


def _shifted(values: torch.Tensor, k: int) -> torch.Tensor:
    """`values[..., t + k]` at t, 0 after the end."""
    return torch.nn.functional.pad(values[..., k:], (0, k)) if k else values


def _take(value: Any, indices: torch.Tensor) -> Any:
    """`value[b, indices[b, t]]` at (b, t), with or without the axis B."""
    at = (indices,) if indices.dim() == 1 else (torch.arange(len(indices), device=indices.device)[:, None], indices)
    return _apply(lambda rows: rows[at], value)
