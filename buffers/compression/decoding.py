"""Windows out of blocks. Each block that a batch needs is read and decompressed once, into the batch if that can be.

    blocks of an episode    | 0       | 1       | 2       | 3       |
    window                        # # # # # # # # #
    decompressed                beside  in place  beside              what lies beside is then copied, in part

Windows of a batch that share a block are decompressed together, beside the batch, and copied from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from buffers.compression.codecs import Codec, DamagedBlockError, scratch
from buffers.table import Windows

__all__ = ["Fetched", "Run", "decode_runs", "runs_of"]

# From so many bytes of a batch, and of a block, on, threads share the work: of smaller blocks, they spend more time
# waiting for each other's Python than they save.
_LARGE, _LARGE_BLOCK = 1 << 20, 3 << 16


class Fetched(NamedTuple):
    """Consecutive blocks, as they are stored: where each ends, and their bytes, from which those ends count."""

    ends: list[int]
    data: bytes | bytearray | memoryview


class Run(NamedTuple):
    """Consecutive blocks of an episode, and the windows that are cut from them.

    Attributes:
        start: Step id of the episode's first row.
        episode: Its id.
        length: Its rows.
        cut: As in `Windows`.
        first: Block.
        end: Block behind the last.
        parts: For each window, the first row that it needs of the episode, their number, and the row of the batch,
            `(B * T)`, to which the first goes.
    """

    start: int
    episode: int
    length: int
    cut: int
    first: int
    end: int
    parts: list[tuple[int, int, int]]


def runs_of(windows: Windows, rows_per_block: int, positions: np.ndarray | None = None) -> list[Run]:
    """The blocks that windows need, each once; `positions` are theirs in the batch, if they are some of it."""
    skipped, num_rows = np.maximum(-windows.step, 0), windows.num_rows
    steps = windows.step + skipped
    rows = (np.arange(len(steps)) if positions is None else positions) * windows.length + skipped
    firsts, ends = steps // rows_per_block, (steps + num_rows - 1) // rows_per_block + 1
    cuts = np.zeros_like(steps) if windows.cut is None else windows.cut
    order = np.lexsort((firsts, windows.episode))
    columns = windows.start - windows.step, windows.episode, windows.episode_length, cuts, firsts, ends
    found: list[Run] = []
    taken = zip(*(column[order].tolist() for column in (*columns, steps, num_rows, rows)), strict=True)
    for start, episode, length, cut, first, end, step, num, row in taken:
        last = found[-1] if found else None
        if last is not None and last.episode == episode and first < last.end:
            last.parts.append((step, num, row))
            if end > last.end:
                found[-1] = last._replace(end=end)
        else:
            found.append(Run(start, episode, length, cut, first, end, [(step, num, row)]))
    return found


def decode_runs(
    codec: Codec, runs: Iterable[tuple[Run, Fetched]], out: torch.Tensor
) -> list[tuple[Run, DamagedBlockError]]:
    """Fill `out`, `(B, T, *shape)`, by torch's number of threads; returns the runs that are damaged.

    Args:
        codec: Of the field.
        runs: Some that `runs_of` found, with their blocks; asked for in the caller's thread.
        out: Contiguous. Rows that no window has are left as they are.
    """
    rows = out.view(-1).view(torch.uint8).numpy()
    is_shared = len(rows) >= _LARGE and codec.rows_per_block * codec.kind.nbytes >= _LARGE_BLOCK
    num_threads = torch.get_num_threads() if is_shared else 1
    if num_threads == 1:
        return _decode_all(codec, rows, runs)
    fetched = list(runs)
    pool = _threads(num_threads)
    others = [pool.submit(_decode_all, codec, rows, fetched[n::num_threads]) for n in range(1, num_threads)]
    damaged = _decode_all(codec, rows, fetched[::num_threads])
    return damaged + [pair for other in others for pair in other.result()]


def _decode_all(
    codec: Codec, rows: np.ndarray, pairs: Iterable[tuple[Run, Fetched]]
) -> list[tuple[Run, DamagedBlockError]]:
    damaged = []
    for run, (ends, data) in pairs:
        decode = _decode_window if len(run.parts) == 1 else _decode_beside
        try:
            decode(codec, rows, run, ends, memoryview(data))
        except DamagedBlockError as error:
            damaged.append((run, error))
    return damaged


def _decode_window(codec: Codec, rows: np.ndarray, run: Run, ends: list[int], data: memoryview) -> None:
    (step, num, row), size, row_bytes = run.parts[0], codec.rows_per_block, codec.kind.nbytes
    begin, at, last = 0, run.first * size, step + num
    # Where row 0 of the episode would be in the batch.
    origin = (row - step) * row_bytes
    for end in ends:
        # The block has rows [at, stop) of the episode, of which the window has some.
        stop = min(at + size, run.length)
        if at >= step and stop <= last:
            codec.decode(data[begin:end], rows[origin + at * row_bytes : origin + stop * row_bytes])
        else:
            beside = scratch((stop - at) * row_bytes, "rows")
            codec.decode(data[begin:end], beside)
            own, end_of_own = max(at, step) * row_bytes, min(stop, last) * row_bytes
            rows[origin + own : origin + end_of_own] = beside[own - at * row_bytes : end_of_own - at * row_bytes]
        begin, at = end, stop


def _decode_beside(codec: Codec, rows: np.ndarray, run: Run, ends: list[int], data: memoryview) -> None:
    size, row_bytes, first_row = codec.rows_per_block, codec.kind.nbytes, run.first * codec.rows_per_block
    beside, block_bytes = scratch((min(run.end * size, run.length) - first_row) * row_bytes, "rows"), size * row_bytes
    begin = 0
    for n, end in enumerate(ends):
        codec.decode(data[begin:end], beside[n * block_bytes : (n + 1) * block_bytes])
        begin = end
    for step, num, row in run.parts:
        own = (step - first_row) * row_bytes
        rows[row * row_bytes : (row + num) * row_bytes] = beside[own : own + num * row_bytes]


_pool: tuple[int, int, ThreadPoolExecutor] | None = None


def _threads(num: int) -> ThreadPoolExecutor:
    """A pool of this process, which a fork does not inherit."""
    global _pool
    if _pool is None or _pool[:2] != (os.getpid(), num):
        _pool = os.getpid(), num, ThreadPoolExecutor(num, "buffers-decode")
    return _pool[2]
