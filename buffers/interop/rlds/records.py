"""Records of the two kinds of files that tensorflow-datasets writes by itself, one at a time, from any number on."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

from buffers.interop.base import library
from buffers.interop.rlds.crc32c import masked_crc32c

__all__ = ["LEAST_BYTES", "RECORDS"]

_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")


def _tfrecords(path: str, first: int) -> Iterator[bytes]:
    """Of a TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    with open(path, "rb") as file:
        size, number = os.fstat(file.fileno()).st_size, 0
        while file.tell() < size:
            header = file.read(_LENGTH.size)
            if len(header) < _LENGTH.size:
                raise ValueError(f"ends within the header of record {number}")
            length, checksum = _LENGTH.unpack(header)
            if masked_crc32c(header[:8]) != checksum:
                raise ValueError(f"has no length of record {number} where it belongs")
            if length + _CHECKSUM.size > size - file.tell():
                raise ValueError(f"ends within record {number}")
            if number < first:
                file.seek(length + _CHECKSUM.size, os.SEEK_CUR)
            else:
                record = file.read(length)
                if masked_crc32c(record) != _CHECKSUM.unpack(file.read(_CHECKSUM.size))[0]:
                    raise ValueError(f"has a record {number} that does not match its checksum")
                yield record
            number += 1


def _array_records(path: str, first: int) -> Iterator[bytes]:
    """Of an ArrayRecord file. The library checks what it reads."""
    module = library("array_record.python.array_record_module", "rlds")
    # Without readahead: one record, which is an episode, is in memory at a time.
    reader = module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
    try:
        for number in range(first, reader.num_records()):
            yield reader.read([number])[0]
        if not reader.ok():
            reader.read([0])  # It raises what is wrong.
    finally:
        if reader.is_open():
            reader.close()


#: `format -> function(path, first record)`. ValueError or RuntimeError if a file is damaged.
RECORDS: dict[str, Callable[[str, int], Iterator[bytes]]] = {"tfrecord": _tfrecords, "array_record": _array_records}
#: The least that a record takes.
LEAST_BYTES = {"tfrecord": _LENGTH.size + _CHECKSUM.size, "array_record": 1}
