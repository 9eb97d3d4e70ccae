"""The index object: what is under a URL, so that nobody has to list it. `upload` writes it, last.

It is one line, "buffers-index 1 0123abcd 345": the version, the CRC-32 of all that follows, the bytes of the header.
Then come the header in JSON, int64 (n, 3) little endian with size, stamp and mark of each object, and their names,
joined by newlines.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from buffers.disk import DamagedEpisodeError, as_damage, parse_json

__all__ = ["INDEX", "Index"]

INDEX = "index.buffers"
_VERSION = 1
_FIRST_LINE = re.compile(rb"buffers-index ([0-9]{1,9}) ([0-9a-f]{8}) ([0-9]{1,12})\n")


class Index(NamedTuple):
    """What is under a URL.

    Attributes:
        said: Of all of it: what kind it is, and what that kind needs.
        names: Of the objects, relative to the URL.
        table: int64 (n, 3): the size of each, its stamp (see `ObjectInfo`; 0 if not known), its mark (see `mark_of`).
    """

    said: dict[str, Any]
    names: list[str]
    table: npt.NDArray[np.int64]

    def encode(self) -> bytes:
        """As the object."""
        header = json.dumps(self.said, separators=(",", ":")).encode()
        body = b"".join((header, self.table.astype("<i8").tobytes(), "\n".join(self.names).encode()))
        return b"buffers-index %d %08x %d\n" % (_VERSION, zlib.crc32(body), len(header)) + body

    @classmethod
    def decode(cls, data: bytes) -> Index:
        """The inverse of `encode`.

        Raises:
            DamagedEpisodeError: It is not what was written.
            ValueError: It is of another version.
        """
        match = _FIRST_LINE.match(data)
        if match is None:
            raise DamagedEpisodeError("is no index of this library")
        if int(match[1]) != _VERSION:
            raise ValueError(f"is an index of version {int(match[1])}; this library knows {_VERSION}")
        body = memoryview(data)[match.end() :]
        if zlib.crc32(body) != int(match[2], 16):
            raise DamagedEpisodeError("is not the index that was written")
        with as_damage():
            said, rest = parse_json(bytes(body[: int(match[3])])), body[int(match[3]) :]
            num = said["num_objects"]
            table = np.frombuffer(rest[: 24 * num], "<i8").reshape(num, 3).astype(np.int64)
            names = bytes(rest[24 * num :]).decode().split("\n") if num else []
            if len(names) != num or len(set(names)) != num:
                raise DamagedEpisodeError(f"names {len(names)} objects, and says {num}")
        return cls(said, names, table)


def mark_of(size: int, head: bytes, tail: bytes) -> int:
    """What tells a file from others of its name: its size, beginning and end, where a checksum of its rows is."""
    return zlib.crc32(tail, zlib.crc32(head, size & 0xFFFFFFFF))
