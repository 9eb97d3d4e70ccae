"""Files: directories in which they appear whole, locks, and what they say."""

from buffers.disk.directory import DAMAGED, TEMPORARY, Directory, Files, open_directory, with_advice
from buffers.disk.lock import NO_SURPRISES, Descriptor
from buffers.disk.parsing import (
    DTYPES,
    DamagedEpisodeError,
    UnknownVersionError,
    as_damage,
    described_fields,
    parse_fields,
    parse_json,
    safetensors_type,
)
from buffers.disk.reading import RangeFile, fill_from, read_at, size_of

__all__ = [
    "DAMAGED",
    "DTYPES",
    "DamagedEpisodeError",
    "Descriptor",
    "Directory",
    "Files",
    "NO_SURPRISES",
    "RangeFile",
    "TEMPORARY",
    "UnknownVersionError",
    "as_damage",
    "described_fields",
    "fill_from",
    "open_directory",
    "parse_fields",
    "parse_json",
    "read_at",
    "safetensors_type",
    "size_of",
    "with_advice",
]
