"""Samplers: windows, drawn over the table of episodes."""

from buffers.sampler.base import Sampler, integers_below
from buffers.sampler.uniform import UniformEpisodeSampler, UniformSampler
from buffers.table import Windows

__all__ = ["Sampler", "UniformEpisodeSampler", "UniformSampler", "Windows", "integers_below"]
