"""What the environments of the files of TorchRL saw, by their own log. Needs numpy only.

Every value says which environment, episode and step it is of, so that a shift by one row, or a row of another
environment, is seen.
"""

from __future__ import annotations

import numpy as np

Arrays = dict[str, np.ndarray]

#: (transitions, how it ends) of environment 0; the others have the same, in another order. 11 transitions in all.
ENDS = ((3, "terminated"), (1, "truncated"), (4, "both"), (1, "terminated"), (2, "cut"))
NUM_ROWS = 11


def ends_of(env: int) -> list[tuple[int, str]]:
    """The recording of each environment is cut in its last episode."""
    whole, shift = list(ENDS[:-1]), env % 4
    return [*whole[shift:], *whole[:shift], ENDS[-1]]


def episode(env: int, number: int, num_steps: int, end: str) -> Arrays:
    """T + 1 observations, images and counts, T of the rest."""
    rows, steps = np.arange(num_steps + 1), np.arange(num_steps)
    last = steps == num_steps - 1
    return {
        "obs": np.stack([np.full(num_steps + 1, env), np.full(num_steps + 1, number), rows], 1).astype(np.float32),
        "image": (64 * env + 10 * number + rows)[:, None, None, None]
        .repeat(12, 1)
        .reshape(-1, 2, 2, 3)
        .astype(np.uint8),
        "action": np.stack([env + 10 * number + 0.5 + steps / 8, -steps - 1.0], 1).astype(np.float32),
        "reward": (100 * env + 10 * number + steps + 0.25).astype(np.float32),
        "terminated": last & (end in ("terminated", "both")),
        "truncated": last & (end in ("truncated", "both")),
        "step_count": rows[:, None].astype(np.int64),
    }


def log(env: int = 0) -> list[Arrays]:
    """The episodes of an environment."""
    return [episode(env, number, length, end) for number, (length, end) in enumerate(ends_of(env))]


def later(played: Arrays, num: int) -> Arrays:
    """An episode without its first transitions."""
    return {name: values[num:] for name, values in played.items()}


def rows(env: int = 0) -> Arrays:
    """The transitions of all episodes of an environment, one row each; `next_...` is what follows the step."""
    played = log(env)
    found = {}
    for name in played[0]:
        is_of_row = len(played[0][name]) > len(played[0]["action"])
        found[name] = np.concatenate([each[name][:-1] if is_of_row else each[name] for each in played])
        if is_of_row:
            found[f"next_{name}"] = np.concatenate([each[name][1:] for each in played])
    lengths = [len(each["action"]) for each in played]
    found["is_init"] = np.concatenate([np.arange(length) == 0 for length in lengths])
    found["traj_ids"] = np.repeat(np.arange(len(played)) * 10 + env, lengths)
    return found


def arrived(played: Arrays) -> Arrays:
    """An episode as rows that are aligned on arrival."""
    first = {name: np.zeros_like(played[name][:1]) for name in ("action", "reward", "terminated", "truncated")}
    found = {name: np.concatenate([zero, played[name]]) for name, zero in first.items()}
    kept = {name: played[name] for name in ("obs", "image", "step_count")}
    return {**kept, **found, "is_first": np.arange(len(played["obs"])) == 0}
