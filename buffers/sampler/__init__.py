"""Samplers: windows, drawn over the table of episodes."""

from buffers.sampler.base import Geometry, Listeners, Sampler, integers_below
from buffers.sampler.episode_filter import EpisodeFilter
from buffers.sampler.mixed import MixedSampler
from buffers.sampler.online import OnlineSampler
from buffers.sampler.prioritized import PrioritizedSampler
from buffers.sampler.recency import RecencySampler
from buffers.sampler.uniform import UniformEpisodeSampler, UniformSampler
from buffers.table import Windows

__all__ = [
    "EpisodeFilter",
    "Geometry",
    "Listeners",
    "MixedSampler",
    "OnlineSampler",
    "PrioritizedSampler",
    "RecencySampler",
    "Sampler",
    "UniformEpisodeSampler",
    "UniformSampler",
    "Windows",
    "integers_below",
]
