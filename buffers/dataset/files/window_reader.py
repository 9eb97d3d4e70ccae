"""Reading windows from episode files: ranges of rows straight into the batch, or slices of decoded episodes."""

from __future__ import annotations

import contextlib
import io
import os
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from buffers.dataset.files.directory import EpisodeDirectory, FileName
from buffers.dataset.files.serialization import DamagedEpisodeError, EpisodeSerializationStrategy, bytes_of
from buffers.fields import Fields
from buffers.table import Windows
from buffers.utils import ThreadLock

__all__ = ["LostWindow", "WindowReader"]

MAX_OPEN_FILES = 1024
MAX_DECODED_BYTES = 256 * 2**20
# A gap between two ranges is read too, and thrown away, where that costs less than a second call, and all gaps together
# are at most this share of the window.
_MAX_GAP = 8192
_MAX_SHARE_OF_GAPS = 0.1
# Buffers that one call may fill: POSIX promises 16, Linux has 1024.
_MAX_BUFFERS = 512
# Not everywhere: where it is missing, episodes cannot be read by ranges, and importing this works all the same.
_preadv: Any = getattr(os, "preadv", None)


class LostWindow(NamedTuple):
    """A window that could not be read, by its position in the batch, and why."""

    position: int
    name: FileName
    error: Exception


class _Layout(NamedTuple):
    """Where the rows of each field begin in a file of this size that was found to be good: ascending (offset, name)."""

    size: int
    offsets: tuple[tuple[int, str], ...]


_OpenFile = tuple[io.FileIO, _Layout]


class WindowReader:
    """Copies rows of episodes into a batch, and keeps some files open, or some episodes decoded.

    Several threads may read; they take turns. `forget` waits for none of them.
    """

    def __init__(self, directory: EpisodeDirectory) -> None:
        self._directory = directory
        self._max_open_files = _max_open_files()
        self._lock = ThreadLock()
        self._forgotten: deque[int] = deque()
        # Both in the order of their last use.
        self._files: dict[int, _OpenFile] = {}
        self._decoded: dict[int, Mapping[str, torch.Tensor]] = {}
        self._decoded_bytes = 0
        # What was found once is not looked for again, except for the size. Most files share a layout with others.
        self._layouts: dict[int, _Layout] = {}
        self._shared_layouts: dict[_Layout, _Layout] = {}
        self._waste = memoryview(bytearray(_MAX_GAP))
        weakref.finalize(self, _close_all, self._files).atexit = False

    def read(
        self, strategy: EpisodeSerializationStrategy, fields: Fields, windows: Windows, out: Mapping[str, torch.Tensor]
    ) -> list[LostWindow]:
        """Fill `name -> (B, T, *shape)`; returns the windows whose file is gone or damaged."""
        starts = (windows.start - windows.step).tolist()
        ids, lengths, steps = windows.episode.tolist(), windows.episode_length.tolist(), windows.step.tolist()
        num_rows = windows.num_rows.tolist()
        # Bytes of a row, and the memory, of each field that is wanted and has any.
        memory = {name: (fields[name].nbytes, bytes_of(out[name])) for name in out if fields[name].nbytes}
        lost = []
        with self._lock:
            self._drop_forgotten()
            # In the order of files, so that each is opened, or decoded, once.
            for b in windows.episode.argsort(kind="stable").tolist():
                name = FileName(ids[b], starts[b], lengths[b])
                try:
                    source = self._find(name, strategy, fields)
                    if isinstance(source, tuple):
                        self._read_rows(*source, memory, b * windows.length, steps[b], num_rows[b])
                    else:
                        for field, tensor in out.items():
                            tensor[b, : num_rows[b]] = source[field][steps[b] : steps[b] + num_rows[b]]
                except (FileNotFoundError, DamagedEpisodeError) as error:
                    lost.append(LostWindow(b, name, error))
        return lost

    def forget(self, episode_id: int) -> None:
        """The episode is gone. Its file is closed now or, if another thread is reading, before the next read."""
        self._forgotten.append(episode_id)
        if self._lock.acquire(blocking=False):
            try:
                self._drop_forgotten()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Close all files, once no thread reads any more."""
        with self._lock:
            _close_all(self._files)
            self._decoded.clear()
            self._decoded_bytes = 0

    def _drop_forgotten(self) -> None:
        while self._forgotten:
            episode_id = self._forgotten.popleft()
            if episode_id in self._files:
                self._files.pop(episode_id)[0].close()
            self._layouts.pop(episode_id, None)
            self._decoded_bytes -= _num_bytes(self._decoded.pop(episode_id, {}))

    def _find(
        self, name: FileName, strategy: EpisodeSerializationStrategy, fields: Fields
    ) -> _OpenFile | Mapping[str, torch.Tensor]:
        """The open file of an episode or, if its format has no ranges, the episode; now the last to be closed."""
        caches: tuple[dict[int, Any], ...] = self._files, self._decoded
        for kept in caches:
            if name.id in kept:
                kept[name.id] = found = kept.pop(name.id)
                return found
        file = self._directory.open(name.text(self._directory.suffix))
        try:
            layout = self._find_layout(file, name, strategy, fields)
            if layout is not None:
                while len(self._files) >= self._max_open_files:
                    self._files.pop(next(iter(self._files)))[0].close()
                self._files[name.id] = opened = file, layout
                return opened
            episode = load_episode(strategy, file, fields, name.length)
        except Exception:
            file.close()
            raise
        file.close()
        self._decoded[name.id] = episode
        self._decoded_bytes += _num_bytes(episode)
        while self._decoded_bytes > MAX_DECODED_BYTES:
            self._decoded_bytes -= _num_bytes(self._decoded.pop(next(iter(self._decoded))))
        return episode

    def _find_layout(
        self, file: io.FileIO, name: FileName, strategy: EpisodeSerializationStrategy, fields: Fields
    ) -> _Layout | None:
        size, layout = os.fstat(file.fileno()).st_size, self._layouts.get(name.id)
        if layout is None:
            offsets = strategy.row_offsets(file, fields, name.length)
            if offsets is None:
                return None
            layout = _Layout(size, tuple(sorted((offsets[field], field) for field in fields)))
            self._layouts[name.id] = layout = self._shared_layouts.setdefault(layout, layout)
        if size != layout.size:
            raise DamagedEpisodeError(f"has {size} bytes, and had {layout.size} before")
        return layout

    def _read_rows(
        self,
        file: io.FileIO,
        layout: _Layout,
        memory: Mapping[str, tuple[int, memoryview]],
        row: int,
        step: int,
        num_rows: int,
    ) -> None:
        """Fill rows of a batch, from `row` on, with those from `step` on of an episode, in as few calls as pay."""
        descriptor = file.fileno()
        spare = int(num_rows * sum(row_bytes for row_bytes, _ in memory.values()) * _MAX_SHARE_OF_GAPS)
        buffers: list[memoryview] = []
        begin = end = 0
        for offset, field in layout.offsets:
            if field not in memory:
                continue
            row_bytes, view = memory[field]
            first = offset + step * row_bytes
            gap = first - end
            if not buffers or gap > min(spare, _MAX_GAP) or len(buffers) > _MAX_BUFFERS:
                _read_exactly(descriptor, buffers, begin, end)
                buffers, begin = [], first
            elif gap:
                spare -= gap
                buffers.append(self._waste[:gap])
            end = first + num_rows * row_bytes
            buffers.append(view[row * row_bytes : (row + num_rows) * row_bytes])
        _read_exactly(descriptor, buffers, begin, end)


def load_episode(
    strategy: EpisodeSerializationStrategy, file: io.FileIO, fields: Fields, length: int
) -> Mapping[str, torch.Tensor]:
    """A whole episode, checked against the fields whatever the format makes of the file."""
    file.seek(0)
    episode = strategy.load(file, fields, length)
    if episode.keys() != set(fields):
        raise DamagedEpisodeError(f"holds the fields {sorted(episode)!r:.200}, expected {sorted(fields)!r:.200}")
    for name, tensor_type in fields.items():
        found = episode[name].dtype, tuple(episode[name].shape)
        if found != (tensor_type.dtype, (length, *tensor_type.shape)):
            raise DamagedEpisodeError(f"has `{name}` as {found}, expected {length} rows of {tensor_type}")
    return episode


def _read_exactly(descriptor: int, buffers: list[memoryview], begin: int, end: int) -> None:
    """Fill the buffers with the file's bytes from `begin` to `end`; one call brings at most 2 GB."""
    while begin < end:
        num_read = _preadv(descriptor, buffers, begin)
        if num_read == 0:
            raise DamagedEpisodeError("is shorter than its header says")
        begin += num_read
        while begin < end and num_read >= len(buffers[0]):
            num_read -= len(buffers.pop(0))
        buffers[0] = buffers[0][num_read:]


def _close_all(files: dict[int, _OpenFile]) -> None:
    while files:
        files.popitem()[1][0].close()


def _num_bytes(episode: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in episode.values())


def _max_open_files() -> int:
    """A quarter of what the process may have open: the rest is for others."""
    with contextlib.suppress(ImportError):  # Missing on some systems.
        import resource

        return max(8, min(MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
    return 64
