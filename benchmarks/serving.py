"""A contestant's process, told what to do by JSON lines on its stdin: `python -m benchmarks.serving NAME FOLDER CORES`.

CORES is how many processors it may use, 0 for all.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.contestant import Contestant
from benchmarks.peers import CONTESTANTS
from benchmarks.timing import calls_to_fill, microseconds
from benchmarks.verification import check_priorities, check_sequences, distribution
from benchmarks.workloads import Workload


class Server:
    """Answers the driver's requests about one contestant."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.functions: dict[str, Callable[[], Any]] = {}
        self.calls: dict[str, int] = {}
        self.workload: Workload | None = None
        self.steps: Any = None

    def hello(self) -> dict[str, Any]:
        """Which versions are measured, and where `buffers` was imported from, if it was."""
        return {"versions": _versions(), "buffers": getattr(sys.modules.get("buffers"), "__file__", "")}

    def build(self, workload: dict[str, Any], threads: int) -> dict[str, Any]:
        """Fill the store, unless it is there from the workload before; report the bytes that it takes."""
        self.workload, self.functions, self.steps = Workload.from_json(workload), {}, None
        contestant, store = self.contestant, self.workload.store
        before = memory_in_use()
        begin = time.perf_counter()
        # A store is used again where timing does not change it.
        if contestant.store != store or self.workload.part == "adding" or self.workload.adds_episode:
            contestant.fill(store)
        seconds = time.perf_counter() - begin
        contestant.set_threads(threads)
        self.functions = contestant.functions(self.workload)
        for function in self.functions.values():
            function()
        return {"seconds": seconds, "bytes": memory_in_use() - before}

    def warm(self) -> dict[str, Any]:
        """Settle how many calls make a measurement."""
        # Batches of workers come in bursts: a measurement has at least as many as they may hold.
        least = max(1, self.contestant.prefetched)
        self.calls = {variant: max(least, calls_to_fill(function)) for variant, function in self.functions.items()}
        return {"calls": self.calls}

    def measure(self) -> dict[str, Any]:
        """Microseconds a call, by variant."""
        return {"microseconds": {variant: self._measured(variant) for variant in self.functions}}

    def _measured(self, variant: str) -> float:
        function, prefetched = self.functions[variant], self.contestant.prefetched
        for _ in range(prefetched):
            function()
        taken = microseconds(function, self.calls[variant])
        if prefetched:
            # Workers go on until they are as far ahead as they may be, which must not disturb the next contestant.
            time.sleep(min(3.0, prefetched * taken / 1e6))
        return taken

    def verify(self) -> dict[str, Any]:
        """Look at the tags of what is drawn."""
        assert self.workload is not None
        return check_sequences(self.contestant, self.workload)

    def distribution(self) -> dict[str, Any]:
        self.functions = {}
        return distribution(self.contestant)

    def check_priorities(self) -> dict[str, Any]:
        """Look at whether large priorities are preferred as they shall be."""
        self.functions = {}
        return check_priorities(self.contestant)

    def hold_up(self, **options: Any) -> dict[str, Any]:
        """Time additions while a thread reads large files."""
        return importlib.import_module("benchmarks.holding_up").hold_up(self.contestant.folder, **options)

    def saving(self, step: str, **options: Any) -> dict[str, float]:
        """A step of a round of "saving"."""
        if self.steps is None:
            self.steps = importlib.import_module("benchmarks.saving_steps").Steps(self.contestant, self.workload)
        return getattr(self.steps, step)(**options)

    def check(self, module: str, name: str) -> dict[str, Any]:
        """What stands in the table for a claim; "not checked" where there is no check."""
        # A forked process must not wait for threads that it does not have.
        self.contestant.set_threads(1)
        check = getattr(importlib.import_module(f"benchmarks.checks.{module}"), name, None)
        return {"cell": "not checked" if check is None else check(self.contestant.folder)}


def memory_in_use() -> int:
    """Bytes of this process: its own, and its share of what it shares."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory_of("self")


def memory_of(pid: str) -> int:
    """Bytes of a process: its own, and its share of what it shares."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("The kernel does not report memory in use (Pss in /proc/self/smaps_rollup).")


def _versions() -> dict[str, str]:
    peers = ("torchrl", "tensordict", "jax", "flashbax", "cpprb", "stable_baselines3", "lerobot")
    found = {}
    for name in ("buffers", "torch", "numpy", *peers):
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(getattr(module, "__version__", "")) or importlib.metadata.version(name)
    return found


def main() -> None:
    name, folder, num_processors = sys.argv[1:]
    if int(num_processors):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(num_processors) :])
    # Whatever a library prints goes to stderr: stdout is the line to the driver.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = CONTESTANTS[name]
    module, cls = spec.target.split(":")
    try:
        contestant = getattr(importlib.import_module(f"benchmarks.peers.{module}"), cls)(**spec.options)
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    contestant.folder = folder
    server = Server(contestant)
    answers.write(json.dumps(server.hello()) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
