"""A LeRobot dataset, read where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import numpy as np

from buffers.fields import Fields
from buffers.interop.base import FormatError, chosen_fields
from buffers.interop.in_place import InPlaceDataset
from buffers.interop.lerobot.features import Feature
from buffers.interop.lerobot.frames import FrameReader, Source, arranged, is_of_frames
from buffers.interop.lerobot.layout import EpisodeEntry
from buffers.interop.lerobot.reading import LeRobotReader
from buffers.utils import integer, one_of

__all__ = ["LeRobotInPlaceDataset"]


@final
class LeRobotInPlaceDataset(InPlaceDataset):
    """See `open`.

    Attributes:
        notes: What the dataset does not have, or is not read.
        metadata: What it says of itself as a whole.
    """

    format: ClassVar[str] = "lerobot"

    def __init__(self, path: str, fields: Sequence[str] | None, video: str | None, cache_bytes: int) -> None:
        if video is not None:
            one_of("video", video, ("reference", "skip"))
        self.cache_bytes = integer("cache_bytes", cache_bytes, 0)
        reader = LeRobotReader(path, fields, video="decode" if video is None else video)
        with reader:
            self._source = reader.source
            if names := [feature.field for feature in self._source.features if feature.kind == "video"]:
                advice = "Import it, or open it with `video='reference'` or `video='skip'`"
                raise FormatError(path, f"has video, {names}, which is not read in place", advice)
            self.notes, self.metadata = list(reader.notes), reader.metadata
            chosen = chosen_fields(path, _fields_of(self._source), fields)
        options = {"fields": fields, "video": video, "cache_bytes": self.cache_bytes}
        super().__init__(path, chosen, self._source.lengths, dict(enumerate(self._source.infos)), options)
        self._features = {feature.field: feature for feature in self._source.features}

    def _open_file(self) -> _Opened:
        return _Opened(self._source, self.cache_bytes)

    def _read_rows(self, file: _Opened, episode: int, start: int, stop: int, out: Mapping[str, np.ndarray]) -> None:
        entry = self._source.layout.episodes[episode]
        for name, rows in out.items():
            feature = self._features.get(name)
            if feature is None:
                rows[...] = np.arange(start, stop) == (0 if name == "is_first" else entry.length)
            elif feature.is_observation or is_of_frames(feature):
                last = min(stop, entry.length)
                # The last row is that of the frame before it.
                first = min(start, last - 1)
                file.read(feature, entry, first, rows[: last - start] if last > start else rows)
                rows[last - start :] = rows[max(last - start - 1, 0)]
            else:
                is_first = start == 0
                rows[:is_first] = 0
                file.read(feature, entry, start - (not is_first), rows[is_first:])


def _fields_of(source: Source) -> Fields:
    """The fields of what `read` yields, from an episode of one frame of zeros."""
    values = [np.zeros((1, *feature.shape), feature.dtype) for feature in source.features]
    return Fields.from_episode(arranged(source.features, values, 1))


class _Opened:
    """What a process has open: the numbers in memory if they are few, and the files."""

    def __init__(self, source: Source, cache_bytes: int) -> None:
        self._source = source
        self._frames = FrameReader(source.layout, cache_bytes)
        lengths = [entry.length for entry in source.layout.episodes]
        self._firsts = np.cumsum([0, *lengths])
        num_bytes = sum(feature.nbytes for feature in source.features if feature.kind == "numbers")
        self._is_kept = num_bytes * int(self._firsts[-1]) <= cache_bytes
        self._numbers: dict[str, np.ndarray] = {}

    def read(self, feature: Feature, entry: EpisodeEntry, start: int, out: np.ndarray) -> None:
        """Copy the frames from `start` on."""
        if not len(out):
            return
        if feature.kind == "image":
            self._frames.images(feature, entry, start, out)
        elif feature.kind == "times":
            times = self._frames.times(entry, not self._source.has_times)
            out[...] = entry.videos[feature.name].begin + times[start : start + len(out)]
        elif self._is_kept:
            first = int(self._firsts[entry.number]) + start
            out[...] = self._all(feature)[first : first + len(out)]
        else:
            out[...] = self._frames.numbers(feature, entry, start, start + len(out))

    def _all(self, feature: Feature) -> np.ndarray:
        """The frames of all episodes."""
        if feature.name not in self._numbers:
            values = np.empty((int(self._firsts[-1]), *feature.shape), feature.dtype)
            for entry in self._source.layout.episodes:
                first = int(self._firsts[entry.number])
                values[first : first + entry.length] = self._frames.numbers(feature, entry, 0, entry.length)
            self._numbers[feature.name] = values
        return self._numbers[feature.name]

    def close(self) -> None:
        """Close the files, and forget what was read."""
        self._frames.close()
        self._numbers.clear()
