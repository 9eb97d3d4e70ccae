"""`python -m benchmarks [part ...]` prints the tables; `--rounds 101` for steadier medians."""

from __future__ import annotations

import argparse
import platform

import numpy as np
import torch

from benchmarks.adding import adding, memory
from benchmarks.composing import composing
from benchmarks.disk import disk
from benchmarks.recording import recording
from benchmarks.sampling import growth, sampling
from benchmarks.workers import workers

PARTS = {
    "sampling": sampling,
    "growth": growth,
    "adding": adding,
    "memory": lambda rounds: memory(),
    "recording": recording,
    "disk": disk,
    "workers": workers,
    "composing": composing,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="what to measure; all by default")
    parser.add_argument("--rounds", type=int, default=31, help="measurements of each contender")
    arguments = parser.parse_args()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}"
    )
    for part in arguments.parts or PARTS:
        PARTS[part](arguments.rounds)


if __name__ == "__main__":
    main()
