"""Files of arrays as nobody writes them: headers that lie, members that are not what they say."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def npy(values: Any, **header: Any) -> bytes:
    """The bytes of an .npy file, with another `shape`, `descr` or `fortran_order` in its header if given."""
    array = np.asarray(values)
    found = np.lib.format.header_data_from_array_1_0(array) | header
    text = "{" + "".join(f"{name!r}: {value!r}, " for name, value in found.items()) + "}"
    text = text.ljust(118 if len(text) < 118 else len(text) + 8) + "\n"
    order = "F" if found["fortran_order"] else "C"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin-1") + array.tobytes(order)


def npz(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive of members that are given as bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def pickled_objects() -> bytes:
    """An .npy file of objects, as numpy pickles them."""
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}, None], object), allow_pickle=True)
    return stream.getvalue()


def with_central_sizes(
    path: Path, name: str, *, file_size: int | None = None, compress_size: int | None = None
) -> None:
    """Change the sizes that the table of contents states for a member."""
    content = bytearray(path.read_bytes())
    position = content.index(b"PK\x01\x02")
    while content[position : position + 4] == b"PK\x01\x02":
        num_name, num_extra, num_comment = struct.unpack_from("<HHH", content, position + 28)
        if content[position + 46 : position + 46 + num_name] == name.encode():
            if compress_size is not None:
                struct.pack_into("<I", content, position + 20, compress_size)
            if file_size is not None:
                struct.pack_into("<I", content, position + 24, file_size)
        position += 46 + num_name + num_extra + num_comment
    path.write_bytes(bytes(content))
