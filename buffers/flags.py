"""What a caller passes with rows: flags of environments, and rows that need no conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.fields import Fields

__all__ = ["ONE", "as_flag", "exact_rows"]

# A flag that is one value, not an array of one for each environment.
ONE = (bool, np.bool_)


def exact_rows(fields: Fields, leading: tuple[int, ...], step_data: Mapping[str, Any]) -> list[np.ndarray] | None:
    """The values if all are arrays that fit as they are; None if they have to be converted, or refused."""
    if type(step_data) is not dict or len(step_data) != len(fields.layout):
        return None
    rows = []
    for name, dtype, shape in fields.layout:
        value = step_data.get(name)
        if type(value) is not np.ndarray or value.dtype is not dtype or value.shape != leading + shape:
            return None
        rows.append(value)
    return rows


def as_flag(name: str, value: Any) -> Any:
    """A bool `(N,)`, a plain bool, or an np.bool_ for an array without axes, which means a single environment."""
    if isinstance(value, bool):
        return value
    array = value
    if type(value) is not np.ndarray:
        array = as_array(name, value) if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind != "b":
        if array.dtype.kind not in "iuf":
            raise TypeError(f"`{name}` must be bool or an array of bool, found {array.dtype}: {array!r:.60}.")
        flags = array != 0
        if (array != flags).any():
            raise ValueError(f"`{name}` must be bool, or numbers that are 0 or 1, found {array!r:.60}.")
        array = np.asarray(flags)
    if array.ndim > 1:
        raise ValueError(f"`{name}` must have at most one axis, that of the environments, found shape {array.shape}.")
    if array.ndim:
        return array
    return bool(array) if isinstance(value, (int, float)) else np.bool_(array)
