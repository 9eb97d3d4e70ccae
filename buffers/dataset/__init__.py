"""Datasets: stores of whole episodes."""

from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.ring_buffer import RingBufferDataset

__all__ = ["EpisodeDataset", "RingBufferDataset"]
