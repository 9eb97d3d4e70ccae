"""The default format: safetensors."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Mapping
from typing import NamedTuple, final

import numpy as np
import safetensors.torch
import torch

from buffers.dataset.files.serialization import (
    SCHEMA_KEY,
    DamagedEpisodeError,
    EpisodeSerializationStrategy,
    as_damage,
    bytes_of,
    check_fields,
    parse_json,
    parse_schema,
    schema_text,
)
from buffers.fields import Fields, TensorType, as_tensor

__all__ = ["SafetensorsSerialization"]

# An episode's header is far from the 100 MB that safetensors allows.
_MAX_HEADER = 16 * 2**20
# By how much the header may grow from one row to 10**9 - 1: 8 digits in a shape, 9 in each of two offsets, a field;
# and padding.
_MORE_DIGITS, _PADDING = 26, 8


@final
class SafetensorsSerialization(EpisodeSerializationStrategy):
    """The default: raw rows behind a header in JSON, written by the safetensors library and readable by it.

    Complex numbers, which not every version of that library has, are pairs of floats: `(L, *shape, 2)`.
    """

    suffix = ".safetensors"

    def save(self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter) -> None:
        """Write an episode: a header that depends on fields and length alone, but for the checksum; then the rows."""
        if "__metadata__" in episode:
            raise ValueError("Field `__metadata__` has a name that safetensors keeps for itself. Rename it.")
        encoded = _encoded(episode, fields)
        if int.from_bytes(encoded[:8], "little") > _MAX_HEADER:
            raise ValueError(f"The names of the fields make a header of more than {_MAX_HEADER} bytes.")
        file.write(encoded)

    def load(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, torch.Tensor]:
        """Read an episode after its header has been found to be the expected one. The checksum is not looked at."""
        offsets = self.row_offsets(file, fields, length)
        episode = {}
        for name, tensor_type in fields.items():
            episode[name] = as_tensor(np.empty((length, *tensor_type.shape), tensor_type.numpy_dtype), tensor_type)
            view = bytes_of(episode[name])
            file.seek(offsets[name])
            # One read brings at most 2 GB.
            while view and (num_read := file.readinto(view)):
                view = view[num_read:]
            if view:
                raise DamagedEpisodeError("is shorter than its header says")
        return episode

    def load_fields(self, file: io.FileIO) -> Fields:
        """The fields that the header states and its tensors have."""
        return _read_header(file).fields

    def overhead(self, fields: Fields) -> tuple[int, int]:
        """The header's bytes for one row, and room for longer numbers."""
        row = {name: as_tensor(np.zeros((1, *kind.shape), kind.numpy_dtype), kind) for name, kind in fields.items()}
        least = len(_encoded(row, fields)) - fields.nbytes
        return least, least + _MORE_DIGITS * len(fields) + _PADDING

    def row_offsets(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, int]:
        """Check the header against fields, length and the file's size, and say where rows lie."""
        header = _read_header(file)
        check_fields(header.fields, fields)
        if header.length != length:
            raise DamagedEpisodeError(f"has {header.length} rows, its name says {length}")
        size = os.fstat(file.fileno()).st_size - min(header.offsets.values())
        if size != length * fields.nbytes:
            raise DamagedEpisodeError(f"has {size} bytes of rows, its header says {length * fields.nbytes}")
        return header.offsets

    def verify(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Check the header and the checksum of the rows."""
        found = checksum(self.load(file, fields, length))
        if _read_header(file).checksum != found:
            raise DamagedEpisodeError(f"has rows of checksum {found}, not the one it was written with")


def checksum(episode: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the rows, one field after the other in the order of their names."""
    value = 0
    for name in sorted(episode):
        value = zlib.crc32(bytes_of(episode[name]), value)
    return f"crc32:{value:08x}"


def _encoded(episode: Mapping[str, torch.Tensor], fields: Fields) -> bytes:
    stored = {
        name: torch.view_as_real(tensor) if tensor.dtype.is_complex else tensor for name, tensor in episode.items()
    }
    return safetensors.torch.save(stored, {SCHEMA_KEY: schema_text(fields, checksum=checksum(episode))})


class _Header(NamedTuple):
    fields: Fields
    length: int
    offsets: dict[str, int]  # Where the rows of each field begin in the file.
    checksum: object


def _read_header(file: io.FileIO) -> _Header:
    content = os.pread(file.fileno(), 4096, 0)
    end = 8 + int.from_bytes(content[:8], "little")
    if 4096 < end <= 8 + _MAX_HEADER:
        content = os.pread(file.fileno(), end, 0)
    if not 8 < end <= len(content):
        raise DamagedEpisodeError("has no whole safetensors header")
    with as_damage():
        return _parse_header(content[8:end])


def _parse_header(header: bytes) -> _Header:
    entries = parse_json(header)
    fields, schema = parse_schema(entries.pop("__metadata__")[SCHEMA_KEY])
    if entries.keys() != set(fields):
        raise DamagedEpisodeError(f"holds the tensors {sorted(entries)!r:.200}, its schema {sorted(fields)!r:.200}")
    length = next(iter(entries.values()))["shape"][0]
    if type(length) is not int or not 1 <= length < 2**48:
        raise DamagedEpisodeError("holds a tensor without rows")
    offsets, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _stored(fields[name])
        begin, end = end, end + length * fields[name].nbytes
        expected = {"dtype": dtype, "shape": [length, *shape], "data_offsets": [begin, end]}
        if entry != expected:
            raise DamagedEpisodeError(f"has the tensor `{name}` as {entry!r:.200}, expected {expected}")
        offsets[name] = 8 + len(header) + begin
    return _Header(fields, length, offsets, schema.get("checksum"))


def _stored(tensor_type: TensorType) -> tuple[str, tuple[int, ...]]:
    """What safetensors calls the dtype, and the shape there."""
    if tensor_type.dtype.is_complex:
        return ("F32" if tensor_type.dtype == torch.complex64 else "F64"), (*tensor_type.shape, 2)
    if tensor_type.dtype == torch.bfloat16:
        return "BF16", tensor_type.shape
    dtype = tensor_type.numpy_dtype
    return "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}", tensor_type.shape
