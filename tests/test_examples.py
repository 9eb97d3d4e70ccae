"""The examples run as their docstrings say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_two_ranks_train_on_one_ring() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*command, "examples/ddp.py", "--steps", "100"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # Not by the exit code: gloo's threads sometimes abort a process that has ended its work.
    losses = {
        int(rank): (float(a), float(b))
        for rank, a, b in re.findall(r"rank (\d): loss ([\d.]+) -> ([\d.]+)", found.stdout)
    }
    assert losses.keys() == {0, 1}, found.stderr
    assert all(end < begin / 5 for begin, end in losses.values()), found.stdout


def test_actors_shards_and_a_learner_of_ray_end_together() -> None:
    found = subprocess.run(
        [sys.executable, "examples/ray_dqn.py", "--updates", "500"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    # A pole that is pushed one way only falls within 8 to 10 steps.
    (mean,) = re.findall(r"500 updates: mean return (\d+)", found.stdout)
    assert int(mean) >= 8, found.stdout
