"""The results file, and the tables that are made of it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.driver import Driver, Row
from benchmarks.peers import CONTESTANTS, VARIANTS, label_of
from benchmarks.timing import table

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
RAW = HERE / ".raw"
TITLES = {
    "sampling": "Drawing a batch of B x T from memory",
    "transitions": "Drawing 256 transitions (obs, action, reward, terminated, truncated, next_obs)",
    "adding": "Adding a step of every environment",
    "growth": "An episode of 20 steps added, then a batch of state 256 x 8, by stored episodes",
    "training": "A training-like loop: 256 environments step, their rows are added, a batch is drawn",
    "disk": "Drawing a batch from files, page cache warm",
    "memory": "Memory",
    "distribution": "What is drawn",
    "claims": "What was checked",
    "samplers": "Drawing a batch of B x T from memory, by sampler",
    "wrapping": "Drawing a batch of B x T from a ring of 10,000 steps, of episodes of 100 steps and of long ones",
    "padding": "Drawing a batch of B x T from memory: as it is, a tenth of it padded, and as stacks of four frames",
    "offsets": "Drawing 256 anchors of pixels: observations at -1 and 0, actions at 0 to 15, the rest at 0",
    "priorities": "Drawing by priorities, and by recency; writing priorities",
    "priorities_growth": "An episode of 20 steps added, then state 256 x 8 drawn by priorities, by stored episodes",
    "holding_up": "Adding an episode while another thread samples from compressed files of 100 MB",
    "saving": "Saving a full store, loading it, and saving it again when a little is new",
}
UNITS = "microseconds a call: median (least to most)"


def load(path: Path = RESULTS) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def record(results: dict[str, Any], part: str, found: Any, driver: Driver) -> None:
    """Put a part's findings in place of those from before, with how they came about."""
    of_all = not any(part in spec.parts for spec in CONTESTANTS.values())
    results["parts"][part] = {
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "rounds": driver.rounds,
        "scale": driver.scale,
        "versions": dict(sorted(driver.versions.items())),
        "missing": {name: why for name, why in driver.missing.items() if of_all or part in CONTESTANTS[name].parts},
        "found": [_without_raw(row) for row in found] if isinstance(found, list) else found,
    }


def _without_raw(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name != "measured"}


def save(results: dict[str, Any], path: Path = RESULTS) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def save_raw(part: str, rows: Iterable[Row]) -> None:
    """Every single measurement, in a file that is not committed."""
    RAW.mkdir(exist_ok=True)
    measured = [{"label": row.label, "threads": row.threads, "measured": row.measured} for row in rows]
    (RAW / f"{part}-{time.strftime('%Y%m%d-%H%M%S')}.json").write_text(json.dumps(measured))


def machine() -> str:
    """Processor, cores and memory, in words."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = " ".join(line.split(":")[1].split())
            break
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB, Python {platform.python_version()}"


# Tables.


def section(results: dict[str, Any], part: str) -> str:
    """The Markdown of a part."""
    if part == "machine":
        return machine_section(results)
    if part == "short":
        return short_table(results)
    if part not in results["parts"]:
        return f"`{part}` was not measured yet."
    entry = results["parts"][part]
    body = {
        "memory": memory_table,
        "distribution": distribution_table,
        "claims": claims_table,
        "holding_up": holding_up_table,
        "saving": saving_tables,
    }.get(part, timing_tables)
    return "\n\n".join([body(entry, part), _provenance(entry)])


def timing_tables(entry: dict[str, Any], part: str) -> str:
    """Microseconds, and ratios to the two limits and to the build from before."""
    rows = entry["found"]
    names = _names(rows)
    header = [_what(part), *(["threads"] if _has_threads(rows) else []), *map(label_of, names)]
    parts = [f"{UNITS[0].upper()}{UNITS[1:]}.", table(header, [_line(row, rows, names, _cell) for row in rows])]
    if "gather" in names:
        parts += ["Times the bare gather / times the memory copy.", _ratios(rows, names, part, ("gather", "copy"))]
    elif "copy" in names:
        parts += ["Times the memory copy.", _ratios(rows, names, part, ("copy",))]
    elif "ours" in names and len(names) > 1:
        parts += ["Times ours.", _ratios(rows, names, part, ("ours",))]
    for before in ("before", "before_disk"):
        if before in names:
            ours = [name for name in names if name.startswith("ours")]
            parts += ["Times before.", _ratios(rows, [*ours, before], part, (before,))]
    crossing = _crossing(rows, names)
    if crossing:
        parts.append(f"Sequences that cross the end of an episode, among those looked at before timing: {crossing}.")
    return "\n\n".join([*parts, *_left_out(rows)])


def short_table(results: dict[str, Any]) -> str:
    """Medians of drawing with one thread, for the project's README."""
    if "sampling" not in results["parts"]:
        return "`sampling` was not measured yet."
    rows = [row for row in results["parts"]["sampling"]["found"] if row["threads"] == 1]
    names = [name for name in _names(rows) if name not in ("torchrl", "before")]

    def cell(row: dict[str, Any], name: str) -> str:
        return _number(row["timings"][name]["median"]) if name in row["timings"] else "-"

    header = ["batch", *(CONTESTANTS[name].label for name in names)]
    return table(header, [[row["label"], *(cell(row, name) for name in names)] for row in rows])


def _ratios(rows: list[dict[str, Any]], names: list[str], part: str, limits: tuple[str, ...]) -> str:
    others = [name for name in names if name not in limits or name == "gather"]

    def cell(row: dict[str, Any], name: str) -> str:
        found = row["timings"]
        if name not in found or any(limit not in found for limit in limits):
            return "-"
        return " / ".join(_short(found[name]["median"] / found[limit]["median"]) for limit in limits)

    header = [_what(part), *(["threads"] if _has_threads(rows) else []), *map(label_of, others)]
    return table(header, [_line(row, rows, others, cell) for row in rows])


def _line(row: dict[str, Any], rows: list[dict[str, Any]], names: list[str], cell: Any) -> list[str]:
    threads = [str(row["threads"])] if _has_threads(rows) else []
    return [row["label"], *threads, *(cell(row, name) for name in names)]


def _cell(row: dict[str, Any], name: str) -> str:
    timing = row["timings"].get(name)
    if timing is None:
        return "-"
    return f"{_number(timing['median'])} ({_number(timing['least'])} to {_number(timing['most'])})"


def memory_table(entry: dict[str, Any], part: str) -> str:
    """Memory in use over payload."""
    rows = entry["found"]
    names = _names(rows)

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row['timings'][name]['median']:.2f}" if name in row["timings"] else "-"

    header = ["state", *(CONTESTANTS[name].label for name in names)]
    lines = [[row["label"], *(cell(row, name) for name in names)] for row in rows]
    return "\n\n".join(["Memory in use over payload, once the store is full.", table(header, lines), *_left_out(rows)])


def holding_up_table(entry: dict[str, Any], part: str) -> str:
    """Milliseconds of additions."""
    lines = [
        [
            label_of(name),
            f"{found['num_added']:,}",
            f"{found['num_batches']:,}",
            f"{found['median']:.2f}",
            _number(found["slowest"]),
        ]
        for name, found in entry["found"].items()
    ]
    return table(["contestant", "additions", "batches drawn meanwhile", "median, ms", "slowest, ms"], lines)


def saving_tables(entry: dict[str, Any], part: str) -> str:
    """A table of quantities for each store, and the ratios to the plain copy."""
    rows, tables = [row for row in entry["found"] if row["timings"]], []
    for store in dict.fromkeys(row["label"].split(": ")[0] for row in rows):
        of_store = [row for row in rows if row["label"].startswith(f"{store}: ")]
        names = _names(of_store)
        lines = [[row["label"].removeprefix(f"{store}: "), *(_cell(row, name) for name in names)] for row in of_store]
        tables.append(table([store, *map(label_of, names)], lines))
    compared = [row for row in rows if any("ratio" in row["timings"][n] for n in row["timings"] if n != "plain")]
    names = [name for name in _names(compared) if name != "plain"]

    def cell(row: dict[str, Any], name: str) -> str:
        ratio = row["timings"].get(name, {}).get("ratio")
        return "-" if ratio is None else _short(ratio)

    lines = [[row["label"], *(cell(row, name) for name in names)] for row in compared]
    ratios = ["Times the plain copy of the same round, median.", table(["", *map(label_of, names)], lines)]
    return "\n\n".join(["Median (least to most).", *tables, *(ratios if names else []), *_left_out(entry["found"])])


def distribution_table(entry: dict[str, Any], part: str) -> str:
    """What is drawn, by contestant."""
    lines = []
    for name, found in entry["found"].items():
        crossing = f"{100 * found['share_crossing']:.0f} %" if found["draws_sequences"] else "draws single rows"
        lines.append([CONTESTANTS[name].label, found["rule"], crossing, "yes" if found["last_step"] else "no"])
    header = ["contestant", "what is drawn", "sequences that cross episodes", "last row of every episode drawn"]
    return table(header, lines)


def claims_table(entry: dict[str, Any], part: str) -> str:
    """What was checked, by peer."""
    columns = entry["found"]["columns"]
    lines = [[row["claim"], *(row["cells"][name] for name in columns)] for row in entry["found"]["rows"]]
    return table(["", *columns.values()], lines)


def _what(part: str) -> str:
    return {"growth": "stored episodes", "priorities_growth": "stored episodes", "adding": "rows"}.get(part, "batch")


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """The columns: contestants, each followed by its variants."""
    columns = [name if not variant else f"{name}_{variant}" for name in CONTESTANTS for variant in ("", *VARIANTS)]
    return [name for name in columns if any(name in row["timings"] for row in rows)]


def _has_threads(rows: list[dict[str, Any]]) -> bool:
    return len({row["threads"] for row in rows}) > 1


def _crossing(rows: list[dict[str, Any]], names: list[str]) -> str:
    found = []
    for name in names:
        counts = [row["crossing"][name].split(" of ") for row in rows if row["crossing"].get(name)]
        if counts:
            crossing, looked_at = (sum(int(pair[i].replace(",", "")) for pair in counts) for i in (0, 1))
            found.append(f"{CONTESTANTS[name].label} {crossing:,} of {looked_at:,}")
    return "; ".join(found)


def _left_out(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"* {CONTESTANTS[name].label} at {row['label']}: {reason}"
        for row in rows
        for name, reason in row["left_out"].items()
    ]
    return ["Left out:\n\n" + "\n".join(dict.fromkeys(lines))] if lines else []


def _provenance(entry: dict[str, Any]) -> str:
    line = f"{entry['when']}, {entry['rounds']} rounds"
    if entry["scale"] > 1:
        line += f"; a quick run, with {entry['scale']} times fewer steps stored"
    missing = "".join(f"; {CONTESTANTS[name].label} left out: {why}" for name, why in entry["missing"].items())
    return f"<sub>{line}{missing}.</sub>"


def machine_section(results: dict[str, Any]) -> str:
    """On what, and which versions: of all parts, which may come of several runs."""
    machines, versions = [], {}
    for entry in results["parts"].values():
        machines.append(entry["machine"])
        for name, version in entry["versions"].items():
            versions.setdefault(name, []).append(version)
    described = " / ".join(dict.fromkeys(machines))
    listed = ", ".join(f"{name} {' / '.join(dict.fromkeys(found))}" for name, found in sorted(versions.items()))
    return f"{described}. {listed}."


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def _short(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 20 else f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def paste(pages: Iterable[Path] = (HERE / "README.md", HERE.parent / "README.md")) -> None:
    """Put the tables between the markers of pages: `<!-- table: sampling -->` ... `<!-- end -->`."""
    results = load()
    for page in pages:
        pieces = page.read_text().split("<!-- table: ")
        found = [pieces[0]]
        for piece in pieces[1:]:
            part, rest = piece.split(" -->", 1)
            after = rest.split("<!-- end -->", 1)[1]
            found.append(f"{part} -->\n\n{section(results, part)}\n\n<!-- end -->{after}")
        page.write_text("<!-- table: ".join(found))
