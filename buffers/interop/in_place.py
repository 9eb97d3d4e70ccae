"""InPlaceDataset: episodes that are read where they lie, in a file of another format."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset import EpisodeDataset
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.fields import Fields
from buffers.interop.formats import module_of
from buffers.table import Windows
from buffers.utils import Process

__all__ = ["InPlaceDataset"]


class InPlaceDataset(EpisodeDataset):
    """Episodes in a file of another format, which loaders, mixtures and samplers take. Nothing can be added or evicted.

    A format implements `_open_file`, `_close_file` and `_read_rows`. The file must not change while it is open. Episode
    ids are the numbers of the episodes. Each process opens the file itself, when it first reads.

    Args:
        path: Of the file.
        fields: Of the rows, as the format's `read` yields them.
        lengths: Rows of each episode.
        infos: `number -> info` of episodes that have one.
        options: What the format's `open` was given besides the path, so that a save can open it again.
    """

    #: The name of the format; empty where its module is not in `buffers.interop`.
    format: ClassVar[str] = ""

    def __init__(
        self,
        path: str,
        fields: Fields,
        lengths: Sequence[int],
        infos: Mapping[int, EpisodeInfo] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self._options = os.path.abspath(path), dict(options or {})
        self._file: Any = None
        self._opened_by = -1
        num_rows = np.asarray(lengths, np.int64)
        super().__init__(max(int(num_rows.sum()), 1), EpisodeDatasetInfo(fields))
        table = np.zeros((len(num_rows), 4), np.int64)
        table[:, 0], table[:, 1], table[:, 2] = num_rows.cumsum() - num_rows, num_rows, np.arange(len(num_rows))
        self.table.extend(table)
        self._infos.update(infos or {})

    @abstractmethod
    def _open_file(self) -> Any:
        """Open the file; what is returned is kept as `file` of `_read_rows`."""

    @abstractmethod
    def _read_rows(self, file: Any, episode: int, start: int, stop: int, out: Mapping[str, np.ndarray]) -> None:
        """Copy the rows [start, stop) of an episode, as `read` yields them, into `out`.

        `out` is `name -> (stop - start, *shape)`, for some or all of the fields. FormatError if the file is damaged.
        """

    def _close_file(self, file: Any) -> None:
        file.close()

    @property
    def is_reader(self) -> bool:
        """As `EpisodeDataset.is_reader`."""
        return True

    def describe_store(self) -> dict[str, Any]:
        """As `EpisodeDataset.describe_store`."""
        options = {name: _plain(value) for name, value in self._options.items()}
        own = {"directory": self.path, "options": options, "module": type(self).__module__}
        return {**super().describe_store(), **own}

    @classmethod
    def made_as(cls, told: Mapping[str, Any], info: EpisodeDatasetInfo) -> EpisodeDataset:
        """As `EpisodeDataset.made_as`: the same path, opened again with the same options."""
        return module_of(cls.format).open(told["directory"], **told["options"])

    def check_writable(self) -> None:
        """As `EpisodeDataset.check_writable`."""
        raise RuntimeError(f"{self.path} is open in place, only to be read. Import it, or add to another dataset.")

    def _allocate(self, fields: Fields) -> None:
        pass

    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        self.check_writable()

    def _erase(self, episode_id: int, start: int, length: int) -> None:
        self.check_writable()

    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> None:
        file = self._opened()
        arrays = {name: as_array(name, tensor) for name, tensor in out.items()}
        # In the order of the file, which is the order of the episodes.
        for b in np.lexsort((windows.step, windows.episode)).tolist():
            episode, step = int(windows.episode[b]), int(windows.step[b])
            stop = min(step + windows.length, int(windows.episode_length[b]))
            rows = {name: array[b, : stop - step] for name, array in arrays.items()}
            self._read_rows(file, episode, step, stop, rows)

    def _opened(self) -> Any:
        if self._file is None or self._opened_by != Process.number:
            # A forked child must not use the file of its parent.
            self._file, self._opened_by = self._open_file(), Process.number
        return self._file

    def close(self) -> None:
        """Close the file; reading opens it again."""
        file, self._file = self._file, None
        if file is not None and self._opened_by == Process.number:
            self._close_file(file)

    def __enter__(self) -> InPlaceDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __repr__(self) -> str:
        return f"{super().__repr__()}\nRead in place from {self.path}"


def _plain(value: Any) -> Any:
    """An option as JSON holds it."""
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
