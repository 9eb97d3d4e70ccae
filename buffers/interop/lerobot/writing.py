"""Episodes of a dataset as a LeRobot dataset v3.0."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from buffers.dataset import EpisodeDataset
from buffers.interop.base import library
from buffers.interop.exporting import Exported, Exporter, new_target
from buffers.interop.lerobot.data_writer import DATA_PATH, DataWriter
from buffers.interop.lerobot.features import MARK
from buffers.interop.lerobot.meta_writer import EpisodesWriter, Tasks, write_info
from buffers.interop.lerobot.parquet import EXTRA
from buffers.interop.lerobot.plan import Planned, planned
from buffers.interop.lerobot.statistics import of_depths, of_images, of_numbers
from buffers.interop.lerobot.video_writer import VIDEO_PATH, VideoWriter
from buffers.interop.origin import Summary
from buffers.utils import number

__all__ = ["write"]

_MB = 1 << 20
_DATA_MB, _VIDEO_MB, _FILES_A_CHUNK = 100, 200, 1000
#: Fields that `read` makes of columns that LeRobot has anyway.
_OF_FRAMES = ("timestamp", "task_index")


def write(
    dataset: EpisodeDataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = False,
    fps: float | None = None,
    task: str | None = None,
    robot_type: str | None = None,
    video: bool = False,
) -> Summary:
    """Write a LeRobot dataset v3.0, finalized, which `LeRobotDataset(repo_id, root=path)` loads.

    An episode of T + 1 rows is T frames. Its last observation is left out, as LeRobot has no place for it:

        row                   0     1     2    ...   T
        obs/*                 o0    o1    o2         oT
        action                0     a0    a1         aT-1
        reward, others        0     r1    r2         rT

        frame                 0     1     2    ...   T-1
        observation.*         o0    o1    o2         oT-1
        action                a0    a1    a2         aT-1
        next.reward, others   r1    r2    r3         rT

    Fields are named as `read` names them: `obs/images/top` becomes `observation.images.top`, a sole `obs`
    `observation.state`, or `observation.image`. What the name does not tell is kept in the feature, under the key
    `buffers`, so that `read` gives the same fields. uint8 images (H, W, C) or (C, H, W) with 1, 3 or 4 channels are
    written as images, without loss; other arrays as numbers, of up to five axes. If there are flags, `next.done` is
    `terminated` or `truncated`, which LeRobot's own buffer reads. What else an episode's info has is in a file that
    only `read` knows.

    Args:
        dataset: With `obs`, aligned on arrival.
        path: The directory; must not exist, or be empty.
        fields: The fields to write, where "obs" stands for all below it; None for all.
        limit: The number of episodes to write; None for all.
        progress: Whether to show a bar (of tqdm).
        fps: Frames a second; None for those of the LeRobot dataset that was imported.
        task: What episodes do that have no `task` in their info; None for the empty text.
        robot_type: As LeRobot has it; None for that of the LeRobot dataset that was imported.
        video: Whether to write images of three channels as video (AV1), which loses detail. LeRobot finds its frames by
            `timestamp`, which is then `frame_index / fps` even if there is a field of that name.

    Raises:
        ValueError: There is no `fps`, or no episode with a transition; the target exists; there is no `obs`.
        ImportError: A library of the extra is missing.
    """
    for name in ("pyarrow", "av"):
        library(name, EXTRA)
    exporter = Exporter(dataset, "lerobot", path, fields, limit, progress)
    rate = exporter.metadata.get("fps") if fps is None else fps
    if rate is None:
        raise ValueError("LeRobot needs `fps`, frames a second. Give it, 1 if the steps have no time.")
    rate = number("fps", rate, 1e-6)
    named = {"fps": int(rate) if rate.is_integer() else rate, "task": task}
    named["robot_type"] = exporter.metadata.get("robot_type") if robot_type is None else robot_type
    with new_target(exporter.path) as work, ExitStack() as stack:
        os.mkdir(work)
        _Writing(exporter, work, named, video, stack).write()
    return exporter.summary()


class _Writing:
    """The writing of one dataset."""

    def __init__(self, exporter: Exporter, path: str, named: Mapping[str, Any], video: bool, stack: ExitStack) -> None:
        self.exporter, self.path, self.named, self.stack = exporter, path, named, stack
        known = exporter.metadata
        # Of an imported dataset, these two are no fields of ours.
        self.of_frames = [name for name in _OF_FRAMES if _is_of_frames(name, exporter)]
        exporter.keeps_first = self.of_frames
        self.features = planned(exporter.fields, self.of_frames, video, known.get("features", {}), exporter.notes)
        self.task_names: Mapping[str, str] = known.get("tasks", {})
        self.tasks, self.num_frames, self.num_episodes = Tasks(_numbered(self.task_names)), 0, 0
        self.episodes = EpisodesWriter(path)
        stack.callback(self.episodes.close)
        sizes = {"files_a_chunk": _FILES_A_CHUNK}
        kept = [feature for feature in self.features if feature.kind != "video"]
        self.data = DataWriter(path, kept, _DATA_MB * _MB, **sizes)
        self.videos = {
            feature.name: VideoWriter(path, feature.name, named["fps"], _VIDEO_MB * _MB, **sizes)
            for feature in self.features
            if feature.kind == "video"
        }
        self.has_times = "timestamp" in self.of_frames and not self.videos
        if "timestamp" in self.of_frames and self.videos:
            exporter.notes.add(
                "`timestamp` is `frame_index / fps`, and not the field, as frames of video have these times."
            )
        if "task_index" in self.of_frames and not len(self.tasks):
            exporter.notes.add("Tasks get other numbers: `task_index` changes, and not their texts.")
        stack.callback(self.data.close)
        for writer in self.videos.values():
            stack.callback(writer.close)

    def write(self) -> None:
        """Write all episodes, and then what is known of them."""
        for exported in self.exporter:
            self._add(exported)
        if not self.num_episodes:
            raise ValueError("There is no episode with a transition.")
        self.stack.close()
        self.tasks.write(self.path)
        write_info(self.path, self._info(), self.episodes.statistics)

    def _add(self, exported: Exported) -> None:
        found, length = exported.transitions, exported.transitions.num_steps
        if not found.final_missing:
            self.exporter.notes.add("Final observations are left out: LeRobot has none.")
        frames = {feature.name: feature.frames(found) for feature in self.features}
        tasks = self._tasks(exported)
        indexes = self._indexes(exported, tasks)
        row: dict[str, Any] = {"episode_index": exported.number, "tasks": [*dict.fromkeys(tasks)], "length": length}
        row |= self.data.add({name: frames[name] for name in frames if name not in self.videos}, indexes)
        row |= {"dataset_from_index": self.num_frames, "dataset_to_index": self.num_frames + length}
        for feature in self.features:
            if feature.kind == "video":
                images = frames[feature.name]
                images = images.transpose(0, 2, 3, 1) if feature.is_channel_first else images
                row |= self.videos[feature.name].add(images)
        statistics = {feature.name: _statistics(feature, frames[feature.name]) for feature in self.features}
        statistics |= {name: of_numbers(values) for name, values in indexes.items()}
        self.episodes.add(row, exported.info, statistics)
        self.num_episodes += 1
        self.num_frames += length

    def _tasks(self, exported: Exported) -> list[str]:
        """The task of each frame."""
        found, length = exported.transitions, exported.transitions.num_steps
        default = exported.info.get("task", self.named["task"])
        if not isinstance(default, str | None):
            self.exporter.notes.add("A `task` of infos that is a number becomes text, as LeRobot has it.")
        if default is None:
            self.exporter.notes.add("Episodes without a `task` in their info have an empty one.")
            default = ""
        if "task_index" not in self.of_frames:
            return [str(default)] * length
        numbers = np.concatenate([found.first["task_index"][None], found.steps["task_index"][:-1]]).tolist()
        return [self.task_names.get(str(number), str(default)) for number in numbers]

    def _indexes(self, exported: Exported, tasks: list[str]) -> dict[str, np.ndarray]:
        """The columns that LeRobot adds to frames."""
        found, frames = exported.transitions, np.arange(exported.transitions.num_steps)
        times = (frames / self.named["fps"]).astype(np.float32)
        if self.has_times:
            kept = np.concatenate([found.first["timestamp"][None], found.steps["timestamp"][:-1]])
            times = kept.astype(np.float32)
            if not np.array_equal(times, kept, equal_nan=True):
                self.exporter.notes.add("`timestamp` is float32 in LeRobot, which has changed some.")
        return {
            "timestamp": times,
            "frame_index": frames,
            "episode_index": np.full(len(frames), exported.number),
            "index": self.num_frames + frames,
            "task_index": np.array([self.tasks.number(task) for task in tasks]),
        }

    def _info(self) -> dict[str, Any]:
        """The content of meta/info.json."""
        features = {}
        for feature in self.features:
            described = feature.described()
            if feature.kind == "video":
                shape = feature.shape[1:] if feature.is_channel_first else feature.shape[:2]
                described["info"] = self.videos[feature.name].described(shape)
            features[feature.name] = described
        kinds = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
        for name, dtype in {**kinds, "task_index": "int64"}.items():
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "fps": self.named["fps"],
            "features": features,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self.tasks),
            "chunks_size": _FILES_A_CHUNK,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.videos else None,
            "robot_type": self.named["robot_type"],
            "splits": {"train": f"0:{self.num_episodes}"},
        }


def _is_of_frames(name: str, exporter: Exporter) -> bool:
    """Whether `read` made a field of a column that LeRobot has anyway, not of a feature of that name."""
    features = exporter.metadata.get("features")
    if features is None or name not in exporter.fields or exporter.fields[name].shape != ():
        return False
    return not any(feature.get(MARK, {}).get("path") == [name] for feature in features.values())


def _numbered(names: Mapping[str, str]) -> list[str]:
    """Texts of tasks by their numbers in the source; none if LeRobot could not have numbered them so."""
    texts = [names.get(str(number)) for number in range(len(names))]
    found = [text for text in texts if isinstance(text, str)]
    return found if len({*found}) == len(names) else []


def _statistics(feature: Planned, frames: np.ndarray) -> dict[str, Any]:
    if feature.kind == "numbers":
        return of_numbers(frames)
    if feature.is_depth:
        return of_depths(frames)
    return of_images(frames.transpose(0, 2, 3, 1) if feature.is_channel_first else frames)
