"""The base class of file formats, and what the formats share: the schema, reading rows, and telling damage.

`docs/format.md` says what a file holds. The formats are in `safetensors_format.py` and `archives.py`.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

from buffers.dataset.episode_info import EpisodeInfo, checked_info, info_text
from buffers.dataset.files.compressed import FieldBlocks
from buffers.disk import DamagedEpisodeError, UnknownVersionError, as_damage, described_fields, parse_fields, parse_json
from buffers.fields import Fields, TensorType, as_tensor

__all__ = ["DamagedEpisodeError", "EpisodeSerializationStrategy", "UnknownVersionError"]

FORMAT_VERSION = 1
# Of files with compressed fields, which earlier versions of this library cannot read.
COMPRESSED_VERSION = 2
# The key of the schema in a file.
SCHEMA_KEY = "buffers"
# zipfile copies what it reads under the GIL, so a larger piece would stop other threads for longer.
_PIECE = 2**18


class EpisodeSerializationStrategy(ABC):
    """A file format. One of your own needs a `suffix`, `save` and `load`; to keep the info of episodes, three more.

    Files may come from anyone, so reading must not run code from a file, and must check what the file says before
    allocating memory for it. A DamagedEpisodeError sets a file aside. Any other exception reaches the caller, and the
    file stays.

    Attributes:
        suffix: The end of file names, ".safetensors" for example.
    """

    suffix: str
    #: The library that writes unsigned integers of more than 8 bits, with its first version that does; if there is one.
    writes_unsigned: tuple[ModuleType, str] | None = None
    #: Whether files keep the info of their episodes, by `save_with_info` and `load_info`.
    keeps_info = False

    @abstractmethod
    def save(self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter) -> None:
        """Write an episode.

        Args:
            episode: `name -> (L, *shape)`, contiguous tensors on the CPU that share no memory.
            fields: Their types.
            file: Open for writing. The caller flushes, syncs and closes it.

        Raises:
            ValueError: The format cannot hold these fields (because of a name, say).
        """

    @abstractmethod
    def load(self, file: io.FileIO, fields: Fields, length: int) -> Mapping[str, torch.Tensor]:
        """Read an episode.

        Args:
            file: Open for reading, at its beginning.
            fields: The expected fields.
            length: L, the expected number of rows.

        Returns:
            `name -> (L, *shape)` tensors.

        Raises:
            DamagedEpisodeError: The file holds something else.
        """

    def save_with_info(
        self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter, info: EpisodeInfo
    ) -> None:
        """`save`, with an info, which is empty unless the format `keeps_info`."""
        self.save(episode, fields, file)

    def load_info(self, file: io.FileIO) -> EpisodeInfo:
        """The info that a file has, {} for one that was saved without; a DamagedEpisodeError for anything else."""
        return {}

    def check_dtypes(self, fields: Fields) -> None:
        """ValueError for dtypes that the installed library cannot write."""
        library, least = self.writes_unsigned or (torch, "0")
        if TorchVersion(library.__version__) >= least:
            return
        for name, kind in fields.items():
            if kind.dtype in (torch.uint16, torch.uint32, torch.uint64):
                raise ValueError(
                    f"Field `{name}` has dtype {kind.dtype}, which {library.__name__} {library.__version__} cannot "
                    f"store: install `{library.__name__}>={least}`."
                )

    def load_fields(self, file: io.FileIO) -> Fields | None:
        """The fields that a file says it holds, or None (the default) if the format does not store them.

        If it does not, a directory with episodes can only be opened with `info` that has the fields.
        """
        return None

    def check(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Raise a DamagedEpisodeError if the file is seen to be damaged without reading its rows."""
        self.row_offsets(file, fields, length)

    def block_places(self, file: io.FileIO) -> dict[str, FieldBlocks]:
        """Where a file that has been checked has compressed fields; by default, there are none."""
        return {}

    def verify(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Read the whole file and raise a DamagedEpisodeError if any byte that matters has changed."""
        self.load(file, fields, length)

    def overhead(self, fields: Fields) -> tuple[int, int] | None:
        """The least and the greatest number of bytes besides the rows, or None (the default) if that depends on data.

        When a directory is opened, a file whose size is within these bounds counts as whole until it is first read.
        The bounds are those of a file without info: one that has an info is looked into.
        """
        return None

    def row_offsets(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, int] | None:
        """Check the file, and return `name -> offset of the first row`; None (the default) if rows have no offsets.

        With offsets, the rows of a field must be contiguous and little endian, and reading a window costs the bytes of
        the window. Without, whole episodes are loaded, and a bounded number of bytes is cached.
        """
        return None


def has_offsets(strategy: EpisodeSerializationStrategy) -> bool:
    """Whether the rows of a format's files can be read by themselves: not where it leaves `row_offsets` as it is."""
    return type(strategy).row_offsets is not EpisodeSerializationStrategy.row_offsets


def schema_text(fields: Fields, info: EpisodeInfo | None = None, **more: Any) -> str:
    """The version, the fields and an info as JSON in ASCII; equal ones give equal texts."""
    if info:
        more |= {"info": info, "info_checksum": _checksum(info)}
    version = COMPRESSED_VERSION if "compress" in more else FORMAT_VERSION
    return json.dumps({"version": version, **more, "fields": described_fields(fields)}, separators=(",", ":"))


def _checksum(info: EpisodeInfo) -> str:
    return f"crc32:{zlib.crc32(info_text(info).encode()):08x}"


def parse_schema(text: str | bytes) -> tuple[Fields, dict[str, Any]]:
    """The fields, and the whole JSON, of what `schema_text` wrote; its "info" is {} where there is none.

    Raises:
        UnknownVersionError: Another version of the format.
        DamagedEpisodeError: Anything else.
    """
    with as_damage():
        schema = parse_json(text)
        known = COMPRESSED_VERSION if "compress" in schema else FORMAT_VERSION
        if (version := schema["version"]) != known:
            raise UnknownVersionError(f"is of version {version!r:.20} of the format; this library knows {known}")
        fields = parse_fields(schema["fields"])
        schema["info"] = info = checked_info(schema.get("info", {}))
        if info and schema["info_checksum"] != _checksum(info):
            raise DamagedEpisodeError(f"has an info that is not the one it was written with: {info!r:.200}")
        return fields, schema


def as_saved(
    episode: Mapping[str, np.ndarray], fields: Mapping[str, TensorType], length: int
) -> dict[str, torch.Tensor]:
    """Copies of the rows as tensors, as `save` gets them; ValueError for other shapes than those of `length` rows."""
    tensors = {}
    for name, kind in fields.items():
        rows = np.array(episode[name], kind.numpy_dtype, order="C")
        if rows.shape != (length, *kind.shape):
            raise ValueError(f"Field `{name}` has shape {rows.shape}, expected {(length, *kind.shape)}.")
        tensors[name] = as_tensor(rows, kind)
    return tensors


def check_fields(found: Fields, expected: Fields) -> None:
    conflict = found.conflict_with(expected)
    if conflict is not None:
        raise DamagedEpisodeError(f"holds other fields: {conflict}")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_rows(file: Any, tensor_type: TensorType, length: int) -> torch.Tensor:
    """Read `(length, *shape)` from the current position of a file or of an archive's member."""
    tensor = as_tensor(np.empty((length, *tensor_type.shape), tensor_type.numpy_dtype), tensor_type)
    view = bytes_of(tensor)
    while view and (num_read := file.readinto(view[:_PIECE])):
        view = view[num_read:]
    if view:
        raise DamagedEpisodeError("is shorter than its header says")
    return tensor


def check_strategy(strategy: object) -> None:
    """TypeError for an object that is not a format, ValueError for a suffix that no format may have."""
    if not isinstance(strategy, EpisodeSerializationStrategy):
        raise TypeError(
            f"`serialization_strategy` must be an EpisodeSerializationStrategy, found {type(strategy).__name__}."
        )
    suffix: object = strategy.suffix
    if not isinstance(suffix, str) or not re.fullmatch(r"(?!\.(lock|next)$)\.[A-Za-z0-9_.-]*[A-Za-z0-9_-]", suffix):
        raise ValueError(
            f"The `suffix` of a format must be like `.name`, other than .lock and .next; found {suffix!r}."
        )
