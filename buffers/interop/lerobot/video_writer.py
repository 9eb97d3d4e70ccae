"""Frames of a feature as video: episodes one behind the other, in files of limited size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np

from buffers.interop.base import library
from buffers.interop.lerobot.parquet import EXTRA

__all__ = ["VIDEO_PATH", "VideoWriter"]

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
# What LeRobot encodes by.
_CODEC, _PIXELS = "libsvtav1", "yuv420p"
_OPTIONS = {"g": "2", "crf": "30", "preset": "12"}


@contextmanager
def _priority_kept() -> Iterator[None]:
    """The encoder makes the thread that calls it a real-time one where it may (as root), and leaves it so.

    Processes that are started later, such as workers, would inherit that, and keep the processors to themselves.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield  # Only Linux has it.
        return
    before, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != before:
            os.sched_setscheduler(0, before, parameters)


class VideoWriter:
    """Writes the video of one feature.

    Args:
        path: Of the dataset.
        name: Of the feature.
        fps: Frames a second.
        most_bytes: At which a file is followed by another.
        files_a_chunk: At which a folder is followed by another.
    """

    def __init__(self, path: str, name: str, fps: float, most_bytes: int, files_a_chunk: int) -> None:
        self.path, self.name, self.fps = path, name, fps
        self.most_bytes, self.files_a_chunk = most_bytes, files_a_chunk
        self._number = -1  # Of the file.
        self._file: Any = None
        self._container: Any = None
        self._stream: Any = None
        self._num_frames = 0  # In the file.

    def add(self, frames: np.ndarray) -> dict[str, Any]:
        """Encode an episode, uint8 `(T, H, W, 3)`; returns what meta/episodes says of it."""
        av = library("av", EXTRA)
        try:
            if self._container is None or self._file.tell() >= self.most_bytes:
                self._next_file(*frames.shape[1:3])
            begin = self._num_frames / self.fps
            for image in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts = self._num_frames
                with _priority_kept():
                    self._container.mux(self._stream.encode(frame))
                self._num_frames += 1
        except (av.FFmpegError, ValueError) as error:
            self._num_frames = 0  # Nothing that could be ended.
            raise self._refused(frames, error) from error
        chunk, index = divmod(self._number, self.files_a_chunk)
        found = {"chunk_index": chunk, "file_index": index, "from_timestamp": begin}
        found["to_timestamp"] = self._num_frames / self.fps
        return {f"videos/{self.name}/{key}": value for key, value in found.items()}

    def _refused(self, frames: np.ndarray, error: Exception) -> ValueError:
        height, width = frames.shape[1:3]
        return ValueError(
            f"Frames of {height} x {width} of `{self.name}` cannot be encoded as video ({error}). Write images: leave "
            "out `video`."
        )

    def _next_file(self, height: int, width: int) -> None:
        self.close()
        self._number += 1
        chunk, index = divmod(self._number, self.files_a_chunk)
        name = VIDEO_PATH.format(video_key=self.name, chunk_index=chunk, file_index=index)
        where = os.path.join(self.path, name)
        os.makedirs(os.path.dirname(where), exist_ok=True)
        self._file = open(where, "wb")  # noqa: SIM115  # `close` closes it.
        self._num_frames = 0
        self._container = library("av", EXTRA).open(self._file, "w", format="mp4")
        rate = Fraction(self.fps).limit_denominator(100_000)
        self._stream = self._container.add_stream(_CODEC, rate=rate, options=_OPTIONS)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, _PIXELS
        self._stream.codec_context.time_base = 1 / rate

    def described(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """What info.json says of it besides dtype, shape and names."""
        height, width = shape
        size = {"video.height": height, "video.width": width, "video.fps": self.fps, "video.channels": 3}
        return {"video.codec": "av1", "video.pix_fmt": _PIXELS, "is_depth_map": False, "has_audio": False, **size}

    def close(self) -> None:
        """End the file."""
        container, self._container = self._container, None
        file, self._file = self._file, None
        try:
            if container is not None:
                if self._num_frames:
                    container.mux(self._stream.encode(None))
                container.close()
        finally:
            if file is not None:
                file.close()
