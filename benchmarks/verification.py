"""What a contestant really draws, told from the tags: whether sequences cross episodes, and from which distribution."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from benchmarks.contestant import Contestant, Rows
from benchmarks.workloads import ALPHA, PADDING, Store, Workload, log_uniform, offsets_of, tagged_rows, tags_of

_NUM_SEQUENCES = 2_000
_NUM_DRAWN = 40_000
# Episodes of unlike length, each several times over, so that what happens at the ends of the storage counts for little.
LENGTHS = (3, 5, 12, 30) * 8
LENGTH = 3
# The mean of squared deviations over their expectation is 1 for the right distribution, and grows with those drawn.
_IS_ALIKE = 1.5
#: What `priority ** ALPHA` is taken of, from priorities `(..., T)`.
PRIORITY_RULES = {
    "each row by its own": lambda rows: rows[..., 0],
    "windows by their first row": lambda rows: rows[..., 0],
    "windows by 0.9 of the largest and 0.1 of the mean of their rows": lambda rows: (
        0.9 * rows.max(-1) + 0.1 * rows.mean(-1)
    ),
}


def check_sequences(contestant: Contestant, workload: Workload) -> dict[str, Any]:
    """How many of the sequences drawn are not consecutive rows of one episode, or not those at the offsets.

    Returns:
        `num_sequences` looked at, 0 where a contestant draws no sequences, and `num_crossing` among them.
    """
    if not workload.batch_size or not (contestant.draws_sequences or workload.store.transitions):
        return {"num_sequences": 0, "num_crossing": 0}
    num_sequences = num_crossing = 0
    num_batches = max(1, min(20, _NUM_SEQUENCES // workload.batch_size))
    for draw in itertools.chain.from_iterable([draw] * num_batches for draw in contestant.drawers(workload).values()):
        rows = contestant.arrays(draw(), workload.batch_size, workload.length)
        obs = rows["obs"]
        if workload.store.transitions:
            obs = np.concatenate([obs, rows["next_obs"]], axis=1)
        if workload.part == "padding":
            # Of stacks, the newest frame; tests look at the padding.
            obs = obs[:, :, -1] if obs.ndim == len(workload.store.fields["obs"][0]) + 3 else obs
            obs = obs[:, PADDING["pad_before"] : -PADDING["pad_after"]]
        if workload.part == "offsets":
            num_crossing += int(is_misread(rows, workload.store.episode_length).sum())
        else:
            num_crossing += int(is_crossing(*tags_of(obs)).sum())
        num_sequences += len(obs)
    return {"num_sequences": num_sequences, "num_crossing": num_crossing}


def is_crossing(episode: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Which of the sequences with these tags `(B, T)` are not consecutive rows of one episode; bool `(B,)`."""
    return (np.diff(episode) != 0).any(1) | (np.diff(step) != 1).any(1)


def is_misread(rows: Rows, episode_length: int) -> np.ndarray:
    """Which anchors were not read at their offsets, within their episode; bool `(B,)`. A row's reward is its step."""
    anchor = rows["reward"].astype(np.int64)
    episode, step = tags_of(rows["obs"])
    found = {"obs": step, "action": rows["action"][..., 0]}
    expected = {name: np.clip(anchor + offsets_of(name), 0, episode_length - 1) for name in found}
    return (episode != episode[:, :1]).any(1) | np.any([(found[n] != expected[n]).any(1) for n in found], axis=0)


def check_priorities(contestant: Contestant) -> dict[str, Any]:
    """Draw from a small store whose rows have priorities, written twice, and compare with the contestant's rule.

    Returns:
        `deviation`, chi squared over its degrees of freedom, and `of_uniform`, that from windows all alike.

    Raises:
        AssertionError: The rule does not explain what was drawn.
    """
    _fill_small(contestant)
    priorities = log_uniform(sum(LENGTHS))
    length = LENGTH if contestant.draws_sequences else 1
    # Upside down at first: what was written before must be forgotten.
    contestant.spread_priorities(1 / priorities)
    draw = contestant.prioritized_drawer(100, length)
    draw()
    contestant.update(np.arange(len(priorities)), contestant.as_priorities(priorities, 1))
    batches = [contestant.arrays(draw(), 100, length)["obs"] for _ in range(_NUM_DRAWN // (100 * LENGTH))]
    counts, share = np.zeros((2, len(LENGTHS), max(LENGTHS)))
    episode, step = tags_of(np.concatenate(batches))
    np.add.at(counts, (episode[:, 0], step[:, 0]), 1)
    row = 0
    for number, num_rows in enumerate(LENGTHS):
        windows = np.lib.stride_tricks.sliding_window_view(priorities[row : row + num_rows], length)
        share[number, : len(windows)] = PRIORITY_RULES[contestant.priority_rule](windows) ** ALPHA
        row += num_rows
    found = {
        "deviation": _deviation(counts, share / share.sum()),
        "of_uniform": _deviation(counts, (share > 0) / (share > 0).sum()),
    }
    if not found["deviation"] < _IS_ALIKE < found["of_uniform"]:
        raise AssertionError(f"It does not draw {contestant.priority_rule}: {found}.")
    return found


def _fill_small(contestant: Contestant) -> None:
    """Episodes of `LENGTHS`, which fill the store."""
    contestant.fill(Store("state", sum(LENGTHS), is_filled=False))
    for episode, length in enumerate(LENGTHS):
        contestant.add_rows(tagged_rows("state", episode, 1, length), length)
    contestant.store = None


def distribution(contestant: Contestant) -> dict[str, Any]:
    """Draw sequences of 3 from episodes of 3 to 30 rows, and say which rule explains where they start.

    Returns:
        `draws_sequences`, `rule`, `share_crossing`, and `last_step`: whether the last row of every episode was drawn.
    """
    _fill_small(contestant)
    num_windows = 100 * (LENGTH if contestant.draws_sequences else 1)
    length = LENGTH if contestant.draws_sequences else 1
    draw = contestant.drawer(100, length)
    batches = []
    for _ in range(_NUM_DRAWN // num_windows):
        rows = contestant.arrays(draw(), 100, length)
        # A transition is a sequence of two rows.
        batches.append(np.concatenate([rows["obs"], rows["next_obs"]], axis=1) if "next_obs" in rows else rows["obs"])
    episode, step = tags_of(np.concatenate(batches))
    things = "transitions" if "next_obs" in rows else "windows"
    lasts = np.asarray(LENGTHS) - 1
    return {
        "draws_sequences": contestant.draws_sequences,
        "rule": rule_of(episode[:, 0], step[:, 0], episode.shape[1], things),
        "share_crossing": float(is_crossing(episode, step).mean()),
        "last_step": len(np.unique(episode[step == lasts[episode]])) == len(LENGTHS),
    }


def rule_of(episode: np.ndarray, step: np.ndarray, length: int, things: str = "windows") -> str:
    """The name of the rule that explains the starts `(episode, step)` of sequences of `length` best, if one does."""
    counts = np.zeros((len(LENGTHS), max(LENGTHS)))
    np.add.at(counts, (episode, step), 1)
    places = np.arange(max(LENGTHS))
    lengths = np.asarray(LENGTHS)[:, None]
    is_row, is_start = places < lengths, places <= lengths - length
    start_of_episode = is_start / is_start.sum(1, keepdims=True)
    row_of_episode = is_row / is_row.sum(1, keepdims=True)
    expected = {
        f"all {things} alike": is_start / is_start.sum(),
        f"all long enough episodes alike, then their {things}": start_of_episode / len(LENGTHS),
        "all rows alike, whatever follows": is_row / is_row.sum(),
        "all episodes alike, then their rows": row_of_episode / len(LENGTHS),
    }
    if length == 1:
        expected = {"all rows alike": expected["all rows alike, whatever follows"]}
    found = {name: _deviation(counts, share) for name, share in expected.items()}
    best = min(found, key=lambda name: found[name])
    return best if found[best] < _IS_ALIKE else "none of the usual ones"


def _deviation(counts: np.ndarray, share: np.ndarray) -> float:
    """Chi squared over its degrees of freedom; infinite where something was drawn that cannot be."""
    possible = share > 0
    if counts[~possible].any():
        return float("inf")
    mean = share[possible] * counts.sum()
    return float(((counts[possible] - mean) ** 2 / mean).sum() / (possible.sum() - 1))
