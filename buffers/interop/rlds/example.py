"""tf.train.Example messages, by the documented wire format of protocol buffers.

    Example   features = 1: Features
    Features  feature = 1: map from a name (key = 1) to a Feature (value = 2)
    Feature   one of bytes_list = 1, float_list = 2, int64_list = 3
    ...List   value = 1, repeated; floats and integers are packed, or stand one by one

What is not asked for is not decoded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["Feature", "parse_example"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
_LISTS = {1: "bytes", 2: "floats", 3: "integers"}

_Payload = int | memoryview


class Feature:
    """The values of one feature, in the form that the message has.

    Attributes:
        kind: "bytes", "floats" or "integers"; "nothing" for an empty feature, which stands for no values of any kind.
    """

    def __init__(self, message: memoryview) -> None:
        self.kind, self._content = "nothing", memoryview(b"")
        for number, content in _fields(message):
            self.kind, self._content = _LISTS.get(number, "nothing"), _as_bytes(content)

    def strings(self) -> list[memoryview]:
        """The values of a list of bytes."""
        self._check("bytes")
        return [_as_bytes(value) for number, value in _fields(self._content) if number == 1]

    def floats(self) -> np.ndarray:
        """The values of a list of floats, float32."""
        self._check("floats")
        parts = [_as_bytes(value) for number, value in _fields(self._content) if number == 1]
        if any(len(part) % 4 for part in parts):
            raise ValueError("a list of floats ends within one")
        return np.frombuffer(b"".join(parts) if len(parts) != 1 else parts[0], "<f4")

    def integers(self) -> np.ndarray:
        """The values of a list of integers, int64."""
        self._check("integers")
        parts = [
            np.array([value], np.uint64).view(np.int64) if isinstance(value, int) else _packed_integers(value)
            for number, value in _fields(self._content)
            if number == 1
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts]) if len(parts) != 1 else parts[0]

    def _check(self, kind: str) -> None:
        if self.kind not in (kind, "nothing"):
            raise ValueError(f"a list of {self.kind} where features.json has {kind}")


def parse_example(message: bytes) -> dict[str, Feature]:
    """The features of a message by name. ValueError if it is no message."""
    found = {}
    for number, features in _fields(memoryview(message)):
        if number == 1:
            for entry_number, entry in _fields(_as_bytes(features)):
                if entry_number == 1:
                    parts = dict(_fields(_as_bytes(entry)))
                    name = bytes(_as_bytes(parts.get(1, memoryview(b""))))
                    found[name.decode()] = Feature(_as_bytes(parts.get(2, memoryview(b""))))
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, _Payload]]:
    """(number, value) of each field: an integer, or bytes, also those of numbers of fixed size."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of the unknown wire type {kind}")
        if length > len(message) - at:
            raise ValueError("a field is longer than its message")
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for number, byte in enumerate(message[at : at + _LONGEST_VARINT]):
        value |= (byte & 127) << 7 * number
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at + number + 1
    raise ValueError("a number does not end")


def _packed_integers(content: memoryview) -> np.ndarray:
    data = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(data < 128)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        raise ValueError("a list of integers ends within one")
    starts = np.concatenate([[0], ends + 1])[:-1]
    lengths = ends - starts + 1
    if len(ends) and lengths.max() > _LONGEST_VARINT:
        raise ValueError("a number does not end")
    values = np.zeros(len(ends), np.uint64)
    for number in range(int(lengths.max(initial=0))):
        has = lengths > number
        values[has] |= (data[starts[has] + number] & 127).astype(np.uint64) << np.uint64(7 * number)
    return values.view(np.int64)


def _as_bytes(value: _Payload) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value
