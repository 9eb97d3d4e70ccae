"""Frames of video by their times, read forward."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from buffers.interop.base import FormatError, library
from buffers.interop.lerobot.parquet import EXTRA, checked_file

__all__ = ["VideoReader"]

# Seconds that are decoded rather than sought over.
_CLOSE = 1.0


class VideoReader:
    """Reads frames of one feature of a dataset, episode after episode. The file that was read last stays open."""

    def __init__(self, path: str, feature: str) -> None:
        self.path, self.feature = path, feature
        self._name = ""
        self._container: Any = None
        self._frames: Iterator[Any] = iter(())
        self._time = 0.0  # Of the last frame that was decoded.

    def read(self, name: str, times: np.ndarray, fps: float, shape: tuple[int, ...]) -> np.ndarray:
        """The frames nearest to ascending times, uint8 (T, H, W, 3), for frames of the shape (H, W, 3).

        FormatError if there is none within half a frame of a time, or frames of another size.
        """
        where = os.path.join(self.path, name)
        with self._errors(where):
            self._go_to(where, name, float(times[0]), shape)
            out, row = np.empty((len(times), *shape), np.uint8), 0
            for frame in self._frames:
                self._time = float(frame.time)
                if self._time < times[row] - 0.5 / fps:
                    continue
                if self._time > times[row] + 0.5 / fps:
                    break
                out[row] = frame.to_ndarray(format="rgb24")
                row += 1
                if row == len(times):
                    return out
        found = f"has no frame at {times[row]:.4f} s, which is frame {row} of an episode"
        raise FormatError(where, found, "Get a whole copy, or leave video out with `video='skip'`")

    def _go_to(self, where: str, name: str, time: float, shape: tuple[int, ...]) -> None:
        if self._container is None or name != self._name:
            self.close()
            # With the format: a list of other files would be followed, whatever the name of the file.
            self._container = library("av", EXTRA).open(checked_file(where), format="mp4")
            self._name, self._time = name, -np.inf
            for stream in self._container.streams.video:
                if stream.codec_context is not None:
                    stream.thread_type = "AUTO"
        # A file that is cut has streams of an unknown codec.
        if not self._container.streams.video or self._container.streams.video[0].codec_context is None:
            raise FormatError(where, "has no video", "Get a whole copy of it")
        stream = self._container.streams.video[0]
        height, width = stream.codec_context.height, stream.codec_context.width
        if (height, width, 3) != shape:
            found = f"has frames of {height} x {width}, where meta/info.json says {shape} of `{self.feature}`"
            raise FormatError(where, found, "Correct meta/info.json")
        if not self._time < time < self._time + _CLOSE:
            self._container.seek(max(round(time / stream.time_base) - 1, 0), stream=stream)
            self._frames = self._container.decode(stream)

    @contextmanager
    def _errors(self, where: str) -> Iterator[None]:
        av = library("av", EXTRA)
        try:
            yield
        except FormatError:
            raise
        except (av.FFmpegError, ValueError, TypeError) as error:
            self.close()
            found = f"cannot be decoded ({type(error).__name__}: {str(error)[:200]})"
            raise FormatError(where, found, "Get a whole copy, or leave video out with `video='skip'`") from error

    def close(self) -> None:
        """Close the file; reading opens it again."""
        container, self._container = self._container, None
        self._frames = iter(())
        if container is not None:
            container.close()
