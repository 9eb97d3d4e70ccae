"""How a ring with compressed fields admits an episode: only once that is compressed, it is known what must leave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from buffers.compression import EpisodeTooLargeError
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.ring.saving import SavedRing

__all__ = ["AdmittingRing"]

_NO_REGION = np.empty(0, np.uint8)


class AdmittingRing(SavedRing):
    """A ring that compresses an episode before it makes room."""

    # Of the episode that is being stored, and that episode.
    _region = _NO_REGION
    _prepared: dict[str, np.ndarray] | None = None
    # Rows before this step id may be overwritten.
    _oldest_step: int

    @contextlib.contextmanager
    def prepared(self, episode: dict[str, np.ndarray]) -> Iterator[bool]:
        """As `EpisodeDataset.prepared`: with its compressed rows."""
        room, before = self._room, (self._prepared, self._region)
        if room is None or len(next(iter(episode.values()))) > self.capacity:
            with super().prepared(episode) as fits:
                yield fits
            return
        if self._prepared is not episode:
            self._region = room.region(episode)
            self._prepared = episode
        try:
            yield len(self._region) <= room.capacity_bytes
        finally:
            self._prepared, self._region = before

    def store(self, episode: dict[str, np.ndarray], cut: int = 0, info: EpisodeInfo | None = None) -> int:
        """As `EpisodeDataset.store`; EpisodeTooLargeError if it takes more than `capacity_bytes`."""
        if self._room is None:
            return super().store(episode, cut, info)
        self._check_length(len(next(iter(episode.values()))))
        # What Ctrl-C has left behind.
        self._room.erase(self._oldest_step)
        self._room.forget(self.table.next_start)
        with self.prepared(episode) as fits:
            if not fits:
                raise EpisodeTooLargeError(
                    f"An episode of {len(self._region):,} bytes, compressed, does not fit `capacity_bytes`="
                    f"{self._room.capacity_bytes:,}, and is left out. Raise it, or cut long episodes by "
                    "`max_episode_length`."
                )
            return super().store(episode, cut, info)

    def make_room(self, start: int, length: int, keep: int | None = None) -> bool:
        """As `EpisodeDataset.make_room`; if episode `keep` is in the way of compressed rows, nothing leaves."""
        if self._room is not None and keep is not None:
            row = self.table.row_of(keep)
            if self._room.lacks_beside(row[0], len(self._region)):
                return False
        return super().make_room(start, length, keep)

    def evict(self, position: int, makes_room: bool = False) -> None:
        """As `EpisodeDataset.evict`: after its table, so that a save never looks for rows that are gone."""
        super().evict(position, makes_room)
        if self._room is not None:
            self._room.erase(self._oldest_step)
