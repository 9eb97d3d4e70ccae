"""Datasets: stores of whole episodes."""

from buffers.dataset.composing.mixture import MixtureDataset
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.files.individual_file import IndividualFileDataset
from buffers.dataset.ring import RingBufferDataset

__all__ = ["EpisodeDataset", "IndividualFileDataset", "MixtureDataset", "RingBufferDataset"]
