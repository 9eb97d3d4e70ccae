"""The picture: what a batch costs as episodes are stored, from the results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers import CONTESTANTS

PICTURE = Path(__file__).parent / "growth.png"
# Okabe and Ito's colours, which colour-blind people can tell apart; ours the boldest, the limit in black.
_STYLES: dict[str, dict[str, Any]] = {
    "gather": {"color": "#000000", "linestyle": "--", "marker": "", "linewidth": 1.8},
    "ours": {"color": "#0072B2", "marker": "o", "linewidth": 3.2, "zorder": 5},
    "torchrl": {"color": "#D55E00", "marker": "s"},
    "flashbax": {"color": "#009E73", "marker": "^"},
    "cpprb": {"color": "#CC79A7", "marker": "D"},
    "sb3": {"color": "#E69F00", "marker": "v"},
}
_NOTES = {
    "gather": " (limit)",
    "torchrl": " SliceSampler",
    "flashbax": " (JAX), over ends",
    "cpprb": ", loose rows",
    "sb3": ", loose rows",
}
# Labels keep this share of the axis of costs between them.
_LEAST_SHARE = 0.05


def draw(results: dict[str, Any], path: Path = PICTURE) -> None:
    """Write the PNG, 900 pixels wide as READMEs show it and twice as sharp."""
    from matplotlib.figure import Figure

    entry = results["parts"]["growth"]
    figure = Figure(figsize=(9, 5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    ends = {}
    for name, style in _STYLES.items():
        rows = [row for row in entry["found"] if name in row["timings"]]
        if not rows:
            continue
        counts = [int(row["label"].replace(",", "")) for row in rows]
        costs = [row["timings"][name]["median"] for row in rows]
        axes.plot(counts, costs, **{"linewidth": 2, "markersize": 6, **style})
        ends[name] = costs[-1]
    most = max(int(row["label"].replace(",", "")) for row in entry["found"])
    axes.set(xscale="log", yscale="log", xlim=(80, most * 1.15))
    lowest, highest = axes.get_ylim()
    for name, place in _apart(ends, (highest / lowest) ** _LEAST_SHARE).items():
        axes.text(
            most * 1.25,
            place,
            CONTESTANTS[name].label + _NOTES.get(name, ""),
            color=_STYLES[name]["color"],
            weight="bold" if name == "ours" else "normal",
            va="center",
            fontsize=12,
        )
    axes.set_xticks([10**power for power in range(2, len(str(most)))])
    axes.minorticks_off()
    axes.set_xlabel("stored episodes (20 steps each)", fontsize=12)
    axes.set_ylabel("microseconds", fontsize=12)
    axes.set_title("An episode is added, then 256 sequences of 8 steps are drawn (one thread)", fontsize=13, loc="left")
    axes.tick_params(labelsize=11)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _apart(places: dict[str, float], least_ratio: float) -> dict[str, float]:
    """Where labels stand, so that none covers another: in the order of their lines, pushed up where too close."""
    found: dict[str, float] = {}
    last = 0.0
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        last = max(place, last * least_ratio)
        found[name] = last
    return found
