"""A transform for `multiprocess_data_loading.ipynb`: worker processes import it from here."""

import time


def five_milliseconds(batch):
    """Keep a processor busy for 5 ms, as decoding or augmentation would, and return the batch."""
    end = time.thread_time() + 0.005
    while time.thread_time() < end:
        pass
    return batch
