"""What a dataset shares with its copies in other processes: the changes of its table, and its late fields."""

from __future__ import annotations

import contextlib
import pickle
import sys
from typing import Any

from buffers.late import LateFields
from buffers.sharing import PublishedTable, SharedArrays

__all__ = ["open_copy", "pickled_handle"]


def pickled_handle(log: PublishedTable | None, late: LateFields) -> bytes | None:
    """What finds both in another process; None where it cannot.

    In bytes, because a dataset may be unpickled when the process that shares is gone.
    """
    if sys.platform != "linux":
        return None
    owned = late if late and late.is_owner else None
    return pickle.dumps((None if log is None else log.memory.__getstate__(), owned))


def _opened_handle(handle: bytes | None) -> tuple[PublishedTable | None, LateFields | None]:
    """Both, as far as they are shared and their process lives. Otherwise, a copy reads the directory."""
    if handle is not None:
        with contextlib.suppress(RuntimeError):
            log, late = pickle.loads(handle)
            return None if log is None else PublishedTable(SharedArrays.opened(log)), late
    return None, None


def open_copy(
    kind: Any, handle: bytes | None, counts: tuple[int, int], options: dict[str, Any], *arguments: Any
) -> Any:
    """Unpickle a dataset of this class, as a reader: with options and arguments for its constructor."""
    dataset = kind.__new__(kind)
    dataset._is_copy = True
    # Before `__init__`, which lists the directory if there is no log.
    dataset._log, dataset._shared_late = _opened_handle(handle)
    dataset.__init__(*arguments, mode="r", **options)
    dataset.num_lost, dataset.num_dismissed = counts
    return dataset
