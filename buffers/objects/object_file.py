"""ObjectFiles: objects as files that are read by ranges, many at once, with a cache before the store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from buffers.disk import DamagedEpisodeError
from buffers.disk.reading import RangeFile
from buffers.objects.cache import CacheEntry, ObjectCache
from buffers.objects.ranges import BLOCK, copy_overlap, merged
from buffers.objects.store import ObjectInfo, ObjectStore

__all__ = ["ObjectFile", "ObjectFiles", "Part"]


class Part(NamedTuple):
    """Bytes of an object that are to be read, from an offset on, as many as there is memory."""

    file: ObjectFile
    offset: int
    memory: memoryview


class ObjectFile(RangeFile):
    """An object of which size and version are known."""

    def __init__(self, files: ObjectFiles, name: str, info: ObjectInfo, entry: CacheEntry | None) -> None:
        super().__init__()
        self._files, self.object_name, self.size, self.entry = files, name, info.size, entry
        # Its beginning, as far as it has been read before it was asked for.
        self.head: bytes | bytearray = b""
        # What was wrong with it then: asking for each file again, one after the other, would take long.
        self.error: FileNotFoundError | DamagedEpisodeError | None = None

    def read_at(self, num_bytes: int, offset: int) -> bytes:
        """As `RangeFile.read_at`."""
        end = min(offset + num_bytes, self.size)
        if offset >= end:
            return b""
        if end > len(self.head):
            if self.error is not None:
                raise self.error
            memory = bytearray(end - offset)
            failed = self._files.fill([Part(self, offset, memoryview(memory))])
            if failed:
                raise failed[self]
            return bytes(memory)
        return bytes(self.head[offset:end])

    def whole(self) -> memoryview:
        """As `RangeFile.whole`."""
        if len(self.head) < self.size:
            self.head = self.read_at(self.size, 0)
        return memoryview(self.head)


class ObjectFiles:
    """Reads parts of objects.

    Args:
        store: Where they are.
        cache: Keeps blocks of them; None for no cache.
    """

    def __init__(self, store: ObjectStore, cache: ObjectCache | None) -> None:
        self.store, self._cache = store, cache

    def file(self, name: str, info: ObjectInfo) -> ObjectFile:
        """An object as a file. Nothing is read, nor whether it is there."""
        entry = None if self._cache is None else self._cache.entry(self.store.identity, name, *info)
        return ObjectFile(self, name, info, entry)

    def whole_file(self, name: str) -> ObjectFile:
        """A small object that may be replaced by others of its name, read now; FileNotFoundError if there is none."""
        data = self.store.read(name)
        file = ObjectFile(self, name, ObjectInfo(len(data), 0), None)
        file.head = data
        return file

    def fill(self, parts: Sequence[Part]) -> dict[ObjectFile, FileNotFoundError | DamagedEpisodeError]:
        """Read parts into their memory, from the cache or by as few requests as make sense, several at a time.

        Returns:
            The files that are gone, or are shorter than expected, whose parts are not all there.

        Raises:
            ObjectStoreError: The store does not do it.
        """
        failed: dict[ObjectFile, FileNotFoundError | DamagedEpisodeError] = {}
        missing: dict[ObjectFile, list[Part]] = {}
        for part in parts:
            file, offset, memory = part
            end = offset + len(memory)
            if not memory:
                continue  # Rows may have no bytes.
            if end > file.size:
                failed[file] = DamagedEpisodeError("is shorter than its header says")
                continue
            ranges = [(offset, end)] if file.entry is None else file.entry.read(offset, memory)
            for start, stop in ranges:
                missing.setdefault(file, []).append(Part(file, start, memory[start - offset : stop - offset]))
        asked = [(file, *span) for file, own in missing.items() for span in _requests(file, own)]
        requests = [(file.object_name, start, end, file.size) for file, start, end in asked]
        for at, answer in self.store.read_ranges(requests):
            file, start, _ = asked[at]
            if not isinstance(answer, bytes):
                failed[file] = answer
                continue
            for part in missing[file]:
                copy_overlap(start, answer, part.offset, part.memory)
            if file.entry is not None:
                file.entry.put(start, answer)
        return failed

    def read_heads(self, files: Sequence[tuple[ObjectFile, int]]) -> None:
        """Read the first bytes of files, as many as are asked for, all at once; `read_at` returns them then.

        What is wrong with a file comes when it is read.
        """
        heads = [(file, bytearray(min(num, file.size))) for file, num in files]
        failed = self.fill([Part(file, 0, memoryview(head)) for file, head in heads])
        for file, head in heads:
            file.error = failed.get(file)
            if file.error is None:
                file.head = head


def _requests(file: ObjectFile, parts: Sequence[Part]) -> list[tuple[int, int]]:
    ranges = [(part.offset, part.offset + len(part.memory)) for part in parts]
    method = partial(merged, block=1 if file.entry is None else BLOCK)
    return list(method(ranges, file.size))
