"""Episodes of a LeRobot dataset, one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from buffers.interop.base import Episode, FormatReader
from buffers.interop.lerobot.features import Feature
from buffers.interop.lerobot.frames import FrameReader, arranged, find_source
from buffers.interop.lerobot.layout import EpisodeEntry
from buffers.interop.lerobot.video import VideoReader
from buffers.utils import one_of

__all__ = ["LeRobotReader"]

# Of columns of row groups, which hold several episodes where other programs wrote them.
_MOST_BYTES = 1 << 26


class LeRobotReader(FormatReader):
    """See `read`."""

    format = "lerobot"

    def __init__(
        self,
        path: str,
        fields: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
        video: str = "decode",
    ) -> None:
        super().__init__(path, fields, dtypes)
        one_of("video", video, ("decode", "reference", "skip"))
        self.source = find_source(path, video, self.wants, self.notes)
        layout = self.source.layout
        self.metadata = layout.metadata
        self.num_episodes, self.num_steps = len(layout.episodes), sum(self.source.lengths)
        self._frames = FrameReader(layout, _MOST_BYTES)
        self._videos = {
            feature.name: VideoReader(layout.path, feature.name)
            for feature in self.source.features
            if feature.kind == "video"
        }

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        features, entries = self.source.features, self.source.layout.episodes
        for entry, info in zip(entries[number:], self.source.infos[number:], strict=True):
            values = [self._values(feature, entry) for feature in features]
            yield Episode(arranged(features, values, entry.length), dict(info))

    def _values(self, feature: Feature, entry: EpisodeEntry) -> np.ndarray:
        """The frames of an episode, `(T, *shape)`."""
        if feature.kind == "numbers":
            return self._frames.numbers(feature, entry, 0, entry.length)
        if feature.kind == "image":
            out = np.empty((entry.length, *feature.shape), feature.dtype)
            self._frames.images(feature, entry, 0, out)
            return out
        place = entry.videos[feature.name]
        times = place.begin + self._frames.times(entry, not self.source.has_times)
        if feature.kind == "times":
            return times
        shape = (*feature.shape[1:], feature.shape[0]) if feature.is_channel_first else feature.shape
        out = self._videos[feature.name].read(place.file, times, self.source.layout.fps, shape)
        return np.ascontiguousarray(out.transpose(0, 3, 1, 2)) if feature.is_channel_first else out

    def files(self) -> list[str]:
        """As `FormatReader.files`."""
        return [
            os.path.join(self.source.layout.path, name) for name in ("meta", "data", *(["videos"] * bool(self._videos)))
        ]

    def close(self) -> None:
        """As `FormatReader.close`."""
        self._frames.close()
        for video in self._videos.values():
            video.close()
