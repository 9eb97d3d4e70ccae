"""The default format: safetensors."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from buffers.dataset.serialization import (
    SCHEMA_KEY,
    DamagedEpisodeError,
    EpisodeSerializationStrategy,
    bytes_of,
    check_fields,
    parse_schema,
    schema_text,
)
from buffers.fields import Fields, TensorType

__all__ = ["SafetensorsSerialization"]

# An episode's header is far from the 100 MB that safetensors allows.
_MAX_HEADER = 16 * 2**20
_READ_SIZE = 2**20
_POWERS_OF_TEN = 10 ** np.arange(1, 19, dtype=np.int64)


@final
class SafetensorsSerialization(EpisodeSerializationStrategy):
    """The default: raw rows behind a header in JSON, written by the safetensors library and readable by it.

    Complex numbers, which not every version of that library has, are pairs of floats: `(L, *shape, 2)`.
    """

    suffix = ".safetensors"

    def __init__(self) -> None:
        self._layouts: tuple[Fields, _Layout] | None = None

    def __reduce__(self) -> tuple[type[SafetensorsSerialization], tuple[()]]:
        return SafetensorsSerialization, ()

    def save(self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter) -> None:
        """Write an episode: a header that depends on fields and length alone, but for the checksum; then the rows."""
        if "__metadata__" in episode:
            raise ValueError("Field `__metadata__` has a name that safetensors keeps for itself. Rename it.")
        encoded = _encoded(episode, fields, checksum(episode))
        num_bytes = int.from_bytes(encoded[:8], "little")
        if num_bytes > _MAX_HEADER:
            raise ValueError(f"The names of the fields make a header of {num_bytes} bytes, of {_MAX_HEADER} allowed.")
        file.write(encoded)

    def load(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, torch.Tensor]:
        """Read an episode after its header has been found to be the expected one. The checksum is not looked at."""
        offsets = self.row_offsets(file, fields, length)
        episode = {}
        for name, tensor_type in fields.items():
            tensor = torch.empty((length, *tensor_type.shape), dtype=tensor_type.dtype)
            file.seek(offsets[name])
            view = bytes_of(tensor)
            # One read brings at most 2 GB.
            while view and (num_read := file.readinto(view)):
                view = view[num_read:]
            if view:
                raise DamagedEpisodeError("is shorter than its header says")
            episode[name] = tensor
        return episode

    def load_fields(self, file: io.FileIO) -> Fields:
        """The fields that the header states and its tensors have."""
        return _parse_header(_read_header(file)).fields

    def sizes(self, fields: Fields, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Bytes of whole files, as this version of the safetensors library writes them."""
        layout = self._layout(fields)
        return layout.sizes(lengths) if layout.is_exact else None

    def row_offsets(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, int]:
        """Check the header against fields, length and the file's size, and say where rows lie."""
        header = _read_header(file)
        size = os.fstat(file.fileno()).st_size - 8 - len(header)
        if size < length * fields.nbytes:
            # Before memory is taken for what may be a lie.
            raise DamagedEpisodeError(f"has {size} bytes of rows, its header says {length * fields.nbytes}")
        layout = self._layout(fields)
        if size == length * fields.nbytes and layout.matches(header, length):
            return layout.offsets(length, len(header))
        found = _parse_header(header)
        check_fields(found.fields, fields)
        if found.length != length:
            raise DamagedEpisodeError(f"has {found.length} rows, its name says {length}")
        if size != length * fields.nbytes:
            raise DamagedEpisodeError(f"has {size} bytes of rows, its header says {length * fields.nbytes}")
        return {name: 8 + len(header) + begin for name, begin in found.begins.items()}

    def verify(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Check the header and the checksum of the rows."""
        offsets = self.row_offsets(file, fields, length)
        # Parsed once more: a header that was merely compared may have anything in the place of the checksum.
        stated = _parse_header(_read_header(file)).checksum
        value = 0
        for name in sorted(offsets):
            for block in _blocks(file, offsets[name], length * fields[name].nbytes):
                value = zlib.crc32(block, value)
        if stated != f"crc32:{value:08x}":
            raise DamagedEpisodeError(f"has rows of checksum crc32:{value:08x}, not the one it was written with")

    def _layout(self, fields: Fields) -> _Layout:
        if self._layouts is None or self._layouts[0] is not fields:
            self._layouts = (fields, _Layout(fields))
        return self._layouts[1]


def checksum(episode: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the rows, one field after the other in the order of their names."""
    value = 0
    for name in sorted(episode):
        value = zlib.crc32(bytes_of(episode[name]), value)
    return f"crc32:{value:08x}"


def _encoded(episode: Mapping[str, torch.Tensor], fields: Fields, checksum: str) -> bytes:
    stored = {
        name: torch.view_as_real(tensor) if tensor.dtype.is_complex else tensor for name, tensor in episode.items()
    }
    return safetensors.torch.save(stored, {SCHEMA_KEY: schema_text(fields, checksum=checksum)})


def _read_header(file: io.FileIO) -> bytes:
    start = os.pread(file.fileno(), 4096, 0)
    num_bytes = int.from_bytes(start[:8], "little")
    if len(start) < 8 or num_bytes > _MAX_HEADER:
        raise DamagedEpisodeError("has no safetensors header")
    header = start[8 : 8 + num_bytes]
    if len(header) < num_bytes:
        header += os.pread(file.fileno(), num_bytes - len(header), 8 + len(header))
    if len(header) < num_bytes:
        raise DamagedEpisodeError("ends within its header")
    return header


class _Header(NamedTuple):
    """What a header says, with `begins`: where the rows of each field begin behind it."""

    fields: Fields
    length: int
    begins: dict[str, int]
    checksum: object


def _parse_header(header: bytes) -> _Header:
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
        fields, schema = parse_schema(entries.pop("__metadata__")[SCHEMA_KEY])
        if entries.keys() != set(fields):
            raise DamagedEpisodeError(f"holds the tensors {sorted(entries)!r:.200}, its schema {sorted(fields)!r:.200}")
        rows = {entry["shape"][0] for entry in entries.values()}
        length = rows.pop()
        if rows or type(length) is not int or not 1 <= length < 2**48:
            raise DamagedEpisodeError("holds tensors of unlike lengths")
        begins, end = {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = _stored(fields[name])
            begin, end = end, end + length * fields[name].nbytes
            expected = {"dtype": dtype, "shape": [length, *shape], "data_offsets": [begin, end]}
            if entry != expected:
                raise DamagedEpisodeError(f"has the tensor `{name}` as {entry!r:.200}, expected {expected}")
            begins[name] = begin
        return _Header(fields, length, begins, schema.get("checksum"))
    except DamagedEpisodeError:
        raise
    except Exception as error:
        raise DamagedEpisodeError(f"has no readable header ({type(error).__name__})") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DamagedEpisodeError("has a header with a key twice")
    return found


def _stored(tensor_type: TensorType) -> tuple[str, tuple[int, ...]]:
    """What safetensors calls the dtype, and the shape there."""
    if tensor_type.dtype.is_complex:
        return ("F32" if tensor_type.dtype == torch.complex64 else "F64"), (*tensor_type.shape, 2)
    if tensor_type.dtype == torch.bfloat16:
        return "BF16", tensor_type.shape
    dtype = tensor_type.numpy_dtype
    return "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}", tensor_type.shape


def _blocks(file: io.FileIO, offset: int, num_bytes: int) -> Iterator[bytes]:
    while num_bytes:
        block = os.pread(file.fileno(), min(num_bytes, _READ_SIZE), offset)
        if not block:
            raise DamagedEpisodeError("is shorter than its header says")
        yield block
        offset, num_bytes = offset + len(block), num_bytes - len(block)


class _Layout:
    """What the safetensors library makes of episodes with these fields, for any length.

    The header depends on the length alone, but for the checksum, so that files can be told to be whole by their size,
    and headers to be good by a comparison of bytes. The order of the fields is learned from the library. Should a
    version of it write headers in another way, `is_exact` is False and headers are parsed.
    """

    def __init__(self, fields: Fields) -> None:
        one_row = {name: torch.zeros((1, *field.shape), dtype=field.dtype) for name, field in fields.items()}
        blank = "crc32:00000000"
        encoded = _encoded(one_row, fields, blank)
        header = encoded[8 : 8 + int.from_bytes(encoded[:8], "little")]
        names = list(_parse_header(header).begins)
        widths = [fields[name].nbytes for name in names]
        self._begins = dict(zip(names, np.cumsum([0, *widths[:-1]]).tolist(), strict=True))
        self._metadata = json.dumps({SCHEMA_KEY: schema_text(fields, checksum=blank)}, separators=(",", ":"))
        self._entries = [
            (json.dumps(name, ensure_ascii=False), *_stored(fields[name]), begin, begin + width)
            for (name, begin), width in zip(self._begins.items(), widths, strict=True)
        ]
        self._row_bytes = fields.nbytes
        self._checksum_at = slice(self._metadata.index(blank) + 16, self._metadata.index(blank) + 16 + len(blank))
        self._cache: dict[int, bytes] = {}
        self.is_exact = self._header(1) == header and header[self._checksum_at] == blank.encode()

    def matches(self, header: bytes, length: int) -> bool:
        """Whether a header is that of an episode of this length, whatever the checksum."""
        at = self._checksum_at
        expected = self._header(length)
        return header[: at.start] == expected[: at.start] and header[at.stop :] == expected[at.stop :]

    def offsets(self, length: int, header_size: int) -> dict[str, int]:
        """Where the rows of each field begin."""
        return {name: 8 + header_size + length * begin for name, begin in self._begins.items()}

    def sizes(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bytes of files: those of the header for one row, with more digits in it, padded; and the rows."""
        bounds = [bound for entry in self._entries for bound in entry[3:]]
        numbers = [lengths] * len(self._entries) + [lengths * bound for bound in bounds]
        header = np.full(lengths.shape, len(self._unpadded(1)))
        for number, for_one_row in zip(numbers, [1] * len(self._entries) + bounds, strict=True):
            header += _num_digits(number) - len(str(for_one_row))
        return 8 + -(-header // 8) * 8 + lengths * self._row_bytes

    def _header(self, length: int) -> bytes:
        header = self._cache.get(length)
        if header is None:
            if len(self._cache) == 1024:
                self._cache.clear()
            unpadded = self._unpadded(length)
            header = self._cache[length] = unpadded + b" " * (-len(unpadded) % 8)
        return header

    def _unpadded(self, length: int) -> bytes:
        parts = ['{"__metadata__":' + self._metadata]
        for name, dtype, shape, begin, end in self._entries:
            sizes = ",".join(map(str, (length, *shape)))
            parts.append(
                f'{name}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{length * begin},{length * end}]}}'
            )
        return (",".join(parts) + "}").encode()


def _num_digits(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.searchsorted(_POWERS_OF_TEN, numbers, side="right") + 1
