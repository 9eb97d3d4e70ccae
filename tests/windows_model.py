"""The reference model of windows: what padding and offsets mean, a row at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.episode_source import EpisodeSource
from tests import tagged
from tests.format_helpers import STRATEGIES
from tests.list_dataset import ListDataset

Row = tuple[int, int]  # (episode, step)


def starts(length: int, num_rows: int, before: int, after: int) -> range:
    """Where the windows of an episode begin."""
    return range(-before, num_rows - length + after + 1)


def expected_rows(number: int, num_rows: int, steps: Sequence[int], pad: str) -> dict[str, np.ndarray]:
    """Rows of a tagged episode at these steps, `(n, *shape)`, padded where there are none."""
    nearest = [min(max(step, 0), num_rows - 1) for step in steps]
    rows = tagged.flatten(tagged.rows(0, number, np.array(nearest)))
    is_real = real(num_rows, steps)
    if pad == "zero":
        for values in rows.values():
            values[~is_real] = 0
    return rows


def real(num_rows: int, steps: Sequence[int]) -> np.ndarray:
    return np.array([0 <= step < num_rows for step in steps])


def assert_sequence(
    batch: dict[str, Any], b: int, number: int, num_rows: int, first: int, length: int, pad: str
) -> None:
    """Sequence b of a batch is the window of an episode that begins at `first`."""
    steps = range(first, first + length)
    is_real = real(num_rows, steps)
    for name, values in expected_rows(number, num_rows, steps, pad).items():
        np.testing.assert_array_equal(tagged.flatten(batch)[name][b].cpu().numpy(), values, err_msg=name, strict=True)
    np.testing.assert_array_equal(batch["mask"][b].cpu().numpy(), is_real)
    np.testing.assert_array_equal(batch["step"][b].cpu().numpy(), np.where(is_real, steps, -1))
    origin = batch["index"][b].cpu().numpy() - batch["step"][b].cpu().numpy()
    assert (batch["index"][b].cpu().numpy()[~is_real] == -1).all() and len(set(origin[is_real].tolist())) == 1
    np.testing.assert_array_equal(batch["is_first"][b].cpu().numpy(), is_real & (np.array(steps) == 0))
    np.testing.assert_array_equal(batch["is_last"][b].cpu().numpy(), is_real & (np.array(steps) == num_rows - 1))


STORAGES: dict[str, Callable[[int, str], Any]] = {
    "ring": lambda capacity, directory: RingBufferDataset(capacity),
    "list": lambda capacity, directory: ListDataset(capacity),
    "cuda": lambda capacity, directory: RingBufferDataset(capacity, device="cuda"),
} | {
    strategy.suffix: lambda capacity, directory, strategy=strategy: IndividualFileDataset(
        capacity, directory=f"{directory}/files", serialization_strategy=strategy, durability="rename"
    )
    for strategy in STRATEGIES
}
KINDS = [kind for kind in STORAGES if kind != "cuda" or torch.cuda.is_available()] + ["mixture"]


@contextmanager
def stored(kind: str, lengths: Sequence[int], capacity: int = 1000) -> Iterator[EpisodeSource]:
    """A source with tagged episodes of these lengths, numbered from 0; a mixture has every other one in each member."""
    with tempfile.TemporaryDirectory() as directory:
        if kind != "mixture":
            dataset = STORAGES[kind](capacity, directory)
            for number, length in enumerate(lengths):
                dataset.add_episode(tagged.episode(length, number))
            yield dataset
            return
        members = [STORAGES[name](capacity, directory) for name in ("ring", "list")]
        for number, length in enumerate(lengths):
            members[number % 2].add_episode(tagged.episode(length, number))
        members = [member for member in members if member.num_episodes]
        yield MixtureDataset(members, [1.0] * len(members))


EVERYTHING = ("index", "episode", "step", "is_first", "is_last", "mask")
PROPERTY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def padded(most: int) -> st.SearchStrategy[tuple[int, int, int]]:
    """T, pad_before, pad_after."""
    return st.integers(1, most).flatmap(
        lambda length: st.tuples(st.just(length), st.integers(0, length - 1), st.integers(0, length - 1))
    )


def place(batch: dict[str, Any], b: int) -> tuple[int, int]:
    """The number of the episode of a sequence, and where it begins, from its first real row."""
    t = int(batch["mask"][b].to(torch.int8).argmax())
    return int(batch["obs"]["state"][b, t, 1]), int(batch["step"][b, t]) - t


def live(dataset: Any) -> dict[int, int]:
    """The number of each stored episode, and its rows."""
    return dict(tagged.number_and_length(episode) for episode in dataset.episodes())
