"""The default format: safetensors."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import safetensors.torch
import torch

from buffers.compression import CODECS, Codec, codecs_as, described, num_blocks
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.files.compressed import INDEX, FieldBlocks, decoded
from buffers.dataset.files.serialization import (
    SCHEMA_KEY,
    EpisodeSerializationStrategy,
    bytes_of,
    check_fields,
    parse_schema,
    read_rows,
    schema_text,
)
from buffers.disk import (
    DamagedEpisodeError,
    UnknownVersionError,
    as_damage,
    parse_json,
    read_at,
    safetensors_type,
    size_of,
)
from buffers.fields import Fields, TensorType, as_tensor

__all__ = ["SafetensorsSerialization"]

# The header of an episode is far smaller than the 100 MB that safetensors allows.
_MAX_HEADER = 16 * 2**20
# How much longer the header of 10**9 - 1 rows is than that of one row: 8 digits in the shape and 9 in each of the two
# offsets of a field, and padding.
_MORE_DIGITS, _PADDING = 26, 8
# LZ4 twice makes rows up to 255 * 255 times smaller, and nothing else more: what says more would fill the memory.
_MOST_TIMES = 1 << 17
_BYTE = TensorType((), torch.uint8)


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
        self.save_blocks(episode, {}, {}, fields, len(next(iter(episode.values()))), file, info)

    def save_blocks(
        self,
        rows: Mapping[str, torch.Tensor],
        blocks: Mapping[str, torch.Tensor],
        codecs: Mapping[str, Codec],
        fields: Fields,
        length: int,
        file: io.BufferedWriter,
        info: EpisodeInfo,
    ) -> None:
        """Write an episode: rows as they are, `name -> (L, *shape)`, and others as `stored_blocks` has made them."""
        for name in fields:
            if name == "__metadata__" or name.startswith(INDEX):
                raise ValueError(f"Field `{name}` has a name that safetensors keeps for itself. Rename it.")
        encoded = _encode({**rows, **blocks}, fields, info, codecs, length)
        if int.from_bytes(encoded[:8], "little") > _MAX_HEADER:
            raise ValueError(f"The names of the fields make a header of more than {_MAX_HEADER} bytes.")
        file.write(encoded)

    def load(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, torch.Tensor]:
        """Read an episode after checking its header. The checksum is not compared, but for those of its blocks."""
        self.row_offsets(file, fields, length)
        header = _read_header(file)
        episode = {}
        for name, kind in fields.items():
            if name in header.blocks:
                episode[name] = as_tensor(decoded(header.blocks[name], file, length), kind)
            else:
                file.seek(header.offsets[name])
                episode[name] = read_rows(file, kind, length)
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
        least = len(_encode(row, fields, {}, {}, 1)) - fields.nbytes
        return least, least + _MORE_DIGITS * len(fields) + _PADDING

    def row_offsets(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, int]:
        """Check the header against the fields, the length and the file's size, and return where rows begin.

        Of fields that are compressed, where their blocks do.
        """
        header = _read_header(file)
        check_fields(header.fields, fields)
        if header.length != length:
            raise DamagedEpisodeError(f"has {header.length} rows, its name says {length}")
        size = size_of(file) - header.begin
        if size != header.num_bytes:
            raise DamagedEpisodeError(f"has {size} bytes of rows, its header says {header.num_bytes}")
        return header.offsets | {name: blocks.first for name, blocks in header.blocks.items()}

    def block_places(self, file: io.FileIO) -> dict[str, FieldBlocks]:
        """As `EpisodeSerializationStrategy.block_places`."""
        return _read_header(file).blocks

    def verify(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Check the header, and the checksum of all that is behind it."""
        self.row_offsets(file, fields, length)
        self._check_rows(file)

    def load_all(self, file: io.FileIO) -> tuple[Fields, dict[str, torch.Tensor], EpisodeInfo]:
        """The fields, the rows and the info of a file of which nothing is known, after checking all of it."""
        header = _read_header(file)
        rows = self.load(file, header.fields, header.length)
        self._check_rows(file)
        return header.fields, rows, header.info

    def _check_rows(self, file: io.FileIO) -> None:
        header, stored = _read_header(file), {}
        for name, (offset, num_bytes) in header.places.items():
            file.seek(offset)
            stored[name] = read_rows(file, _BYTE, num_bytes)
        found = _checksum(stored)
        if header.checksum != found:
            raise DamagedEpisodeError(f"has rows of checksum {found}, not the one it was written with")


def _checksum(episode: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of all tensors, in ascending order of their names."""
    value = 0
    for name in sorted(episode):
        value = zlib.crc32(bytes_of(episode[name]), value)
    return f"crc32:{value:08x}"


def _encode(
    episode: Mapping[str, torch.Tensor],
    fields: Fields,
    info: EpisodeInfo,
    codecs: Mapping[str, Codec],
    length: int,
) -> bytes:
    more = {"compress": described(codecs), "length": length} if codecs else {}
    stored = {
        name: torch.view_as_real(tensor) if tensor.dtype.is_complex else tensor for name, tensor in episode.items()
    }
    return safetensors.torch.save(stored, {SCHEMA_KEY: schema_text(fields, info, checksum=_checksum(episode), **more)})


class _Header(NamedTuple):
    fields: Fields
    length: int
    begin: int  # Of all that is behind it, and how much that is.
    num_bytes: int
    places: dict[str, tuple[int, int]]  # Where each tensor begins in the file, and its bytes.
    blocks: dict[str, FieldBlocks]  # Of the fields that are compressed.
    checksum: object
    info: EpisodeInfo

    @property
    def offsets(self) -> dict[str, int]:
        """Of the first row of each other field, in the file."""
        return {name: self.places[name][0] for name in self.fields if name not in self.blocks}


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
    codecs = codecs_as(_known(schema.get("compress", {})), fields)
    expected_names = {*fields, *(INDEX + name for name in codecs)}
    if entries.keys() != expected_names:
        found = f"{sorted(entries)!r:.200}, its schema {sorted(expected_names)!r:.200}"
        raise DamagedEpisodeError(f"holds the tensors {found}")
    length = schema["length"] if codecs else next(iter(entries.values()))["shape"][0]
    if type(length) is not int or not 1 <= length < 2**48:
        raise DamagedEpisodeError("holds a tensor without rows")
    begin, places, end = 8 + len(header), {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, num_bytes = _expected(name, entry, fields, codecs, length)
        expected = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        if entry != expected:
            raise DamagedEpisodeError(f"has the tensor `{name}` as {entry!r:.200}, expected {expected}")
        places[name] = begin + end, num_bytes
        end += num_bytes
    blocks = {n: FieldBlocks(codec, places[INDEX + n][0], *places[n]) for n, codec in codecs.items()}
    return _Header(fields, length, begin, end, places, blocks, schema.get("checksum"), schema["info"])


def _known(compress: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a schema says of compressed fields; UnknownVersionError for a codec that only later versions can have."""
    for name, how in compress.items():
        if isinstance(codec := how["codec"], str) and codec not in CODECS:
            raise UnknownVersionError(f"has `{name}` compressed by {codec!r:.60}, which this library does not know")
    return compress


def _expected(
    name: str, entry: Mapping[str, Any], fields: Fields, codecs: Mapping[str, Codec], length: int
) -> tuple[str, list[int], int]:
    """The dtype, shape and bytes that a tensor must have; of blocks, the entry says how many bytes they are."""
    if name in codecs:
        size = entry["shape"][0]
        row_bytes = length * fields[name].nbytes
        if type(size) is not int or not 1 <= size <= row_bytes <= size * _MOST_TIMES:
            raise DamagedEpisodeError(f"has {size!r:.50} bytes of blocks of `{name}`")
        return "U8", [size], size
    if name not in fields:
        num = num_blocks(length, codecs[name.removeprefix(INDEX)])
        return "I32", [num, 2], 8 * num
    dtype, shape = safetensors_type(fields[name])
    return dtype, [length, *shape], length * fields[name].nbytes
