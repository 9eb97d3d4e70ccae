"""The comparison table: what was checked of each library, by running it or from what was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.driver import ContestantError, Driver, say

#: Columns: a contestant's name, the heading, and the module of its checks.
COLUMNS = {
    "ours": ("ours", "of_ours"),
    "torchrl": ("TorchRL", "of_torchrl"),
    "flashbax": ("flashbax", "of_flashbax"),
    "cpprb": ("cpprb", "of_cpprb"),
    "sb3": ("SB3", "of_sb3"),
    "npz": ("files by hand", "of_files"),
}
#: Rows that a check fills, by the check's name.
CHECKS = {
    "whole_episodes": "Whole episodes of unlike length, with a mask",
    "final_observation": "The true final observation is kept when environments reset themselves",
    "live_data": "Worker processes see what is added while they run",
    "same_batches": "The same batches for 0, 1 and 2 workers, with a seed",
    "survives_kill": "On disk, survives a kill",
}
NOT_CHECKED = "not checked"
NO_SEQUENCES = "no sequences, single rows"


def claims(driver: Driver, results: dict[str, Any]) -> dict[str, Any]:
    """Run the checks, and read the rest off what was measured.

    Returns:
        `columns`, name to heading, of those that are there, and `rows`, each a `claim` and its `cells` by name.
    """
    # Each in a fresh process: checks fork, and must not meet what was measured before.
    driver.end()
    takers = {**driver.takers("sampling"), **driver.takers("disk")}
    columns = {name: heading for name, (heading, _) in COLUMNS.items() if name in takers}
    rows = _drawn(columns, results) + _growth(columns, results)
    single = [name for name, cell in rows[0]["cells"].items() if cell == NO_SEQUENCES]
    for check, claim in CHECKS.items():
        cells = {}
        for name in columns:
            if check == "whole_episodes" and name in single:
                cells[name] = NO_SEQUENCES
                continue
            try:
                cells[name] = takers[name].ask("check", module=COLUMNS[name][1], name=check)["cell"]
            except ContestantError as error:
                say(f"{claim}: {columns[name]}: {error}")
                cells[name] = NOT_CHECKED
        rows.append({"claim": claim, "cells": cells})
    driver.end()
    return {"columns": columns, "rows": rows}


def _drawn(columns: dict[str, str], results: dict[str, Any]) -> list[dict[str, Any]]:
    found = results["parts"].get("distribution", {}).get("found", {})

    def row(claim: str, cell: Any) -> dict[str, Any]:
        return {
            "claim": claim,
            "cells": {name: cell(found[name]) if name in found else NOT_CHECKED for name in columns},
        }

    return [
        row("Sequences never cross the end of an episode", _crossing_cell),
        row("What is drawn", lambda entry: entry["rule"]),
        row("The last row of an episode can be drawn", lambda entry: "yes" if entry["last_step"] else "no"),
    ]


def _crossing_cell(entry: dict[str, Any]) -> str:
    if not entry["draws_sequences"]:
        return NO_SEQUENCES
    return "no, they do" if entry["share_crossing"] else "yes"


def _growth(columns: dict[str, str], results: dict[str, Any]) -> list[dict[str, Any]]:
    """How many times the cost at the fewest stored episodes a call costs at the most, an episode added before each."""
    rows = results["parts"].get("growth", {}).get("found", [])
    cells = dict.fromkeys(columns, NOT_CHECKED)
    for name in columns:
        found = [(row["label"], row["timings"][name]["median"]) for row in rows if name in row["timings"]]
        if len(found) > 1:
            (first, least), (last, most) = found[0], found[-1]
            cells[name] = f"{most / least:.1f} times, {least:,.0f} to {most:,.0f} us, {first} to {last} episodes"
    return [{"claim": "Cost as episodes are stored, one added before each batch", "cells": cells}]
