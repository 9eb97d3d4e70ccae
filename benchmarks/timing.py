"""Measuring one contestant, and the numbers and tables that come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Key, Value = TypeVar("Key"), TypeVar("Value")
# One measurement of a contestant is as many calls as fill this time.
SECONDS_PER_MEASUREMENT = 0.005
PERIOD = 32
# A process that has waited for its turn is slower for so long: by a third in the first milliseconds, and where rows are
# written to many places, until it has been at all of them again.
SECONDS_TO_WARM = 0.1


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: over all rounds the median, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, measured: Sequence[float]) -> Timing:
        return cls(float(np.median(measured)), min(measured), max(measured))


def calls_to_fill(function: Callable[[], object], seconds: float = SECONDS_PER_MEASUREMENT) -> int:
    """How many calls make a measurement; the function is warm afterwards."""
    begin = time.perf_counter()
    for _ in range(3):
        function()
        if time.perf_counter() - begin > 1:
            return 1
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        function()
        calls += 1
    # What is made several at a time, up to 32 of ours, is measured with all that it costs.
    return -(-calls // PERIOD) * PERIOD if calls > PERIOD // 4 else max(1, calls)


def microseconds(function: Callable[[], object], calls: int) -> float:
    """The mean of that many calls, after others that warm the process, unless a measurement is a single call."""
    begin = time.perf_counter()
    while calls > 1 and time.perf_counter() - begin < SECONDS_TO_WARM:
        function()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls * 1e6


def in_turn(functions: Mapping[Key, Callable[[], Value]], rounds: int) -> dict[Key, list[Value]]:
    """What each function answers, in each round; the first round is not counted."""
    found: dict[Key, list[Value]] = {key: [] for key in functions}
    for number in range(1 + rounds):
        for key, function in functions.items():
            taken = function()
            if number:
                found[key].append(taken)
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"\n### {title}\n\n{table(header, rows)}", flush=True)
