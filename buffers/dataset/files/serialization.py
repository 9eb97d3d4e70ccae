"""File formats of episodes: the seam for formats of one's own, and what all of them share.

`docs/format.md` states what a file holds. The formats are in `safetensors_format.py` and `archives.py`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from buffers import fields as field_types
from buffers.fields import Fields, TensorType, as_tensor

__all__ = [
    "DamagedEpisodeError",
    "EpisodeSerializationStrategy",
    "UnknownVersionError",
    "check_strategy",
    "tensors_to_store",
]

FORMAT_VERSION = 1
# Where each format keeps the text of `schema_text`.
SCHEMA_KEY = "buffers"
# What damaged bytes raise where they are parsed.
_RAISED_BY_BYTES = (
    *(ValueError, LookupError, TypeError, AttributeError, EOFError, NotImplementedError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)
_OUT_OF_MEMORY = "Error -4"  # How zlib's own error begins.
# No text of ours nests as deeply.
_MAX_DEPTH = 100
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    )
}


class DamagedEpisodeError(ValueError):
    """A file is not the whole episode that its name promises."""


class UnknownVersionError(DamagedEpisodeError):
    """A file is of a version of the format that this version of the library does not know."""


class EpisodeSerializationStrategy(ABC):
    """How an episode becomes a file. A format of one's own needs a `suffix`, `save` and `load`.

    A file may come from anyone, so `load` and all that follows it must run no code from the file, and must check what
    the file says before allocating for it. The arguments say what to expect.

    A DamagedEpisodeError, and nothing else, sets a file aside. Any other exception is trouble of the process or a
    mistake in the format: it reaches the caller, and the file stays.

    Attributes:
        suffix: Ends the names of files, ".safetensors" for example.
    """

    suffix: str

    @abstractmethod
    def save(self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter) -> None:
        """Write an episode.

        Args:
            episode: `name -> (L, *shape)`, contiguous tensors on the CPU that share no memory.
            fields: Their types.
            file: Open for writing; flushed, made durable and closed by the caller.

        Raises:
            ValueError: The format cannot hold these fields (a name, say).
        """

    @abstractmethod
    def load(self, file: io.FileIO, fields: Fields, length: int) -> Mapping[str, torch.Tensor]:
        """Read an episode.

        Args:
            file: Open for reading, at its beginning.
            fields: What it holds.
            length: L, its rows.

        Returns:
            `name -> (L, *shape)` tensors.

        Raises:
            DamagedEpisodeError: The file is something else.
        """

    def load_fields(self, file: io.FileIO) -> Fields | None:
        """The fields that a file says it holds; None (the default) if the format does not keep them.

        Without them, opening a directory that has episodes takes `info` with the fields.
        """
        return None

    def check(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Refuse, by a DamagedEpisodeError, a file that can be told to be damaged without reading its rows."""
        self.row_offsets(file, fields, length)

    def verify(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Refuse, by a DamagedEpisodeError, a file of which any byte that matters has changed. Reads all of it."""
        self.load(file, fields, length)

    def overhead(self, fields: Fields) -> tuple[int, int] | None:
        """The fewest and the most bytes of a file beyond its rows; None (the default) if sizes depend on the data.

        On opening a directory, files of a size within these bounds are taken for whole until they are first read.
        """
        return None

    def row_offsets(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, int] | None:
        """Where ranges of rows can be read: `name -> offset of its first row`; None (the default) if nowhere.

        For formats whose rows lie one behind the other, as they are in memory (little endian). A window then costs its
        own bytes; otherwise whole episodes are loaded, and a bounded number of them is kept.
        """
        return None


@contextlib.contextmanager
def as_damage() -> Iterator[None]:
    """Turn what damaged bytes raise into a DamagedEpisodeError. For parsing alone."""
    try:
        yield
    except DamagedEpisodeError:
        raise
    except (*_RAISED_BY_BYTES, OSError) as error:
        if isinstance(error, zlib.error) and str(error).startswith(_OUT_OF_MEMORY):
            raise MemoryError(str(error)) from error
        # zipfile takes an error of the system for the lack of an archive. An offset before the beginning is damage.
        cause = error.__context__ if isinstance(error, zipfile.BadZipFile) else error
        if isinstance(cause, OSError) and cause.errno != errno.EINVAL:
            raise cause from None
        raise DamagedEpisodeError(f"cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def parse_json(data: str | bytes) -> Any:
    """What JSON says. Too deep a text is damaged; where it is the caller's stack that is deep, it is not."""
    text = data if isinstance(data, str) else data.decode()
    try:
        return json.loads(text)
    except RecursionError:
        if max(accumulate((char in "[{") - (char in "]}") for char in text)) <= _MAX_DEPTH:
            raise
        raise DamagedEpisodeError("nests too deeply") from None


def schema_text(fields: Fields, **more: Any) -> str:
    """Version and fields as JSON in ASCII; equal fields give equal texts."""
    if max(map(len, fields.paths)) > _MAX_DEPTH:
        raise ValueError(f"Files hold fields of at most {_MAX_DEPTH} levels.")
    described = [
        {"path": path, "type": _type_name(kind), "dtype": str(kind.dtype).removeprefix("torch."), "shape": kind.shape}
        for path, kind in zip(fields.paths, fields.values(), strict=True)
    ]
    return json.dumps({"version": FORMAT_VERSION, **more, "fields": described}, separators=(",", ":"))


def parse_schema(text: str | bytes) -> tuple[Fields, dict[str, Any]]:
    """The fields, and all of the JSON, of what `schema_text` wrote.

    Raises:
        UnknownVersionError: Another version of the format.
        DamagedEpisodeError: Anything else.
    """
    with as_damage():
        schema = parse_json(text)
        if (version := schema["version"]) != FORMAT_VERSION:
            raise UnknownVersionError(
                f"is of version {version!r:.20} of the format; this library knows {FORMAT_VERSION}"
            )
        tree: dict[str, Any] = {}
        for described in schema["fields"]:
            *parents, last = described["path"]
            if len(parents) >= _MAX_DEPTH:
                raise DamagedEpisodeError("nests fields too deeply")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            if last in node:
                raise DamagedEpisodeError(f"names the field {last!r:.60} twice")
            node[last] = _parsed_type(described)
        return Fields(tree), schema


def _parsed_type(described: Mapping[str, Any]) -> TensorType:
    name, shape = described["type"], described["shape"]
    kind = getattr(field_types, name) if name in field_types.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, TensorType)):
        raise DamagedEpisodeError(f"has a field of the unknown type {name!r:.60}")
    if not all(type(size) is int and 0 <= size < 2**48 for size in shape) or math.prod(shape) >= 2**48:
        raise DamagedEpisodeError(f"has a field of shape {shape!r:.60}")
    return kind(tuple(shape), _DTYPES[described["dtype"]])


def _type_name(tensor_type: TensorType) -> str:
    """The nearest class that every version of the library knows: a user's own is described by its base."""
    return next(kind.__name__ for kind in type(tensor_type).__mro__ if kind.__name__ in field_types.__all__)


def check_fields(found: Fields, expected: Fields) -> None:
    conflict = found.conflict_with(expected)
    if conflict is not None:
        raise DamagedEpisodeError(f"holds other fields: {conflict}")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def check_strategy(strategy: object) -> None:
    """Refuse what is no format by a TypeError, and a suffix that none can have by a ValueError."""
    if not isinstance(strategy, EpisodeSerializationStrategy):
        raise TypeError(
            f"`serialization_strategy` must be an EpisodeSerializationStrategy, found {type(strategy).__name__}."
        )
    suffix: object = strategy.suffix
    if not isinstance(suffix, str) or not re.fullmatch(r"(?!\.(lock|next)$)\.[A-Za-z0-9_.-]*[A-Za-z0-9_-]", suffix):
        raise ValueError(
            f"The `suffix` of a format must be like `.name`, other than .lock and .next; found {suffix!r}."
        )


def tensors_to_store(episode: Mapping[str, np.ndarray], fields: Fields) -> dict[str, torch.Tensor]:
    """Copies of an episode's rows, in the order and of the types of the fields; a ValueError for another shape."""
    length = len(next(iter(episode.values())))
    tensors = {}
    for name, tensor_type in fields.items():
        rows = np.array(episode[name], tensor_type.numpy_dtype, order="C")
        if rows.shape != (length, *tensor_type.shape):
            raise ValueError(f"Field `{name}` has shape {rows.shape}, expected {(length, *tensor_type.shape)}.")
        tensors[name] = as_tensor(rows, tensor_type)
    return tensors
