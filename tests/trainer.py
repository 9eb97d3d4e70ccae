"""A trainer that the tests of workers' lives run and kill: prints the ids of its workers, then goes on as told."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from buffers.dataset import RingBufferDataset
from tests import tagged


def main() -> None:
    method, activity = sys.argv[1:]
    # A shell lets what it starts in the background ignore Ctrl-C, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    dataset = RingBufferDataset(1000)
    dataset.add_episode(tagged.episode(500, 0))
    loader = dataset.get_loader(8, 4, num_workers=2, multiprocessing_context=method)
    batches = iter(loader)
    next(batches)
    sibling = os.fork()
    if sibling == 0:  # It holds copies of every descriptor and ends when it likes.
        time.sleep(60)
        os._exit(0)
    workers = [worker.pid for worker in batches._batches._workers]
    print(*workers, sibling, flush=True)
    while True:
        if activity == "fetching":
            next(batches)
        else:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
