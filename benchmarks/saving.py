"""Saving a full store and loading it, and saving it again with 1 % new: `python -m benchmarks saving`.

A round asks each contestant in turn for one step, then for the next: all save, all load, ... Everything that is saved
in a round is on the disk of this repository, and removed after it. The first round is not measured: all rows are looked
at in it, and memory is touched that the kernel, or the machine that this one is part of, gives only then.

The goals: a save and a load within 1.3 times the plain copy, a save with 1 % new within 1.5 times; `block=False` holds
its caller up for 5 ms and 1 us an episode at most; under 64 MB of memory beyond the store.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.driver import Contestant, ContestantError, Driver, Row, say
from benchmarks.peers import label_of
from benchmarks.saving_steps import num_new
from benchmarks.timing import Timing
from benchmarks.workloads import EPISODE_LENGTH, Workload, workloads

# Ignored by git, and on the same disk as the repository: /tmp may be memory.
FOLDER = Path(__file__).parent / ".raw"
THREADS = 2
SECONDS_PER_STEP = 300.0
# A contestant that has used up so many seconds in a workload takes part in no further rounds.
SECONDS_TO_SAVE = 60.0
# Those that take part where only the number of episodes is another: to the others, rows are rows.
_COUNT_EPISODES = ("plain", "ours")
# Ratios are taken of this one's.
_LIMIT = "plain"


@dataclass(frozen=True)
class Quantity:
    """What a line of the table has.

    Attributes:
        label: With its unit.
        has_ratio: Whether it is compared with the plain copy's.
    """

    label: str
    has_ratio: bool = False


#: By the names that `Steps` answers with, in the order of the table.
QUANTITIES = {
    "save": Quantity("a save, ms", True),
    "load": Quantity("a load, ms", True),
    "load_from_disk": Quantity("a load, nothing in the page cache, ms", True),
    "save_new": Quantity("a save with {new} new, ms", True),
    "files": Quantity("size of a save, MB", True),
    "files_new": Quantity("files new or changed with {new} new, MB", True),
    "to_disk_new": Quantity("of these, pages changed, MB", True),
    "memory": Quantity("memory beyond the store while saving, MB"),
    "held_up": Quantity("`block=False` returns after, ms"),
    "addition_meanwhile": Quantity("slowest addition of an episode meanwhile, ms"),
    "addition_else": Quantity("slowest of as many with nothing being saved, ms"),
    "memory_background": Quantity("memory beyond the store meanwhile, MB"),
}
_Measured = dict[str, dict[str, list[float]]]


def saving(driver: Driver) -> list[Row]:
    """A row for each quantity of each store; `timings` also have `ratio`, where there is one."""
    rows = []
    for workload in workloads("saving", driver.scale):
        rows += _measured(driver, workload)
        # What was added is not what another part would have stored.
        driver.end()
    return rows


def _measured(driver: Driver, workload: Workload) -> list[Row]:
    first = Row(workload.label, THREADS, {}, {}, {})
    ready = [
        contestant
        for name, contestant in driver.takers("saving", THREADS).items()
        if (workload.store.episode_length == EPISODE_LENGTH or name in _COUNT_EPISODES)
        and driver.built(contestant, workload, THREADS, first) is not None
    ]
    measured: _Measured = {}
    spent: dict[str, float] = {}
    FOLDER.mkdir(exist_ok=True)
    for number in range(1 + driver.rounds):
        ready = [contestant for contestant in ready if spent.get(contestant.name, 0.0) < SECONDS_TO_SAVE]
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            for step, options in _steps(number):
                for contestant in _rotated(ready, number):
                    begin, name = time.perf_counter(), contestant.name
                    where = {"directory": f"{folder}/{name}"} if step == "start" else {}
                    answer = _asked(driver, contestant, first, step=step, **options, **where)
                    if answer is None:
                        ready.remove(contestant)
                    elif number:
                        spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin
                        for quantity, value in answer.items():
                            measured.setdefault(quantity, {}).setdefault(name, []).append(value)
        # What the kernel does to remove them must not be met by the next round.
        os.sync()
    return _rows(workload, measured, first)


def _asked(driver: Driver, contestant: Contestant, row: Row, **options: Any) -> dict[str, float] | None:
    """What a step found; None where it failed, which of ours stops the run."""
    try:
        return contestant.ask("saving", SECONDS_PER_STEP, **options)
    except ContestantError as error:
        if contestant.name == "ours":
            raise AssertionError(f"{contestant.name}, {row.label}: {error}") from error
        driver.leave_out(row, contestant.name, str(error))
        return None


def _steps(number: int) -> list[tuple[str, dict[str, Any]]]:
    """The steps of a round."""
    timed = [(step, {}) for step in ("start", "save", "load", "load_from_disk", "save_new")]
    return [*timed, *([("check", {})] if number == 0 else []), ("hold_up", {"check": number == 0})]


def _rotated(contestants: list[Contestant], number: int) -> list[Contestant]:
    """Another first in each round: what one leaves behind in the memory and at the disk meets the next."""
    begin = number % max(1, len(contestants))
    return [*contestants[begin:], *contestants[:begin]]


def _rows(workload: Workload, measured: _Measured, first: Row) -> list[Row]:
    store = workload.store
    share = 100 * num_new(store) * store.episode_length / store.num_steps
    rows = []
    for name, quantity in QUANTITIES.items():
        found = measured.get(name, {})
        timings = {who: asdict(Timing.of(values)) for who, values in found.items()}
        if quantity.has_ratio and _LIMIT in found:
            for who, values in found.items():
                # Of the same round: disks are not alike from one minute to the next.
                ratios = [value / limit for value, limit in zip(values, found[_LIMIT], strict=False)]
                timings[who]["ratio"] = float(np.median(ratios))
        label = f"{workload.label}: {quantity.label.format(new=f'{share:g} %')}"
        rows.append(Row(label, THREADS, timings, {}, {} if rows else first.left_out, found))
        medians = {label_of(who): round(timing["median"], 1) for who, timing in timings.items()}
        say(f"saving, {label}: {medians}")
    return rows
