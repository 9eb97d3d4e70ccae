"""Minari's HDF5 storage: all episodes in one file.

data/metadata.json
data/main_data.hdf5
    episode_7                  attributes: id, total_steps, seed, options/NAME, ...
        observations           a dataset; a group by key for Dict spaces, by _index_0, _index_1 ... for Tuple spaces
        actions, rewards, terminations, truncations
        infos                  a group, if infos were recorded
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from buffers.interop.base import FormatError, library
from buffers.interop.minari.columns import ROOTS, Column, Path, Storage, StoredEpisode, column, field_of
from buffers.interop.minari.files import as_format_error
from buffers.interop.minari.images import decoded

__all__ = ["HDF5_FILE", "Hdf5Storage"]

HDF5_FILE = "main_data.hdf5"

_EPISODE = re.compile(r"episode_(0|[1-9]\d*)")
_INDEX = re.compile(r"_index_(\d+)")
# What one byte of deflate can stand for; other filters are as good on data that repeats.
_MOST_PER_BYTE = 1100
_MAX_DEPTH = 32


class Hdf5Storage(Storage):
    """The file main_data.hdf5 of a dataset.

    Args:
        data: The directory `data/`.
        images: Shapes of columns that Minari takes for images, which are JPEG if the file has them with another shape.
    """

    def __init__(self, data: str, images: Mapping[Path, tuple[int, ...]]) -> None:
        self.path = os.path.join(data, HDF5_FILE)
        self.others: list[str] = []
        self._images, self._open_file = images, None
        self._names: dict[Path, str] = {}  # Of columns, in the group of an episode.
        if not os.path.isfile(self.path):
            raise FormatError(self.path, "is not there", "Get a whole copy of the dataset")

    @property
    def _file(self) -> Any:
        if self._open_file is None:
            with as_format_error(self.path):
                self._open_file = self._h5py.File(self.path, "r")
        return self._open_file

    @cached_property
    def _h5py(self) -> Any:
        return library("h5py", "minari")

    def close(self) -> None:
        """As `Storage.close`."""
        file, self._open_file = self._open_file, None
        if file is not None:
            file.close()

    def ids(self) -> list[int]:
        """As `Storage.ids`."""
        with as_format_error(self.path):
            names = {name: _EPISODE.fullmatch(name) for name in self._file}
        self.others = [name for name, match in names.items() if not match]
        return sorted(int(match[1]) for match in names.values() if match)

    def describe(self, episode_id: int) -> StoredEpisode:
        """As `Storage.describe`."""
        with as_format_error(self.path):
            group = self._member(self._file, f"episode_{episode_id}")
            names = list(group) if isinstance(group, self._h5py.Group) else []
            metadata = dict(group.attrs)
            columns = {}
            for root in (root for root in ROOTS if root in names):
                for path, name, data in self._walk((root,), root, self._member(group, root)):
                    self._names[path] = name
                    columns[path] = self._described(path, data)
        rewards = columns.get(("rewards",))
        num_steps = 0 if rewards is None else rewards.rows
        stated = metadata.get("total_steps")
        if stated is not None and not np.array_equal(stated, num_steps):
            raise self._damaged(
                f"episode_{episode_id} has {num_steps} rewards, and its total_steps is {stated}",
                "Minari glues an episode that is added under an old id onto that: record it again, with `id=None`",
            )
        return StoredEpisode(num_steps, columns, metadata, [name for name in names if name not in ROOTS])

    def read(self, episode_id: int, columns: Mapping[Path, Column]) -> dict[Path, np.ndarray]:
        """As `Storage.read`."""
        found = {}
        with as_format_error(self.path):
            group = self._file[f"episode_{episode_id}"]
            for path, one in columns.items():
                values = group[self._names[path]][()]
                if one.is_jpeg:
                    frames = [np.asarray(frame, np.uint8).tobytes() for frame in values]
                    values = decoded(self.path, field_of(path), frames, one.shape)
                found[path] = values
        return found

    def _walk(self, path: Path, place: str, node: Any) -> Iterator[tuple[Path, str, Any]]:
        """(path, name in the file, dataset) of all below a node of an episode."""
        if not isinstance(node, self._h5py.Group):
            yield path, place, node
            return
        if len(path) > _MAX_DEPTH:
            raise self._damaged(f"{node.name[:100]} nests too deeply")
        # Tuples come in the order of their numbers, of which text would put 10 before 2.
        names = {name: _INDEX.fullmatch(name) for name in node}
        is_tuple = all(names.values())
        keys = {name: match[1] if match and is_tuple else name for name, match in names.items()}
        for name in sorted(names, key=lambda name: (int(keys[name]), "") if is_tuple else (0, name)):
            yield from self._walk((*path, keys[name]), f"{place}/{name}", self._member(node, name))

    def _member(self, group: Any, name: str) -> Any:
        """What has a name in a group, unless it lies in another file, or elsewhere in this one."""
        h5py = self._h5py
        is_here = group.id.links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD
        found = group[name] if is_here else None
        if not isinstance(found, (h5py.Group, h5py.Dataset)):
            raise self._damaged(f"{name} in {group.name} is no group and no dataset, but a link or a type")
        return found

    def _described(self, path: Path, data: Any) -> Column:
        shape, dtype = data.shape, data.dtype
        # Asked at once, because there may be many datasets.
        properties = data.id.get_create_plist()
        if properties.get_layout() == self._h5py.h5d.VIRTUAL or properties.get_external_count():
            raise self._damaged(f"{data.name} lies in other files", "Copy it into one file, by h5repack for example")
        if not shape:
            return Column(dtype, (), 0, "has no row for each step")
        stored = data.id.get_storage_size() * (_MOST_PER_BYTE if properties.get_nfilters() else 1)
        if math.prod(shape) * dtype.itemsize > stored:
            found = f"{data.name} is said to have shape {shape}, but has {data.id.get_storage_size()} bytes"
            raise self._damaged(found)
        if dtype.kind == "O":
            return self._described_objects(path, dtype, shape)
        # Of one length, the files of images are rows of a matrix.
        if path in self._images and len(shape) == 2 and dtype == np.uint8:
            return Column(dtype, self._images[path], shape[0], is_jpeg=True)
        return column(dtype, shape[1:], shape[0])

    def _described_objects(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Column:
        if self._h5py.check_string_dtype(dtype) is not None:
            return Column(dtype, shape[1:], shape[0], "is text")
        if path in self._images and len(shape) == 1 and self._h5py.check_vlen_dtype(dtype) == np.uint8:
            return Column(np.dtype(np.uint8), self._images[path], shape[0], is_jpeg=True)
        return Column(dtype, shape[1:], shape[0], "has rows of different lengths")

    def _damaged(self, found: str, advice: str = "Get a whole copy of the dataset") -> FormatError:
        return FormatError(self.path, found, advice)
