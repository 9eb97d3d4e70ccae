"""Files: directories in which they appear whole, locks, and what they say."""

from buffers.disk.directory import DAMAGED, TEMPORARY, Directory, open_directory, with_advice
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

__all__ = [
    "DAMAGED",
    "DTYPES",
    "DamagedEpisodeError",
    "Descriptor",
    "Directory",
    "NO_SURPRISES",
    "TEMPORARY",
    "UnknownVersionError",
    "as_damage",
    "described_fields",
    "open_directory",
    "parse_fields",
    "parse_json",
    "safetensors_type",
    "with_advice",
]
