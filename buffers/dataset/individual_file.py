"""The documented import path of `IndividualFileDataset` and its formats."""

from buffers.dataset.files.archives import NumpyCompressedSerialization, TorchSerialization
from buffers.dataset.files.individual_file import IndividualFileDataset
from buffers.dataset.files.safetensors_format import SafetensorsSerialization
from buffers.dataset.files.serialization import EpisodeSerializationStrategy
from buffers.disk import DamagedEpisodeError, UnknownVersionError

__all__ = [
    "DamagedEpisodeError",
    "EpisodeSerializationStrategy",
    "IndividualFileDataset",
    "NumpyCompressedSerialization",
    "SafetensorsSerialization",
    "TorchSerialization",
    "UnknownVersionError",
]
