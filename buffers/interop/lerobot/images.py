"""Encoded images as arrays, and back.

PNG, which LeRobot writes, is decoded by PyAV, 2 to 3 times as fast as by Pillow; all else by Pillow, as LeRobot does.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from buffers.interop.base import FormatError, library
from buffers.interop.lerobot.parquet import EXTRA

__all__ = ["ImageDecoder", "ImageEncoder", "ImageType", "image_type"]

_PNG = b"\x89PNG\r\n\x1a\n"
# By bits of a channel and type of color: the channels of those that PyAV decodes.
_PNG_KINDS = {(8, 0): 1, (8, 2): 3, (8, 6): 4, (16, 0): 1}
_BY_CHANNELS = {1: "gray", 3: "rgb24", 4: "rgba"}
_DEPTH = "gray16be"
# Deflate makes at most 1,032 bytes of one.
_MOST_EXPANSION = 1100
# By Pillow's mode.
_MODES = {"L": (1, np.uint8), "RGB": (3, np.uint8), "RGBA": (4, np.uint8), "F": (1, np.float32)}
_MODES |= {mode: (1, np.uint16) for mode in ("I;16", "I;16B", "I;16L")}
_PILLOW_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")


class ImageType(NamedTuple):
    """What the header of an image says."""

    shape: tuple[int, int, int]  # Height, width, channels.
    dtype: np.dtype


def image_type(path: str, name: str, data: Any) -> ImageType:
    """That of an encoded image, of which only the header is looked at. FormatError if it is none."""
    found = _png_type(data)
    if found is None:
        with _pillow_image(path, name, data) as image:
            found = _pillow_type(path, name, image)
    elif math.prod(found.shape) > _MOST_EXPANSION * len(data):
        text = f"`{name}` has an image of {len(data)} bytes that says it has the shape {found.shape}"
        raise FormatError(path, text, "Get a whole copy of it")
    return found


def _png_type(data: Any) -> ImageType | None:
    """Of a PNG that PyAV decodes as Pillow does; None for others."""
    head = bytes(memoryview(data)[:29])
    if len(head) < 29 or not head.startswith(_PNG) or head[12:16] != b"IHDR":
        return None
    width, height, bits, color = struct.unpack(">IIBB", head[16:26])
    channels = _PNG_KINDS.get((bits, color))
    return None if channels is None else ImageType((height, width, channels), np.dtype(f"u{bits // 8}"))


@contextmanager
def _pillow_image(path: str, name: str, data: Any) -> Iterator[Any]:
    pillow = library("PIL.Image", EXTRA)
    try:
        with pillow.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            yield image
    except FormatError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly any for damaged bytes.
        found = f"`{name}` has an image that cannot be read ({type(error).__name__}: {str(error)[:200]})"
        raise FormatError(path, found, "Get a whole copy of it") from error


def _pillow_type(path: str, name: str, image: Any) -> ImageType:
    if image.mode not in _MODES:
        advice = "Convert the images to RGB"
        raise FormatError(path, f"`{name}` has an image of Pillow's mode {image.mode!r:.20}", advice)
    channels, dtype = _MODES[image.mode]
    return ImageType((image.height, image.width, channels), np.dtype(dtype))


class ImageDecoder:
    """Decodes images of one feature after another. Each process needs its own."""

    def __init__(self) -> None:
        self._context: Any = None

    def decode(self, path: str, name: str, data: Any, out: np.ndarray) -> None:
        """Decode an image into `out`, (H, W, C), which it must fit. FormatError if it does not."""
        png = _png_type(data)
        found = image_type(path, name, data) if png is None else png
        if found != (out.shape, out.dtype):
            text = f"`{name}` has an image of {found.dtype} {found.shape}, where others have {out.dtype} {out.shape}"
            raise FormatError(path, text, "All images of a feature are alike")
        if png is None or not self._decode_png(path, name, data, out):
            with _pillow_image(path, name, data) as image:
                out[...] = np.asarray(image).reshape(out.shape)

    def _decode_png(self, path: str, name: str, data: Any, out: np.ndarray) -> bool:
        """Whether the image is one that PyAV decodes as Pillow does."""
        av = library("av", EXTRA)
        if self._context is None:
            self._context = av.CodecContext.create("png", "r")
            self._context.thread_count = 1
            # Else bytes that were changed are decoded to something.
            self._context.options = {"err_detect": "crccheck+explode"}
        packet = av.Packet(data)
        # Else the decoder adds the image before this one to it.
        packet.is_keyframe = True
        try:
            (frame,) = self._context.decode(packet)
            # A color that stands for transparency makes another format of it.
            if frame.format.name not in (_BY_CHANNELS[out.shape[2]], _DEPTH):
                return False
            out[...] = frame.to_ndarray().reshape(out.shape)
            return True
        except (av.FFmpegError, ValueError) as error:
            found = f"`{name}` has an image that cannot be read ({type(error).__name__}: {str(error)[:200]})"
            raise FormatError(path, found, "Get a whole copy of it") from error


class ImageEncoder:
    """Encodes images of one shape, uint8 (H, W, C) or uint16 (H, W, 1), as PNG."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        height, width, channels = shape
        av = library("av", EXTRA)
        self._av, self._format = av, _DEPTH if dtype == np.uint16 else _BY_CHANNELS[channels]
        self._context = av.CodecContext.create("png", "w")
        self._context.width, self._context.height, self._context.pix_fmt = width, height, self._format
        self._context.time_base = Fraction(1)
        self._context.thread_count = 1
        # As small as by Pillow at this level, and twice as fast.
        self._context.options = {"pred": "up", "compression_level": "1"}

    def encode(self, image: np.ndarray) -> bytes:
        """The bytes of an image."""
        values = image[..., 0] if image.shape[2] == 1 else image
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(values), self._format)
        (packet,) = self._context.encode(frame)
        return bytes(packet)
