"""A worker ends when its trainer does."""

from __future__ import annotations

import os
import select
import threading
import time

__all__ = ["end_with"]

_watched: set[int] = set()


def end_with(trainer: int) -> None:
    """End this process when the trainer has ended, however it did; called once or more.

    torch looks whether its parent has changed, which under forkserver is not the trainer.
    """
    if trainer not in _watched:
        _watched.add(trainer)
        threading.Thread(target=_wait_and_exit, args=(trainer,), daemon=True, name="buffers-end-with-trainer").start()


def _wait_and_exit(trainer: int) -> None:
    try:
        poll = select.poll()  # Unlike select, with any number of descriptors.
        poll.register(os.pidfd_open(trainer), select.POLLIN)
        poll.poll()
    except (AttributeError, OSError):  # Not Linux, an old kernel, or gone already.
        while _is_alive(trainer):
            time.sleep(1.0)
    os._exit(1)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
