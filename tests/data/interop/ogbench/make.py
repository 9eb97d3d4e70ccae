"""Writes the files beside it: what OGBench 1.2.2 downloads, and what its `load_dataset` makes of it, by np.savez.

Needs none of `buffers`. In the root of the repository:

    python3.11 -m venv venv && venv/bin/pip install gymnasium==1.4.0 numpy==2.4.6 tqdm==4.70.1
    venv/bin/pip install --no-deps ogbench==1.2.2  # Its other requirements are simulators, which are not run here.
    PYTHONPATH=. venv/bin/python tests/data/interop/ogbench/make.py

`raw.npz` is laid out as the comments of `load_dataset` say, with the dtypes that the benchmark's own scripts write; its
trajectories are `tests.interop.logged.PLAYED`. `regular.npz` and `compact.npz` are what the library makes of it. Those
with `_cut` end within the last trajectory. The tests play the game anew: its log is the oracle.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ogbench.utils import load_dataset

from tests.interop.logged import PLAYED, play

HERE = Path(__file__).parent


def raw(is_cut: bool) -> dict[str, np.ndarray]:
    """Trajectories one after the other; the action of their last rows is what a player did there, without a result."""
    logs = play()
    unused = np.full((1, 2), 77, np.float32)
    terminals = [np.arange(length + 1) == length for length, _ in PLAYED]
    if is_cut:
        terminals[-1][:] = False
    return {
        "observations": np.concatenate([log["obs"] for log in logs]),
        "actions": np.concatenate([values for log in logs for values in (log["action"], unused)]),
        "terminals": np.concatenate(terminals),
        "qpos": np.concatenate([log["obs"] + 0.5 for log in logs]).astype(np.float32),
        "button_states": np.concatenate([log["state"] for log in logs]),
    }


def main() -> None:
    """Write all files."""
    for suffix in ("", "_cut"):
        path = HERE / f"raw{suffix}.npz"
        np.savez_compressed(path, **raw(bool(suffix)))
        kinds = {"ob_dtype": np.float64, "add_info": True}
        np.savez(HERE / f"regular{suffix}.npz", **load_dataset(path, **kinds))
        np.savez(HERE / f"compact{suffix}.npz", **load_dataset(path, compact_dataset=True, **kinds))


if __name__ == "__main__":
    main()
