"""Formats that are zip archives: compressed `.npz` and `torch.save`'s `.pt`.

Rows cannot be read by ranges here, so a window costs a whole episode unless it is still held. In return `.npz` is
small where data compresses well, and numpy reads it.
"""

from __future__ import annotations

import errno
import io
import math
import os
import pickletools
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset.files.serialization import (
    SCHEMA_KEY,
    DamagedEpisodeError,
    EpisodeSerializationStrategy,
    as_damage,
    bytes_of,
    check_fields,
    parse_schema,
    schema_text,
)
from buffers.fields import Fields, TensorType, as_tensor

__all__ = ["NumpyCompressedSerialization", "TorchSerialization"]

# What an archive may hold beyond its rows: headers, names, the schema.
_OVERHEAD = 2**16
_OVERHEAD_PER_FIELD = 2**13
_SCHEMA_MEMBER = SCHEMA_KEY + ".json"
_MAX_SMALL_MEMBER = 2**24
_NO_DATE = (1980, 1, 1, 0, 0, 0)
_ENCRYPTED = 1  # A flag of a member.
# The start of a .npy file of version 1.0, before two bytes with the size of the header that follows.
_NPY = b"\x93NUMPY\x01\x00"
_STORAGES = {
    **{torch.uint8: "Byte", torch.int8: "Char", torch.int16: "Short", torch.int32: "Int", torch.int64: "Long"},
    **{torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float32: "Float", torch.float64: "Double"},
    **{torch.complex64: "ComplexFloat", torch.complex128: "ComplexDouble", torch.bool: "Bool"},
}


@final
class NumpyCompressedSerialization(EpisodeSerializationStrategy):
    """`.npz`, compressed: one member a field, `numpy.load` reads it. bfloat16 is there as two opaque bytes ("V2")."""

    suffix = ".npz"

    def save(self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter) -> None:
        """Write an episode, compressed."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo(_SCHEMA_MEMBER, _NO_DATE), schema_text(fields))
            for name, tensor in episode.items():
                if "\0" in name:
                    raise ValueError(f"Field {name!r} has a NUL in its name, which a zip archive cannot hold.")
                member = zipfile.ZipInfo(name + ".npy", _NO_DATE)
                member.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(member, "w", force_zip64=True) as target:
                    np.lib.format.write_array(target, as_array(name, tensor), version=(1, 0), allow_pickle=False)

    def load(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, torch.Tensor]:
        """Read an episode, comparing what is announced with what is expected before anything is expanded."""
        with _opened(file, fields, length) as archive:
            _check_members(archive, fields, length)
            return {
                name: _read_rows(archive, name + ".npy", _npy_start(kind, length), kind, length)
                for name, kind in fields.items()
            }

    def load_fields(self, file: io.FileIO) -> Fields:
        """The fields that the archive says it holds."""
        with _opened(file) as archive:
            return parse_schema(_small_member(archive, _SCHEMA_MEMBER))[0]

    def check(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Compare the archive's table of contents with what is expected."""
        with _opened(file, fields, length) as archive:
            _check_members(archive, fields, length)


@final
class TorchSerialization(EpisodeSerializationStrategy):
    """`.pt`, a dict of tensors by `torch.save`. It is read without torch: its pickle is not run."""

    suffix = ".pt"

    def save(self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter) -> None:
        """Write an episode."""
        # Not straight into the file: torch hides the error of a full disk behind one of its own.
        content = io.BytesIO()
        torch.save({SCHEMA_KEY: schema_text(fields), "episode": dict(episode)}, content)
        with zipfile.ZipFile(content) as archive:
            # A version of torch that writes something else is found out now, not when rows are wanted.
            _find_storages(archive, fields, len(next(iter(episode.values()))))
        file.write(content.getbuffer())

    def load(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, torch.Tensor]:
        """Read an episode, comparing what the pickle describes with what is expected before rows are read."""
        with _opened(file, fields, length) as archive:
            members = _find_storages(archive, fields, length)
            return {name: _read_rows(archive, members[name], b"", kind, length) for name, kind in fields.items()}

    def load_fields(self, file: io.FileIO) -> Fields:
        """The fields that the file says it holds."""
        with _opened(file) as archive:
            words = _read_words(archive)[1]
            return parse_schema(words[words.index(SCHEMA_KEY) + 1])[0]

    def check(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Compare the archive's table of contents, and what the pickle describes, with what is expected."""
        with _opened(file, fields, length) as archive:
            _find_storages(archive, fields, length)


@contextmanager
def _opened(file: io.FileIO, fields: Fields | None = None, length: int = 0) -> Iterator[zipfile.ZipFile]:
    """The archive, of which it is known that it cannot expand far beyond what is expected."""
    size = os.fstat(file.fileno()).st_size
    # Stored rows, or rows that do not compress, and what belongs to them. Without an expectation: what there is.
    allowed = size if fields is None else length * fields.nbytes + _OVERHEAD + _OVERHEAD_PER_FIELD * len(fields)
    if size > allowed + allowed // 100:
        raise DamagedEpisodeError(f"has {size} bytes, {length} rows take at most {allowed}")
    try:
        with as_damage(NotImplementedError), zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            expanded = sum(member.file_size for member in members)
            if fields is not None and expanded > allowed:
                raise DamagedEpisodeError(f"would expand to {expanded} bytes, {length} rows take at most {allowed}")
            if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
                raise DamagedEpisodeError("is compressed in another way")
            if any(member.flag_bits & _ENCRYPTED for member in members):
                raise DamagedEpisodeError("is encrypted")
            yield archive
    except OSError as error:
        # An offset before the beginning of the file is the file's fault; other errors of the system are not.
        if error.errno != errno.EINVAL:
            raise
        raise DamagedEpisodeError("has an offset before its beginning") from error


def _small_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member whose size nothing else tells, so that at most 16 MB of it are read."""
    with archive.open(name) as member:
        content = member.read(_MAX_SMALL_MEMBER)
    if len(content) == _MAX_SMALL_MEMBER:
        raise DamagedEpisodeError(f"has a member {name!r:.60} of more than {_MAX_SMALL_MEMBER} bytes")
    return content


def _read_rows(archive: zipfile.ZipFile, name: str, start: bytes, tensor_type: TensorType, length: int) -> torch.Tensor:
    """The rows in a member, behind a header that begins with `start` and ends with a line break."""
    with archive.open(name) as member:
        if start:
            found = member.read(len(_NPY) + 2)
            found += member.read(int.from_bytes(found[-2:], "little"))
            if not found.startswith(_NPY) or found[len(_NPY) + 2 :].rstrip() != start:
                raise DamagedEpisodeError(f"has in {name!r:.60} the header {found!r:.200}, expected {start!r:.200}")
        array = np.empty((length, *tensor_type.shape), tensor_type.numpy_dtype)
        tensor = as_tensor(array, tensor_type)
        view, num_read = bytes_of(tensor), 0
        # The end is read too: there the checksum is compared.
        while block := member.read(2**20):
            if num_read + len(block) > len(view):
                raise DamagedEpisodeError(f"has more rows in {name!r:.60} than it says")
            view[num_read : num_read + len(block)] = block
            num_read += len(block)
        if num_read < len(view):
            raise DamagedEpisodeError(f"has fewer rows in {name!r:.60} than it says")
    return tensor


# .npz


def _check_members(archive: zipfile.ZipFile, fields: Fields, length: int) -> None:
    names = archive.namelist()
    expected = {_SCHEMA_MEMBER} | {name + ".npy" for name in fields}
    if len(names) != len(expected) or set(names) != expected:
        raise DamagedEpisodeError(f"holds the members {names!r:.200}, expected {sorted(expected)!r:.200}")
    for name, tensor_type in fields.items():
        found = archive.getinfo(name + ".npy").file_size - length * tensor_type.nbytes
        if not 0 < found < _OVERHEAD_PER_FIELD:
            raise DamagedEpisodeError(f"does not have {length} rows in `{name}`")


def _npy_start(tensor_type: TensorType, length: int) -> bytes:
    """The header of a member, as numpy writes it before padding."""
    descr, shape = np.lib.format.dtype_to_descr(tensor_type.numpy_dtype), (length, *tensor_type.shape)
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()


# .pt


def _read_words(archive: zipfile.ZipFile) -> tuple[str, list[Any]]:
    """The folder of the archive, and the names, texts and numbers in its pickle, which is not run."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise DamagedEpisodeError("is not an archive of torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist():
        order = _small_member(archive, f"{folder}byteorder")
        if order != sys.byteorder.encode():
            raise DamagedEpisodeError(f"has numbers of byte order {order!r:.20}")
    words: list[Any] = []
    memo: dict[Any, list[Any]] = {}
    for opcode, argument, _ in pickletools.genops(_small_member(archive, pickles[0])):
        if "PUT" in opcode.name:
            memo[argument] = words[-1:]
        elif "GET" in opcode.name:
            words += memo.get(argument, ["nothing"])
        elif argument is not None and opcode.name != "PROTO":
            words.append(argument)
    return folder, words


def _find_storages(archive: zipfile.ZipFile, fields: Fields, length: int) -> dict[str, str]:
    """The member with the rows of each field, if the pickle is word by word what `save` writes."""
    folder, words = _read_words(archive)
    if words[:1] != [SCHEMA_KEY] or words[2:3] != ["episode"]:
        raise DamagedEpisodeError("is not what torch.save writes for an episode")
    found = parse_schema(words[1])[0]
    check_fields(found, fields)
    members, position = {}, 3
    for name, tensor_type in found.items():
        expected = _words_of(name, tensor_type, length)
        described = words[position : position + len(expected)]
        position += len(expected)
        is_right = (wanted is None or wanted == word for wanted, word in zip(expected, described, strict=False))
        if len(described) < len(expected) or not all(is_right):
            raise DamagedEpisodeError(f"has `{name}` as {described!r:.300}, expected {expected!r:.300}")
        members[name] = f"{folder}data/{described[4]}"
        if archive.getinfo(members[name]).file_size != length * tensor_type.nbytes:
            raise DamagedEpisodeError(f"does not have {length} rows in `{name}`")
    if position < len(words):
        raise DamagedEpisodeError("holds more than its schema says")
    return members


def _words_of(name: str, tensor_type: TensorType, length: int) -> list[Any]:
    """The words of a pickled tensor that owns its storage and has its rows one behind the other; None for any word."""
    shape, dtype = (length, *tensor_type.shape), tensor_type.dtype
    size, more = math.prod(shape), []
    function, storage = "_rebuild_tensor_v2", f"torch {_STORAGES.get(dtype)}Storage"
    if dtype not in _STORAGES:
        function, storage, size = "_rebuild_tensor_v3", "torch.storage UntypedStorage", size * dtype.itemsize
        more = [str(dtype).replace(".", " ")]
    stride = [math.prod(shape[i:]) if size else None for i in range(1, len(shape) + 1)]
    start = [name, f"torch._utils {function}", "storage", storage, None, "cpu", size, 0]
    return [*start, *shape, *stride, "collections OrderedDict", *more]
