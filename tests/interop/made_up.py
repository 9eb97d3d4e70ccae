"""A format of the tests: a reader whose episodes are computed, and which can fail where a test wants it to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest

from buffers.interop import Episode, FormatReader
from buffers.interop.alignment import rows_on_arrival


def log(number: int, num_steps: int) -> dict[str, np.ndarray]:
    """What an environment's own log says of an episode of T steps."""
    rows, steps = np.arange(num_steps + 1), np.arange(num_steps)
    return {
        "obs": np.stack([np.full(num_steps + 1, number), rows], 1).astype(np.float32),
        "action": (1000 * number + steps).astype(np.int64),
        "reward": number + steps / 8,
        "terminated": (steps == num_steps - 1) & (number % 2 == 0),
        "truncated": (steps == num_steps - 1) & (number % 3 == 0),
    }


def length_of(number: int) -> int:
    return 1 + number * 5 % 7


@contextmanager
def killed_before(number: int) -> Iterator[None]:
    """For an import of any format in the block, which is cut off before the episode with this number."""
    whole = FormatReader.episodes

    def killed(self: FormatReader, first: int = 0) -> Iterator[Episode]:
        for position, episode in enumerate(whole(self, first), first):
            if position == number:
                raise KeyboardInterrupt
            yield episode

    with mock.patch.object(FormatReader, "episodes", killed), pytest.raises(KeyboardInterrupt):
        yield


class Reader(FormatReader):
    """`num` episodes; the source fails with `error` before the episode `fails_at`."""

    format = "flat"
    fails_at = -1
    error: BaseException = KeyboardInterrupt()

    def __init__(
        self,
        path: str,
        num: int = 9,
        fields: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path, fields, dtypes)
        self.num_episodes = num
        self.num_steps = sum(length_of(number) + 1 for number in range(num))
        self.metadata = {"made": "up"}
        self.notes.add("There is no seed.")

    def read_from(self, number: int) -> Iterator[Episode]:
        for position in range(number, self.num_episodes or 0):
            if position == self.fails_at:
                raise self.error
            if position == 4:
                self.notes.add("Episode 4 is odd.")
            yield Episode(rows_of(position), {"number": position})


def rows_of(number: int) -> dict[str, Any]:
    found = log(number, length_of(number))
    return rows_on_arrival(found.pop("obs"), found)
