"""Fields: the name, shape and dtype of everything that a step holds.

A step may nest dicts; a field is one leaf of it, and its name is the path to it joined by "/".
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from buffers.conversion import TO_NUMPY, TO_TORCH, as_array, number_as, torch_dtype

__all__ = ["ColorImage", "Fields", "PaddedPointcloud", "Scalar", "TensorType", "Vector"]


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype of one field in one step."""

    shape: tuple[int, ...]  # Without time and batch. An int stands for a shape of one dimension.
    dtype: torch.dtype = torch.float32  # Or a numpy dtype, or its name.

    def __post_init__(self) -> None:
        shape = (self.shape,) if isinstance(self.shape, int) else tuple(int(size) for size in self.shape)
        if any(size < 0 for size in shape):
            raise ValueError(f"`shape` must not have negative sizes, found {shape}.")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", torch_dtype(self.dtype))
        self._check_shape()

    def _check_shape(self) -> None:
        pass

    @property
    def nbytes(self) -> int:
        """Bytes of one step."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype:
        """The numpy dtype with the same bytes (an opaque two-byte item for bfloat16)."""
        return TO_NUMPY[self.dtype]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"

    @staticmethod
    def infer(shape: Iterable[int], dtype: torch.dtype) -> TensorType:
        """The most specific type for a shape and dtype, but no `PaddedPointcloud`, which looks like any matrix."""
        shape = tuple(shape)
        if len(shape) < 2:
            return Vector(shape, dtype) if shape else Scalar(shape, dtype)
        if _is_image(shape) and (dtype == torch.uint8 or dtype.is_floating_point):
            return ColorImage(shape, dtype)
        return TensorType(shape, dtype)


@dataclass(frozen=True)
class Scalar(TensorType):
    """One number, shape `()`: a reward, a flag."""

    shape: tuple[int, ...] = ()

    def _check_shape(self) -> None:
        if self.shape != ():
            raise ValueError(f"A Scalar has shape (), found {self.shape}.")


@dataclass(frozen=True)
class Vector(TensorType):
    """One dimension, shape `(n,)`: a state, a continuous action."""

    def _check_shape(self) -> None:
        if len(self.shape) != 1:
            raise ValueError(f"A Vector has shape (n,), found {self.shape}.")


@dataclass(frozen=True)
class ColorImage(TensorType):
    """An image: `(H, W)` gray or depth, `(H, W, C)` or `(C, H, W)` with C 1 or 3, `(H, W, 4)` with opacity.

    Or four gray frames, as environments stack them: `(4, H, W)`.
    """

    dtype: torch.dtype = torch.uint8

    def _check_shape(self) -> None:
        if len(self.shape) != 2 and not _is_image(self.shape):
            raise ValueError(f"A ColorImage has shape (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4, found {self.shape}.")


@dataclass(frozen=True)
class PaddedPointcloud(TensorType):
    """At most `n` points, shape `(n, 3 + k)`: x, y, z and k features; rows of NaN pad it."""

    def _check_shape(self) -> None:
        if len(self.shape) != 2 or self.shape[1] < 3:
            raise ValueError(f"A PaddedPointcloud has shape (n, 3 + k), found {self.shape}.")


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and (shape[2] in (1, 3, 4) or shape[0] in (1, 3, 4))


def as_tensor(array: np.ndarray, tensor_type: TensorType) -> torch.Tensor:
    """The tensor over an array of `tensor_type.numpy_dtype`, sharing its memory."""
    if tensor_type.dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Fields(Mapping[str, TensorType]):
    """The fields of a dataset: an ordered mapping from name to `TensorType`.

        >>> fields = Fields(obs={"image": ColorImage((64, 64, 3)), "speed": Scalar()}, action=Vector(6))
        >>> list(fields)
        ['obs/image', 'obs/speed', 'action']
        >>> fields.nbytes  # of one step
        12316

    Args:
        tree: Nested dict of types; or give the top level as keywords.
    """

    def __init__(self, tree: Mapping[str, Any] | None = None, /, **types: Any) -> None:
        leaves = list(_walk({**(tree or {}), **types}))
        if not leaves:
            raise ValueError("A step needs at least one field, found none.")
        self._types: dict[str, TensorType] = {}
        self.paths: tuple[tuple[str, ...], ...] = tuple(path for path, _ in leaves)
        for path, leaf in leaves:
            name = "/".join(path)
            if not isinstance(leaf, TensorType):
                raise TypeError(f"Field `{name}` must be a TensorType, found {leaf!r:.60}.")
            if name in self._types:
                raise ValueError(f"Two fields would both be named `{name}`; rename one of them.")
            self._types[name] = leaf
        self.names: tuple[str, ...] = tuple(self._types)
        #: Name, numpy dtype and shape of each field, for checks of each added row.
        self.layout: tuple[tuple[str, np.dtype, tuple[int, ...]], ...] = tuple(
            (name, tensor_type.numpy_dtype, tensor_type.shape) for name, tensor_type in self._types.items()
        )
        #: Keys of the top level.
        self.roots: frozenset[str] = frozenset(path[0] for path in self.paths)
        #: Whether no dict is nested in a step.
        self.is_flat = all(len(path) == 1 for path in self.paths)

    @classmethod
    def from_rows(cls, rows: Mapping[str, Any], num_leading_axes: int) -> Fields:
        """Infer the fields of data whose leaves have leading axes (environment, time) before those of a step."""

        def infer(name: str, value: Any) -> TensorType:
            array = as_array(name, value)
            if array.ndim < num_leading_axes:
                expected = "an axis before its own: that of the environments, or of an episode's rows"
                raise ValueError(f"Field `{name}` has shape {array.shape}, expected {expected}.")
            return TensorType.infer(array.shape[num_leading_axes:], TO_TORCH[array.dtype])

        return cls(nested((path, infer("/".join(path), leaf)) for path, leaf in _walk(rows)))

    @classmethod
    def from_episode(cls, episode: Mapping[str, Any]) -> Fields:
        """Infer the fields from an episode: `field -> (L, *shape)`, or lists of L rows."""
        return cls.from_rows(episode, num_leading_axes=1)

    @property
    def nbytes(self) -> int:
        """Bytes of one step over all fields."""
        return sum(tensor_type.nbytes for tensor_type in self._types.values())

    def flatten(self, tree: Any) -> list[Any]:
        """The leaves of a nested dict in the order of the fields; ValueError for missing or unexpected keys."""
        # `isinstance` of an abstract class is slow.
        if self.is_flat and (type(tree) is dict or isinstance(tree, Mapping)) and len(tree) == len(self.names):
            try:
                return [tree[name] for name in self.names]
            except KeyError:
                pass  # What follows finds out which names differ.
        leaves = dict(_walk(tree))
        missing = ["/".join(path) for path in self.paths if path not in leaves]
        unexpected = ["/".join(path) for path in leaves if path not in self.paths]
        if missing or unexpected:
            expected = list(self.names)
            raise ValueError(f"The fields differ: missing {missing}, unexpected {unexpected}. Expected {expected}.")
        return [leaves[path] for path in self.paths]

    def arrays(self, tree: Any) -> list[np.ndarray]:
        """The leaves in the order of the fields, as arrays of native byte order, views where that is possible.

        Numbers and lists take the dtype of their field if nothing is lost but precision of floats: rewards may be float
        and np.float64, or `[0, 0.5]` and then `[0, 1]`.
        Errors are those of `flatten` and `as_array`; ValueError for a dict in place of a leaf.
        """
        leaves = self.flatten(tree)
        for i, (name, dtype, _) in enumerate(self.layout):
            leaf = leaves[i]
            if type(leaf) is np.ndarray:
                if leaf.dtype is not dtype and not leaf.dtype.isnative:
                    leaves[i] = as_array(name, leaf)
            elif isinstance(leaf, dict):
                raise ValueError(f"Field `{name}` is a dict with the keys {list(leaf)}, expected {self[name]}.")
            else:
                leaves[i] = number_as(dtype, as_array(name, leaf), leaf)
        return leaves

    def unflatten(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The nested dict for `name -> leaf`; the inverse of `flatten`."""
        return nested((path, leaves[name]) for path, name in zip(self.paths, self.names, strict=True))

    def below(self, name: str) -> list[str]:
        """The fields that a name stands for: the one that has it, or all below it, as "obs" for "obs/image"."""
        return [field for field in self if f"{field}/".startswith(f"{name}/")]

    def select(self, names: Collection[str]) -> Fields:
        """The fields of these names, in their order here."""
        pairs = zip(self.paths, self.items(), strict=True)
        return Fields(nested((path, leaf) for path, (name, leaf) in pairs if name in names))

    def with_others(self, others: Fields) -> Fields:
        """These fields, and others behind them; ValueError if two have one name."""
        pairs = [(path, own[name]) for own in (self, others) for path, name in zip(own.paths, own.names, strict=True)]
        twice = self.roots & others.roots
        if twice:
            raise ValueError(f"Late fields have the names of fields of the steps: {sorted(twice)}. Rename one of them.")
        return Fields(nested(pairs))

    def conflict_with(self, other: Fields) -> str | None:
        """Describe what differs from `other` in names, shapes or dtypes; None if data of one fits the other."""
        missing, unexpected = set(other) - set(self), set(self) - set(other)
        if missing or unexpected:
            return f"missing {sorted(missing)}, unexpected {sorted(unexpected)}"
        if set(self.paths) != set(other.paths):
            return f"the same names, but nested in another way: {sorted(self.paths)}, expected {sorted(other.paths)}"
        for name, expected in other.items():
            found = self[name]
            if (found.shape, found.dtype) != (expected.shape, expected.dtype):
                return f"field `{name}` is {found}, expected {expected}"
        return None

    def __getitem__(self, name: str) -> TensorType:
        return self._types[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)

    def __repr__(self) -> str:
        return "Fields(" + ", ".join(f"{name}: {tensor_type}" for name, tensor_type in self.items()) + ")"


def _walk(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All (path, leaf) of nested dicts, in order."""
    if not isinstance(tree, Mapping):
        if not path:
            raise TypeError(f"Expected a dict from field to value, found {type(tree).__name__}.")
        yield path, tree
        return
    if path and not tree:
        raise ValueError(f"Field `{'/'.join(path)}` is an empty dict; leave it out.")
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"Names of fields must be strings, found {key!r:.60} in {'/'.join(path) or 'the step'}.")
        if not key:
            raise ValueError("Names of fields must not be empty.")
        yield from _walk(value, (*path, key))


def nested(leaves: Iterable[tuple[Sequence[str], Any]]) -> dict[str, Any]:
    """The nested dicts for (path, leaf) of each leaf."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree
