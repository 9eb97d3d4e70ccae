"""Frames of features, and the fields that they become: what `read` and `open` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from buffers.dataset.episode_info import EpisodeInfo, checked_info
from buffers.fields import nested
from buffers.interop.alignment import rows_on_arrival
from buffers.interop.base import FormatError, Notes
from buffers.interop.lerobot.columns import array_of, encoded_images
from buffers.interop.lerobot.features import Feature
from buffers.interop.lerobot.images import ImageDecoder, ImageType, image_type
from buffers.interop.lerobot.layout import EpisodeEntry, Layout, read_layout
from buffers.interop.lerobot.parquet import ParquetFiles
from buffers.interop.lerobot.survey import Survey, survey

__all__ = ["FrameReader", "Source", "arranged", "find_source", "is_of_frames"]

#: Columns that become fields only where they say something; they belong to a frame's own time.
_OF_FRAMES = ("timestamp", "task_index")
_MANY_BYTES = 1 << 16


@dataclass
class Source:
    """A dataset of which everything but the rows is known.

    Attributes:
        layout: Of the files.
        features: Those that become fields; of video, none that is left out.
        infos: By episode.
        has_times: Whether some frame is not at `frame_index / fps`.
    """

    layout: Layout
    features: list[Feature]
    infos: list[EpisodeInfo]
    has_times: bool

    @property
    def lengths(self) -> list[int]:
        """Rows of the episodes: T + 1 for T frames."""
        return [entry.length + 1 for entry in self.layout.episodes]


def find_source(path: str, video: str, wants: Callable[[str], bool], notes: Notes) -> Source:
    """Look at a dataset as closely as it goes without reading its rows. FormatError if it is not whole.

    Args:
        path: Its directory.
        video: "decode", "reference" or "skip".
        wants: Whether a field is wanted.
        notes: Takes what is missing, and what is left out.
    """
    layout = read_layout(path)
    videos = [feature.name for feature in layout.features if feature.kind == "video" and wants(feature.field)]
    seen = survey(layout, () if video == "skip" else videos)
    for name, kind in layout.unread.items():
        notes.add(f"`{name}` is {kind}, and is not read.")
    for name in sorted(seen.unknown):
        notes.add(f"`{name}` is in the files, but no feature, and is not read.")
    features = [feature for feature in layout.features if wants(feature.field)]
    features = [*_without_video(features, video, notes), *_of_frames(layout, seen, wants, notes)]
    reader = FrameReader(layout, 0)
    try:
        features = [_looked_at(reader, feature) for feature in features]
    finally:
        reader.close()
    _note_missing(layout.features, notes)
    shown = {feature.name: f"{feature.field}/path" for feature in layout.features if feature.name in videos}
    infos = [_info(entry, layout, seen, shown if video == "reference" else {}, notes) for entry in layout.episodes]
    return Source(layout, features, infos, seen.has_times)


def _without_video(features: list[Feature], video: str, notes: Notes) -> list[Feature]:
    found = []
    for feature in features:
        if feature.kind != "video":
            found.append(feature)
        elif video == "reference":
            notes.add(f"`{feature.field}` is video: its times are read, and the info of an episode has its path.")
            path = (*feature.path, "timestamp")
            found.append(replace(feature, path=path, kind="times", shape=(), dtype=np.dtype(np.float64)))
        elif video == "skip" or feature.is_depth:
            notes.add(f"`{feature.field}` is video{' of depths' if feature.is_depth else ''}, and is left out.")
        else:
            notes.add(f"`{feature.field}` was compressed as video, with a loss.")
            found.append(feature)
    return found


def _of_frames(layout: Layout, seen: Survey, wants: Callable[[str], bool], notes: Notes) -> list[Feature]:
    if seen.has_task_changes:
        notes.add(
            "The task changes within episodes: `task_index` says which one it is, the metadata has its text, and "
            "`task` is that of the first frame."
        )
    taken = {feature.field for feature in layout.features}
    found = []
    for name, is_chosen in zip(_OF_FRAMES, (seen.has_times, seen.has_task_changes), strict=True):
        path = (f"frame.{name}" if name in taken else name,)
        if is_chosen and wants(path[0]):
            is_double = layout.metadata["features"].get(name, {}).get("dtype") == "float64"
            dtype = np.dtype(np.int64 if name == "task_index" else np.float64 if is_double else np.float32)
            found.append(Feature(name, path, "numbers", (1,), (), dtype))
    return found


def _note_missing(features: list[Feature], notes: Notes) -> None:
    fields = {feature.field for feature in features}
    notes.add("There are no final observations: the last row repeats the one before, and `final_obs_missing` says so.")
    if not any(feature.is_observation for feature in features):
        notes.add("There are no observations.")
    if "reward" not in fields:
        notes.add("There are no rewards.")
    if missing := [name for name in ("terminated", "truncated") if name not in fields]:
        notes.add(f"There are no flags {' and '.join(f'`{name}`' for name in missing)}.")
    if "done" in fields and missing:
        notes.add("`done` is kept as it is: it says that an episode ends, not why.")


def _looked_at(reader: FrameReader, feature: Feature) -> Feature:
    """With the dtype of the first image, which must have the declared shape; of video, the channels are compared."""
    if feature.kind == "numbers" and feature.nbytes > _MANY_BYTES:
        reader.numbers(feature, reader.layout.episodes[0], 0, 1)  # Before room is made for rows of that shape.
    if feature.kind not in ("image", "video"):
        return feature
    height, width, channels = feature.shape[1:] + feature.shape[:1] if feature.is_channel_first else feature.shape
    if feature.kind == "video":
        found = ImageType((height, width, 3), np.dtype(np.uint8))
    else:
        found = reader.first_image_type(feature)
    if found.shape != (height, width, channels):
        where = os.path.join(reader.layout.path, "meta", "info.json")
        text = f"has `{feature.name}` of shape {feature.shape}, where frames are {found.shape}"
        raise FormatError(where, text, "Correct it")
    return replace(feature, dtype=found.dtype)


def _info(entry: EpisodeEntry, layout: Layout, seen: Survey, shown: dict[str, str], notes: Notes) -> EpisodeInfo:
    tasks = [layout.tasks[seen.tasks[entry.number]]] if seen.tasks[entry.number] >= 0 else [*entry.tasks][:1]
    paths = {shown[name]: place.file for name, place in entry.videos.items() if name in shown}
    wanted: dict[str, Any] = {**entry.info, **paths}
    if tasks:
        wanted["task"] = tasks[0]
    try:
        return checked_info(wanted)
    except ValueError:
        pass  # Too long: what fits is kept.
    found: EpisodeInfo = {}
    for key, value in reversed(wanted.items()):
        try:
            found = checked_info({**found, key: value})
        except ValueError:
            notes.add(f"`{key:.60}` of some episodes is left out: an info has at most 4,096 bytes.")
    return found


class FrameReader:
    """Reads frames of features from Parquet. Each process needs its own.

    Args:
        layout: Of the dataset.
        most_bytes: How much of it to keep in memory.
    """

    def __init__(self, layout: Layout, most_bytes: int) -> None:
        self.layout = layout
        self._files, self._decoder = ParquetFiles(layout.path, most_bytes), ImageDecoder()

    def numbers(self, feature: Feature, entry: EpisodeEntry, start: int, stop: int) -> np.ndarray:
        """The frames [start, stop) of an episode, `(n, *shape)`."""
        where, chunks = self._chunks(feature, entry, start, stop)
        found = array_of(where, feature.name, chunks, feature.dtype, feature.declared)
        return found.reshape(len(found), *feature.shape)

    def images(self, feature: Feature, entry: EpisodeEntry, start: int, out: np.ndarray) -> None:
        """Decode the frames from `start` on into `out`, `(n, *shape)`."""
        where, chunks = self._chunks(feature, entry, start, start + len(out))
        out = out.transpose(0, 2, 3, 1) if feature.is_channel_first else out
        for data, image in zip(encoded_images(where, feature.name, chunks), out, strict=True):
            self._decoder.decode(where, feature.name, data, image)

    def times(self, entry: EpisodeEntry, is_regular: bool) -> np.ndarray:
        """Seconds from the beginning of an episode to each of its frames, float64 (T,)."""
        if is_regular:
            return np.arange(entry.length) / self.layout.fps
        column = Feature("timestamp", ("timestamp",), "numbers", (1,), (), np.dtype(np.float64))
        return self.numbers(column, entry, 0, entry.length)

    def first_image_type(self, feature: Feature) -> ImageType:
        """That of the first frame of all."""
        entry = self.layout.episodes[0]
        where, chunks = self._chunks(feature, entry, 0, 1)
        (data,) = encoded_images(where, feature.name, chunks)
        return image_type(where, feature.name, data)

    def _chunks(self, feature: Feature, entry: EpisodeEntry, start: int, stop: int) -> tuple[str, list[Any]]:
        where = os.path.join(self.layout.path, entry.file)
        return where, self._files.rows(entry.file, feature.name, entry.start + start, entry.start + stop)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()


def is_of_frames(feature: Feature) -> bool:
    """Whether a feature that is no observation belongs to a frame's own time all the same."""
    return feature.name in _OF_FRAMES


def arranged(features: Iterable[Feature], values: Iterable[np.ndarray], length: int) -> dict[str, Any]:
    """The rows of an episode from the frames `(T, *shape)` of each feature; there may be none of observations."""
    observations, steps, more = [], [], {}
    for feature, frames in zip(features, values, strict=True):
        if is_of_frames(feature):
            more[feature.field] = np.concatenate([frames, frames[-1:]])
        elif feature.is_observation:
            observations.append((feature.path, frames))
        else:
            steps.append((feature.path, frames))
    if observations:
        return rows_on_arrival(nested(observations)["obs"], nested(steps), more=more, final_missing=True)
    # Something must say how many there are.
    rows = rows_on_arrival(np.zeros(length), nested(steps), more=more, final_missing=True)
    del rows["obs"]
    return rows
