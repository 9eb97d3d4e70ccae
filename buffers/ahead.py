"""Batches that are drawn, and small ones read, before they are asked for: while nothing changes, several at once.

A batch costs some microseconds however small it is, and between two batches the caches forget what the next one needs.
What is stored stays the same for many batches as a rule, so those can share that cost, and nobody can tell: batch n is
a function of (seed, n) and of what is stored. Once something is added or evicted, what was made ahead is dropped.

    version   7 7 7 7 7 7 7 8 8 ...
    batch     0 1 2 3 4 5 6 7 8        made with 0: 0; with 1: 1; with 2: 2 3; with 4: 4 5 6 (7); with 7: 7; ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from buffers.dataset.index import Windows

if TYPE_CHECKING:
    from buffers.stream import SequenceStream

__all__ = ["Ahead"]

_MAX_BATCHES = 32
# Batches that are read together should stay in a processor's own cache until they are asked for: larger ones are not.
_MAX_BYTES = 1 << 20
_MAX_WINDOWS = 1 << 14

Data = dict[str, torch.Tensor]


class Ahead:
    """What a stream has made ahead. It holds no stream, so that no cycle keeps a dataset in memory."""

    def __init__(self) -> None:
        self._key: Any = None
        # Batches that were made together: the windows of each and, if they were read, the data of all by field.
        self._numbers: range = range(0)
        self._windows: list[Windows] = []
        self._data: list[tuple[str, np.ndarray, torch.dtype | None]] | None = None
        self._num_next = 1

    def __reduce__(self) -> tuple[type[Ahead], tuple[()]]:
        return Ahead, ()

    def get(self, stream: SequenceStream, n: int, step: int, reads: bool) -> tuple[Windows, Data | None]:
        """The windows of batch n, and its data if that has been read.

        Args:
            stream: Whose batches.
            n: Which one.
            step: From it to the next that will be asked for.
            reads: Whether batches may be read ahead, too.
        """
        version = stream.dataset.index.version
        key = (version, stream.random, stream.sampler, stream.sequence_length, stream.num_windows, step)
        if key != self._key:
            self._key, self._numbers, self._num_next = key, range(0), 1
            return stream.draw(range(n, n + 1)), None
        if n not in self._numbers:
            reads, most = _how_many(stream, step, reads)
            num = min(self._num_next, most)
            self._make(stream, range(n, n + num * step, step), reads)
            self._num_next = 2 * num
        i = self._numbers.index(n)
        if self._data is None:
            return self._windows[i], None
        # Copies, or a batch that the user keeps would keep all that were read with it.
        data = {name: torch.from_numpy(batches[i].copy()) for name, batches, _ in self._data}
        for name, _, dtype in self._data:
            if dtype is not None:
                data[name] = data[name].view(dtype)
        return self._windows[i], data

    def _make(self, stream: SequenceStream, numbers: range, reads: bool) -> None:
        # A read may fail, or Ctrl-C end it: until all is made, there is nothing.
        self._numbers = range(0)
        windows, data = stream.draw(numbers), None
        if len(numbers) > 1:
            if reads:
                out, was_read = stream.dataset._read_new(windows)
                if was_read is None:
                    data = [_by_batch(name, tensor, len(numbers)) for name, tensor in out.items()]
            else:
                stream.dataset._prepare(windows)
        self._windows, self._data = windows.split(len(numbers)), data
        self._numbers = numbers


def _how_many(stream: SequenceStream, step: int, reads: bool) -> tuple[bool, int]:
    """Whether batches are read ahead, and how many at a time at the most."""
    # Of the batches of other workers, which lie between, the randomness is made, too.
    most_drawn = max(1, min(_MAX_BATCHES, _MAX_WINDOWS // (stream.num_windows * step)))
    fields = stream.dataset.fields
    if not reads or fields is None or stream.dataset.device.type != "cpu":
        return False, most_drawn
    num_bytes = stream.num_windows * (stream.sequence_length or 1) * max(fields.nbytes, 1)
    num = min(_MAX_BATCHES, _MAX_BYTES // num_bytes)
    return (True, num) if num >= 4 else (False, most_drawn)


def _by_batch(name: str, tensor: torch.Tensor, num: int) -> tuple[str, np.ndarray, torch.dtype | None]:
    """An array of the batches of a field, and the dtype that they have where numpy knows none like it."""
    dtype = torch.bfloat16 if tensor.dtype == torch.bfloat16 else None
    array = (tensor if dtype is None else tensor.view(torch.int16)).numpy()
    return name, array.reshape(num, len(array) // num, *array.shape[1:]), dtype
