"""Ledger: which episodes of each writer a shard has stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buffers.remote.wire import Told

__all__ = ["Ledger"]


class Ledger:
    """By writer, the number of the first episode that is missing: a writer's episodes are stored in order.

    It is saved with the episodes, at the same moment, so it knows what is there after a restart, and nothing else.

    Attributes:
        num_added: Steps that were ever stored, as far as that is known.
        num_missing: Episodes that were lost with an earlier life, and that their writers do not keep any more.
        loaders: What learners have told, by name.
    """

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self._refused: dict[str, dict[int, str]] = {}
        self.num_added = self.num_missing = self._num_before = 0
        self.loaders: dict[str, Told] = {}

    def open(self, writer: str, kept_from: int) -> int:
        """The number of the next episode of a writer that will not send those below `kept_from` again."""
        found = self._next.get(writer, 0)
        if kept_from > found:
            self.num_missing += kept_from - found
            found = kept_from
        self._next[writer] = found
        if writer in self._refused:
            self._refused[writer] = {n: why for n, why in self._refused[writer].items() if n >= kept_from}
        return found

    def stored(self, writer: str, num_steps: int) -> None:
        """Note that the next episode of a writer is stored, with so many steps of its own."""
        self._next[writer] += 1
        self.num_added += num_steps

    def count_before(self, num_steps: int) -> None:
        """Note how many steps earlier lives have stored, as somebody knows who was there."""
        more = max(0, num_steps - self._num_before)
        self._num_before += more
        self.num_added += more

    def refuse(self, writer: str, why: str) -> None:
        """Note that the next episode of a writer can never be stored."""
        self._refused.setdefault(writer, {})[self._next[writer]] = why
        self._next[writer] += 1

    def refused(self, writer: str) -> dict[int, str]:
        """Why episodes of a writer could not be stored, by number."""
        return dict(self._refused.get(writer, {}))

    @property
    def num_refused(self) -> int:
        """Episodes that were refused, of which their writers may not know yet."""
        return sum(map(len, self._refused.values()))

    def marks(self) -> dict[str, int]:
        """By writer, the number of the next episode."""
        return dict(self._next)

    def state_dict(self) -> dict[str, Any]:
        """For a save."""
        return {
            "next": [list(item) for item in self._next.items()],
            "refused": [[writer, n, why] for writer, found in self._refused.items() for n, why in found.items()],
            "num_added": self.num_added,
            "num_missing": self.num_missing,
            "loaders": [list(told) for told in self.loaders.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a save."""
        self._next = {writer: number for writer, number in state["next"]}
        self._refused = {}
        for writer, number, why in state["refused"]:
            self._refused.setdefault(writer, {})[number] = why
        self.num_added, self.num_missing = state["num_added"], state["num_missing"]
        self.loaders = {told[0]: Told(*told) for told in state["loaders"]}
