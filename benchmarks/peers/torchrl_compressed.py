"""TorchRL's `CompressedListStorage` with a `SliceSampler`, in a process of its environment: told what to do by lines.

It compresses row by row. Its own functions use zstd from Python 3.14 on, and zlib before, so it is given functions
that do the same, by zstd of the same level. The sampler is told which rows are of one episode, so that it need not
read the storage to find out. Its batch stays flat.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.environments import python_of
from benchmarks.frames import episodes, frames

_LEVEL, _NUM_BATCHES = 3, 3


class CompressedTorchRL:
    """The driver's end. Times are measured in the process itself.

    Args:
        name: Of the frames.
        num_frames: How many different ones.
        num_steps: To store.
        batch: Windows, and their length.

    Raises:
        RuntimeError: TorchRL is not installed.
    """

    def __init__(self, name: str, num_frames: int, num_steps: int, batch: tuple[int, int]) -> None:
        python = python_of("torchrl")
        if python is None:
            raise RuntimeError("TorchRL is not there: `python -m benchmarks environments` installs it.")
        arguments = (name, *map(str, (num_frames, num_steps, *batch)))
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.torchrl_compressed", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def _ask(self, request: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(request + "\n")
        return float(json.loads(self._process.stdout.readline()))

    def microseconds(self) -> float:
        """Of a batch."""
        return self._ask("microseconds")

    def num_bytes(self) -> float:
        """Of all rows, without what Python adds to each."""
        return self._ask("num_bytes")

    def __enter__(self) -> CompressedTorchRL:
        return self

    def __exit__(self, *_: object) -> None:
        # It ends by itself, as what TorchRL has opened must be closed.
        self._process.communicate()


def _compressed(tensor: torch.Tensor) -> torch.Tensor:
    import zstandard

    return torch.frombuffer(bytearray(zstandard.compress(tensor.numpy().tobytes(), _LEVEL)), dtype=torch.uint8)


def _decompressed(block: torch.Tensor, described: dict[str, Any]) -> torch.Tensor:
    import zstandard

    rows = bytearray(zstandard.decompress(block.numpy().tobytes()))
    return torch.frombuffer(rows, dtype=described["dtype"]).reshape(described["shape"])


def serve(name: str, num_frames: int, num_steps: int, num_windows: int, length: int) -> None:
    from tensordict import TensorDict
    from torchrl.data import CompressedListStorage, ReplayBuffer, SliceSampler

    torch.set_num_threads(1)
    stored = [torch.from_numpy(episode) for episode in episodes(frames(name, num_frames), num_steps)]
    num_rows = sum(map(len, stored))
    storage = CompressedListStorage(
        num_rows, compression_fn=_compressed, decompression_fn=_decompressed, compression_level=_LEVEL
    )
    buffer = ReplayBuffer(storage=storage, batch_size=num_windows * length)
    for episode in stored:
        buffer.extend(TensorDict({"image": episode}, [len(episode)]))
    of_rows = torch.repeat_interleave(torch.arange(len(stored)), torch.tensor([len(episode) for episode in stored]))
    options = {"cache_values": True, "truncated_key": None, "init_key": None}
    # An addition would make it forget what it is told here.
    buffer.set_sampler(SliceSampler(num_slices=num_windows, trajectories=of_rows, **options))
    assert buffer.sample()["image"].shape == (num_windows * length, *stored[0].shape[1:])
    for line in sys.stdin:
        if line.strip() == "num_bytes":
            print(json.dumps(storage.bytes()), flush=True)
            continue
        begin = time.perf_counter()
        for _ in range(_NUM_BATCHES):
            buffer.sample()
        print(json.dumps(1e6 * (time.perf_counter() - begin) / _NUM_BATCHES), flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = answers
    serve(sys.argv[1], *map(int, sys.argv[2:]))
