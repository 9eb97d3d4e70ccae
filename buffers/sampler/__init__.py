"""Samplers: windows, drawn over the index."""

from buffers.dataset.index import Windows
from buffers.sampler.base import Sampler, integers_below
from buffers.sampler.uniform import UniformEpisodeSampler, UniformSampler

__all__ = ["Sampler", "UniformEpisodeSampler", "UniformSampler", "Windows", "integers_below"]
