"""The images of an episode, decoded by Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from buffers.interop.base import library

__all__ = ["decode_images"]

_FORMATS = ("PNG", "JPEG")
# What deflate, and JPEG with one color, expand to at most, and some room for images of few bytes.
_MOST_EXPANSION, _ALWAYS_ALLOWED = 1100, 1 << 16
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# As TensorFlow does: an image with fewer channels than stated repeats gray, one with more drops alpha.
_CONVERTIBLE = {("L", "RGB"), ("P", "RGB"), ("P", "RGBA"), ("RGBA", "RGB"), ("LA", "L"), ("1", "L"), ("L", "RGBA")}


def decode_images(encoded: Sequence[memoryview], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """PNG and JPEG files as `(n, height, width, channels)`; height and width may be -1, those of the first are then.

    float32 images of one channel are stored as the four bytes of each number in PNGs of four channels.

    Raises:
        ValueError: An image of another shape, or one that is damaged.
        ImportError: Pillow is missing.
    """
    channels = 4 if dtype == np.float32 else shape[2]
    stated = np.dtype(np.uint8) if dtype == np.float32 else dtype
    images: np.ndarray | None = None
    for number, content in enumerate(encoded):
        with _opened(content) as image:
            size = (image.height, image.width)
            expected = shape[:2] if images is None else images.shape[1:3]
            if any(wanted not in (-1, found) for wanted, found in zip(expected, size, strict=True)):
                raise ValueError(f"image {number} has {size} pixels, expected {tuple(expected)}")
            if size[0] * size[1] * channels > _MOST_EXPANSION * len(content) + _ALWAYS_ALLOWED:
                raise ValueError(f"image {number} has {size} pixels in {len(content)} bytes")
            if images is None:
                _check_all(encoded, size[0] * size[1] * channels * stated.itemsize)
                images = np.empty((len(encoded), *size, channels), stated)
            images[number] = _pixels(image, channels, stated).reshape(*size, channels)
    if images is None:
        images = np.empty((0, *(max(length, 0) for length in shape[:2]), channels), stated)
    return images.view(np.float32) if dtype == np.float32 else images


def _opened(content: memoryview) -> Any:
    """The image, of which only the header is read."""
    module = library("PIL.Image", "rlds")
    try:
        return module.open(io.BytesIO(content), formats=_FORMATS)
    except module.UnidentifiedImageError:
        raise ValueError("an image that is neither PNG nor JPEG") from None
    except module.DecompressionBombError as error:
        raise ValueError(str(error)) from None


def _check_all(encoded: Sequence[memoryview], nbytes: int) -> None:
    most = sum(_MOST_EXPANSION * len(content) + _ALWAYS_ALLOWED for content in encoded)
    if len(encoded) * nbytes > most:
        raise ValueError(f"{len(encoded)} images of {nbytes} bytes are in {sum(map(len, encoded))} bytes")


def _pixels(image: Any, channels: int, dtype: np.dtype) -> np.ndarray:
    if dtype == np.uint16:
        if image.mode not in ("I;16", "I;16B", "I"):  # Older versions of Pillow have "I".
            raise ValueError(f"an image of the mode {image.mode!r} where features.json has uint16")
        return np.asarray(image).astype(np.uint16)
    mode = _MODES[channels]
    if image.mode != mode:
        if (image.mode, mode) not in _CONVERTIBLE:
            raise ValueError(f"an image of the mode {image.mode!r} where features.json has {channels} channels")
        image = image.convert(mode)
    return np.asarray(image)
