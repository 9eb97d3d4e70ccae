"""Functions on a batch of recorded rows, for the `transform=` of a loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["n_step_returns", "to_transitions"]

_ROW_FIELDS = ("obs", "action", "reward", "terminated", "truncated")
# From the row before a transition.
_BEFORE = ("obs", "is_first", "index", "step")
# One value a sequence, not one a row.
_PER_SEQUENCE = ("episode", "weight", "source")


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
        unchanged.

    Raises:
        ValueError: A field is missing, `next_obs` exists already, or sequences have one row.
    """
    missing = [name for name in _ROW_FIELDS if name not in batch]
    if missing:
        raise ValueError(f"The batch has no {missing}: `to_transitions` takes what a Recorder has recorded.")
    _check_free(batch, "next_obs")
    axis = batch["terminated"].dim() - 1
    length = batch["terminated"].shape[axis]
    if length < 2:
        raise ValueError("A transition needs two rows, found sequences of 1. Draw with `sequence_length=2` or more.")
    transitions = {}
    for name, value in batch.items():
        start = 0 if name in _BEFORE else 1
        # A field of the rows with such a name has the time axis.
        is_per_sequence = name in _PER_SEQUENCE and isinstance(value, torch.Tensor) and value.dim() <= axis
        transitions[name] = value if is_per_sequence else _narrow(value, axis, start, length - 1)
    transitions["next_obs"] = _narrow(batch["obs"], axis, 1, length - 1)
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
        batch: Transitions of `to_transitions`, `(B, T, *shape)`, with `reward` `(B, T)`. What a `mask` marks as padding
            is left out, and has a return and a discount of 0.
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
    if reward.shape != terminated.shape:
        raise ValueError(
            f"`reward` has shape {tuple(reward.shape)}, expected {tuple(terminated.shape)}: one number each."
        )
    if not reward.is_floating_point():
        reward = reward.float()
    is_real = batch.get("mask", torch.ones_like(terminated))
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


def _narrow(value: Any, axis: int, start: int, length: int) -> Any:
    # The cheaper test first.
    if type(value) is not torch.Tensor and isinstance(value, Mapping):
        return {key: _narrow(item, axis, start, length) for key, item in value.items()}
    return value.narrow(axis, start, length)


def _shifted(values: torch.Tensor, k: int) -> torch.Tensor:
    """`values[..., t + k]` at t, 0 after the end."""
    return torch.nn.functional.pad(values[..., k:], (0, k)) if k else values


def _take(value: Any, indices: torch.Tensor) -> Any:
    """`value[b, indices[b, t]]` at (b, t), with or without the axis B."""
    if isinstance(value, Mapping):
        return {key: _take(item, indices) for key, item in value.items()}
    if indices.dim() == 1:
        return value[indices]
    return value[torch.arange(len(indices), device=indices.device)[:, None], indices]
