"""What a LeRobot dataset says of itself: `meta/info.json`, its features, its episodes, and where their rows lie.

v3.0   data/chunk-000/file-000.parquet              many episodes a file
meta/episodes/chunk-000/file-000.parquet     a row an episode: which file, from which row to which
meta/tasks.parquet
videos/KEY/chunk-000/file-000.mp4            many episodes a file, from a time to a time
v2.1   data/chunk-000/episode_000000.parquet        an episode a file
meta/episodes.jsonl, meta/tasks.jsonl
videos/chunk-000/KEY/episode_000000.mp4
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from buffers.disk import DamagedEpisodeError, as_damage, parse_json
from buffers.interop.base import FormatError
from buffers.interop.lerobot.features import Feature, parse_features
from buffers.interop.lerobot.parquet import UNFINISHED, checked_file, has_footer, table_of

__all__ = ["EpisodeEntry", "INFOS", "Layout", "Video", "read_layout"]

#: Where `write` keeps the infos of episodes, a line each. LeRobot ignores it.
INFOS = "meta/episode_infos.jsonl"
_MOST_JSON_BYTES = 1 << 28
_INFO = "info.json"
_PLACE = re.compile(r"\{(\w+)(?::(0?\d?)d)?\}")
_NUMBER = (int, float)
_PLAIN = (bool, int, float, str)
# Columns of meta/episodes that are no info of an episode.
_KNOWN = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
_KNOWN_BEGINNINGS = ("data/", "videos/", "meta/")


class Video(NamedTuple):
    """Where the frames of a feature in an episode are."""

    file: str  # Below the dataset's directory.
    begin: float  # Seconds, at which the first frame is.


class EpisodeEntry(NamedTuple):
    """Where an episode is."""

    number: int
    length: int  # T, frames.
    file: str  # Of its rows, below the dataset's directory.
    start: int  # Its first row in the file.
    first_index: int | None  # `index` of its first frame; None in v2, which does not need it.
    tasks: tuple[str, ...]
    info: dict[str, Any]  # What else meta/episodes has.
    videos: dict[str, Video]  # By feature.


@dataclass
class Layout:
    """A dataset. Its rows have not been looked at."""

    path: str
    version: str
    fps: float
    features: list[Feature]
    unread: dict[str, str]  # name -> what it is, of features that are not read.
    derived: set[str]  # Features that `write` has added, which follow from others.
    episodes: list[EpisodeEntry]  # Ascending by number, from 0.
    tasks: dict[int, str]
    metadata: dict[str, Any] = field(default_factory=dict)

    def files(self) -> Iterator[tuple[str, list[EpisodeEntry]]]:
        """Each file of rows with its episodes, by rows."""
        found: dict[str, list[EpisodeEntry]] = {}
        for entry in self.episodes:
            found.setdefault(entry.file, []).append(entry)
        for name, entries in found.items():
            yield name, sorted(entries, key=lambda entry: entry.start)


def read_layout(path: str) -> Layout:
    """The layout of a directory. FormatError if it is no whole LeRobot dataset of v3.0 or v2.1."""
    if not os.path.isdir(path):
        raise FormatError(path, "is not there" if not os.path.lexists(path) else "is no directory", "Check the path")
    where = os.path.join(path, "meta", _INFO)
    if not os.path.lexists(where):
        raise FormatError(path, "has no meta/info.json", "Give the directory of a LeRobot dataset, v3.0 or v2.1")
    info = _json(where)
    if not isinstance(info, dict):
        raise FormatError(where, "is no dict", "Get a whole copy of it")
    version, fps = info.get("codebase_version"), info.get("fps")
    known = re.fullmatch(r"v(2\.[01]|3\.\d{1,3})", version) if isinstance(version, str) else None
    if known is None:
        advice = "Convert it to v3.0 by LeRobot's own script"
        raise FormatError(where, f"has the version {version!r:.40}, where v3.0, v2.1 and v2.0 are read", advice)
    if isinstance(fps, bool) or not isinstance(fps, _NUMBER) or not 0 < fps < 1e9:
        raise FormatError(where, f"has {fps!r:.40} frames a second", "Correct it")
    features, unread, derived = parse_features(where, info.get("features"))
    assert isinstance(version, str)
    read = _episodes_v3 if version.startswith("v3") else _episodes_v2
    episodes, tasks = read(path, info, features, unread)
    _check_counts(where, info, episodes)
    kept = {key: info.get(key) for key in ("codebase_version", "fps", "robot_type", "features")}
    metadata = {**kept, "tasks": {str(number): task for number, task in tasks.items()}}
    return Layout(path, version, float(fps), features, unread, derived, episodes, tasks, metadata)


def _check_counts(where: str, info: Mapping[str, Any], episodes: list[EpisodeEntry]) -> None:
    if not episodes:
        raise FormatError(where, "says that there is no episode", "Record one")
    found = {"total_episodes": len(episodes), "total_frames": sum(entry.length for entry in episodes)}
    for key, number in found.items():
        if info.get(key, number) != number:
            text = f"says that there are {info[key]!r:.40} {key.partition('_')[2]}, where its episodes have {number}"
            raise FormatError(where, text, "Get a whole copy, of one time")


def _json(path: str) -> Any:
    """The JSON of a file."""
    return _parsed(path, _bytes(path))


def _parsed(path: str, content: bytes) -> Any:
    try:
        with as_damage():
            return parse_json(content)
    except DamagedEpisodeError as error:
        raise FormatError(path, str(error), "Get a whole copy of it") from error


def _bytes(path: str) -> bytes:
    size = os.path.getsize(checked_file(path))
    if size > _MOST_JSON_BYTES:
        raise FormatError(path, f"has {size} bytes of JSON", "It is no such file")
    with open(path, "rb") as file:
        return file.read()


def _json_lines(path: str) -> list[dict[str, Any]]:
    """The dicts of a file with one a line."""
    found = [_parsed(path, line) for line in _bytes(path).splitlines() if line.strip()]
    if not all(isinstance(value, dict) for value in found):
        raise FormatError(path, "has a line that is no dict", "Get a whole copy of it")
    return found


def _integer(path: str, value: Mapping[str, Any], key: str) -> int:
    number = value.get(key)
    if isinstance(number, float) and number.is_integer():
        number = int(number)  # As pandas makes it of a column that lacked values for a time.
    if type(number) is not int or not 0 <= number < 2**62:
        raise FormatError(path, f"has {number!r:.40} as `{key}`", "Get a whole copy of it")
    return number


def _file_name(path: str, template: Any, **values: Any) -> str:
    """The name of a file by a template of info.json; it must lie below the directory."""

    def filled(match: re.Match[str]) -> str:
        value = values.get(match[1])
        if value is None or (match[2] is not None and not isinstance(value, int)):
            raise FormatError(path, f"names files by {template!r:.80}", "Get a whole copy of it")
        return format(value, f"{match[2]}d") if match[2] is not None else str(value)

    if not isinstance(template, str):
        raise FormatError(path, f"names files by {template!r:.80}", "Get a whole copy of it")
    name = _PLACE.sub(filled, template)
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(char in name for char in "\0\\{}"):
        raise FormatError(path, f"names the file {name!r:.80}", "Files lie below the directory")
    return name


def _in_order(path: str, entries: Iterable[EpisodeEntry]) -> list[EpisodeEntry]:
    found = sorted(entries, key=lambda entry: entry.number)
    for position, entry in enumerate(found):
        if entry.number != position:
            text = f"has the episode {entry.number} where {position} is expected: one is missing, or there twice"
            raise FormatError(path, text, "Get a whole copy of it")
    return found


def _checked_tasks(path: str, tasks: Any) -> tuple[str, ...]:
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise FormatError(path, f"has the tasks {tasks!r:.60}", "Get a whole copy of it")
    return tuple(tasks)


def _episodes_v2(
    path: str, info: Mapping[str, Any], features: list[Feature], unread: dict[str, str]
) -> tuple[list[EpisodeEntry], dict[int, str]]:
    where, described = os.path.join(path, "meta", "episodes.jsonl"), os.path.join(path, "meta", _INFO)
    a_chunk = _integer(described, {"chunks_size": 1000, **info}, "chunks_size") or 1
    videos = [feature.name for feature in features if feature.kind == "video"]
    entries = []
    for value in _json_lines(where):
        number, length = _integer(where, value, "episode_index"), _integer(where, value, "length")
        names = {"episode_index": number, "episode_chunk": number // a_chunk}
        found = {
            name: Video(_file_name(described, info.get("video_path"), video_key=name, **names), 0.0) for name in videos
        }
        file, tasks = _file_name(described, info.get("data_path"), **names), _checked_tasks(where, value.get("tasks"))
        entries.append(EpisodeEntry(number, length, file, 0, None, tasks, _info_of(value, unread), found))
    _check_lengths(where, entries)
    lines = os.path.join(path, "meta", "tasks.jsonl")
    return _in_order(where, entries), _tasks(lines, _json_lines(lines))


def _tasks(path: str, rows: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    found = {}
    for row in rows:
        number, task = _integer(path, row, "task_index"), row.get("task", row.get("__index_level_0__"))
        if not isinstance(task, str) or number in found:
            raise FormatError(path, f"has the task {task!r:.60} as number {number}", "Get a whole copy of it")
        found[number] = task
    return found


def _check_lengths(path: str, entries: Iterable[EpisodeEntry]) -> None:
    for entry in entries:
        if entry.length == 0:
            raise FormatError(path, f"has the episode {entry.number} of no frame", "Delete it by LeRobot's tools")


def _info_of(row: Mapping[str, Any], unread: dict[str, str]) -> dict[str, Any]:
    """Numbers and texts of an episode besides those that say where it is; others are added to `unread`."""
    found = {}
    for key, value in row.items():
        if key in _KNOWN or key.startswith(_KNOWN_BEGINNINGS) or value is None:
            continue
        if isinstance(value, _PLAIN):
            found[key] = value
        else:
            unread[f"{key} of meta/episodes"] = "no number or text"
    return found


def _episodes_v3(
    path: str, info: Mapping[str, Any], features: list[Feature], unread: dict[str, str]
) -> tuple[list[EpisodeEntry], dict[int, str]]:
    described = os.path.join(path, "meta", _INFO)
    videos = [feature.name for feature in features if feature.kind == "video"]
    entries = []
    for where in _episode_files(path, info):
        for row in table_of(where, leave_out="stats/").to_pylist():
            entries.append(_entry_v3(where, described, row, info, videos)._replace(info=_info_of(row, unread)))
    _check_lengths(os.path.join(path, "meta", "episodes"), entries)
    found = _from_file_starts(path, _in_order(os.path.join(path, "meta", "episodes"), entries))
    where = os.path.join(path, INFOS)
    if os.path.lexists(where):
        # There are fewer where LeRobot has recorded on. It does not remove episodes from a dataset that is there.
        for number, info in enumerate(_json_lines(where)[: len(found)]):
            if not all(isinstance(value, _PLAIN) for value in info.values()):
                raise FormatError(where, f"has the info {info!r:.60}", "Remove the file: LeRobot does not need it")
            found[number] = found[number]._replace(info={**found[number].info, **info})
    where = os.path.join(path, "meta", "tasks.parquet")
    return found, _tasks(where, table_of(where, leave_out="stats/").to_pylist())


def _episode_files(path: str, info: Mapping[str, Any]) -> list[str]:
    """The files of meta/episodes, which are there once a dataset is finalized."""
    found = _parquet_files(os.path.join(path, "meta", "episodes"))
    if not found:
        count = f"meta/info.json counts {info.get('total_episodes')!r:.20} episodes, and meta/episodes is not there"
        cut = [name for name in _parquet_files(os.path.join(path, "data")) if not has_footer(name)]
        if not cut:
            raise FormatError(path, count, "Get the whole dataset")
        raise FormatError(path, f"was not finalized: {count}, and {cut[0]} has no footer", UNFINISHED)
    return found


def _parquet_files(where: str) -> list[str]:
    found = []
    for folder, folders, names in os.walk(where):
        folders.sort()
        found += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".parquet")]
    return found


def _entry_v3(
    where: str, described: str, row: Mapping[str, Any], info: Mapping[str, Any], videos: list[str]
) -> EpisodeEntry:
    number, length = _integer(where, row, "episode_index"), _integer(where, row, "length")
    first, last = _integer(where, row, "dataset_from_index"), _integer(where, row, "dataset_to_index")
    if last - first != length:
        found = f"has the episode {number} of {length} frames, from {first} to {last}"
        raise FormatError(where, found, "Get a whole copy of it")

    def file(template: str, prefix: str, **names: Any) -> str:
        chunk = _integer(where, row, f"{prefix}/chunk_index")
        index = _integer(where, row, f"{prefix}/file_index")
        return _file_name(described, info.get(template), chunk_index=chunk, file_index=index, **names)

    found_videos = {}
    for name in videos:
        begin = row.get(f"videos/{name}/from_timestamp")
        if not isinstance(begin, _NUMBER) or not 0 <= begin < 1e9:
            found = f"has {begin!r:.40} as the time at which `{name}` begins"
            raise FormatError(where, found, "Get a whole copy of it")
        found_videos[name] = Video(file("video_path", f"videos/{name}", video_key=name), float(begin))
    tasks = _checked_tasks(where, row.get("tasks"))
    return EpisodeEntry(number, length, file("data_path", "data"), first, first, tasks, {}, found_videos)


def _from_file_starts(path: str, entries: list[EpisodeEntry]) -> list[EpisodeEntry]:
    """With `start` counted from the beginning of the file, whose episodes must follow each other."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for entry in sorted(entries, key=lambda entry: entry.start):
        starts.setdefault(entry.file, entry.start)
        if ends.setdefault(entry.file, entry.start) != entry.start:
            where = os.path.join(path, "meta", "episodes")
            found = f"has frame {entry.start} as the first of episode {entry.number}, not {ends[entry.file]}"
            raise FormatError(where, found, "Get a whole copy of it")
        ends[entry.file] += entry.length
    return [entry._replace(start=entry.start - starts[entry.file]) for entry in entries]
