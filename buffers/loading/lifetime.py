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
    """End this process, a worker, when the trainer has ended, however it did; called once or more.

    torch looks whether its parent has changed, which under forkserver is not the trainer. Ctrl-C, which a terminal and
    Jupyter send to all processes of a group, is for the trainer alone: it may go on.
    """
    if trainer not in _watched:
        _watched.add(trainer)
        # A dataset that wraps ours may iterate it in a thread of its own, where Python allows no handlers.
        if threading.current_thread() is threading.main_thread():
            # Not SIG_IGN, which programs that a worker starts would have, too.
            signal.signal(signal.SIGINT, lambda number, frame: None)
        threading.Thread(target=_wait_and_exit, args=(trainer,), daemon=True, name="buffers-end-with-trainer").start()


def _wait_and_exit(trainer: int) -> None:
    try:
        poll = select.poll()  # Unlike select, with any number of descriptors.
        poll.register(os.pidfd_open(trainer), select.POLLIN)
        poll.poll()
    except (AttributeError, OSError):  # Not Linux, an old kernel, or gone already.
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(trainer, 0)
                time.sleep(1.0)
    os._exit(1)
