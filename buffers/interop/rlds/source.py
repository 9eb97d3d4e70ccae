"""A directory of tensorflow-datasets: its splits, their files, and their records in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from buffers.disk import DamagedEpisodeError, as_damage, parse_json
from buffers.interop.base import FormatError, library
from buffers.interop.rlds.records import LEAST_BYTES, RECORDS
from buffers.interop.rlds.schema import Schema, parse_schema

__all__ = ["Record", "Source"]

_INFO, _FEATURES = "dataset_info.json", "features.json"
_MOST_BYTES = 1 << 26
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_KEPT = ("name", "version", "configName", "description", "citation", "license", "releaseNotes")
_MOST_TEXT = 10_000
_LEAST_DIGITS = 5
_WHOLE = "Get a whole copy of the dataset"


class Record(NamedTuple):
    """An Example, and where it is from."""

    split: str
    path: str
    number: int  # Within its file.
    content: bytes


class _Shard(NamedTuple):
    split: str
    path: str
    num_records: int


class Source:
    """Looks at everything but the records.

    Args:
        path: The directory of a version, which has dataset_info.json.
        split: The name of the split to read; None for all, in the order of dataset_info.json.

    Raises:
        FormatError: There is no such directory, or not all of it.
        ValueError: There is no such split.
    """

    def __init__(self, path: str, split: str | None) -> None:
        self.path = path
        if not os.path.isdir(path):
            raise FormatError(path, "is no directory", "Give the directory that has dataset_info.json")
        info, described = self._json(_INFO), self._json(_FEATURES)
        with self._parsing(_FEATURES):
            self.schema: Schema = parse_schema(described)
        with self._parsing(_INFO):
            self.format = str(info.get("fileFormat") or "tfrecord")
            self.metadata = {key: str(info[key])[:_MOST_TEXT] for key in _KEPT if isinstance(info.get(key), str)}
            splits = {str(each["name"]): each for each in info.get("splits", [])}
        if self.format not in RECORDS:
            found = f"has files of the format {self.format!r:.40}"
            raise FormatError(self._in(_INFO), found, f"Convert them to {' or '.join(RECORDS)}")
        if self.format == "array_record":
            library("array_record", "rlds")
        if split is not None and split not in splits:
            raise ValueError(f"{path} has no split {split!r}. It has {[*splits]}.")
        self.shards = [
            shard
            for name, each in splits.items()
            if split in (None, name)
            for shard in self._shards(str(info.get("name", "")), name, each)
        ]
        self.num_records = sum(shard.num_records for shard in self.shards)
        if not self.num_records:
            raise FormatError(self._in(_INFO), "has no episodes", _WHOLE)

    @property
    def files(self) -> list[str]:
        """What is read."""
        return [self._in(_INFO), self._in(_FEATURES), *(shard.path for shard in self.shards)]

    def records(self, first: int) -> Iterator[Record]:
        """The records from a number on; files before its own are not opened."""
        for shard in self.shards:
            if first >= shard.num_records:
                first -= shard.num_records
                continue
            number = first
            with self._reading(shard.path):
                for content in RECORDS[self.format](shard.path, first):
                    if number == shard.num_records:
                        raise ValueError(f"has more than {shard.num_records} records")
                    yield Record(shard.split, shard.path, number, content)
                    number += 1
                if number < shard.num_records:
                    raise ValueError(f"has {shard.num_records} records by dataset_info.json, and fewer in fact")
            first = 0

    def _in(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _json(self, name: str) -> Any:
        path = self._in(name)
        if not os.path.isfile(path):
            raise FormatError(path, "is not there", self._advice())
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES)
        with self._parsing(name):
            found = parse_json(content)
            if not isinstance(found, dict):
                raise DamagedEpisodeError("is no dict")
            return found

    def _advice(self) -> str:
        """Name directories of versions below, because often the one above is given."""
        outer = ["", *_entries(self.path)]
        inner = [os.path.join(first, second) for first in outer for second in _entries(self.path, first)]
        found = [name for name in inner if os.path.isfile(os.path.join(self.path, name, _INFO))]
        return f"Give the directory of a version: {', '.join(found[:5])}" if found else _WHOLE

    @contextmanager
    def _parsing(self, name: str) -> Iterator[None]:
        try:
            with as_damage():
                yield
        except ValueError as error:
            advice = "Get a whole copy of the dataset, or write it again with tensorflow-datasets 4.9 or later"
            raise FormatError(self._in(name), str(error), advice) from error

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError, LookupError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(path, str(error)[:300] or "cannot be read", "Get a whole copy of the file") from error

    def _shards(self, dataset: str, split: str, described: Mapping[str, Any]) -> Iterator[_Shard]:
        with self._parsing(_INFO):
            lengths = [int(length) for length in described.get("shardLengths", [])]
            template = str(described.get("filepathTemplate") or _TEMPLATE)
            names = [self._file_name(template, dataset, split, k, len(lengths)) for k in range(len(lengths))]
        for name, length in zip(names, lengths, strict=True):
            path = self._in(name)
            if not os.path.isfile(path):
                raise FormatError(path, "is not there", _WHOLE)
            if not 0 <= length <= os.path.getsize(path) // LEAST_BYTES[self.format]:
                raise FormatError(path, f"is too short for {length} records", "Get a whole copy of the file")
            yield _Shard(split, path, length)

    def _file_name(self, template: str, dataset: str, split: str, number: int, count: int) -> str:
        """The name by the template, which may not leave the directory."""
        width = max(len(str(count)), _LEAST_DIGITS)
        index, total = f"{number:0{width}d}", f"{count:0{width}d}"
        known = {"DATASET": dataset, "SPLIT": split, "FILEFORMAT": self.format}
        known |= {"SHARD_X_OF_Y": f"{index}-of-{total}", "SHARD_INDEX": index, "NUM_SHARDS": total}
        name = template
        for key, value in known.items():
            # Not `str.format`, in which a template may ask for more than values.
            name = name.replace("{" + key + "}", value)
        if {"", ".", ".."} & {*name.split("/")} or "{" in name or "\0" in name:
            raise DamagedEpisodeError(f"names the file {name!r:.100}")
        return name


def _entries(*parts: str) -> list[str]:
    path = os.path.join(*parts)
    return sorted(os.listdir(path)) if os.path.isdir(path) else []
