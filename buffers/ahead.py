"""Batches that are drawn, and small ones read, before they are asked for: while nothing changes, several at once.

A batch costs some microseconds however small it is, and between two batches the caches forget what the next one needs.
What is stored stays the same for many batches as a rule, so those can share that cost, and nobody can tell: batch n is
a function of (seed, n) and of what is stored. Once something is added or evicted, what was made ahead is dropped.

    version   7 7 7 7 7 7 7 8 8 ...
    batch     0 1 2 3 4 5 6 7 8        made with 0: 0; with 1: 1; with 2: 2 3; with 4: 4 5 6 (7); with 7: 7; ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from buffers.dataset.fields import as_tensor
from buffers.dataset.index import Windows

if TYPE_CHECKING:
    from buffers.stream import BatchRandom, SequenceStream

__all__ = ["Ahead", "SeveralBatches"]

_MAX_DRAWN, _MAX_READ = 8, 32
# Batches that are read together should stay in a processor's own cache until they are asked for: larger ones are not.
_MAX_BYTES = 1 << 20

Data = dict[str, torch.Tensor]


class SeveralBatches(np.random.Generator):
    """Randomness of several batches, as if each were drawn alone. For a sampler that asks once, for integers.

    Args:
        random: Of single batches.
        numbers: Which.
    """

    def __init__(self, random: BatchRandom, numbers: Sequence[int]) -> None:
        super().__init__(random.generator(numbers[0]).bit_generator)
        self._random, self._numbers = random, numbers

    def integers(self, high: Any, *, size: Any) -> Any:  # type: ignore[override]
        """What each batch would draw, one behind the other."""
        each = size // len(self._numbers)
        return np.concatenate([self._random.generator(n).integers(high, size=each) for n in self._numbers])


class Ahead:
    """What a stream has made ahead. It holds no stream, so that no cycle keeps a dataset in memory."""

    def __init__(self) -> None:
        self._key: Any = None
        # Batches that were made together, all windows and, if they were read, all data of them.
        self._numbers: range = range(0)
        self._windows: Windows | None = None
        self._arrays: dict[str, np.ndarray] | None = None
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
        key = (stream.random, version, stream.sampler, stream.sequence_length, stream.num_windows, step)
        if key != self._key:
            self._key, self._numbers, self._num_next = key, range(0), 1
            return stream.draw((n,)), None
        if n not in self._numbers:
            reads, most = _how_many(stream, reads)
            num = min(self._num_next, most)
            self._make(stream, range(n, n + num * step, step), reads)
            self._num_next = 2 * num
        assert self._windows is not None  # It was made just now, if not before.
        if len(self._numbers) == 1:
            return self._windows, None
        begin = self._numbers.index(n) * stream.num_windows
        part = slice(begin, begin + stream.num_windows)
        if self._arrays is None:
            return self._windows[part], None
        fields = stream.dataset.fields
        assert fields is not None  # There is data of them.
        # Copies, or a batch that the user keeps would keep all that were read with it.
        data = {name: as_tensor(array[part].copy(), fields[name]) for name, array in self._arrays.items()}
        return self._windows[part], data

    def _make(self, stream: SequenceStream, numbers: range, reads: bool) -> None:
        self._windows, self._arrays, self._numbers = stream.draw(numbers), None, numbers
        if len(numbers) == 1:
            return
        if reads:
            out, was_read = stream.dataset._read_new(self._windows)
            if was_read is None:
                self._arrays = {name: _as_array(tensor) for name, tensor in out.items()}
        else:
            stream.dataset._prepare(self._windows)


def _how_many(stream: SequenceStream, reads: bool) -> tuple[bool, int]:
    """Whether batches are read ahead, and how many at a time at the most."""
    fields = stream.dataset.fields
    if not reads or fields is None or stream.dataset.device.type != "cpu":
        return False, _MAX_DRAWN
    num_bytes = stream.num_windows * (stream.sequence_length or 1) * max(fields.nbytes, 1)
    num = min(_MAX_READ, _MAX_BYTES // num_bytes)
    return (True, num) if num >= 4 else (False, _MAX_DRAWN)


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    # `fields.as_array` would do; of tensors that were just read, nothing has to be looked at.
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
