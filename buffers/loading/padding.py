"""Padding: the rows of windows that reach beyond their episodes.

An episode of 4 rows, T = 5:

step      -2 -1  0  1  2          1  2  3  4  5
window     .  .  #  #  #          #  #  #  .  .
read       ?  ?  0  1  2          1  2  3  ?  ?
"zero"     -  -  0  1  2          1  2  3  -  -
"edge"     0  0  0  1  2          1  2  3  3  3
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from buffers.table import Int64Array, Windows

__all__ = ["pad", "shift"]

_PIECE = 131_072  # Bytes that are copied at a time: memory for more would have to be mapped anew.


def pad(windows: Windows, rows: dict[str, torch.Tensor], mask: npt.NDArray[np.bool_], with_edge: bool) -> None:
    """Set the padding in rows `name -> (B, T, *shape)`: to zero or, with `with_edge`, to the nearest real row.

    Where a window has no real row, the one that is nearest to it must have been read into its first or last row.
    """
    # Rows are counted over the whole batch.
    target = (~mask).ravel().nonzero()[0]
    if not len(target):
        return
    if with_edge:
        b, t = np.divmod(target, windows.length)
        nearest = np.minimum(np.maximum(windows.step[b] + t, 0), windows.episode_length[b] - 1) - windows.step[b]
        source = target - t + np.minimum(np.maximum(nearest, 0), windows.length - 1)
        _copy_rows(rows, target, source, in_pieces=True)
        return
    for tensor in rows.values():
        items = _items(tensor)
        items[_on_device(target, tensor)] = np.zeros((), items.dtype) if isinstance(items, np.ndarray) else 0


def shift(windows: Windows, rows: dict[str, torch.Tensor]) -> None:
    """Move the rows of windows that begin before their episodes, but were read from row 0 on, to where they belong."""
    b = (windows.step < 0).nonzero()[0]
    target = (b * windows.length)[:, None] + np.arange(windows.length)
    source = np.maximum(target + windows.step[b, None], target[:, :1])
    _copy_rows(rows, target.ravel(), source.ravel(), in_pieces=False)


def _copy_rows(rows: dict[str, torch.Tensor], target: Int64Array, source: Int64Array, in_pieces: bool) -> None:
    """Copy rows, by their numbers, to others; in pieces, what a piece reads must not be what another has written."""
    for tensor in rows.values():
        items = _items(tensor)
        num = max(1, _PIECE * len(items) // max(tensor.nbytes, 1)) if in_pieces else len(items)
        for begin in range(0, len(target), num):
            piece = slice(begin, begin + num)
            items[_on_device(target[piece], tensor)] = items[_on_device(source[piece], tensor)]


def _items(tensor: torch.Tensor) -> Any:
    """The rows of `(B, T, *shape)`: `(B * T,)` opaque items, of which numpy copies each at once; or as bytes."""
    # Neither torch nor numpy can assign values of all dtypes.
    num_rows = len(tensor) * tensor.shape[1]
    if not tensor.is_cpu:
        return tensor.view(torch.uint8).view(num_rows, tensor.nbytes // num_rows)
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.ndarray(num_rows, f"V{array.nbytes // num_rows}", array)


def _on_device(numbers: Int64Array, tensor: torch.Tensor) -> Any:
    return numbers if tensor.is_cpu else torch.from_numpy(numbers).to(tensor.device)
