"""The default format: safetensors."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from typing import NamedTuple, final

import safetensors.torch
import torch

from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.files.serialization import (
    SCHEMA_KEY,
    EpisodeSerializationStrategy,
    bytes_of,
    check_fields,
    parse_schema,
    read_rows,
    schema_text,
)
from buffers.disk import DamagedEpisodeError, as_damage, parse_json, read_at, safetensors_type, size_of
from buffers.fields import Fields

__all__ = ["SafetensorsSerialization"]

# The header of an episode is far smaller than the 100 MB that safetensors allows.
_MAX_HEADER = 16 * 2**20
# How much longer the header of 10**9 - 1 rows is than that of one row: 8 digits in the shape and 9 in each of the two
# offsets of a field, and padding.
_MORE_DIGITS, _PADDING = 26, 8


@final
class SafetensorsSerialization(EpisodeSerializationStrategy):
    """The default: raw rows behind a JSON header. The safetensors library writes it and can read it.

    Complex numbers, which not every version of that library supports, are stored as pairs of floats: `(L, *shape, 2)`.
    """

    suffix = ".safetensors"
    writes_unsigned = safetensors, "0.6.1"
    keeps_info = True

    def save(self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter) -> None:
        """Write an episode. Apart from the checksum, the header depends on fields and length alone."""
        self.save_with_info(episode, fields, file, {})

    def save_with_info(
        self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter, info: EpisodeInfo
    ) -> None:
        """Write an episode, with its info in the header."""
        if "__metadata__" in episode:
            raise ValueError("Field `__metadata__` has a name that safetensors keeps for itself. Rename it.")
        encoded = _encode(episode, fields, info)
        if int.from_bytes(encoded[:8], "little") > _MAX_HEADER:
            raise ValueError(f"The names of the fields make a header of more than {_MAX_HEADER} bytes.")
        file.write(encoded)

    def load(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, torch.Tensor]:
        """Read an episode after checking its header. The checksum is not compared."""
        offsets = self.row_offsets(file, fields, length)
        episode = {}
        for name, tensor_type in fields.items():
            file.seek(offsets[name])
            episode[name] = read_rows(file, tensor_type, length)
        return episode

    def load_fields(self, file: io.FileIO) -> Fields:
        """The fields in the header."""
        return _read_header(file).fields

    def load_info(self, file: io.FileIO) -> EpisodeInfo:
        """The info in the header."""
        return _read_header(file).info

    def overhead(self, fields: Fields) -> tuple[int, int]:
        """The size of the header of one row, and of the longest header without info."""
        row = {name: torch.zeros((1, *kind.shape), dtype=kind.dtype, device="cpu") for name, kind in fields.items()}
        least = len(_encode(row, fields, {})) - fields.nbytes
        return least, least + _MORE_DIGITS * len(fields) + _PADDING

    def row_offsets(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, int]:
        """Check the header against the fields, the length and the file's size, and return where rows begin."""
        header = _read_header(file)
        check_fields(header.fields, fields)
        if header.length != length:
            raise DamagedEpisodeError(f"has {header.length} rows, its name says {length}")
        size = size_of(file) - min(header.offsets.values())
        if size != length * fields.nbytes:
            raise DamagedEpisodeError(f"has {size} bytes of rows, its header says {length * fields.nbytes}")
        return header.offsets

    def verify(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Check the header, and the checksum of the rows."""
        self._check_rows(file, self.load(file, fields, length))

    def load_all(self, file: io.FileIO) -> tuple[Fields, dict[str, torch.Tensor], EpisodeInfo]:
        """The fields, the rows and the info of a file of which nothing is known, after checking all of it."""
        header = _read_header(file)
        rows = self.load(file, header.fields, header.length)
        self._check_rows(file, rows)
        return header.fields, rows, header.info

    def _check_rows(self, file: io.FileIO, rows: Mapping[str, torch.Tensor]) -> None:
        found = _checksum(rows)
        if _read_header(file).checksum != found:
            raise DamagedEpisodeError(f"has rows of checksum {found}, not the one it was written with")


def _checksum(episode: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the rows of all fields, in ascending order of the fields' names."""
    value = 0
    for name in sorted(episode):
        value = zlib.crc32(bytes_of(episode[name]), value)
    return f"crc32:{value:08x}"


def _encode(episode: Mapping[str, torch.Tensor], fields: Fields, info: EpisodeInfo) -> bytes:
    stored = {
        name: torch.view_as_real(tensor) if tensor.dtype.is_complex else tensor for name, tensor in episode.items()
    }
    return safetensors.torch.save(stored, {SCHEMA_KEY: schema_text(fields, info, checksum=_checksum(episode))})


class _Header(NamedTuple):
    fields: Fields
    length: int
    offsets: dict[str, int]  # Of the first row of each field, in the file.
    checksum: object
    info: EpisodeInfo


def _read_header(file: io.FileIO) -> _Header:
    size = int.from_bytes(read_at(file, 8, 0), "little")
    header = read_at(file, size, 8) if size <= _MAX_HEADER else b""
    if not header or len(header) < size:
        raise DamagedEpisodeError("has no whole safetensors header")
    with as_damage():
        return _parse_header(header)


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
        dtype, shape = safetensors_type(fields[name])
        begin, end = end, end + length * fields[name].nbytes
        expected = {"dtype": dtype, "shape": [length, *shape], "data_offsets": [begin, end]}
        if entry != expected:
            raise DamagedEpisodeError(f"has the tensor `{name}` as {entry!r:.200}, expected {expected}")
        offsets[name] = 8 + len(header) + begin
    return _Header(fields, length, offsets, schema.get("checksum"), schema["info"])
