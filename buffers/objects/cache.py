"""ObjectCache: blocks of objects in a local directory, which several processes may use at a time.

    <key>       one file an object, sparse. The key stands for the URL, and the version of the object by its ETag
        table   a CRC-32 of each block, 4 bytes little endian; 0: the block is not there
        blocks  from the next multiple of 4096 bytes on, each where it is in the object

A block is written before its CRC. Whatever a kill or a loss of power leaves, a block that does not fit its CRC is not
there. Files leave whole, the one whose last use is longest ago first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
import weakref
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from buffers.disk import NO_SURPRISES, Descriptor, fill_from
from buffers.objects.ranges import BLOCK
from buffers.utils import integer

__all__ = ["CacheEntry", "DEFAULT_CACHE_BYTES", "ObjectCache"]

DEFAULT_CACHE_BYTES = 10 * 2**30
_PAGE = 4096
_KEY_BYTES = 20
# A file is marked as used at most once in so many seconds.
_GRAIN = 10.0


class ObjectCache:
    """A directory with blocks of objects, bounded in bytes.

    Args:
        directory: Made if necessary; by default `buffers/objects` in the user's folder of caches.
        num_bytes: The most that its files shall take on the disk. Each process may write 1/16 more before it looks.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, num_bytes: int) -> None:
        self.directory = os.path.abspath(_default_directory() if directory is None else os.fspath(directory))
        self.num_bytes = integer("cache_bytes", num_bytes, 1)
        # Written since the last look at what all of it takes; the first block leads to one.
        self._written = self.num_bytes
        self._entries: weakref.WeakSet[CacheEntry] = weakref.WeakSet()
        self._has_failed = False
        with self.failures():
            os.makedirs(self.directory, mode=0o700, exist_ok=True)

    def entry(self, store: str, name: str, size: int, stamp: int) -> CacheEntry:
        """What is kept of an object, or will be."""
        identity = f"{store}\0{name}\0{size}\0{stamp}".encode()
        entry = CacheEntry(self, hashlib.blake2b(identity, digest_size=_KEY_BYTES).hexdigest(), size)
        self._entries.add(entry)
        return entry

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Warn, once, of a directory that cannot be used: all is read from the store, then."""
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                warnings.warn(
                    f"The cache in {self.directory} cannot be used ({error.strerror or error}): objects are read from "
                    "the store each time. Make room or permission, choose another `cache_directory`, or pass "
                    "cache_bytes=0.",
                    stacklevel=8,
                )

    def count(self, num_bytes: int) -> None:
        """Take note of bytes that were written, and see now and then that the bound is kept."""
        self._written += num_bytes
        if self._written > self.num_bytes // 16:
            self._written = 0
            with self.failures():
                self.sweep()

    def sweep(self) -> None:
        """Remove the files used longest ago, until the others take at most `num_bytes`."""
        found = []
        with os.scandir(self.directory) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # Another process sweeps, too.
                    if _is_key(file.name):
                        status = file.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, file.name, 512 * status.st_blocks))
        total = sum(num_bytes for *_, num_bytes in found)
        for _, name, num_bytes in sorted(found):
            if total <= self.num_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.directory, name))
            total -= num_bytes
        # A file that is open takes its room until it is closed.
        for entry in list(self._entries):
            entry.drop_if_removed()


class CacheEntry:
    """The blocks of one object that are there. Threads must take turns."""

    def __init__(self, cache: ObjectCache, key: str, size: int) -> None:
        self._cache, self._path, self._size = cache, os.path.join(cache.directory, key), size
        self._num_blocks = -(-size // BLOCK)
        self._start = -(-4 * self._num_blocks // _PAGE) * _PAGE
        self._seed = zlib.crc32(key.encode())
        self._file: Descriptor | None = None
        self._used = -_GRAIN
        # Which blocks this process has written, or compared with their CRC.
        self._is_there = np.zeros(self._num_blocks, np.bool_)

    def read(self, offset: int, memory: memoryview) -> list[tuple[int, int]]:
        """Fill memory with bytes of the object, from an offset on, as far as they are there.

        Returns:
            Ranges (start, end) of the object that are missing, ascending.
        """
        end = offset + len(memory)
        first, last = offset // BLOCK, -(-end // BLOCK)
        missing: list[tuple[int, int]] = []
        try:
            file = self._opened(create=False).number
            self._check(file, first, last)
            at = offset
            for run, run_end in _runs(self._is_there[first:last], first):
                start, stop = max(run * BLOCK, offset), min(run_end * BLOCK, end)
                if fill_from(file, memory[start - offset : stop - offset], self._start + start):
                    missing += [(at, start)] if at < start else []
                    at = stop
        except OSError:
            return [(offset, end)]
        return missing + ([(at, end)] if at < end else [])

    def put(self, start: int, data: bytes) -> None:
        """Keep whole blocks of the object, from a block's start on."""
        with self._cache.failures():
            self._put(self._opened(create=True).number, start, data)

    def drop_if_removed(self) -> None:
        """Close the file if another process, or a sweep, has removed it."""
        if self._file is not None and os.fstat(self._file.number).st_nlink == 0:
            self._file = None
            self._is_there[:] = False

    def _put(self, file: int, start: int, data: bytes) -> None:
        first, memory = start // BLOCK, memoryview(data)
        blocks = [memory[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
        crcs = [self._crc(first + n, block) for n, block in enumerate(blocks)]
        # Data first. A table that the disk has before the data is found out by its CRCs.
        _pwrite(file, memory, self._start + start)
        _pwrite(file, memoryview(np.array(crcs, "<u4").tobytes()), 4 * first)
        self._is_there[first : first + len(blocks)] = True
        self._cache.count(len(data))

    def _crc(self, number: int, block: bytes | memoryview) -> int:
        # A block that lies where another one belongs does not fit, either. 0 is for one that is not there.
        return zlib.crc32(block, self._seed ^ number) or 1

    def _check(self, file: int, first: int, last: int) -> None:
        """Compare the blocks in [first, last) that are new to this process with their CRCs."""
        if self._is_there[first:last].all():
            return
        is_new = ~self._is_there[first:last]
        table = np.zeros(last - first, "<u4")
        fill_from(file, table.view(np.uint8).data, 4 * first)
        for number in (np.flatnonzero(is_new & (table != 0)) + first).tolist():
            start = number * BLOCK
            block = os.pread(file, min(BLOCK, self._size - start), self._start + start)
            self._is_there[number] = self._crc(number, block) == table[number - first]

    def _opened(self, create: bool) -> Descriptor:
        """The file, which is marked as used; FileNotFoundError without `create` if there is none."""
        now = time.monotonic()
        if create or now > self._used + _GRAIN:
            # The bytes of a file that was removed are still right, but take room that is not counted.
            self.drop_if_removed()
        if self._file is None:
            flags = os.O_RDWR | NO_SURPRISES | (os.O_CREAT if create else 0)
            self._file = Descriptor(os.open(self._path, flags, 0o600))
            self._used = -_GRAIN
        if now > self._used + _GRAIN:
            os.utime(self._file.number)
            self._used = now
        return self._file


def _runs(is_there: npt.NDArray[np.bool_], first: int) -> list[list[int]]:
    """The runs [start, end) of blocks that are there, of those from `first` on."""
    if is_there.all():
        return [[first, first + len(is_there)]]
    edges = np.flatnonzero(np.diff(is_there, prepend=False, append=False)) + first
    return edges.reshape(-1, 2).tolist()


def _default_directory() -> str:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(folder, "buffers", "objects")


def _is_key(name: str) -> bool:
    return len(name) == 2 * _KEY_BYTES and set(name) <= set("0123456789abcdef")


def _pwrite(file: int, memory: memoryview, offset: int) -> None:
    while memory:
        num = os.pwrite(file, memory, offset)
        memory, offset = memory[num:], offset + num
