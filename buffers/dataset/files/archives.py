"""Formats that are zip archives: compressed `.npz` and `torch.save`'s `.pt`.

Rows cannot be read by ranges here, so a window costs a whole episode unless it is still held. In return `.npz` is
small where data compresses well, and numpy reads it.
"""

from __future__ import annotations

import io
import os
import pickletools
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import final

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
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1  # A flag of a member.
# The start of a .npy file of version 1.0, before two bytes with the size of the header that follows.
_NPY = b"\x93NUMPY\x01\x00"


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
        length = len(next(iter(episode.values())))
        with zipfile.ZipFile(content) as archive:
            # A version of torch that writes something else is found out now, not when rows are wanted.
            for name, member in _find_storages(archive, fields, length).items():
                if zlib.crc32(bytes_of(episode[name])) != archive.getinfo(member).CRC:
                    raise DamagedEpisodeError(f"does not have `{name}` where it belongs")
        file.write(content.getbuffer())

    def load(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, torch.Tensor]:
        """Read an episode, comparing what is announced with what is expected before rows are read."""
        with _opened(file, fields, length) as archive:
            members = _find_storages(archive, fields, length)
            return {name: _read_rows(archive, member, b"", fields[name], length) for name, member in members.items()}

    def load_fields(self, file: io.FileIO) -> Fields:
        """The fields that the file says it holds."""
        with _opened(file) as archive:
            return _read_schema(archive)[1]

    def check(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Compare the archive's table of contents, and the schema, with what is expected."""
        with _opened(file, fields, length) as archive:
            _find_storages(archive, fields, length)


@contextmanager
def _opened(file: io.FileIO, fields: Fields | None = None, length: int = 0) -> Iterator[zipfile.ZipFile]:
    """The archive, which cannot expand far beyond what is expected."""
    size = os.fstat(file.fileno()).st_size
    # Stored rows, or rows that do not compress, and what belongs to them. Without an expectation: what there is.
    allowed = size if fields is None else length * fields.nbytes + _OVERHEAD + _OVERHEAD_PER_FIELD * len(fields)
    if size > allowed + allowed // 100:
        raise DamagedEpisodeError(f"has {size} bytes, {length} rows take at most {allowed}")
    with as_damage(), zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        expanded = sum(member.file_size for member in members)
        if fields is not None and expanded > allowed:
            raise DamagedEpisodeError(f"would expand to {expanded} bytes, {length} rows take at most {allowed}")
        for member in members:
            if member.compress_type not in _COMPRESSIONS or member.flag_bits & _ENCRYPTED:
                raise DamagedEpisodeError(f"has the member {member.filename!r:.60} in another way")
        yield archive


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
        tensor = as_tensor(np.empty((length, *tensor_type.shape), tensor_type.numpy_dtype), tensor_type)
        view = bytes_of(tensor)
        # The end is read too: there the checksum is compared.
        while block := member.read(2**20):
            if len(block) > len(view):
                raise DamagedEpisodeError(f"has more rows in {name!r:.60} than it says")
            view[: len(block)] = block
            view = view[len(block) :]
        if view:
            raise DamagedEpisodeError(f"has fewer rows in {name!r:.60} than it says")
    return tensor


def _check_members(archive: zipfile.ZipFile, fields: Fields, length: int) -> None:
    """Compare the table of contents of an `.npz` with what is expected."""
    names = archive.namelist()
    expected = {_SCHEMA_MEMBER} | {name + ".npy" for name in fields}
    if len(names) != len(expected) or set(names) != expected:
        raise DamagedEpisodeError(f"holds the members {names!r:.200}, expected {sorted(expected)!r:.200}")
    for name, tensor_type in fields.items():
        found = archive.getinfo(name + ".npy").file_size - length * tensor_type.nbytes
        if not 0 < found < _OVERHEAD_PER_FIELD:
            raise DamagedEpisodeError(f"does not have {length} rows in `{name}`")


def _npy_start(tensor_type: TensorType, length: int) -> bytes:
    """The header of a member of an `.npz`, as numpy writes it before padding."""
    descr, shape = np.lib.format.dtype_to_descr(tensor_type.numpy_dtype), (length, *tensor_type.shape)
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()


def _read_schema(archive: zipfile.ZipFile) -> tuple[str, Fields]:
    """The folder of a `.pt`, and the fields in its schema: the second text of its pickle, which is not run."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise DamagedEpisodeError("is not an archive of torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist():
        order = _small_member(archive, f"{folder}byteorder")
        if order != sys.byteorder.encode():
            raise DamagedEpisodeError(f"has numbers of byte order {order!r:.20}")
    opcodes = pickletools.genops(_small_member(archive, pickles[0]))
    texts = list(islice((str(argument) for opcode, argument, _ in opcodes if "UNICODE" in opcode.name), 2))
    if texts[:1] != [SCHEMA_KEY]:
        raise DamagedEpisodeError("is not what torch.save writes for an episode")
    return folder, parse_schema(texts[1])[0]


def _find_storages(archive: zipfile.ZipFile, fields: Fields, length: int) -> dict[str, str]:
    """The member of a `.pt` with the rows of each field: torch counts them, in the order in which they were saved."""
    folder, found = _read_schema(archive)
    check_fields(found, fields)
    members = {name: f"{folder}data/{number}" for number, name in enumerate(found)}
    if sum(name.startswith(f"{folder}data/") for name in archive.namelist()) != len(members):
        raise DamagedEpisodeError("holds other tensors than its schema says")
    for name, member in members.items():
        if archive.getinfo(member).file_size != length * fields[name].nbytes:
            raise DamagedEpisodeError(f"does not have {length} rows in `{name}`")
    return members
