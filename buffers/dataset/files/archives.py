"""Formats that are zip archives: compressed `.npz`, and the `.pt` of `torch.save`.

Ranges of rows cannot be read from them, so a window costs a whole episode unless the episode is cached. In return,
`.npz` is small where data compresses well, and numpy and torch read the files.
"""

from __future__ import annotations

import io
import pickletools
import sys
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any, final

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.files.serialization import (
    SCHEMA_KEY,
    EpisodeSerializationStrategy,
    bytes_of,
    check_fields,
    parse_schema,
    read_rows,
    schema_text,
)
from buffers.disk import DamagedEpisodeError, as_damage, size_of
from buffers.fields import Fields, TensorType

__all__ = ["NumpyCompressedSerialization", "TorchSerialization"]

# What an archive may hold besides its rows: headers, names, the schema.
_OVERHEAD = 2**16
_OVERHEAD_PER_FIELD = 2**13
_SCHEMA_MEMBER = SCHEMA_KEY + ".json"
_MAX_SMALL_MEMBER = 2**24
_NO_DATE = (1980, 1, 1, 0, 0, 0)
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1  # A flag of a member.
# The start of a .npy file of version 1.0. Two bytes with the size of the header follow it.
_NPY = b"\x93NUMPY\x01\x00"


class _ArchiveSerialization(EpisodeSerializationStrategy):
    """A zip archive with one member for the rows of each field."""

    keeps_info = True

    def save(self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter) -> None:
        """Write an episode."""
        self.save_with_info(episode, fields, file, {})

    @abstractmethod
    def _read_schema(self, archive: zipfile.ZipFile) -> tuple[Fields, dict[str, Any]]:
        """The fields that the archive says it holds, and its whole schema."""

    @abstractmethod
    def _find_members(self, archive: zipfile.ZipFile, fields: Fields, length: int) -> dict[str, str]:
        """`field -> member`, after comparing the table of contents with what is expected."""

    def _check_header(self, member: IO[bytes], tensor_type: TensorType, length: int) -> None:
        """Read what precedes the rows in a member."""

    def load(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, torch.Tensor]:
        episode = {}
        with _open_archive(file, fields, length) as archive:
            for name, member_name in self._find_members(archive, fields, length).items():
                with archive.open(member_name) as member:
                    self._check_header(member, fields[name], length)
                    episode[name] = read_rows(member, fields[name], length)
                    # zipfile compares the checksum at the end.
                    if member.read(1):
                        raise DamagedEpisodeError(f"has more rows in `{name}` than it says")
        return episode

    def load_fields(self, file: io.FileIO) -> Fields:
        with _open_archive(file) as archive:
            return self._read_schema(archive)[0]

    def load_info(self, file: io.FileIO) -> EpisodeInfo:
        with _open_archive(file) as archive:
            return self._read_schema(archive)[1]["info"]

    def verify(self, file: io.FileIO, fields: Fields, length: int) -> None:
        self.load(file, fields, length)
        self.load_info(file)

    def check(self, file: io.FileIO, fields: Fields, length: int) -> None:
        with _open_archive(file, fields, length) as archive:
            self._find_members(archive, fields, length)


@final
class NumpyCompressedSerialization(_ArchiveSerialization):
    """`.npz`, compressed, one member a field. `numpy.load` reads it, and bfloat16 as two opaque bytes ("V2")."""

    suffix = ".npz"

    def save_with_info(
        self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter, info: EpisodeInfo
    ) -> None:
        """Write an episode, compressed, with its info in the schema."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo(_SCHEMA_MEMBER, _NO_DATE), schema_text(fields, info))
            for name, tensor in episode.items():
                if "\0" in name:
                    raise ValueError(f"Field {name!r} has a NUL in its name, which a zip archive cannot hold.")
                member = zipfile.ZipInfo(name + ".npy", _NO_DATE)
                member.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(member, "w", force_zip64=True) as target:
                    np.lib.format.write_array(target, as_array(name, tensor), version=(1, 0), allow_pickle=False)

    def _read_schema(self, archive: zipfile.ZipFile) -> tuple[Fields, dict[str, Any]]:
        return parse_schema(_read_small_member(archive, _SCHEMA_MEMBER))

    def _find_members(self, archive: zipfile.ZipFile, fields: Fields, length: int) -> dict[str, str]:
        members = {name: name + ".npy" for name in fields}
        found, expected = sorted(archive.namelist()), sorted([_SCHEMA_MEMBER, *members.values()])
        if found != expected:
            raise DamagedEpisodeError(f"holds the members {found!r:.200}, expected {expected!r:.200}")
        for name, member in members.items():
            header_size = archive.getinfo(member).file_size - length * fields[name].nbytes
            if not 0 < header_size < _OVERHEAD_PER_FIELD:
                raise DamagedEpisodeError(f"does not have {length} rows in `{name}`")
        return members

    def _check_header(self, member: IO[bytes], tensor_type: TensorType, length: int) -> None:
        # Compared as text, in numpy's spelling: a parser would have to be safe from what a file says.
        descr, shape = np.lib.format.dtype_to_descr(tensor_type.numpy_dtype), (length, *tensor_type.shape)
        expected = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
        start = member.read(len(_NPY) + 2)
        header = member.read(int.from_bytes(start[-2:], "little"))
        if not start.startswith(_NPY) or header.rstrip() != expected:
            raise DamagedEpisodeError(f"has the header {start + header!r:.200}, expected {expected!r:.200}")


@final
class TorchSerialization(_ArchiveSerialization):
    """`.pt`, a dict of tensors by `torch.save`. It is read without torch, and its pickle is not run."""

    suffix = ".pt"
    writes_unsigned = torch, "2.6"

    def save_with_info(
        self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter, info: EpisodeInfo
    ) -> None:
        """Write an episode, with its info in the schema."""
        # Not straight into the file: torch would hide the error of a full disk behind one of its own.
        content = io.BytesIO()
        torch.save({SCHEMA_KEY: schema_text(fields, info), "episode": dict(episode)}, content)
        length = len(next(iter(episode.values())))
        with zipfile.ZipFile(content) as archive:
            # If a version of torch writes anything else, adding must fail, not reading.
            for name, member in self._find_members(archive, fields, length).items():
                if zlib.crc32(bytes_of(episode[name])) != archive.getinfo(member).CRC:
                    raise DamagedEpisodeError(f"does not have `{name}` where it belongs")
        file.write(content.getbuffer())

    def _read_schema(self, archive: zipfile.ZipFile) -> tuple[Fields, dict[str, Any]]:
        """The schema is the second text of the pickle."""
        opcodes = pickletools.genops(_read_small_member(archive, _find_folder(archive) + "data.pkl"))
        texts = list(islice((str(argument) for opcode, argument, _ in opcodes if "UNICODE" in opcode.name), 2))
        if texts[:1] != [SCHEMA_KEY]:
            raise DamagedEpisodeError("is not what torch.save writes for an episode")
        return parse_schema(texts[1])

    def _find_members(self, archive: zipfile.ZipFile, fields: Fields, length: int) -> dict[str, str]:
        """Torch numbers the members with rows in the order in which tensors were saved."""
        folder, (found, _) = _find_folder(archive), self._read_schema(archive)
        check_fields(found, fields)
        members = {name: f"{folder}data/{number}" for number, name in enumerate(found)}
        if sum(name.startswith(f"{folder}data/") for name in archive.namelist()) != len(members):
            raise DamagedEpisodeError("holds other tensors than its schema says")
        for name, member in members.items():
            if archive.getinfo(member).file_size != length * fields[name].nbytes:
                raise DamagedEpisodeError(f"does not have {length} rows in `{name}`")
        return members


def _find_folder(archive: zipfile.ZipFile) -> str:
    """The folder in which a `.pt` has everything, and a check of the byte order."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise DamagedEpisodeError("is not an archive of torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist():
        order = _read_small_member(archive, f"{folder}byteorder")
        if order != sys.byteorder.encode():
            raise DamagedEpisodeError(f"has numbers of byte order {order!r:.20}")
    return folder


@contextmanager
def _open_archive(file: io.FileIO, fields: Fields | None = None, length: int = 0) -> Iterator[zipfile.ZipFile]:
    """The archive, refused if it is, or would expand to, far more than the expected rows."""
    size = size_of(file)
    # Rows that are stored, or do not compress. Without an expectation, the size of the file.
    allowed = size if fields is None else length * fields.nbytes + _OVERHEAD + _OVERHEAD_PER_FIELD * len(fields)
    if size > allowed + allowed // 100:
        raise DamagedEpisodeError(f"has {size} bytes, {length} rows take at most {allowed}")
    with as_damage(), zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        expanded = sum(member.file_size for member in members)
        if fields is not None and expanded > allowed:
            raise DamagedEpisodeError(f"would expand to {expanded} bytes, {length} rows take at most {allowed}")
        if any(member.compress_type not in _COMPRESSIONS or member.flag_bits & _ENCRYPTED for member in members):
            raise DamagedEpisodeError("is encrypted, or compressed by another method than deflate")
        yield archive


def _read_small_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """At most 16 MB of a member: what would be cut off is damaged."""
    with archive.open(name) as member:
        return member.read(_MAX_SMALL_MEMBER)
