"""How closely added data is looked at."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import torch

from buffers.dataset.fields import Fields, TensorType, as_tensor

__all__ = ["VerificationMode"]


class VerificationMode(enum.Enum):
    """What is checked when data is added.

    | mode | checked |
    |---|---|
    | `NO_CHECKS` | keys, and that all fields have as many rows; the caller vouches for shapes and dtypes |
    | `BASIC_CHECKS` | also shapes and dtypes (the default) |
    | `ALL_CHECKS` | also that every floating number is finite, which reads all of the data |
    """

    NO_CHECKS = "no_checks"
    BASIC_CHECKS = "basic_checks"
    ALL_CHECKS = "all_checks"


def check_rows(fields: Fields, arrays: Sequence[np.ndarray], leading: tuple[int, ...], mode: VerificationMode) -> None:
    """Check arrays of `(*leading, *shape)` against the fields, in their order.

    Raises:
        ValueError: Names the first field that differs, what was found and what was expected.
    """
    if mode is VerificationMode.NO_CHECKS:
        return
    for (name, dtype, shape), array in zip(fields.layout, arrays, strict=True):
        if array.dtype != dtype or array.shape != leading + shape:
            raise ValueError(
                f"Field `{name}` has dtype {array.dtype} and shape {array.shape}, "
                f"expected {dtype} and {leading + shape}."
            )
        if mode is VerificationMode.ALL_CHECKS and not _is_finite(array, fields[name]):
            raise ValueError(f"Field `{name}` holds NaN or infinite numbers, which ALL_CHECKS refuses.")


def _is_finite(array: np.ndarray, field: TensorType) -> bool:
    if not (field.dtype.is_floating_point or field.dtype.is_complex):
        return True
    return bool(torch.isfinite(as_tensor(np.array(array), field)).all())
