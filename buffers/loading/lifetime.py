"""A worker ends when its trainer does, and not before."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time

__all__ = ["end_with"]

_watched: set[int] = set()


def end_with(trainer: int) -> None:
    """End this process, a worker, once the process `trainer` has ended; may be called again.

    torch watches the parent, which under forkserver is not the trainer. Ctrl-C, which terminals and Jupyter send to the
    whole process group, is ignored, because the trainer may go on after it.
    """
    if trainer not in _watched:
        _watched.add(trainer)
        # A dataset that wraps ours may iterate it in another thread, where Python allows no handlers.
        if threading.current_thread() is threading.main_thread():
            # Not SIG_IGN, which programs that a worker starts would inherit.
            signal.signal(signal.SIGINT, lambda number, frame: None)
        threading.Thread(target=_wait_and_exit, args=(trainer,), daemon=True, name="buffers-end-with-trainer").start()


def _wait_and_exit(trainer: int) -> None:
    try:
        poll = select.poll()  # `select.select` takes no descriptors above 1023.
        poll.register(os.pidfd_open(trainer), select.POLLIN)
        poll.poll()
    except (AttributeError, OSError):  # Not Linux, an old kernel, or the trainer has ended already.
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(trainer, 0)
                time.sleep(1.0)
    os._exit(1)
