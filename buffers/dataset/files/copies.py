"""What a dataset shares with its copies in other processes: the changes of its table, and its late fields."""

from __future__ import annotations

import contextlib
import pickle
import sys

from buffers.late import LateFields
from buffers.sharing import PublishedTable, SharedArrays

__all__ = ["opened_handle", "pickled_handle"]


def pickled_handle(log: PublishedTable | None, late: LateFields) -> bytes | None:
    """What finds both in another process; None where it cannot.

    In bytes, because a dataset may be unpickled when the process that shares is gone.
    """
    if sys.platform != "linux":
        return None
    owned = late if late and late.is_owner else None
    return pickle.dumps((None if log is None else log.memory.__getstate__(), owned))


def opened_handle(handle: bytes | None) -> tuple[PublishedTable | None, LateFields | None]:
    """Both, as far as they are shared and their process lives. Otherwise, a copy reads the directory."""
    if handle is not None:
        with contextlib.suppress(RuntimeError):
            log, late = pickle.loads(handle)
            return None if log is None else PublishedTable(SharedArrays.opened(log)), late
    return None, None
