"""Cut: how a piece of a stream that `max_episode_length` has cut belongs to those before and behind it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Cut"]


class Cut(NamedTuple):
    """What an episode is of the stream that it was cut from; of a whole episode all is 0 or False."""

    context: int = 0  # Rows at its beginning that the piece before it ends with.
    continues: bool = False  # Whether there is a piece before it, so that its first row is no first step.
    goes_on: bool = False  # Whether there is one behind it, so that its last row is no last step.

    @property
    def code(self) -> int:
        """All of it in one integer, for tables: the context, times 4, and two bits."""
        return self.context << 2 | self.continues << 1 | self.goes_on

    @classmethod
    def of(cls, code: int) -> Cut:
        """The cut that has a code."""
        return cls(code >> 2, bool(code & 2), bool(code & 1))
