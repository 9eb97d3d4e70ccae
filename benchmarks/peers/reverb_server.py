"""Reverb: its server, and its TensorFlow dataset in another process, for `benchmarks/remote.py`; as `torchrl_ray.py`.

    python -m benchmarks.peers.reverb_server STEPS BATCH_SIZE LENGTH NUM_BATCHES

Every window of an episode is an item, drawn uniformly. Items share the chunks of their steps. With STEPS alone, it is
the server, which prints its port.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import reverb
import tensorflow as tf

from benchmarks.workloads import Store, blocks

NUM_WARM = 5
TABLE = "windows"


def serve(num_steps: int) -> None:
    server = reverb.Server([_table(num_steps)], port=None)
    print(server.port, flush=True)
    server.wait()


def main() -> None:
    num_steps, batch_size, length, num_batches = map(int, sys.argv[1:])
    command = [sys.executable, "-m", "benchmarks.peers.reverb_server", str(num_steps)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        draw(f"localhost:{int(server.stdout.readline())}", num_steps, batch_size, length, num_batches)
        server.kill()
    # Threads of its dataset wait for more.
    os._exit(0)


def draw(address: str, num_steps: int, batch_size: int, length: int, num_batches: int) -> None:
    client = reverb.Client(address)
    num_items = sum(_write(client, rows, length) for rows in blocks(Store("pixels", num_steps)))
    assert client.server_info()[TABLE].current_size == num_items
    dataset = reverb.TrajectoryDataset.from_table_signature(address, TABLE, 3 * batch_size)
    batches = dataset.batch(batch_size, drop_remainder=True).prefetch(3).as_numpy_iterator()
    assert next(batches).data["obs"].shape == (batch_size, length, 64, 64, 3)
    print("ready", flush=True)
    for _ in sys.stdin:
        for _ in range(NUM_WARM):
            next(batches)
        begin = time.perf_counter()
        for _ in range(num_batches):
            next(batches)
        print(time.perf_counter() - begin, flush=True)


def _table(num_steps: int) -> reverb.Table:
    example = next(iter(blocks(Store("pixels", num_steps))))
    signature = {
        name: tf.TensorSpec((None, *rows.shape[1:]), tf.as_dtype(rows.dtype), name) for name, rows in example.items()
    }
    return reverb.Table(
        TABLE,
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=num_steps,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=signature,
    )


def _write(client: reverb.Client, rows: dict[str, np.ndarray], length: int) -> int:
    """Write rows of episodes, and return the number of their windows."""
    num_items, ends = 0, rows["terminated"].reshape(len(rows["reward"])).astype(bool)
    first = 0
    for end in [*(ends.nonzero()[0] + 1).tolist(), len(ends)]:
        if end == first:
            continue
        with client.trajectory_writer(num_keep_alive_refs=length) as writer:
            for at in range(first, end):
                writer.append({name: values[at] for name, values in rows.items()})
                if at - first + 1 >= length:
                    trajectory = {name: column[-length:] for name, column in writer.history.items()}
                    writer.create_item(TABLE, 1.0, trajectory)
                    num_items += 1
                if at % 16 == 0:
                    # More would wait in memory.
                    writer.flush()
            writer.flush()
        first = end
    return num_items


if __name__ == "__main__":
    main() if len(sys.argv) > 2 else serve(int(sys.argv[1]))
