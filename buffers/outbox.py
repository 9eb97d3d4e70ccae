"""Outbox: between the open episodes of a writer and the sink that stores them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from buffers.compression import EpisodeTooLargeError
from buffers.dataset.episode_info import EpisodeInfo
from buffers.sink import EpisodeSink
from buffers.table import GOES_ON

__all__ = ["Outbox", "Rows"]

Rows = dict[str, np.ndarray]


class Outbox:
    """Passes episodes to the sink. Keeps copies of those that wait, oldest first, and the sink's last error.

    Those that the sink can never store do not wait: they are gone, with an error that is raised once.
    """

    def __init__(self, sink: EpisodeSink, on_stored: Callable[[int, Rows, int], object] | None) -> None:
        self._sink, self._on_stored = sink, on_stored
        self.waiting: deque[tuple[int, Rows, int, EpisodeInfo | None]] = deque()
        self.error: Exception | None = None
        #: Of episodes that the sink will never take, and that are dropped.
        self.refusals: list[EpisodeTooLargeError] = []
        # By environment, for the episodes that end in the current call.
        self.infos: dict[int, EpisodeInfo] = {}

    def state_dict(self) -> list[dict[str, Any]]:
        """The episodes that wait."""
        return [{"env": env, "rows": rows, "cut": cut, "info": info} for env, rows, cut, info in self.waiting]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Let the episodes of another outbox wait."""
        self.waiting = deque((entry["env"], entry["rows"], entry["cut"], entry["info"]) for entry in state)

    def put(self, env: int, episode: Rows, cut: int) -> None:
        """Store an episode, or let it wait behind those that do."""
        info = None if cut & GOES_ON else self.infos.get(env)
        if self.waiting or not self._is_stored(env, episode, cut, info):
            self.waiting.append((env, {name: rows.copy() for name, rows in episode.items()}, cut, info))

    def take_refusal(self) -> Exception | None:
        """The error of the episodes that were dropped, once."""
        refusals, self.refusals = self.refusals, []
        if len(refusals) > 1:
            return EpisodeTooLargeError(f"{refusals[0]} The same goes for {len(refusals) - 1} more.")
        return refusals[0] if refusals else None

    def retry(self) -> None:
        """Store what waits, up to the first that fails."""
        self.error = None
        while self.waiting:
            # Taken out first: if Ctrl-C interrupts the sink after it has stored the episode, it must not come twice.
            oldest = self.waiting.popleft()
            if not self._is_stored(*oldest):
                self.waiting.appendleft(oldest)
                return

    def _is_stored(self, env: int, episode: Rows, cut: int, info: EpisodeInfo | None) -> bool:
        try:
            self._sink.add(episode, cut, info)
        except EpisodeTooLargeError as error:
            # If it waited, all that comes after it would, too.
            self.refusals.append(error)
            return True
        except Exception as error:
            self.error = error
            return False
        if self._on_stored is not None:
            self._on_stored(env, episode, cut)
        return True
