"""Rows of episodes as Parquet files, one row group or more an episode."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from buffers.interop.base import library
from buffers.interop.lerobot.images import ImageEncoder
from buffers.interop.lerobot.parquet import EXTRA
from buffers.interop.lerobot.plan import Planned

__all__ = ["DATA_PATH", "DataWriter", "arrow_column"]

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_IMAGE_FILE = "frame-{:06d}.png"
# Bytes of frames, before they are encoded, in a row group: less than arrow's arrays of bytes hold.
_MOST_GROUP_BYTES = 1 << 27


def arrow_column(values: np.ndarray) -> Any:
    """An arrow array of the rows `(n, *shape)`, as LeRobot has them.

    Numbers for the shapes () and (1,), lists of one size for others of one axis, lists of lists for more.
    """
    arrow = library("pyarrow", EXTRA)
    found = arrow.array(np.ascontiguousarray(values).reshape(-1))
    if values.shape[1:] in ((), (1,)):
        return found
    if values.ndim == 2:
        return arrow.FixedSizeListArray.from_arrays(found, values.shape[1])
    for axis in range(len(values.shape) - 1, 0, -1):
        num = math.prod(values.shape[:axis])
        offsets = np.arange(num + 1, dtype=np.int32) * values.shape[axis]
        found = arrow.ListArray.from_arrays(arrow.array(offsets), found)
    return found


class DataWriter:
    """Writes the rows of episodes.

    Args:
        path: Of the dataset.
        features: All that are not video.
        most_bytes: At which a file is followed by another.
        files_a_chunk: At which a folder is followed by another.
    """

    def __init__(self, path: str, features: Sequence[Planned], most_bytes: int, files_a_chunk: int) -> None:
        self.path, self.features = path, features
        self.most_bytes, self.files_a_chunk = most_bytes, files_a_chunk
        self._number = -1  # Of the file.
        self._file: Any = None
        self._writer: Any = None
        self._encoders: dict[str, ImageEncoder] = {}

    def add(self, frames: Mapping[str, np.ndarray], indexes: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Write an episode, `name -> (T, *shape)`; returns what meta/episodes says of it."""
        if self._writer is not None and self._file.tell() >= self.most_bytes:
            self.close()
        length = len(next(iter(indexes.values())))
        row_bytes = sum(value.nbytes for value in frames.values()) // length
        num = max(_MOST_GROUP_BYTES // max(row_bytes, 1), 1)
        for start in range(0, length, num):
            self._write({name: value[start : start + num] for name, value in frames.items()}, indexes, start)
        chunk, index = divmod(self._number, self.files_a_chunk)
        return {"data/chunk_index": chunk, "data/file_index": index}

    def _write(self, frames: Mapping[str, np.ndarray], indexes: Mapping[str, np.ndarray], start: int) -> None:
        arrow = library("pyarrow", EXTRA)
        columns = {feature.name: self._column(feature, frames[feature.name], start) for feature in self.features}
        num = len(next(iter(columns.values()))) if columns else len(next(iter(indexes.values())))
        columns |= {name: arrow.array(value[start : start + num]) for name, value in indexes.items()}
        table = arrow.table(columns)
        if self._writer is None:
            self._next_file(table.schema)
        self._writer.write_table(table)

    def _column(self, feature: Planned, values: np.ndarray, start: int) -> Any:
        if feature.kind == "numbers":
            return arrow_column(values)
        arrow = library("pyarrow", EXTRA)
        images = values.transpose(0, 2, 3, 1) if feature.is_channel_first else values
        if feature.name not in self._encoders:
            self._encoders[feature.name] = ImageEncoder(images.shape[1:], images.dtype)
        encoder = self._encoders[feature.name]
        content = arrow.array([encoder.encode(image) for image in images], arrow.binary())
        names = arrow.array([_IMAGE_FILE.format(start + row) for row in range(len(images))], arrow.string())
        return arrow.StructArray.from_arrays([content, names], ["bytes", "path"])

    def _next_file(self, schema: Any) -> None:
        self._number += 1
        chunk, index = divmod(self._number, self.files_a_chunk)
        where = os.path.join(self.path, DATA_PATH.format(chunk_index=chunk, file_index=index))
        os.makedirs(os.path.dirname(where), exist_ok=True)
        self._file = open(where, "wb")  # noqa: SIM115  # `close` closes it.
        images = {feature.name for feature in self.features if feature.kind == "image"}
        others = [name for name in schema.names if name not in images]
        # PNG is compressed, and no two are equal.
        compression = {name: "snappy" for name in others} | {f"{name}.bytes": "none" for name in images}
        self._writer = library("pyarrow.parquet", EXTRA).ParquetWriter(
            self._file, schema, compression=compression, use_dictionary=others, write_statistics=others
        )

    def close(self) -> None:
        """End the file, if one is open."""
        writer, self._writer = self._writer, None
        file, self._file = self._file, None
        if writer is not None:
            try:
                writer.close()
            finally:
                file.close()
