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

from buffers.dataset.directory import EpisodeDirectory, FileName
from buffers.dataset.fields import Fields
from buffers.dataset.index import Windows
from buffers.dataset.serialization import DamagedEpisodeError, EpisodeSerializationStrategy, bytes_of, read_with
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
    error: FileNotFoundError | DamagedEpisodeError


class _Layout(NamedTuple):
    """Where the rows of each field begin in a file of this size that was found to be good: ascending (offset, name)."""

    size: int
    offsets: tuple[tuple[int, str], ...]


class _OpenFile(NamedTuple):
    file: io.FileIO
    layout: _Layout | None


class WindowReader:
    """Copies rows of episodes into a batch, and keeps some files open, or some episodes decoded.

    Several threads may read; they take turns. Nothing here waits for a thread that reads, but `read` and `close`.

    Args:
        directory: Where the files are.
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
        weakref.finalize(self, _close_all, self._files).atexit = False

    def read(
        self, strategy: EpisodeSerializationStrategy, fields: Fields, windows: Windows, out: Mapping[str, torch.Tensor]
    ) -> list[LostWindow]:
        """Fill `name -> (B, T, *shape)`; returns the windows whose file is gone or damaged.

        Raises:
            OSError: As the operating system says.
            MemoryError: There is no room for an episode that must be decoded.
        """
        starts = (windows.start - windows.step).tolist()
        ids, lengths, steps = windows.episode.tolist(), windows.episode_length.tolist(), windows.step.tolist()
        num_rows = windows.num_rows.tolist()
        lost = []
        with self._lock:
            self._drop_forgotten()
            batch = _Batch(strategy, fields, out)
            # In the order of files, so that each is opened, or decoded, once.
            for b in windows.episode.argsort(kind="stable").tolist():
                name = FileName(ids[b], starts[b], lengths[b])
                try:
                    self._read_window(batch, b, name, steps[b], num_rows[b])
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
                self._files.pop(episode_id).file.close()
            self._layouts.pop(episode_id, None)
            self._decoded_bytes -= _num_bytes(self._decoded.pop(episode_id, {}))

    def _read_window(self, batch: _Batch, b: int, name: FileName, step: int, num_rows: int) -> None:
        episode = self._decoded.pop(name.id, None)
        if episode is None:
            opened = self._files.pop(name.id, None) or self._open(batch, name)
            if opened.layout is not None:
                self._files[name.id] = opened
                batch.read_rows(b, opened.file, opened.layout, step, num_rows)
                return
            with opened.file as file:
                episode = load_episode(batch.strategy, file, batch.fields, name.length)
            self._decoded_bytes += _num_bytes(episode)
        self._decoded[name.id] = episode
        batch.copy_rows(b, episode, step, num_rows)
        while self._decoded_bytes > MAX_DECODED_BYTES:
            self._decoded_bytes -= _num_bytes(self._decoded.pop(next(iter(self._decoded))))

    def _open(self, batch: _Batch, name: FileName) -> _OpenFile:
        """Open the file of an episode, and find out where its rows lie."""
        file = self._directory.open(name.text(self._directory.suffix))
        try:
            size, layout = os.fstat(file.fileno()).st_size, self._layouts.get(name.id)
            if layout is None:
                offsets = read_with(batch.strategy.row_offsets, file, batch.fields, name.length)
                if offsets is None:
                    return _OpenFile(file, None)
                layout = _Layout(size, tuple(sorted((offsets[field], field) for field in batch.fields)))
                self._layouts[name.id] = layout = self._shared_layouts.setdefault(layout, layout)
            if size != layout.size:
                raise DamagedEpisodeError(f"has {size} bytes, and had {layout.size} before")
        except Exception:
            file.close()
            raise
        while len(self._files) >= self._max_open_files:
            self._files.pop(next(iter(self._files))).file.close()
        return _OpenFile(file, layout)


class _Batch:
    """A batch that is being filled."""

    def __init__(self, strategy: EpisodeSerializationStrategy, fields: Fields, out: Mapping[str, torch.Tensor]) -> None:
        self.strategy, self.fields, self._out = strategy, fields, out
        self._length = next(iter(out.values())).shape[1]
        # Bytes of a row, and the memory, of each field that is wanted and has any.
        self._memory = {name: (fields[name].nbytes, bytes_of(out[name])) for name in out if fields[name].nbytes}
        self._row_bytes = sum(fields[name].nbytes for name in out)
        self._waste = memoryview(bytearray(_MAX_GAP))

    def read_rows(self, b: int, file: io.FileIO, layout: _Layout, step: int, num_rows: int) -> None:
        """Fill window b with the rows from `step` on, in as few calls as pay.

        Raises:
            DamagedEpisodeError: The file has been cut short.
        """
        descriptor, spare = file.fileno(), int(num_rows * self._row_bytes * _MAX_SHARE_OF_GAPS)
        buffers: list[memoryview] = []
        begin = end = 0
        for offset, name in layout.offsets:
            if name not in self._memory:
                continue
            row_bytes, memory = self._memory[name]
            first, place = offset + step * row_bytes, b * self._length * row_bytes
            gap = first - end
            if not buffers or gap > min(spare, _MAX_GAP) or len(buffers) > _MAX_BUFFERS:
                _read_exactly(descriptor, buffers, begin, end)
                buffers, begin = [], first
            elif gap:
                spare -= gap
                buffers.append(self._waste[:gap])
            end = first + num_rows * row_bytes
            buffers.append(memory[place : place + num_rows * row_bytes])
        _read_exactly(descriptor, buffers, begin, end)

    def copy_rows(self, b: int, episode: Mapping[str, torch.Tensor], step: int, num_rows: int) -> None:
        """Fill window b with the rows from `step` on of a decoded episode."""
        for name, tensor in self._out.items():
            tensor[b, :num_rows] = episode[name][step : step + num_rows]


def load_episode(
    strategy: EpisodeSerializationStrategy, file: io.FileIO, fields: Fields, length: int
) -> Mapping[str, torch.Tensor]:
    """A whole episode, checked against the fields whatever the format makes of the file.

    Raises:
        DamagedEpisodeError: The file is not what was expected.
    """
    episode = read_with(strategy.load, file, fields, length)
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
        files.popitem()[1].file.close()


def _num_bytes(episode: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in episode.values())


def _max_open_files() -> int:
    """A quarter of what the process may have open: the rest is for others."""
    with contextlib.suppress(ImportError):  # Missing on some systems.
        import resource

        return max(8, min(MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
    return 64
