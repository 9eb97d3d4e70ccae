"""What processes share: arrays, and the table of episodes that one of them publishes."""

from buffers.sharing.arrays import SharedArrays
from buffers.sharing.published_table import PublishedTable, fence, store_fence

__all__ = ["PublishedTable", "SharedArrays", "fence", "store_fence"]
