"""Interleaved timing: A B C A B C ..., medians, and ratios within the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# One measurement of a contender is as many calls as fill this time.
SECONDS_PER_MEASUREMENT = 0.005


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: over all rounds the median, the least and the most."""

    median: float
    least: float
    most: float


def interleave(contenders: dict[str, Callable[[], object]], rounds: int = 31) -> dict[str, Timing]:
    """Time all contenders in turn, `rounds` times over, after a warm-up of each."""
    num_calls = {name: _calls_to_fill(function) for name, function in contenders.items()}
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            begin = time.perf_counter()
            for _ in range(num_calls[name]):
                function()
            measured[name].append((time.perf_counter() - begin) / num_calls[name] * 1e6)
    return {name: Timing(float(np.median(times)), min(times), max(times)) for name, times in measured.items()}


def _calls_to_fill(function: Callable[[], object]) -> int:
    for _ in range(3):
        function()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS_PER_MEASUREMENT:
        function()
        calls += 1
    return max(1, calls)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, so that it can be pasted into a note."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    print("\n".join([f"\n### {title}\n", lines[0], rule, *lines[1:]]), flush=True)
