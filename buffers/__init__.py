"""Experience replay for PyTorch that keeps episodes whole."""

from buffers._version import __version__
from buffers.compilation import leave_uncompiled
from buffers.evictor import Evictor, FIFOEvictor
from buffers.limiter import SamplesPerInsert
from buffers.recorder import Recorder
from buffers.replay_buffer import ReplayBuffer

leave_uncompiled("buffers", but="buffers.transforms")

__all__ = ["Evictor", "FIFOEvictor", "Recorder", "ReplayBuffer", "SamplesPerInsert", "__version__"]
