"""EpisodeReturns: what the last episodes of a buffer have returned."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from buffers.conversion import as_array
from buffers.table import CONTINUES, GOES_ON, context_of

__all__ = ["EpisodeReturns"]

_NUM_RETURNS = 100


class EpisodeReturns:
    """The returns of the last episodes, pieces of a stream taken together."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=_NUM_RETURNS)
        # By environment, what the pieces of its open episode have returned so far.
        self._so_far: dict[int, float] = {}

    def note(self, env: int, episode: Mapping[str, Any], cut: int) -> None:
        """Add what an episode has returned: the sum of `reward`, if that is one real number a step."""
        rewards = episode.get("reward")
        if rewards is None or isinstance(rewards, Mapping):
            return
        if type(rewards) is not np.ndarray:
            rewards = as_array("reward", rewards)
        if rewards.dtype.kind == "V":
            # bfloat16 is the upper half of a float32.
            rewards = (rewards.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if rewards.ndim != 1 or rewards.dtype.kind not in "fiub":
            return
        found = float(np.add.reduce(rewards[context_of(cut) :], dtype=np.float64))
        found += self._so_far.pop(env, 0.0) if cut & CONTINUES else 0.0
        if cut & GOES_ON:
            self._so_far[env] = found
        else:
            self.last.append(found)

    def state_dict(self) -> dict[str, Any]:
        """What another needs to go on."""
        return {"last": list(self.last), "so_far": [list(item) for item in self._so_far.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stood."""
        self.last = deque(map(float, state["last"]), _NUM_RETURNS)
        self._so_far = {int(env): float(found) for env, found in state["so_far"]}
