"""Reading windows from episode files: ranges of rows straight into the batch, or slices of decoded episodes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from buffers.dataset.directory import EpisodeDirectory
from buffers.dataset.following import EpisodeNames
from buffers.dataset.serialization import DamagedEpisodeError, EpisodeSerializationStrategy, bytes_of
from buffers.fields import Fields

__all__ = ["WindowReader"]

MAX_OPEN_FILES = 1024
MAX_DECODED_BYTES = 256 * 2**20
# A gap between two ranges is read too, and thrown away, where that is cheaper than a second call (2 us with all that
# belongs to it, in which so many bytes are copied), and all gaps together are at most this share of the window.
_MAX_GAP = 8192
_MAX_SHARE_OF_GAPS = 0.1
# Buffers that one call may fill: POSIX promises 16, Linux has 1024.
_MAX_BUFFERS = 512


# Not everywhere: where it is missing, episodes cannot be read by ranges, and importing this works all the same.
_preadv: Callable[[int, list[memoryview], int], int] = getattr(os, "preadv", None)  # type: ignore[assignment]


class _Segment(NamedTuple):
    """The rows of a field in a file."""

    offset: int
    row_bytes: int
    field: int


class _Rows(NamedTuple):
    """Where the rows of files that were found to be good lie; those of one length share it."""

    size: int
    segments: list[_Segment]


class _OpenFile:
    """An open file. It has no `__del__`, in which Python would swallow a Ctrl-C."""

    __slots__ = ("_file", "descriptor", "segments", "size")

    def __init__(self, file: io.FileIO) -> None:
        # Should Ctrl-C keep it from being closed, it closes itself.
        self._file, self.descriptor = file, file.fileno()
        self.segments: list[_Segment] = []
        status = os.fstat(self.descriptor)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            file.close()
            raise DamagedEpisodeError("is no regular file")

    def close(self) -> None:
        self._file.close()


class WindowReader:
    """Copies rows of episodes into a batch, and keeps some files open, or some episodes decoded.

    It is for one thread at a time: files that another would read are closed.

    Args:
        strategy: The format.
        fields: What the files hold.
        directory: Where they are.
        names: Of files; changed by the owner.
    """

    def __init__(
        self,
        strategy: EpisodeSerializationStrategy,
        fields: Fields,
        directory: EpisodeDirectory,
        names: EpisodeNames,
    ) -> None:
        self._strategy, self._fields, self._directory, self._names = strategy, fields, directory, names
        self._max_open_files = _max_open_files()
        # Both in the order of their last use.
        self._files: dict[int, _OpenFile] = {}
        weakref.finalize(self, _close_all, self._files).atexit = False
        self._decoded: dict[int, Mapping[str, torch.Tensor]] = {}
        self._decoded_bytes = 0
        # Of files that were found to be good, nothing but the size is looked at again.
        self._rows: dict[int, _Rows] = {}
        self._shared_rows: dict[tuple[int, tuple[_Segment, ...]], _Rows] = {}
        self._reads_ranges: bool | None = None

    def batch(self, out: Mapping[str, torch.Tensor]) -> _Batch:
        """Something to read into, `name -> (B, T, *shape)`."""
        return _Batch(self, self._fields, out)

    def forget(self, episode_id: int) -> None:
        """The episode is gone."""
        file = self._files.pop(episode_id, None)
        if file is not None:
            file.close()
        self._rows.pop(episode_id, None)
        decoded = self._decoded.pop(episode_id, None)
        if decoded is not None:
            self._decoded_bytes -= _num_bytes(decoded)

    def close(self) -> None:
        """Close all files."""
        _close_all(self._files)
        self._decoded.clear()
        self._decoded_bytes = 0

    def file(self, episode_id: int, length: int) -> _OpenFile | None:
        """The open file of an episode; None if its format has no ranges.

        Raises:
            FileNotFoundError: It is gone.
            DamagedEpisodeError: It is not what its name promises.
        """
        file = self._files.pop(episode_id, None)
        if file is None:
            if self._reads_ranges is False:
                return None
            file = self._opened(episode_id)
            try:
                segments = self._segments(file, episode_id, length)
            except BaseException:
                file.close()
                raise
            if segments is None:
                file.close()
                return None
            file.segments = segments
            while len(self._files) >= self._max_open_files:
                self._close_oldest()
        self._files[episode_id] = file
        return file

    def decoded(self, episode_id: int, length: int) -> Mapping[str, torch.Tensor]:
        """A whole episode.

        Raises:
            FileNotFoundError: It is gone.
            DamagedEpisodeError: It is not what its name promises.
        """
        episode = self._decoded.pop(episode_id, None)
        if episode is None:
            file = self._opened(episode_id)
            try:
                episode = load(self._strategy, file.descriptor, self._fields, length)
            finally:
                file.close()
            num_bytes = _num_bytes(episode)
            self._decoded_bytes += num_bytes
            while self._decoded_bytes > MAX_DECODED_BYTES and self._decoded:
                self._decoded_bytes -= _num_bytes(self._decoded.pop(next(iter(self._decoded))))
            if num_bytes > MAX_DECODED_BYTES:
                self._decoded_bytes -= num_bytes
                return episode
        self._decoded[episode_id] = episode
        return episode

    def _opened(self, episode_id: int) -> _OpenFile:
        name = self._names.get(episode_id)
        if name is None:
            raise FileNotFoundError(f"Episode {episode_id} is gone.")
        try:
            return _OpenFile(self._directory.open(name))
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DamagedEpisodeError("is a link") from error
            if error.errno == errno.EISDIR:
                raise DamagedEpisodeError("is no regular file") from error
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                raise
        # Others in this process need descriptors too: make do with half.
        self._max_open_files = max(1, len(self._files) // 2)
        while len(self._files) > self._max_open_files:
            self._close_oldest()
        return _OpenFile(self._directory.open(name))

    def _close_oldest(self) -> None:
        self._files.pop(next(iter(self._files))).close()

    def _segments(self, file: _OpenFile, episode_id: int, length: int) -> list[_Segment] | None:
        rows = self._rows.get(episode_id)
        if rows is None:
            rows = self._checked_rows(file, length)
            if rows is None:
                return None
            self._rows[episode_id] = rows
        if file.size != rows.size:
            raise DamagedEpisodeError(f"has {file.size} bytes, and had {rows.size} before")
        return rows.segments

    def _checked_rows(self, file: _OpenFile, length: int) -> _Rows | None:
        with io.FileIO(file.descriptor, closefd=False) as raw, as_damage():
            offsets = self._strategy.row_offsets(raw, self._fields, length)
        self._reads_ranges = offsets is not None
        if offsets is None:
            return None
        names = list(self._fields)
        segments = sorted(
            _Segment(offset, self._fields[name].nbytes, names.index(name))
            for name, offset in offsets.items()
            if self._fields[name].nbytes
        )
        if len(self._shared_rows) > 4096:
            self._shared_rows.clear()
        # With a single field, rows lie at the same place in files of any size.
        return self._shared_rows.setdefault((file.size, tuple(segments)), _Rows(file.size, segments))


class _Batch:
    """A batch that is being filled."""

    def __init__(self, reader: WindowReader, fields: Fields, out: Mapping[str, torch.Tensor]) -> None:
        self._reader, self._out = reader, out
        some = next(iter(out.values()))
        self._length = some.shape[1]
        # By field, also those that are not wanted: of these, nothing is read.
        self._views = [bytes_of(out[name]) if name in out else memoryview(b"") for name in fields]
        self._wanted = None if len(out) == len(fields) else {n for n, name in enumerate(fields) if name in out}
        self._row_bytes = sum(fields[name].nbytes for name in out)
        self._waste = memoryview(bytearray(_MAX_GAP))

    def read(self, b: int, episode_id: int, length: int, step: int, num_rows: int) -> None:
        """Fill window b with the rows from `step` on of an episode of `length` rows.

        Raises:
            FileNotFoundError: The episode is gone.
            DamagedEpisodeError: Its file is not what its name promises.
        """
        file = self._reader.file(episode_id, length)
        if file is None:
            episode = self._reader.decoded(episode_id, length)
            for name, tensor in self._out.items():
                tensor[b, :num_rows] = episode[name][step : step + num_rows]
            return
        views, descriptor, row = self._views, file.descriptor, b * self._length
        allowed = int(num_rows * self._row_bytes * _MAX_SHARE_OF_GAPS)
        buffers: list[memoryview] = []
        begin = end = 0
        segments = file.segments
        if self._wanted is not None:
            segments = [segment for segment in segments if segment.field in self._wanted]
        for offset, row_bytes, field in segments:
            first = offset + step * row_bytes
            gap = first - end
            if not buffers:
                begin = first
            elif gap > allowed or gap > _MAX_GAP or len(buffers) > _MAX_BUFFERS:
                if _preadv(descriptor, buffers, begin) != end - begin:
                    _read_exactly(descriptor, buffers, begin, end)
                buffers, begin = [], first
            elif gap:
                allowed -= gap
                buffers.append(self._waste[:gap])
            num_bytes = num_rows * row_bytes
            end = first + num_bytes
            place = row * row_bytes
            buffers.append(views[field][place : place + num_bytes])
        # No buffers: all fields are of shapes with a zero.
        if buffers and _preadv(descriptor, buffers, begin) != end - begin:
            _read_exactly(descriptor, buffers, begin, end)


def load(
    strategy: EpisodeSerializationStrategy, descriptor: int, fields: Fields, length: int
) -> Mapping[str, torch.Tensor]:
    """A whole episode, in the order of the fields, checked against them whatever the format makes of the file.

    Raises:
        DamagedEpisodeError: The file is not what was expected.
    """
    with io.FileIO(descriptor, closefd=False) as file, as_damage():
        episode = strategy.load(file, fields, length)
        if episode.keys() != set(fields):
            raise DamagedEpisodeError(f"holds the fields {sorted(episode)!r:.200}, expected {sorted(fields)!r:.200}")
        for name, tensor_type in fields.items():
            found = episode[name].dtype, tuple(episode[name].shape)
            if found != (tensor_type.dtype, (length, *tensor_type.shape)):
                raise DamagedEpisodeError(f"has `{name}` as {found}, expected {length} rows of {tensor_type}")
        return {name: episode[name] for name in fields}


@contextlib.contextmanager
def as_damage() -> Iterator[None]:
    """What a format of the user's own raises means that the file is damaged, unless the operating system says it."""
    try:
        yield
    except (DamagedEpisodeError, OSError, MemoryError, ImportError, NameError):
        raise  # The last two are faults of the format's code, which no file is to blame for.
    except Exception as error:
        raise DamagedEpisodeError(f"cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _close_all(files: dict[int, _OpenFile]) -> None:
    while files:
        files.popitem()[1].close()


def _read_exactly(descriptor: int, buffers: list[memoryview], begin: int, end: int) -> None:
    """Fill the buffers with the file's bytes from `begin` to `end`, which one call has not done.

    One call brings at most 2 GB; and nothing where the file has been cut short.
    """
    num_read = _preadv(descriptor, buffers, begin)
    while begin + num_read < end:
        begin += num_read
        while num_read >= len(buffers[0]):
            num_read -= len(buffers.pop(0))
        buffers[0] = buffers[0][num_read:]
        num_read = _preadv(descriptor, buffers, begin)
        if num_read == 0:
            raise DamagedEpisodeError("is shorter than its header says")


def _num_bytes(episode: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in episode.values())


def _max_open_files() -> int:
    """A quarter of what the process may have open: the rest is for others."""
    try:
        import resource
    except ImportError:
        return 64
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(8, min(MAX_OPEN_FILES, allowed // 4))
