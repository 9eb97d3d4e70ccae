"""Images that Minari has stored as JPEG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from buffers.interop.base import FormatError, library

__all__ = ["decoded"]

# JPEG needs at least some bits for each block of 64 values, so that more than this is a lie.
_MOST_PER_BYTE = 1024


def decoded(source: str, name: str, frames: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The images `(len(frames), *shape)` of JPEG files in memory.

    Raises:
        FormatError: A frame is no JPEG image of that shape.
    """
    image_of = library("PIL.Image", "minari")
    height, width, *channels = shape
    mode = {1: "L", 3: "RGB"}.get(math.prod(channels))
    if sum(map(len, frames)) * _MOST_PER_BYTE < len(frames) * math.prod(shape):
        raise _wrong(source, name, f"{sum(map(len, frames))} bytes for {len(frames)} images of shape {shape}")
    images = np.empty((len(frames), *shape), np.uint8)
    for number, frame in enumerate(frames):
        try:
            with image_of.open(io.BytesIO(frame), formats=["JPEG"]) as image:
                # Compared before pixels are decoded.
                if image.size != (width, height) or image.mode != mode:
                    text = f"a frame of {image.size[1]} x {image.size[0]} ({image.mode}), expected {shape}"
                    raise _wrong(source, name, text)
                images[number] = np.asarray(image).reshape(shape)
        except (OSError, SyntaxError, image_of.DecompressionBombError) as error:
            raise _wrong(source, name, f"a frame that is no whole JPEG image ({error})") from error
    return images


def _wrong(source: str, name: str, found: str) -> FormatError:
    return FormatError(source, f"`{name}` has {found}", "Get a whole copy of the dataset")
