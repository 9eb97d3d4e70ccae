"""Windows that are drawn before they are asked for: while nothing changes, those of several batches at once.

A draw costs some microseconds however small the batch is. What is stored stays the same for many batches as a rule, so
those can share that cost, and nobody can tell: batch n is a function of (seed, n) and of what is stored. Once something
is added or evicted, what was drawn ahead is dropped.

    version   7 7 7 7 7 7 7 8 8 ...
    batch     0 1 2 3 4 5 6 7 8        drawn with 0: 0; with 1: 1; with 2: 2 3; with 4: 4 5 6 (7); with 7: 7; ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from buffers.dataset.index import Windows

if TYPE_CHECKING:
    from buffers.stream import SequenceStream

__all__ = ["Ahead"]

_MAX_BATCHES, _MAX_WINDOWS = 32, 1 << 14
_NO_BATCHES = range(0)


class Ahead:
    """What a stream has drawn ahead. It holds no stream, so that no cycle keeps a dataset in memory."""

    def __init__(self) -> None:
        # What the windows were drawn by, and the version that they hold for.
        self._key: Any = None
        self._version = -1
        # Batches that were drawn together, and the windows of each.
        self._numbers = _NO_BATCHES
        self._windows: list[Windows] = []
        self._num_next = 1

    def __reduce__(self) -> tuple[type[Ahead], tuple[()]]:
        return Ahead, ()

    def get(self, stream: SequenceStream, n: int, step: int) -> Windows:
        """The windows of batch n.

        Args:
            stream: Whose batches.
            n: Which one.
            step: From it to the next that will be asked for.
        """
        version = stream.dataset.index.version
        if version != self._version:
            self._version, self._key = version, None
            return stream.draw(range(n, n + 1))
        key = (stream.random, stream.sampler, stream.sequence_length, stream.num_windows, step)
        if key != self._key:
            self._key, self._numbers, self._num_next = key, _NO_BATCHES, 1
        if n not in self._numbers:
            # Of the batches of other workers, which lie between, the randomness is made, too.
            most = max(1, min(_MAX_BATCHES, _MAX_WINDOWS // (stream.num_windows * step)))
            num = min(self._num_next, most)
            self._draw(stream, range(n, n + num * step, step))
            self._num_next = 2 * num
        return self._windows[self._numbers.index(n)]

    def _draw(self, stream: SequenceStream, numbers: range) -> None:
        # A draw may fail, or Ctrl-C end it: until all is done, there is nothing.
        self._numbers = _NO_BATCHES
        windows = stream.draw(numbers)
        if len(numbers) > 1:
            stream.dataset._prepare(windows)
        self._windows = windows.split(len(numbers))
        self._numbers = numbers
