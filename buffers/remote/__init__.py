"""Replay on several machines, by Ray: shards hold episodes, actors write to them, learners draw from them.

    actor    RemoteWriter  -->  shard 0: a dataset  -->  RemoteLoader    learner
    actor    RemoteWriter  -->  shard 1: a dataset  -->

`docs/remote.md` says what survives which death.
"""

from buffers.remote.loader import RemoteLoader
from buffers.remote.on_ray import start_shards
from buffers.remote.shards import Shards
from buffers.remote.transport import ShardLostError
from buffers.remote.writer import RemoteWriter

__all__ = ["RemoteLoader", "RemoteWriter", "ShardLostError", "Shards", "start_shards"]
