"""Datasets: stores of whole episodes."""

from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.individual_file import IndividualFileDataset
from buffers.dataset.mixture import MixtureDataset
from buffers.dataset.ring_buffer import RingBufferDataset

__all__ = ["EpisodeDataset", "IndividualFileDataset", "MixtureDataset", "RingBufferDataset"]
