"""What processes share: arrays, and the table of episodes that one of them publishes."""

from buffers.sharing.arrays import SharedArrays
from buffers.sharing.fences import fence
from buffers.sharing.published_table import PublishedTable

__all__ = ["PublishedTable", "SharedArrays", "fence"]
