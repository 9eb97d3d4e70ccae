"""States as JSON and arrays: what `state_dict` returns may nest dicts, lists, numbers, strings, arrays and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from buffers.conversion import TO_TORCH, as_array
from buffers.fields import TensorType

__all__ = ["pack_tree", "unpack_tree"]

_ARRAY, _TENSOR, _ITEMS = _MARKS = "$array", "$tensor", "$items"


def pack_tree(tree: Any, name: str, arrays: dict[str, tuple[TensorType, np.ndarray]]) -> Any:
    """The tree as JSON can hold it. Arrays are put into `arrays`, under names that begin with `name`.

    TypeError for a value of another type.
    """
    if isinstance(tree, Mapping):
        packed = {key: pack_tree(value, f"{name}/{key}", arrays) for key, value in tree.items()}
        if all(isinstance(key, str) and key not in _MARKS for key in packed):
            return packed
        # JSON has no other keys. Optimizers number their parameters.
        if all(type(key) in (str, int) for key in packed):
            return {_ITEMS: [[key, value] for key, value in packed.items()]}
        raise TypeError(f"A state to be saved has keys in `{name}` that are no strings or integers: {[*packed]!r:.80}.")
    if isinstance(tree, (list, tuple)):
        return [pack_tree(value, f"{name}/{number}", arrays) for number, value in enumerate(tree)]
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, (np.ndarray, torch.Tensor)):
        array = as_array(name, tree) if isinstance(tree, torch.Tensor) else tree
        # One row, so that arrays without axes are none of their own.
        arrays[name] = TensorType(array.shape, TO_TORCH[array.dtype]), array[None]
        return {_TENSOR if isinstance(tree, torch.Tensor) else _ARRAY: name}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"A state to be saved has a {type(tree).__name__} in `{name}`: {tree!r:.60}.")


def unpack_tree(tree: Any, read: Callable[[str], torch.Tensor]) -> Any:
    """The inverse of `pack_tree`; `read` returns the tensor of a name. Tuples have become lists."""
    if isinstance(tree, dict):
        if len(tree) == 1 and (_ARRAY in tree or _TENSOR in tree):
            found = read(next(iter(tree.values())))
            return found if _TENSOR in tree else as_array("state", found)
        if _ITEMS in tree:
            return {key: unpack_tree(value, read) for key, value in tree[_ITEMS]}
        return {key: unpack_tree(value, read) for key, value in tree.items()}
    return [unpack_tree(value, read) for value in tree] if isinstance(tree, list) else tree
