"""Codecs: a block of consecutive rows of one field to bytes, and back.

Rows that follow each other are alike, so they are compressed together. A block is what other programs know by the same
name: an LZ4 block behind a size, a zstd frame, a JPEG file. One that would save less than an eighth is the rows as they
are, which is told by its size.
"""

from __future__ import annotations

import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from buffers.fields import TensorType
from buffers.utils import how_to_install

__all__ = ["CODECS", "Codec", "DamagedBlockError", "codec_as", "codecs_as", "described", "scratch"]

# Bytes of a row.
_SMALL, _LARGE = 1 << 13, 1 << 16
_JPEG_QUALITY = 95
# Bytes of the size that a block of LZ4 begins with.
_SIZE = 4
# Of a block that somebody else has written: who reads a row decompresses all of its block.
_MOST_ROWS = 1 << 10
# LZ4 is tried a second time where the first has made rows so many times smaller.
_LEAST_TIMES = 8


class DamagedBlockError(Exception):
    """A block that is not what was compressed."""


class Codec(ABC):
    """How rows of one type are compressed.

    Attributes:
        kind: The type of a row.
        rows_per_block: Rows of every block but the last of an episode.
    """

    name: str
    #: The module that compresses, imported where it is needed.
    library_name: str
    rows_per_block: int

    def __init__(self, field: str, kind: TensorType) -> None:
        self.field, self.kind = field, kind

    @property
    def key(self) -> tuple[str, int]:
        """Equal for codecs that read each other's blocks."""
        return self.name, self.rows_per_block

    def describe(self) -> dict[str, Any]:
        """What `codec_as` needs to make it again, as JSON can hold it."""
        return {"codec": self.name, "rows_per_block": self.rows_per_block}

    def __reduce__(self) -> Any:
        return codec_as, (self.describe(), self.field, self.kind)

    @classmethod
    def library(cls) -> Any:
        """What compresses; an ImportError that says how to install it."""
        try:
            return importlib.import_module(cls.library_name)
        except ImportError as error:
            advice = how_to_install("compress")
            raise ImportError(f"`compress` needs {cls.library_name} ({error}): {advice}.") from None

    @abstractmethod
    def _encode(self, rows: np.ndarray) -> Any:
        """The block of rows, which come as bytes, uint8 `(n,)`."""

    @abstractmethod
    def _decode(self, block: memoryview, out: np.ndarray) -> object:
        """Fill `out`, uint8 `(n,)`, and return n; for what is damaged, raise anything, or return something else."""

    def encode(self, rows: np.ndarray) -> bytes:
        """A block of rows `(n, *shape)`."""
        memory = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        block = self._encode(memory)
        return bytes(block) if len(block) < len(memory) - len(memory) // 8 else memory.tobytes()

    def decode(self, block: memoryview, out: np.ndarray) -> None:
        """Fill the memory of rows, uint8 `(n,)`, from their block; DamagedBlockError if it is not one of theirs."""
        if len(block) == len(out):
            out[:] = block
            return
        try:
            num_bytes = self._decode(block, out)
        except MemoryError:
            raise
        except Exception as error:
            if self._can_read(block, out):
                raise  # A signal handler has raised it.
            raise DamagedBlockError(
                f"has a block of {len(block)} bytes that {self.name} cannot read: {error}"
            ) from None
        if num_bytes != len(out):
            raise DamagedBlockError(f"has a block of {num_bytes} bytes of rows, expected {len(out)}")

    def _can_read(self, block: memoryview, out: np.ndarray) -> bool:
        """Whether a block can be read after all."""
        try:
            return self._decode(block, out) == len(out)
        except MemoryError:
            raise
        except Exception:
            return False


class Lz4(Codec):
    """LZ4: decompresses about as fast as memory is copied.

    It takes a byte for each 255 of a long match, so where rows are alike, its output is mostly these bytes, and LZ4 of
    that output is up to three times smaller. Where that helps, a block is compressed twice. It begins with the size of
    the first output, as 4 bytes, or with 0 if there was no second time.
    """

    name, library_name = "lz4", "cramjam"

    def __init__(self, field: str, kind: TensorType) -> None:
        super().__init__(field, kind)
        # Of about 100 kB, but of rows enough to find what they share.
        self.rows_per_block = 16 if kind.nbytes <= _SMALL else 8 if kind.nbytes <= _LARGE else 4
        self._lz4 = self.library().lz4
        self._decompress = self._lz4.decompress_block_into

    def _encode(self, rows: np.ndarray) -> Any:
        once = self._compressed(rows)
        if len(once) < len(rows) // _LEAST_TIMES:
            twice = self._compressed(once)
            if len(twice) < len(once) - len(once) // 16:
                return len(once).to_bytes(_SIZE, "little") + bytes(twice)
        return bytes(_SIZE) + bytes(once)

    def _compressed(self, data: np.ndarray) -> np.ndarray:
        # Into memory of our own: where cramjam gets none, it ends the process.
        out = np.empty(self._lz4.compress_block_bound(data), np.uint8)
        return out[: self._lz4.compress_block_into(data, out, store_size=False)]

    def _decode(self, block: memoryview, out: np.ndarray) -> object:
        # Without `output_len`, cramjam takes the first four bytes of a block for its size.
        size, rest = int.from_bytes(block[:_SIZE], "little"), block[_SIZE:]
        if size:
            if size >= len(out):
                return 0
            once = scratch(size, "once")
            if self._decompress(rest, once, output_len=size) != size:
                return 0
            rest = once.data
        return self._decompress(rest, out, output_len=len(out))


class Zstd(Codec):
    """zstd: smaller, and a few times slower than LZ4 both ways."""

    name, library_name = "zstd", "zstandard"
    rows_per_block = 16

    def __init__(self, field: str, kind: TensorType) -> None:
        super().__init__(field, kind)
        self._zstd = self.library()
        # A low level does not look back as far as the row before, if that is long.
        self._level = 1 if kind.nbytes <= 2 * _SMALL else 9

    def _encode(self, rows: np.ndarray) -> Any:
        compressor = _kept(f"compressor{self._level}", lambda: self._zstd.ZstdCompressor(level=self._level))
        return compressor.compress(rows)

    def _decode(self, block: memoryview, out: np.ndarray) -> object:
        # Reading would stop where `out` is full.
        if self._zstd.frame_content_size(block) != len(out):
            return 0
        with _kept("decompressor", self._zstd.ZstdDecompressor).stream_reader(block) as reader:
            return reader.readinto(out)


class Jpeg(Codec):
    """JPEG at quality 95: lossy, a row by itself. For images as cameras see them."""

    name, library_name = "jpeg", "simplejpeg"
    rows_per_block = 1

    def __init__(self, field: str, kind: TensorType) -> None:
        super().__init__(field, kind)
        shape = kind.shape
        if kind.dtype != torch.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))):
            raise ValueError(
                f"JPEG takes images, uint8 (H, W), (H, W, 1) or (H, W, 3); field `{field}` is {kind}. Name the fields "
                "that are, or choose another codec for it."
            )
        self._jpeg = self.library()
        self._colors = "RGB" if shape[2:] == (3,) else "GRAY"
        self._shape = (*shape[:2], 3 if self._colors == "RGB" else 1)

    def _encode(self, rows: np.ndarray) -> Any:
        options = {"quality": _JPEG_QUALITY, "colorspace": self._colors}
        return self._jpeg.encode_jpeg(rows.reshape(self._shape), **options)

    def _decode(self, block: memoryview, out: np.ndarray) -> object:
        found = self._jpeg.decode_jpeg(block, colorspace=self._colors, buffer=out.reshape(self._shape))
        return found.nbytes if found.shape == self._shape else 0


#: By their names.
CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (Lz4, Zstd, Jpeg)}


def codec_as(described: Mapping[str, Any], field: str, kind: TensorType) -> Codec:
    """The codec that has described itself so. What is no description, or not known, is a LookupError or TypeError."""
    codec = CODECS[described["codec"]](field, kind)
    codec.rows_per_block = rows_per_block = described["rows_per_block"]
    if type(rows_per_block) is not int or not 1 <= rows_per_block <= _MOST_ROWS:
        raise LookupError(f"{described!r:.200} describes no codec")
    return codec


def described(codecs: Mapping[str, Codec]) -> dict[str, Any]:
    """How each field is compressed, in their order, as JSON can hold it."""
    return {name: codec.describe() for name, codec in codecs.items()}


def codecs_as(described: Mapping[str, Any], fields: Mapping[str, TensorType]) -> dict[str, Codec]:
    """The inverse of `described`, with the errors of `codec_as`."""
    return {name: codec_as(told, name, fields[name]) for name, told in described.items()}


_own = threading.local()


def _kept(name: str, make: Callable[[], Any]) -> Any:
    """What this thread has made under a name: contexts of a library cost as much as a block."""
    found = getattr(_own, name, None)
    if found is None:
        found = make()
        setattr(_own, name, found)
    return found


def scratch(num_bytes: int, name: str) -> np.ndarray:
    """Memory of this thread's own, uint8 `(num_bytes,)`, until that of this name is asked for again."""
    memory: np.ndarray | None = getattr(_own, name, None)
    if memory is None or len(memory) < num_bytes:
        # New memory costs more than decompressing into it.
        memory = np.empty(num_bytes, np.uint8)
        setattr(_own, name, memory)
    return memory[:num_bytes]
