"""What is checked in added data."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import torch

from buffers.conversion import dtype_name
from buffers.fields import Fields, TensorType, as_tensor

__all__ = ["VerificationMode"]


class VerificationMode(enum.Enum):
    """What is checked when data is added.

    | mode | checked |
    |---|---|
    | `NO_CHECKS` | keys, and that all fields have equally many rows |
    | `BASIC_CHECKS` | also shapes and dtypes (the default) |
    | `ALL_CHECKS` | also that every floating-point number is finite, which reads all data |
    """

    NO_CHECKS = "no_checks"
    BASIC_CHECKS = "basic_checks"
    ALL_CHECKS = "all_checks"


def check_rows(fields: Fields, arrays: Sequence[np.ndarray], leading: tuple[int, ...], mode: VerificationMode) -> None:
    """Check arrays `(*leading, *shape)`, in the order of the fields; ValueError names the first that differs."""
    if mode is VerificationMode.NO_CHECKS:
        return
    for (name, dtype, shape), array in zip(fields.layout, arrays, strict=True):
        if array.dtype != dtype or array.shape != leading + shape:
            found, expected = dtype_name(array.dtype), dtype_name(dtype)
            hint = "" if found == expected else f" Cast it, or let what comes first have {found}."
            raise ValueError(
                f"Field `{name}` has dtype {found} and shape {array.shape}, expected {expected} and "
                f"{leading + shape}.{hint}"
            )
        if mode is VerificationMode.ALL_CHECKS and not _is_finite(array, fields[name]):
            raise ValueError(f"Field `{name}` holds NaN or infinite numbers, which ALL_CHECKS refuses.")


def check_episode(fields: Fields, arrays: Sequence[np.ndarray], mode: VerificationMode) -> None:
    """`check_rows` for an episode `(L, *shape)`; also ValueError for no rows, or fields of unequal length."""
    num_rows = len(arrays[0]) if arrays[0].ndim else 0
    if not num_rows:
        raise ValueError(f"Field `{fields.names[0]}` has no rows: an episode needs at least one step.")
    for name, array in zip(fields.names, arrays, strict=True):
        if array.shape[:1] != (num_rows,):
            found = len(array) if array.ndim else "no"
            raise ValueError(f"Field `{name}` has {found} rows, `{fields.names[0]}` has {num_rows}.")
    check_rows(fields, arrays, (num_rows,), mode)


def _is_finite(array: np.ndarray, field: TensorType) -> bool:
    if not (field.dtype.is_floating_point or field.dtype.is_complex):
        return True
    return bool(torch.isfinite(as_tensor(np.array(array), field)).all())
