"""Reading windows from episode files: ranges of rows straight into the batch, or slices of decoded episodes."""

from __future__ import annotations

import contextlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from buffers.compression import Codec, Fetched, Run, decode_runs, runs_of
from buffers.dataset.files.compressed import BlockIndex, FieldBlocks
from buffers.dataset.files.directory import EpisodeFiles, FileName
from buffers.dataset.files.serialization import EpisodeSerializationStrategy, bytes_of
from buffers.disk import DamagedEpisodeError, UnknownVersionError, size_of
from buffers.disk.reading import fill_from
from buffers.fields import Fields
from buffers.table import Windows
from buffers.utils import ThreadLock

__all__ = ["Layout", "Request", "Target", "WindowReader", "ranges_of"]

MAX_OPEN_FILES = 1024
MAX_DECODED_BYTES = 256 * 2**20
_MAX_LAYOUTS = 1 << 17


class Layout(NamedTuple):
    """What a checked file looks like: its size, and where the rows of each field begin, in the order of the fields."""

    size: int
    offsets: tuple[int, ...]
    #: Name and place of each field that is compressed.
    blocks: tuple[tuple[str, FieldBlocks], ...] = ()


# Position of the field, bytes of a row, memory.
Target = tuple[int, int, memoryview]
# By field and codec, as files may have different ones: the codec, and the positions of windows.
_Compressed = dict[tuple[str, tuple[str, int]], tuple[Codec, list[int]]]
# With the index of each field that is compressed.
_OpenFile = tuple[io.FileIO, Layout, dict[str, BlockIndex]]
#: Bytes of a file from an offset on, and where they go.
Request = tuple[FileName, io.FileIO, int, bytearray]


class WindowReader:
    """Copies rows of episodes into a batch. It keeps some files open, or some episodes decoded.

    Threads may call `read` at the same time; they take turns. `forget` never waits for them.
    """

    def __init__(self, directory: EpisodeFiles) -> None:
        self._directory = directory
        self._max_open_files = _max_open_files()
        self._lock = ThreadLock()
        self._forgotten: deque[int] = deque()
        # Both by episode id, least recently used first.
        self._files: dict[int, _OpenFile] = {}
        self._decoded: dict[int, Mapping[str, torch.Tensor]] = {}
        self._decoded_bytes = 0
        # A file that is opened again is checked by its size only. Most episodes have the layout of another one.
        self._layouts: dict[int, Layout] = {}
        self._shared_layouts: dict[Layout, Layout] = {}

    def read(
        self, strategy: EpisodeSerializationStrategy, fields: Fields, windows: Windows, out: Mapping[str, torch.Tensor]
    ) -> dict[FileName, str | None]:
        """Fill `name -> (B, T, *shape)`, and return the episodes that are gone (None) or damaged (what is wrong)."""
        starts, skipped = (windows.start - windows.step).tolist(), np.maximum(-windows.step, 0)
        ids, lengths = windows.episode.tolist(), windows.episode_length.tolist()
        steps = (windows.step + skipped).tolist()
        rows = (np.arange(len(windows)) * windows.length + skipped).tolist()
        cuts = [0] * len(ids) if windows.cut is None else windows.cut.tolist()
        targets = {n: (i, fields[n].nbytes, bytes_of(out[n])) for i, n in enumerate(fields) if n in out}
        all_targets = [*targets.values()]
        compressed: _Compressed = {}
        lost: dict[FileName, str | None] = {}
        source: _OpenFile | Mapping[str, torch.Tensor] | None = None
        episode_id = -1
        with self._lock:
            self._drop_forgotten()
            # Grouped by episode, so that each file is opened, or decoded, only once.
            for b, num in _runs(windows):
                try:
                    if ids[b] != episode_id:
                        episode_id, source = ids[b], None
                        name = FileName(episode_id, starts[b], lengths[b], cuts[b], self._directory.suffix)
                        source = self._find(name, strategy, fields)
                    if isinstance(source, tuple):
                        file, layout, indices = source
                        plain = [targets[n] for n in targets if n not in indices] if indices else all_targets
                        self._read_rows(name, file, layout, plain, rows[b], steps[b], num)
                        positions = range(b, b + num if windows.length == 1 else b + 1)
                        for field, (codec, *_) in layout.blocks:
                            compressed.setdefault((field, codec.key), (codec, []))[1].extend(positions)
                    elif source is not None:
                        for field, tensor in out.items():
                            tensor.flatten(0, 1)[rows[b] : rows[b] + num] = source[field][steps[b] : steps[b] + num]
                except FileNotFoundError:
                    lost[name] = None
                except DamagedEpisodeError as error:
                    source, lost[name] = None, self._look_again(name, strategy, fields, error)
            self._read_blocks(compressed, windows, out, partial(self._find, strategy=strategy, fields=fields), lost)
        return lost

    def _read_blocks(
        self,
        compressed: _Compressed,
        windows: Windows,
        out: Mapping[str, torch.Tensor],
        find: Callable[[FileName], Any],
        lost: dict[FileName, str | None],
    ) -> None:
        for (field, _), (codec, positions) in compressed.items():
            if field in out:
                at = np.array(positions)
                fetched = self._fetch(field, runs_of(windows[at], codec.rows_per_block, at), find, lost)
                damaged = decode_runs(codec, fetched, out[field])
                lost |= {self._name_of(run): str(damage) for run, damage in damaged}

    def _name_of(self, run: Run) -> FileName:
        return FileName(run.episode, run.start, run.length, run.cut, self._directory.suffix)

    def _fetch(
        self, field: str, runs: list[Run], find: Callable[[FileName], Any], lost: dict[FileName, str | None]
    ) -> Iterator[tuple[Run, Fetched]]:
        """The blocks of those runs whose files are there and whole; the others are `lost`."""
        asked: list[tuple[Run, BlockIndex, bytearray]] = []
        requests: list[Request] = []
        for run in runs:
            name = self._name_of(run)
            try:
                file, layout, indices = find(name)
            except (FileNotFoundError, DamagedEpisodeError) as error:
                lost[name] = str(error) if isinstance(error, DamagedEpisodeError) else None
                continue
            begin, end = indices[field].span(run.first, run.end)
            asked.append((run, indices[field], bytearray(end - begin)))
            requests.append((name, file, dict(layout.blocks)[field].first + begin, asked[-1][2]))
        self._fill(requests, lost)
        for run, index, data in asked:
            name = self._name_of(run)
            if name not in lost:
                try:
                    found = index.fetched(run.first, run.end, data)
                except DamagedEpisodeError as error:
                    lost[name] = str(error)
                else:
                    yield run, found

    def _fill(self, requests: list[Request], lost: dict[FileName, str | None]) -> None:
        for name, file, offset, data in requests:
            if not fill_from(file.fileno(), memoryview(data), offset):
                lost[name] = "is shorter than its header says"

    def forget(self, episode_id: int) -> None:
        """Drop what is kept of an episode that is gone: now or, while another thread reads, before the next read."""
        self._forgotten.append(episode_id)
        if self._lock.acquire(blocking=False):
            try:
                self._drop_forgotten()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Close all files, after waiting for threads that read."""
        with self._lock:
            self._files.clear()
            self._decoded.clear()
            self._decoded_bytes = 0

    def _drop_forgotten(self) -> None:
        while self._forgotten:
            episode_id = self._forgotten.popleft()
            self._files.pop(episode_id, None)
            self._layouts.pop(episode_id, None)
            self._decoded_bytes -= _num_bytes(self._decoded.pop(episode_id, {}))

    def _find(
        self, name: FileName, strategy: EpisodeSerializationStrategy, fields: Fields
    ) -> _OpenFile | Mapping[str, torch.Tensor]:
        """The open file of an episode or, if its format has no offsets, the decoded episode."""
        caches: tuple[dict[int, Any], ...] = self._files, self._decoded
        for cache in caches:
            if name.id in cache:
                cache[name.id] = found = cache.pop(name.id)
                return found
        file = self._directory.open(str(name))
        layout = self._find_layout(file, name, strategy, fields)
        if layout is not None:
            while len(self._files) >= self._max_open_files:
                del self._files[next(iter(self._files))]
            indices = {field: blocks.read_index(file, name.length) for field, blocks in layout.blocks}
            self._files[name.id] = opened = file, layout, indices
            return opened
        self._decoded[name.id] = episode = _load(file, name, strategy, fields)
        self._decoded_bytes += _num_bytes(episode)
        while self._decoded_bytes > MAX_DECODED_BYTES:
            self._decoded_bytes -= _num_bytes(self._decoded.pop(next(iter(self._decoded))))
        return episode

    def _look_again(
        self, name: FileName, strategy: EpisodeSerializationStrategy, fields: Fields, error: DamagedEpisodeError
    ) -> str | None:
        """What is wrong with a file, None if it is gone. If it is not damaged any more, a signal handler has raised."""
        self._files.pop(name.id, None)
        try:
            self._find(name, strategy, fields)
        except FileNotFoundError:
            return None
        except UnknownVersionError as unknown:
            # Whole, so a writer must not set it aside.
            raise ValueError(f"{self._directory.path}/{name} {unknown}.") from None
        except DamagedEpisodeError:
            return str(error)
        raise error.__cause__ or error

    def _read_rows(
        self, name: FileName, file: io.FileIO, layout: Layout, targets: list[Target], row: int, step: int, num_rows: int
    ) -> None:
        """Fill rows of a batch, from `row` on, with rows of an episode, from `step` on."""
        for offset, view in ranges_of(layout, targets, row, step, num_rows):
            # One call reads at most 2 GB.
            while view:
                num_read = os.preadv(file.fileno(), [view], offset)
                if num_read == 0:
                    raise DamagedEpisodeError("is shorter than its header says")
                view, offset = view[num_read:], offset + num_read

    def _find_layout(
        self, file: io.FileIO, name: FileName, strategy: EpisodeSerializationStrategy, fields: Fields
    ) -> Layout | None:
        size, layout = size_of(file), self._layouts.get(name.id)
        if layout is None:
            offsets = strategy.row_offsets(file, fields, name.length)
            if offsets is None:
                return None
            blocks = tuple(strategy.block_places(file).items())
            layout = Layout(size, tuple(offsets[field] for field in fields), blocks)
            if blocks:
                # Each is another one. They are found again if there are too many.
                if len(self._layouts) >= _MAX_LAYOUTS:
                    self._layouts.clear()
                self._layouts[name.id] = layout
            else:
                self._layouts[name.id] = layout = self._shared_layouts.setdefault(layout, layout)
        if size != layout.size:
            raise DamagedEpisodeError(f"has {size} bytes, and had {layout.size} before")
        return layout


def _runs(windows: Windows) -> list[tuple[int, int]]:
    """Position and real rows of each window, by episode; windows of one row that follow each other are one."""
    order, num_rows = windows.episode.argsort(kind="stable"), windows.num_rows
    if windows.length > 1:
        return list(zip(order.tolist(), num_rows[order].tolist(), strict=True))
    follows = (np.diff(order) == 1) & (np.diff(windows.step[order]) == 1) & (np.diff(windows.episode[order]) == 0)
    begins = np.append(0, np.flatnonzero(~follows) + 1)
    return list(zip(order[begins].tolist(), np.diff(begins, append=len(order)).tolist(), strict=True))


def ranges_of(
    layout: Layout, targets: list[Target], row: int, step: int, num_rows: int
) -> Iterator[tuple[int, memoryview]]:
    """Offset in the file, and memory of each field, for rows of an episode from `step` on, of a batch from `row` on."""
    for i, row_bytes, memory in targets:
        yield layout.offsets[i] + step * row_bytes, memory[row * row_bytes : (row + num_rows) * row_bytes]


def _load(
    file: io.FileIO, name: FileName, strategy: EpisodeSerializationStrategy, fields: Fields
) -> Mapping[str, torch.Tensor]:
    """A whole episode. The format may be a user's own, so what it returns is compared with the fields."""
    file.seek(0)
    episode = strategy.load(file, fields, name.length)
    found = {field: (tensor.dtype, tuple(tensor.shape)) for field, tensor in episode.items()}
    expected = {field: (kind.dtype, (name.length, *kind.shape)) for field, kind in fields.items()}
    if found != expected:
        raise DamagedEpisodeError(f"holds {found!r:.200}, expected {expected!r:.200}")
    return episode


def _num_bytes(episode: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in episode.values())


def _max_open_files() -> int:
    """A quarter of the files that the process may open, so that the rest of the program has enough."""
    with contextlib.suppress(ImportError):  # Windows does not have it.
        import resource

        return max(8, min(MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
    return 64
