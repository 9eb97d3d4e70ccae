"""States as JSON and arrays: what `state_dict` returns may nest dicts, lists, numbers, strings, arrays and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from buffers.conversion import TO_NUMPY, TO_TORCH, as_array
from buffers.fields import TensorType

__all__ = ["pack_tree", "unpack_tree"]

_BFLOAT16 = TO_NUMPY[torch.bfloat16]
_ARRAY, _TENSOR, _ITEMS, _TUPLE = _MARKS = "$array", "$tensor", "$items", "$tuple"


def pack_tree(tree: Any, name: str, arrays: dict[str, tuple[TensorType, np.ndarray]]) -> Any:
    """The tree as JSON can hold it. Arrays are copied into `arrays`; `name` is for errors.

    TypeError for a value of another type.
    """
    if isinstance(tree, Mapping):
        packed = {key: pack_tree(value, f"{name}/{key}", arrays) for key, value in tree.items()}
        if all(isinstance(key, str) and key not in _MARKS for key in packed):
            return packed
        # JSON has no other keys. Optimizers number their parameters.
        if all(type(key) in (str, int) for key in packed):
            return {_ITEMS: [[key, value] for key, value in packed.items()]}
        raise TypeError(f"A save cannot hold the keys {[*packed]!r:.80} of `{name}`: they must be strings or integers.")
    if isinstance(tree, (list, tuple)):
        items = [pack_tree(value, f"{name}/{number}", arrays) for number, value in enumerate(tree)]
        return items if isinstance(tree, list) else {_TUPLE: items}
    if isinstance(tree, (np.ndarray, torch.Tensor)):
        array: np.ndarray = tree if tree.dtype == _BFLOAT16 else as_array(name, tree)  # type: ignore[assignment]
        # One row, so that arrays without axes are none of their own.
        key = f"state/{len(arrays)}"
        arrays[key] = TensorType(array.shape, TO_TORCH[array.dtype]), np.array(array)[None]
        return {_TENSOR if isinstance(tree, torch.Tensor) else _ARRAY: key}
    value = tree.item() if isinstance(tree, np.generic) else tree
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"A save cannot hold the {type(tree).__name__} in `{name}`: {tree!r:.60}. Pass numbers, strings, arrays, "
        "tensors, and dicts and lists of them: of a module or an optimizer, its `state_dict()`."
    )


def unpack_tree(tree: Any, read: Callable[[str], torch.Tensor]) -> Any:
    """The inverse of `pack_tree`; `read` returns the tensor of a name."""
    if isinstance(tree, list):
        return [unpack_tree(value, read) for value in tree]
    if not isinstance(tree, dict):
        return tree
    mark = next(iter(tree)) if len(tree) == 1 else None
    if mark in (_ARRAY, _TENSOR):
        found = read(tree[mark])
        return found if mark == _TENSOR else as_array("state", found)
    if mark == _TUPLE:
        return tuple(unpack_tree(value, read) for value in tree[mark])
    if mark == _ITEMS:
        return {key: unpack_tree(value, read) for key, value in tree[mark]}
    return {key: unpack_tree(value, read) for key, value in tree.items()}
