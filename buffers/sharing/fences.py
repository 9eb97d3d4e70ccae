"""Order between what one process stores and another loads."""

from __future__ import annotations

import platform
import threading

__all__ = ["fence", "store_fence"]

_STORES_STAY_IN_ORDER = platform.machine().lower() in ("x86_64", "amd64")


def fence() -> None:
    """Order what this thread has stored and loaded before it against what comes after.

    The atomic operations of taking a lock do it. It is a new lock, as a fork could leave a common one taken for ever.
    """
    threading.Lock().acquire()


def store_fence() -> None:
    """Order stores of single words. x86-64 does so by itself; only large copies may stream past its caches there."""
    if not _STORES_STAY_IN_ORDER:
        fence()
