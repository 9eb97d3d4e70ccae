"""Episodes in memory: one preallocated tensor a field, which never wraps an episode."""

from buffers.dataset.ring.ring_buffer import RingBufferDataset

__all__ = ["RingBufferDataset"]
