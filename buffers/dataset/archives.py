"""Formats that are zip archives: compressed `.npz` and `torch.save`'s `.pt`.

Rows cannot be read by ranges here, so a window costs a whole episode unless it is still held. In return `.npz` is
small where data compresses well, and numpy reads it.
"""

from __future__ import annotations

import errno
import io
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, final

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset.serialization import (
    SCHEMA_KEY,
    DamagedEpisodeError,
    EpisodeSerializationStrategy,
    bytes_of,
    check_fields,
    parse_schema,
    schema_text,
)
from buffers.fields import Fields, TensorType

__all__ = ["NumpyCompressedSerialization", "TorchSerialization"]

# What an archive may hold beyond its rows: headers, names, the schema.
_OVERHEAD = 2**16
_OVERHEAD_PER_FIELD = 2**13
_SCHEMA_MEMBER = SCHEMA_KEY + ".json"
_NO_DATE = (1980, 1, 1, 0, 0, 0)
_PICKLED_DTYPES = {str(dtype).removeprefix("torch.") for dtype in (torch.uint16, torch.uint32, torch.uint64)}


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
            return {name: _read_member(archive, name, fields[name], length) for name in fields}

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
    """`.pt`, a dict of tensors by `torch.save`. It is read with `weights_only=True`, and after a look at the pickle."""

    suffix = ".pt"

    def save(self, episode: Mapping[str, torch.Tensor], fields: Fields, file: io.BufferedWriter) -> None:
        """Write an episode."""
        # Not straight into the file: torch hides the error of a full disk behind one of its own.
        content = io.BytesIO()
        torch.save({SCHEMA_KEY: schema_text(fields), "episode": dict(episode)}, content)
        file.write(content.getbuffer())

    def load(self, file: io.FileIO, fields: Fields, length: int) -> dict[str, torch.Tensor]:
        """Read an episode. The pickle in it may make tensors, and nothing else."""
        with _opened(file, fields, length) as archive:
            _check_pickle(archive)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
            check_fields(parse_schema(content[SCHEMA_KEY])[0], fields)
            episode = content["episode"]
            if episode.keys() != set(fields):
                raise DamagedEpisodeError("holds other fields than its schema says")
            for name, tensor_type in fields.items():
                _check_tensor(name, episode[name], tensor_type, length)
            return episode

    def load_fields(self, file: io.FileIO) -> Fields:
        """The fields that the file says it holds."""
        with _opened(file) as archive:
            # Nothing but the pickle is read: how large the tensors may be is not known yet.
            texts = [argument for opcode, argument, _ in _check_pickle(archive) if "UNICODE" in opcode.name]
            return parse_schema(texts[texts.index(SCHEMA_KEY) + 1])[0]

    def check(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Compare the archive's table of contents, and the names in the pickle, with what is expected."""
        with _opened(file, fields, length) as archive:
            _check_pickle(archive)

    def verify(self, file: io.FileIO, fields: Fields, length: int) -> None:
        """Read all of it, and compare the checksums in it, which `torch.load` need not do."""
        with _opened(file, fields, length) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise DamagedEpisodeError(f"has a wrong checksum in {damaged!r:.60}")
        file.seek(0)
        self.load(file, fields, length)


@contextmanager
def _opened(file: io.FileIO, fields: Fields | None = None, length: int = 0) -> Iterator[zipfile.ZipFile]:
    """The archive, of which it is known that it cannot expand far beyond what is expected."""
    size = os.fstat(file.fileno()).st_size
    # Stored rows, or rows that do not compress, and what belongs to them. Without an expectation: what there is.
    allowed = size if fields is None else length * fields.nbytes + _OVERHEAD + _OVERHEAD_PER_FIELD * len(fields)
    if size > allowed + allowed // 100:
        raise DamagedEpisodeError(f"has {size} bytes, {length} rows take at most {allowed}")
    try:
        with zipfile.ZipFile(file) as archive:
            expanded = sum(member.file_size for member in archive.infolist())
            if fields is not None and expanded > allowed:
                raise DamagedEpisodeError(f"would expand to {expanded} bytes, {length} rows take at most {allowed}")
            yield archive
    except DamagedEpisodeError:
        raise
    except Exception as error:
        # An offset before the beginning of the file is the file's fault; other errors of the system are not.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # zipfile, zlib, pickle and torch each have errors of their own for damaged data.
        raise DamagedEpisodeError(f"cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _small_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member of which nobody has said how large it may be, so that at most 16 MB of it are taken."""
    with archive.open(name) as member:
        content = member.read(2**24)
    if len(content) == 2**24:
        raise DamagedEpisodeError(f"has a member {name!r:.60} of more than {2**24} bytes")
    return content


def _check_members(archive: zipfile.ZipFile, fields: Fields, length: int) -> None:
    members = archive.infolist()
    names = [member.filename for member in members]
    expected = {_SCHEMA_MEMBER} | {name + ".npy" for name in fields}
    if len(names) != len(expected) or set(names) != expected:
        raise DamagedEpisodeError(f"holds the members {names!r:.200}, expected {sorted(expected)!r:.200}")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise DamagedEpisodeError("is compressed in another way")
    for name, tensor_type in fields.items():
        found = archive.getinfo(name + ".npy").file_size - length * tensor_type.nbytes
        if not 0 < found < _OVERHEAD_PER_FIELD:
            raise DamagedEpisodeError(f"does not have {length} rows in `{name}`")


def _read_member(archive: zipfile.ZipFile, name: str, tensor_type: TensorType, length: int) -> torch.Tensor:
    expected = (length, *tensor_type.shape), False, tensor_type.numpy_dtype
    with archive.open(name + ".npy") as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise DamagedEpisodeError(f"has `{name}` in another version of the .npy format")
        found = np.lib.format.read_array_header_1_0(member)
        if found != expected:
            raise DamagedEpisodeError(f"has `{name}` as {found}, expected {expected}")
        tensor = torch.empty(expected[0], dtype=tensor_type.dtype)
        _read_into(member, bytes_of(tensor), name)
    return tensor


def _read_into(member: IO[bytes], view: memoryview, name: str) -> None:
    num_read = 0
    # The end is read too: there the checksum is compared.
    while block := member.read(2**20):
        if num_read + len(block) > len(view):
            raise DamagedEpisodeError(f"has more rows in `{name}` than it says")
        view[num_read : num_read + len(block)] = block
        num_read += len(block)
    if num_read < len(view):
        raise DamagedEpisodeError(f"has fewer rows in `{name}` than it says")


def _check_pickle(archive: zipfile.ZipFile) -> list[tuple[Any, Any, Any]]:
    """The operations of the pickle; one that names anything but tensors is refused.

    `weights_only=True` runs no foreign code, but does call `bytearray` and others with what the file says, and
    ten bytes then take all memory.
    """
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise DamagedEpisodeError("is compressed, which torch.save does not do")
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise DamagedEpisodeError("is not an archive of torch.save")
    operations = list(pickletools.genops(_small_member(archive, pickles[0])))
    for opcode, argument, _ in operations:
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX"):
            raise DamagedEpisodeError(f"has a pickle with {opcode.name}")
        if opcode.name == "GLOBAL" and not _makes_tensors(*str(argument).split(" ", 1)):
            raise DamagedEpisodeError(f"has a pickle that names {argument!r:.100}")
    return operations


def _makes_tensors(module: str, name: str) -> bool:
    if module == "torch":
        return name in _PICKLED_DTYPES or (name.isalnum() and name.endswith("Storage"))
    return (module, name) in {
        ("collections", "OrderedDict"),
        ("torch.storage", "UntypedStorage"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
    }


def _check_tensor(name: str, tensor: object, tensor_type: TensorType, length: int) -> None:
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
        raise DamagedEpisodeError(f"has no tensor in `{name}`")
    found, expected = (tensor.dtype, tuple(tensor.shape)), (tensor_type.dtype, (length, *tensor_type.shape))
    if found != expected or not tensor.is_contiguous():
        raise DamagedEpisodeError(f"has `{name}` as {found}, expected {expected}")
