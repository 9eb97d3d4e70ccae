"""Codecs: a block of consecutive rows of one field to bytes, and back.

Rows that follow each other are alike, so they are compressed together. A block is what other programs know by the same
name: a plain LZ4 block, a zstd frame, a JPEG file. One that would save less than an eighth is the rows as they are,
which is told by its size.
"""

from __future__ import annotations

import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from buffers.fields import TensorType
from buffers.utils import how_to_install

__all__ = ["CODECS", "Codec", "DamagedBlockError", "codec_as", "scratch"]

# How far back an LZ4 block can refer to.
_LZ4_REACH = 1 << 16
_ZSTD_LEVEL = 1
_JPEG_QUALITY = 95


class DamagedBlockError(Exception):
    """A block that is not what was compressed."""


class Codec(ABC):
    """How rows of one type are compressed.

    Attributes:
        kind: The type of a row.
        rows_per_block: Rows of every block but the last of an episode.
    """

    name: str
    is_lossless = True
    rows_per_block: int
    #: Whether each row of a block but the first is stored as what it differs in from the one before, bit by bit.
    is_xor = False

    def __init__(self, field: str, kind: TensorType) -> None:
        if not kind.nbytes:
            raise ValueError(f"Field `{field}` has no bytes to compress: leave it out of `compress`.")
        self.field, self.kind = field, kind

    def describe(self) -> dict[str, Any]:
        """What `codec_as` needs to make it again, as JSON can hold it."""
        return {"codec": self.name, "rows_per_block": self.rows_per_block, "xor": self.is_xor}

    def __reduce__(self) -> Any:
        return codec_as, (self.describe(), self.field, self.kind)

    @abstractmethod
    def _encode(self, rows: np.ndarray) -> Any:
        """Contiguous rows `(n, *shape)` as bytes."""

    @abstractmethod
    def _decode(self, block: memoryview, out: np.ndarray) -> object:
        """Fill `out`; raises anything for what is damaged, or returns other than its bytes."""

    def encode(self, rows: np.ndarray) -> bytes:
        """A block of rows `(n, *shape)`."""
        rows = np.ascontiguousarray(rows)
        block = self._encode(_differences(rows) if self.is_xor else rows)
        return bytes(block) if len(block) <= rows.nbytes - rows.nbytes // 8 - 1 else rows.tobytes()

    def decode(self, block: memoryview, out: np.ndarray) -> None:
        """Fill contiguous rows `(n, *shape)` from their block; DamagedBlockError if it is not one of theirs."""
        if len(block) == out.nbytes:
            out.reshape(-1).view(np.uint8)[:] = block
            return
        try:
            num_bytes = self._decode(block, out)
        except Exception as error:
            raise DamagedBlockError(
                f"has a block of {len(block)} bytes that {self.name} cannot read: {error}"
            ) from None
        if num_bytes != out.nbytes:
            raise DamagedBlockError(f"has a block of {num_bytes} bytes of rows, expected {out.nbytes}")
        if self.is_xor:
            words = _as_words(out)
            for n in range(1, len(words)):
                np.bitwise_xor(words[n], words[n - 1], out=words[n])


class Lz4(Codec):
    """LZ4: decompresses about as fast as memory is copied.

    It finds the row before by itself, unless rows are longer than it can refer back; then they are stored `is_xor`.
    """

    name = "lz4"

    def __init__(self, field: str, kind: TensorType) -> None:
        super().__init__(field, kind)
        self.is_xor = kind.nbytes > _LZ4_REACH
        self.rows_per_block = 4 if self.is_xor else 8
        self._lz4 = _library("cramjam").lz4

    def _encode(self, rows: np.ndarray) -> Any:
        return self._lz4.compress_block(_as_bytes(rows), store_size=False)

    def _decode(self, block: memoryview, out: np.ndarray) -> object:
        return self._lz4.decompress_block_into(block, _as_bytes(out))


class Zstd(Codec):
    """zstd: smaller, and a few times slower than LZ4 both ways."""

    name = "zstd"
    rows_per_block = 16

    def __init__(self, field: str, kind: TensorType) -> None:
        super().__init__(field, kind)
        self._zstd = _library("cramjam").zstd

    def _encode(self, rows: np.ndarray) -> Any:
        return self._zstd.compress(_as_bytes(rows), _ZSTD_LEVEL)

    def _decode(self, block: memoryview, out: np.ndarray) -> object:
        return self._zstd.decompress_into(block, _as_bytes(out))


class Jpeg(Codec):
    """JPEG at quality 95: lossy, a row by itself. For images as cameras see them."""

    name = "jpeg"
    is_lossless = False
    rows_per_block = 1

    def __init__(self, field: str, kind: TensorType) -> None:
        super().__init__(field, kind)
        shape = kind.shape
        if kind.dtype != torch.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))):
            raise ValueError(f"JPEG takes images, uint8 (H, W), (H, W, 1) or (H, W, 3); field `{field}` is {kind}.")
        self._jpeg = _library("simplejpeg")
        self._colors = "RGB" if shape[2:] == (3,) else "GRAY"
        self._shape = (*shape[:2], 3 if self._colors == "RGB" else 1)

    def _encode(self, rows: np.ndarray) -> Any:
        options = {"quality": _JPEG_QUALITY, "colorspace": self._colors}
        return self._jpeg.encode_jpeg(rows.reshape(self._shape), **options)

    def _decode(self, block: memoryview, out: np.ndarray) -> object:
        found = self._jpeg.decode_jpeg(block, colorspace=self._colors, buffer=out.reshape(self._shape))
        return found.nbytes


#: By their names.
CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (Lz4, Zstd, Jpeg)}


def codec_as(described: Mapping[str, Any], field: str, kind: TensorType) -> Codec:
    """The codec that has described itself so. What is no description, or not known, is a LookupError or TypeError."""
    codec = CODECS[described["codec"]](field, kind)
    rows_per_block, is_xor = described["rows_per_block"], described["xor"]
    if type(rows_per_block) is not int or not 1 <= rows_per_block < 2**31 or type(is_xor) is not bool:
        raise LookupError(f"{described!r:.200} describes no codec")
    codec.rows_per_block, codec.is_xor = rows_per_block, is_xor
    return codec


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"`compress` needs {name} ({error}): {how_to_install('compress')}.") from None


def _as_bytes(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(-1).view(np.uint8)


def _as_words(rows: np.ndarray) -> np.ndarray:
    """Contiguous rows `(n, ...)` as `(n, m)` of the largest integers that their size allows."""
    flat = rows.reshape(-1).view(np.uint8).reshape(len(rows), -1)
    return flat.view(np.uint64) if flat.shape[1] % 8 == 0 else flat


def _differences(rows: np.ndarray) -> np.ndarray:
    """Contiguous rows, each but the first as what it differs in from the one before."""
    words = _as_words(rows)
    found = words.copy()
    np.bitwise_xor(words[1:], words[:-1], out=found[1:])
    return found


_own = threading.local()


def scratch(num_rows: int, kind: TensorType) -> np.ndarray:
    """Memory of this thread's own for rows `(num_rows, *shape)`, until it is asked for again."""
    num_bytes = num_rows * kind.nbytes
    memory: np.ndarray | None = getattr(_own, "memory", None)
    if memory is None or len(memory) < num_bytes:
        # New memory costs more than decompressing into it.
        _own.memory = memory = np.empty(num_bytes, np.uint8)
    return memory[:num_bytes].view(kind.numpy_dtype).reshape(num_rows, *kind.shape)
