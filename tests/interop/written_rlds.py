"""RLDS directories for tests, written by hand, damaged ones included. Real ones are in tests/data/interop/rlds."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from buffers.interop.rlds.crc32c import masked_crc32c

#: What every step has.
FLAGS = {"is_first": "bool", "is_last": "bool", "is_terminal": "bool"}
PLAIN = {**FLAGS, "observation": ("float32", 2), "action": "float32", "reward": "float32"}


def varint(value: int) -> bytes:
    found = b""
    value &= 2**64 - 1
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


def field(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: Any, packed: bool = True) -> bytes:
    """A Feature of floats (an array of floats), integers (another array) or bytes (a list)."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, value) for value in values))
    flat = np.asarray(values).reshape(-1)
    if flat.dtype.kind == "f":
        data = flat.astype("<f4")
        each = b"".join(varint(1 << 3 | 5) + value.tobytes() for value in data)
        return field(2, field(1, data.tobytes()) if packed else each)
    numbers = [varint(int(value)) for value in flat]
    return field(3, field(1, b"".join(numbers)) if packed else b"".join(varint(1 << 3) + n for n in numbers))


def example(features: Mapping[str, Any]) -> bytes:
    """An Example; values that are bytes are taken for whole Features."""
    entries = (
        field(1, name.encode()) + field(2, value if isinstance(value, bytes) else feature(value))
        for name, value in features.items()
    )
    return field(1, b"".join(field(1, entry) for entry in entries))


def steps(number: int, length: int) -> dict[str, Any]:
    """The features of an episode of `length` steps with the features `PLAIN`; it is truncated."""
    step = np.arange(length)
    return {
        "steps/observation": np.stack([np.full(length, number), step], 1).astype(np.float32),
        "steps/action": (10 * number + step).astype(np.float32) * (step < length - 1),
        "steps/reward": (number + step / 4).astype(np.float32) * (step < length - 1),
        "steps/is_first": step == 0,
        "steps/is_last": step == length - 1,
        "steps/is_terminal": step < 0,
    }


def described(kind: Any) -> dict[str, Any]:
    """A feature of features.json: the JSON itself, a dict of features, (dtype, *shape), or a dtype."""
    if isinstance(kind, dict):
        is_json = any(isinstance(key, str) and key in ("tensor", "image", "text", "sequence", "raw") for key in kind)
        return kind if is_json else {"featuresDict": {"features": {key: described(kind[key]) for key in kind}}}
    dtype, *shape = kind if isinstance(kind, tuple) else (kind,)
    return {"tensor": {"dtype": dtype, "shape": {"dimensions": [str(size) for size in shape]}, "encoding": "none"}}


def features_json(of_steps: Mapping[str, Any], of_episode: Mapping[str, Any] | None = None) -> dict[str, Any]:
    found = {name: described(kind) for name, kind in (of_episode or {}).items()}
    found["steps"] = {"sequence": {"feature": described(dict(of_steps)), "length": "-1"}}
    return {"featuresDict": {"features": found}}


def tfrecord(records: Iterable[bytes]) -> bytes:
    found = b""
    for record in records:
        length = struct.pack("<Q", len(record))
        found += length + struct.pack("<I", masked_crc32c(length)) + record + struct.pack("<I", masked_crc32c(record))
    return found


def write(
    path: Path,
    examples: Iterable[Mapping[str, Any] | bytes],
    of_steps: Mapping[str, Any] = PLAIN,
    of_episode: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """A directory with one split of one file."""
    path.mkdir(exist_ok=True)
    records = [each if isinstance(each, bytes) else example(each) for each in examples]
    split = {"name": "train", "shardLengths": [str(len(records))]}
    (path / "dataset_info.json").write_text(json.dumps({"name": "made", "splits": [split], **(info or {})}))
    (path / "features.json").write_text(json.dumps(features_json(of_steps, of_episode)))
    (path / "made-train.tfrecord-00000-of-00001").write_bytes(tfrecord(records))
    return path
