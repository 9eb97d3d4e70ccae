"""RemoteWriter: an EpisodeWriter whose episodes go to shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buffers.dataset.episode_info import checked_info
from buffers.dataset.verification import check_episode
from buffers.episode_returns import EpisodeReturns
from buffers.fields import Fields
from buffers.remote.shards import Shards
from buffers.remote.sink import RemoteSink
from buffers.utils import integer, number
from buffers.writer import EpisodeWriter

__all__ = ["RemoteWriter"]


class RemoteWriter(EpisodeWriter):
    """Splits steps of environments into episodes, as a `ReplayBuffer` does, and sends these to shards.

    `Recorder` and the wrappers take it in place of a buffer:

        writer = RemoteWriter(shards)
        env = RecordEpisodes(gymnasium.make("CartPole-v1"), writer)

    An episode is acknowledged once the call that completed it has returned: it is then in the writer's window, and will
    be in exactly one shard. It stays in the window until a shard has stored it and, if shards save, until it is in a
    save, so a shard that dies takes nothing with it as long as its writers live. A writer that dies takes the open
    episodes with it, and those that no shard had stored yet (`wait_until_stored`).

    Args:
        shards: As `start_shards` returns them.
        num_envs: N, as for `ReplayBuffer`; so are `max_episode_length` and `overlap`.
        max_episode_length: As there.
        overlap: As there.
        name: For errors of shards; the host and process by default.
        window_bytes: What all episodes of the window may take. With n shards, one of them may hold up a share of 1 / n.
        pack_bytes: Small episodes travel together, in packs of about this size.
        deadline: Seconds after which a shard that does not answer is named, and is given nothing new; and that adding
            waits for room in the window.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range.
        RuntimeError: No shard answers within the deadline.
    """

    sink: RemoteSink

    def __init__(
        self,
        shards: Shards,
        num_envs: int | None = None,
        max_episode_length: int | None = None,
        overlap: int = 0,
        *,
        name: str | None = None,
        window_bytes: int = 256_000_000,
        pack_bytes: int = 1_000_000,
        deadline: float = 10.0,
    ) -> None:
        if not isinstance(shards, Shards):
            raise TypeError(f"`shards` must be what `start_shards` returns, found {type(shards).__name__}.")
        sizes = integer("window_bytes", window_bytes, 1), integer("pack_bytes", pack_bytes, 1)
        sink = RemoteSink(shards, name, *sizes, number("deadline", deadline, 0.1))
        self.returns = EpisodeReturns()
        super().__init__(sink, num_envs, max_episode_length, overlap, on_stored=self.returns.note)

    def add_episode(self, episode: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> int:
        """Add a complete episode, as `EpisodeDataset.add_episode`; returns how many were added before."""
        self._check_open()
        kept = None if info is None else checked_info(info)
        fields = self.sink.fields or Fields.from_episode(episode)
        arrays = fields.arrays(episode)
        check_episode(fields, arrays, self.sink.verification_mode)
        if len(arrays[0]) > self.sink.episode_capacity:
            raise ValueError(
                f"An episode of {len(arrays[0])} steps does not fit a `capacity` of {self.sink.episode_capacity} steps."
            )
        self.sink.settle_fields(fields)
        rows = dict(zip(fields.names, arrays, strict=True))
        added = self.sink.add(rows, 0, kept)
        self.returns.note(-1, rows, 0)
        return added

    @property
    def may_add(self) -> bool:
        """Whether the limiter of the shards lets a step be added now; an actor that may not does something else.

        It counts the steps that shards have stored, this writer's own that they have not, and its open episodes. News
        of other writers and of learners are up to a tenth of a second old, so they add as much beyond the tolerance as
        they do in that time. True if there is no limiter, and before there is a learner.
        """
        return self.sink.may_add(self.num_open_rows)

    @property
    def troubles(self) -> dict[int, str]:
        """What is wrong with shards, by number: a shard that hangs, is lost, or cannot store or save.

        Adding an episode warns of each, once.
        """
        return self.sink.troubles

    def stats(self) -> dict[str, float]:
        """`num_added` episodes, `num_unstored` and `num_unsaved` ones, the share of the `window` that is taken.

        And `mean_episode_return` of the last 100, if there is a scalar `reward`.
        """
        found = self.sink.stats()
        if last := self.returns.last:
            found["mean_episode_return"] = sum(last) / len(last)
        return found

    def flush(self, timeout: float = 60.0) -> None:
        """Complete the open episodes as they stand, and wait until shards have stored everything.

        Raises:
            RuntimeError: Not everything was stored within so many seconds; names who holds it up. It is still kept.
        """
        super().flush()
        self.sink.wait(timeout, until_saved=False)

    def wait_until_stored(self, timeout: float = 60.0) -> None:
        """Wait until shards have stored all complete episodes; RuntimeError as for `flush`."""
        self.sink.wait(timeout, until_saved=False)

    def wait_until_saved(self, timeout: float = 600.0) -> None:
        """Wait until all complete episodes are in saves of the shards; RuntimeError as for `flush`."""
        self.sink.wait(timeout, until_saved=True)

    def close(self) -> None:
        """`flush`, and take no further step. If not everything can be stored, the writer stays open."""
        super().close()
        self.sink.close()

    def __enter__(self) -> RemoteWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A RemoteWriter belongs to its process: pass the Shards, and make a writer where it writes.")
