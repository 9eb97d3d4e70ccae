"""`python -m benchmarks [part ...]` measures, and prints tables. `peers` is everything against everybody, kept.

Without a part, everything is measured with whoever is installed. With `--before`, our own build of an earlier commit is
measured in turn with today's. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from benchmarks import environments, results
from benchmarks.claims import claims
from benchmarks.driver import BEFORE, Driver, say
from benchmarks.peers import CONTESTANTS
from benchmarks.picture import draw
from benchmarks.saving import saving

# Against the peers; distribution and claims are facts, not figures.
AGAINST_PEERS = (
    *("sampling", "transitions", "adding", "growth", "training", "memory", "disk", "offsets", "priorities"),
    "saving",
    *("distribution", "claims"),
)
# Ours in a process of its own, beside the build from before.
OURS = ("samplers", "wrapping", "padding", "priorities_growth", "holding_up")
# Ours alone.
ALONE = (
    *("recording", "workers", "attaching", "filing", "composing", "learning", "interop"),
    *("remote", "objects", "scaling", "compression"),
)
QUICK_SCALE, QUICK_ROUNDS = 10, 5


def main() -> None:
    arguments = _arguments()
    parts = list(arguments.parts or (*AGAINST_PEERS, *OURS, *ALONE))
    if "environments" in parts:
        environments.make()
    if "peers" in parts:
        environments.make()
        parts[:] = dict.fromkeys([*AGAINST_PEERS, *(part for part in parts if part != "peers")])
        arguments.save = True
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else 21)
    _measure([part for part in parts if part in (*AGAINST_PEERS, *OURS)], arguments, rounds)
    for part in ALONE:
        if part in parts:
            _alone(part)(rounds)
    if "tables" in parts or arguments.save:
        results.paste()
    if "picture" in parts or arguments.save:
        draw(results.load())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    choices = (*AGAINST_PEERS, *OURS, *ALONE, "peers", "environments", "tables", "picture")
    parser.add_argument("parts", nargs="*", choices=[[], *choices], help="what to do; measures all by default")
    names = [name for name, spec in CONTESTANTS.items() if not spec.is_before]
    parser.add_argument("--contestants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--before", nargs="?", const=BEFORE, metavar="COMMIT", help=f"also measure our build of a commit; {BEFORE}"
    )
    parser.add_argument("--rounds", type=int, help="measurements of each contestant; 21, or 5 with --quick")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SCALE} times fewer steps stored, fewer rounds")
    parser.add_argument("--save", action="store_true", help="keep the results, and make tables and picture of them")
    return parser.parse_args()


def _measure(parts: list[str], arguments: argparse.Namespace, rounds: int) -> None:
    found = results.load()
    names = [
        name
        for name, spec in CONTESTANTS.items()
        if (arguments.before if spec.is_before else name in arguments.contestants)
    ]
    scale = QUICK_SCALE if arguments.quick else 1
    with Driver(names, rounds, scale, before=arguments.before or BEFORE) as driver:
        for part in parts:
            say(f"== {part}")
            if part == "memory":
                results.record(found, part, driver.memory(), driver)
            elif part == "distribution":
                results.record(found, part, driver.distributions(), driver)
            elif part == "holding_up":
                results.record(found, part, driver.holding_up(), driver)
            elif part == "claims":
                results.record(found, part, claims(driver, found), driver)
            else:
                rows = saving(driver) if part == "saving" else driver.run(part)
                results.save_raw(part, rows)
                results.record(found, part, rows, driver)
            print(f"\n### {results.TITLES[part]}\n\n{results.section(found, part)}", flush=True)
            if arguments.save:
                results.save(found)


def _alone(part: str) -> Callable[[int], None]:
    """The function that measures it; imported here, as it brings more than the driver needs."""
    return getattr(importlib.import_module(f"benchmarks.{part}"), part)


if __name__ == "__main__":
    main()
