"""The driver: contestants in processes of their own, measured in turn, A B C A B C ..."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.environments import build_at, python_of
from benchmarks.peers import CONTESTANTS, LIMITS, label_of
from benchmarks.timing import Timing
from benchmarks.workloads import Workload, workloads

ROOT = Path(__file__).parent.parent
# Beyond this, a contestant is left out of a workload.
SECONDS_TO_BUILD = 120.0
# A contestant that has used up so many seconds in a workload, warm-up aside, is not measured in further rounds.
SECONDS_TO_MEASURE = 6.0
# Memory to leave free, over what a store holds.
_SPARE_BYTES = 2 << 30
# Threads that spin for a moment after their work must not meet the next contestant's.
_PAUSE = 0.002
THREADS = {"sampling": (1, 2), "transitions": (1, 2)}
# What `--before` compares with when no commit is given.
BEFORE = "b70b526"
# Additions that are timed while another thread reads, and when to stop if they are held up.
NUM_ADDED, SECONDS_TO_ADD, MOST_ROUNDS_OF_ADDING = 1_000, 6.0, 3


class ContestantError(RuntimeError):
    """A contestant could not do what it was asked."""


class Contestant:
    """The driver's end of a contestant's process.

    Args:
        name: Of `CONTESTANTS`.
        folder: Where it may write files.
        threads: Of those that must be started with as many.
        before: The commit of contestants from before.

    Raises:
        ContestantError: Its environment or its commit is not there, or its library cannot be imported.
    """

    def __init__(self, name: str, folder: str, threads: int, before: str = BEFORE) -> None:
        self.name, self.spec, self.threads = name, CONTESTANTS[name], threads
        python = python_of(self.spec.environment)
        if python is None:
            raise ContestantError("its environment is not there: `python -m benchmarks environments` makes it")
        home = self._build(before) if self.spec.is_before else ROOT
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.serving", name, str(self._own(folder)), self._processors()],
            cwd=home,
            # An earlier build has no benchmarks of its own: its `buffers` comes first, then all that is today's.
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(home), str(ROOT)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCHMARKS_VERBOSE") else subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        try:
            hello = self._answer(SECONDS_TO_BUILD)
        except ContestantError:
            self.close()
            raise
        self.imported_from = hello["buffers"]
        self.versions = {"before": home.name.removeprefix("before-")} if self.spec.is_before else hello["versions"]

    @staticmethod
    def _build(commit: str) -> Path:
        try:
            return build_at(commit)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ContestantError(f"commit {commit} cannot be taken from git: {error}") from None

    def _processors(self) -> str:
        return str(self.threads if self.spec.threads_at_start else 0)

    def _own(self, folder: str) -> Path:
        path = Path(folder) / self.name
        path.mkdir(exist_ok=True)
        return path

    def ask(self, do: str, seconds: float = SECONDS_TO_BUILD, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            ContestantError: It failed, or took longer than `seconds`; then its process is ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        except BrokenPipeError:
            raise ContestantError("its process has ended") from None
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.close()
                raise ContestantError(f"it took more than {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise ContestantError(f"its process has ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"])
        return answer

    def serves(self, threads: int) -> bool:
        """Whether it is there, and can compute with so many threads."""
        return self._process.poll() is None and (not self.spec.threads_at_start or self.threads == threads)

    def close(self) -> None:
        """End the process: it stops when its stdin ends, or is made to."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclass
class Row:
    """One line of results: a workload with some number of threads."""

    label: str
    threads: int
    timings: dict[str, dict[str, float]]
    crossing: dict[str, str]
    left_out: dict[str, str]
    measured: dict[str, list[float]] = field(default_factory=dict)


class Driver:
    """Starts contestants when they are first needed, and keeps them.

    Args:
        names: Who takes part.
        rounds: Measurements of each, at most.
        scale: How many times fewer steps are stored.
        seconds_to_measure: Per contestant and workload.
        before: The commit of contestants from before.
    """

    def __init__(
        self,
        names: Iterable[str],
        rounds: int,
        scale: int = 1,
        seconds_to_measure: float = 0.0,
        before: str = BEFORE,
    ) -> None:
        self.names, self.rounds, self.scale, self.before = list(names), rounds, scale, before
        self.seconds_to_measure = seconds_to_measure or SECONDS_TO_MEASURE
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self._running: dict[str, Contestant] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="buffers_benchmarks_")

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()
        self._folder.cleanup()

    def end(self) -> None:
        """End all processes; those that are needed again are started anew."""
        for contestant in self._running.values():
            contestant.close()
        self._running.clear()

    def takers(self, part: str, threads: int = 1) -> dict[str, Contestant]:
        """The processes of those who take part; who cannot be started is left out, with a line that says so once."""
        found = {}
        for name in self.names:
            if part not in CONTESTANTS[name].parts or name in self.missing:
                continue
            if name in self._running and not self._running[name].serves(threads):
                self._running.pop(name).close()
            if name not in self._running:
                try:
                    self._running[name] = Contestant(name, self._folder.name, threads, self.before)
                except ContestantError as error:
                    self.missing[name] = str(error)
                    say(f"{CONTESTANTS[name].label} is left out: {error}")
                    continue
                self.versions.update(self._running[name].versions)
            found[name] = self._running[name]
        return found

    def run(self, part: str) -> list[Row]:
        """Measure all workloads of a part."""
        rows = []
        every = workloads(part, self.scale)
        if part == "priorities":
            self._check_priorities()
        for threads in THREADS.get(part, (1,)):
            for workload in every:
                row = self._measured(workload, threads)
                rows.append(row)
                medians = {label_of(name): round(t["median"], 1) for name, t in row.timings.items()}
                say(f"{part}, {row.label}, {threads} thread(s): {medians}")
        order = [workload.label for workload in every]
        return sorted(rows, key=lambda row: (order.index(row.label), row.threads))

    def memory(self) -> list[Row]:
        """Bytes in use over payload, once the store is full and a batch was drawn; each in a fresh process."""
        rows = []
        for workload in workloads("memory", self.scale):
            row = Row(workload.label, 1, {}, {}, {})
            self.end()
            small = replace(workload, store=replace(workload.store, num_steps=1_000))
            for name, contestant in self.takers("memory").items():
                # What a library takes for itself when it is first used is none of the store's.
                if self.built(contestant, small, 1, row) is None:
                    continue
                answer = self.built(contestant, workload, 1, row)
                if answer is not None:
                    share = answer["bytes"] / workload.store.num_bytes
                    row.timings[name] = asdict(Timing(share, share, share))
                contestant.close()
            rows.append(row)
        return rows

    def distributions(self) -> dict[str, dict[str, Any]]:
        """What each contestant draws from, by name."""
        found = {}
        for part in ("sampling", "disk"):
            for name, contestant in self.takers(part).items():
                if name in LIMITS:
                    continue
                try:
                    found[name] = contestant.ask("distribution")
                except ContestantError as error:
                    say(f"{CONTESTANTS[name].label}, distribution: {error}")
        return found

    def holding_up(self) -> dict[str, dict[str, float]]:
        """Milliseconds of additions while another thread reads files of 100 MB, by contestant, in turn."""
        answers: dict[str, list[dict[str, Any]]] = {}
        for _ in range(min(self.rounds, MOST_ROUNDS_OF_ADDING)):
            for name, contestant in self.takers("holding_up").items():
                try:
                    answer = contestant.ask("hold_up", num_added=NUM_ADDED // self.scale, limit=SECONDS_TO_ADD)
                except ContestantError as error:
                    say(f"{CONTESTANTS[name].label}, holding up: {error}")
                    continue
                answers.setdefault(name, []).append(answer)
        return {
            name: {
                "num_added": sum(len(answer["milliseconds"]) for answer in found),
                "num_batches": sum(answer["num_batches"] for answer in found),
                "median": Timing.of([Timing.of(answer["milliseconds"]).median for answer in found]).median,
                "slowest": max(max(answer["milliseconds"]) for answer in found),
            }
            for name, found in answers.items()
        }

    def _check_priorities(self) -> None:
        """Who does not prefer large priorities is left out; if it is ours, the run stops."""
        for name, contestant in self.takers("priorities").items():
            if name in LIMITS:
                continue
            try:
                say(f"{CONTESTANTS[name].label}, priorities: {contestant.ask('check_priorities')}")
            except ContestantError as error:
                if name.startswith("ours"):
                    raise AssertionError(f"{name}: {error}") from None
                self.missing[name] = str(error)
                say(f"{CONTESTANTS[name].label} is left out: {error}")

    def _measured(self, workload: Workload, threads: int) -> Row:
        row = Row(workload.label, threads, {}, {}, {})
        ready = []
        for name, contestant in self.takers(workload.part, threads).items():
            if self.built(contestant, workload, threads, row) is None:
                continue
            try:
                row.crossing[name] = self._verified(contestant, workload)
                contestant.ask("warm")
            except ContestantError as error:
                self.leave_out(row, name, str(error))
                continue
            ready.append(contestant)
        row.measured = self._interleaved(ready, row)
        row.timings = {name: asdict(Timing.of(values)) for name, values in row.measured.items() if values}
        return row

    def _interleaved(self, contestants: list[Contestant], row: Row) -> dict[str, list[float]]:
        """Microseconds in the order in which they were measured, by contestant, and by variant where it has some."""
        measured: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        spent = dict.fromkeys(measured, 0.0)
        for _ in range(self.rounds):
            for contestant in list(contestants):
                name = contestant.name
                if spent[name] > self.seconds_to_measure:
                    continue
                begin = time.perf_counter()
                try:
                    for variant, taken in contestant.ask("measure")["microseconds"].items():
                        measured.setdefault(f"{name}_{variant}" if variant else name, []).append(taken)
                except ContestantError as error:
                    contestants.remove(contestant)
                    self.leave_out(row, name, str(error))
                spent[name] += time.perf_counter() - begin
                time.sleep(_PAUSE)
        return measured

    def built(self, contestant: Contestant, workload: Workload, threads: int, row: Row) -> dict[str, Any] | None:
        """Have it fill the store; None where it is left out of this row, as it cannot."""
        stored = 0 if workload.store.on_disk else workload.store.num_bytes * contestant.spec.copies
        needed = stored + _SPARE_BYTES
        if needed > memory_available():
            self.leave_out(row, contestant.name, f"{needed >> 20:,} MiB of memory are not free")
            return None
        try:
            return contestant.ask("build", workload=workload.to_json(), threads=threads)
        except ContestantError as error:
            self.leave_out(row, contestant.name, str(error))
            return None

    def _verified(self, contestant: Contestant, workload: Workload) -> str:
        """How many sequences cross episodes; of ours, none may. The limits do not draw."""
        if contestant.name in LIMITS:
            return ""
        found = contestant.ask("verify")
        if found["num_crossing"] and contestant.name.startswith("ours"):
            raise AssertionError(f"{contestant.name} drew sequences that cross episodes in {workload}: {found}")
        if not found["num_sequences"]:
            return ""
        return f"{found['num_crossing']:,} of {found['num_sequences']:,}"

    def leave_out(self, row: Row, name: str, reason: str) -> None:
        """Note why a contestant has no figures in a row, and say so."""
        row.left_out[name] = reason
        say(f"{row.label}: {CONTESTANTS[name].label} is left out, as {reason}")


def memory_available() -> int:
    """Bytes that can be had."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("The kernel does not report available memory.")


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for tables."""
    print(line, file=sys.stderr, flush=True)
