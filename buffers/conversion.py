"""Between torch and numpy: dtypes, and arrays of the values that a caller passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["TO_NUMPY", "TO_TORCH", "as_array", "cast_if_kept", "dtype_name", "number_as", "torch_dtype"]

_NAMES = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64 complex128"
# numpy has no bfloat16. An opaque item of two bytes stands for it, which equals no other dtype.
_BFLOAT16 = np.dtype("V2")
TO_TORCH: dict[np.dtype, torch.dtype] = {np.dtype(name): getattr(torch, name) for name in _NAMES.split()}
TO_TORCH[_BFLOAT16] = torch.bfloat16
TO_NUMPY: dict[torch.dtype, np.dtype] = {dtype: key for key, dtype in TO_TORCH.items()}


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype for a torch or numpy dtype, or a name of one."""
    if isinstance(dtype, torch.dtype):
        if dtype not in TO_NUMPY:
            raise TypeError(f"dtype {dtype} cannot be stored; convert it, to torch.float32 for example.")
        return dtype
    try:
        return TO_TORCH[np.dtype(dtype).newbyteorder("=")]
    except (KeyError, TypeError):
        raise TypeError(f"dtype {dtype} has no torch counterpart; convert it to a number type.") from None


def as_array(name: str, value: Any) -> np.ndarray:
    """A numpy view of a value, or a copy where there is no view (GPU, lists, byte order).

    Python floats become float32, ints int64, bools bool; other dtypes are kept. A list has the dtype that holds all its
    members, so float64 only if one of them is. TypeError for what is no tensor, array or number, or has a dtype that
    torch does not have; ValueError for a ragged list.
    """
    if isinstance(value, torch.Tensor):
        try:
            return value.numpy()
        except (RuntimeError, TypeError):
            return _tensor_to_array(name, value)
    if isinstance(value, (list, tuple)):
        array = _list_to_array(name, value)
    elif isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"Field `{name}` is a masked array, whose mask would be lost: use `.filled(value)`.")
    elif isinstance(value, (np.ndarray, np.generic, bool, int)):
        array = np.asarray(value)
    elif isinstance(value, (float, complex)):
        array = np.asarray(value, np.float32 if isinstance(value, float) else np.complex64)
    else:
        found = f"{type(value).__name__}: {value!r:.60}"
        raise TypeError(f"Field `{name}` must be a tensor, an array or a number, found {found}.")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype not in TO_TORCH or array.dtype == _BFLOAT16:
        raise TypeError(f"Field `{name}` has dtype {array.dtype}, which torch cannot hold: {value!r:.60}.")
    return array


def dtype_name(dtype: np.dtype) -> str:
    """The name of an array's dtype."""
    return "bfloat16" if dtype == _BFLOAT16 else str(dtype)


def number_as(dtype: np.dtype, array: np.ndarray, value: Any) -> np.ndarray:
    """`cast_if_kept` for the array of a number or list `value`; the arrays of tensors and arrays are unchanged."""
    is_number = array.ndim == 0 and not isinstance(value, torch.Tensor)
    return cast_if_kept(array, dtype) if is_number or isinstance(value, (list, tuple)) else array


def cast_if_kept(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast an array within its kind, or from integers, unless an integer would change or a number become infinite."""
    from_integers = array.dtype.kind in "iu" and dtype.kind in "iufc"
    if array.dtype == dtype or not (from_integers or np.can_cast(array.dtype, dtype, "same_kind")):
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
        if dtype.kind in "iub":
            is_kept = cast == array
        elif from_integers:
            is_kept = cast.real.astype(array.dtype) == array
        else:
            is_kept = np.isfinite(cast) | ~np.isfinite(array)
    return cast if is_kept.all() else array


def _tensor_to_array(name: str, tensor: torch.Tensor) -> np.ndarray:
    """For a tensor without a numpy view: on a GPU, with a gradient, of bfloat16, and so on."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.dtype not in TO_NUMPY:
        found = f"{tensor.layout}, {tensor.dtype}"
        raise TypeError(f"Field `{name}` must be a dense tensor of bfloat16 or a dtype that numpy has, found {found}.")
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.resolve_conj().resolve_neg().numpy()


def _list_to_array(name: str, value: list | tuple) -> np.ndarray:
    if any(isinstance(item, torch.Tensor) for item in value):
        value = [as_array(name, item) if isinstance(item, torch.Tensor) else item for item in value]
    if any(isinstance(item, np.ma.MaskedArray) for item in value):
        raise TypeError(f"Field `{name}` is a list of masked arrays, whose masks would be lost: use `.filled(value)`.")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"Field `{name}` is a ragged list: its members differ in shape.") from None
    return array.astype(np.float32) if array.dtype == np.float64 and not _has_float64(value) else array


def _has_float64(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_float64(item) for item in value)
    return getattr(value, "dtype", None) == np.float64
