"""Mistakes that the model of samplers must find, and those that other libraries have made."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.late import PriorityField
from buffers.sampler import EpisodeFilter, MixedSampler, RecencySampler, prioritized, priority_index
from buffers.sampler.priority_index import EpisodeIndex, WindowIndex
from tests import samplers_model as model
from tests.samplers_model import LENGTHS, Model, Shape, add, random_priorities

PRIORITIZED = ("prioritized", 1.0, 0.5)
HALF = ("mixed", ("prioritized", 1.0, 0.5), 0.5, "uniform", 0.5)


PADDED = Shape(5, 4, 3)


def check_changes(spec: Any = PRIORITIZED, shape: Shape = PADDED) -> None:
    """Batches before and after priorities change, and after a lap of the ring, are as the model says."""
    ring, sampler = RingBufferDataset(90), model.build(spec)
    for length in LENGTHS:
        add(ring, length)
    loader = ring.get_loader(500, sampler=sampler, include=model.EVERYTHING, seed=3, **shape.options)
    batches, given = iter(loader), dict[int, float]()
    check(batches, ring, given, spec, shape, sampler.beta)
    given |= random_priorities(ring)
    model.write(ring, given)
    check(batches, ring, given, spec, shape, sampler.beta)
    largest = max(given.values())
    for length in (12, 25, 4):
        add(ring, length)
        start = int(ring.table.starts[-1])
        given |= dict.fromkeys(range(start, start + length), largest)
    check(batches, ring, given, spec, shape, sampler.beta)


def check(batches: Any, ring: Any, given: dict[int, float], spec: Any, shape: Shape, beta: float | None) -> None:
    found = Model.of(ring, shape, given)
    expected = {(0, *window): share for window, share in found.distribution(spec).items()}
    counts: Counter[model.Window] = Counter()
    for batch in itertools.islice(batches, 12):
        counts.update(model.check_batch(batch, expected, beta, found.num_windows))
    model.assert_plausible(counts, expected)


def check_mixture() -> None:
    members = [RingBufferDataset(200), RingBufferDataset(200)]
    for member, lengths in zip(members, (LENGTHS, LENGTHS[:5]), strict=True):
        for length in lengths:
            add(member, length)
    priorities = [random_priorities(member, n) for n, member in enumerate(members)]
    model.check_draws(MixtureDataset(members, [0.3, 0.7]), HALF, Shape(5), priorities)


def weighed(priority: Callable[[np.ndarray, Any], float]) -> Callable[..., np.ndarray]:
    """`PriorityIndex.weights`, one window at a time."""

    def weights(self: Any, episode: np.ndarray, step: np.ndarray) -> np.ndarray:
        found = []
        for (start, num_rows, *_), first in zip(episode.tolist(), step.tolist(), strict=True):
            width = num_rows if isinstance(self, EpisodeIndex) else self._width
            ids = start + np.arange(max(first, 0), min(first + width, num_rows))
            rows = self.field.windows(ids, 1).ravel().astype(np.float64)
            found.append(priority(rows, self) ** self._alpha)
        return np.array(found)

    return weights


def of_rows(rows: np.ndarray, index: Any) -> float:
    return model.priority(rows, 1.0, index._eta)


def test_the_mutants_differ_from_this_by_one_mistake(monkeypatch) -> None:
    monkeypatch.setattr(WindowIndex, "weights", weighed(of_rows))
    check_changes()
    check_mixture()


def shifted(original: Any) -> Any:
    def windows(*arguments: Any) -> Any:
        found = original(*arguments)
        return found.shifted(1, found.length)

    return windows


def twice(values: np.ndarray, exponent: float) -> np.ndarray:
    return np.power(np.power(values, exponent, dtype=np.float64), exponent)


FILL = PriorityField.fill


def only_in_the_first_lap(self: Any, start: int, length: int) -> None:
    if start < self.num_rows:
        FILL(self, start, length)


OF_WINDOWS: dict[str, tuple[Any, str, Any]] = {
    "the priority of the first row alone": (WindowIndex, "weights", weighed(lambda rows, index: rows[0])),
    "the priority of the last row alone": (WindowIndex, "weights", weighed(lambda rows, index: rows[-1])),
    "the largest alone": (WindowIndex, "weights", weighed(lambda rows, index: rows.max())),
    "the mean alone": (WindowIndex, "weights", weighed(lambda rows, index: rows.mean())),
    "padding counts in the mean": (
        WindowIndex,
        "weights",
        weighed(lambda rows, index: index._eta * rows.max() + (1 - index._eta) * rows.sum() / index._width),
    ),
    "every proposal is accepted": (WindowIndex, "weights", lambda self, episode, step: np.full(len(step), 1e9)),
    "a window beyond the end": (prioritized, "_windows", shifted(prioritized._windows)),
    "a new row has the priority of the one that was there": (PriorityField, "fill", only_in_the_first_lap),
    "nobody is told of a change": (PriorityField, "note", lambda *_: None),
    "bounds stay as they are when a priority rises": (WindowIndex, "_bounds", None),
}


def stale_bounds(original: Any) -> Any:
    def bounds(self: Any, pieces: Any) -> np.ndarray:
        found, before = original(self, pieces), self.tree.weights.take(pieces.number)
        return np.where(before > 0, np.minimum(before, found), found)

    return bounds


@pytest.mark.parametrize("mutant", OF_WINDOWS)
def test_every_mistake_about_windows_is_found(mutant, monkeypatch) -> None:
    owner, name, mistake = OF_WINDOWS[mutant]
    check_changes()
    monkeypatch.setattr(owner, name, mistake or stale_bounds(WindowIndex._bounds))
    with pytest.raises((AssertionError, IndexError)):
        check_changes()


@pytest.mark.parametrize("shape", [Shape(), Shape(None), Shape(5)])
def test_an_exponent_that_is_applied_twice_is_found(shape, monkeypatch) -> None:
    spec = ("prioritized", 0.6, 0.5)
    check_changes(spec, shape)
    monkeypatch.setattr(priority_index, "_power", twice)
    with pytest.raises(AssertionError):
        check_changes(spec, shape)


def by_the_first(self: Any, table: Any, windows: Any) -> Any:
    return self._samplers[0].density(table, windows)


OF_WEIGHTS: dict[str, tuple[Any, str, Any]] = {
    "steps for windows": (EpisodeSource, "num_to_draw", lambda self, *_: self.num_timesteps),
    "one number of windows for all members": (EpisodeSource, "num_to_draw", lambda *_: 100),
    "by one of the samplers": (MixedSampler, "density", by_the_first),
    "by none": (MixedSampler, "density", lambda self, table, windows: np.ones(len(windows))),
}


@pytest.mark.parametrize("mutant", OF_WEIGHTS)
def test_every_mistake_about_weights_is_found(mutant, monkeypatch) -> None:
    check_mixture()
    monkeypatch.setattr(*OF_WEIGHTS[mutant])
    with pytest.raises(AssertionError, match="weight"):
        check_mixture()


def test_weights_that_forget_who_was_left_out_are_found(monkeypatch) -> None:
    spec = ("mixed", ("filter", PRIORITIZED), 0.5, "uniform", 0.5)
    check_changes(spec)
    monkeypatch.setattr(
        EpisodeFilter, "density", lambda self, table, windows: self.sampler.density(self._part(table), windows)
    )
    with pytest.raises((AssertionError, RuntimeWarning)):
        check_changes(spec)


def test_an_age_from_the_wrong_end_is_found(monkeypatch) -> None:
    check_changes(("recency", 20.0))
    draw = RecencySampler.draw

    def reversed_draw(self: Any, table: Any, num_windows: int, length: int, rng: Any) -> Any:
        found = draw(self, table, num_windows, length, rng)
        r = table.num_to_draw(length) - 1 - table.places_of(found, length)
        return table.windows_of(table.count_windows(length), r, length)

    monkeypatch.setattr(RecencySampler, "draw", reversed_draw)
    with pytest.raises(AssertionError):
        check_changes(("recency", 20.0))


# Faults that a user of TorchRL's buffers has met, each as it shows.


def drawn(priorities: list[list[float]], length: int, alpha: float = 1.0, eta: float = 0.5) -> Counter[tuple[int, int]]:
    """How often each (episode, start) is drawn of 20,000."""
    ring = RingBufferDataset(1000)
    loader = ring.get_loader(
        20_000, length, sampler=prioritized.PrioritizedSampler(alpha, eta=eta), include=("episode", "step"), seed=0
    )
    for rows in priorities:
        ring.add_episode({"x": np.arange(len(rows))})
    ring.update(np.arange(ring.num_timesteps), {"priority": np.concatenate(priorities).astype(np.float32)})
    return Counter((e, s) for _, e, s in model.places(next(iter(loader))))


def test_steps_near_the_end_of_an_episode_are_drawn() -> None:
    # Where a draw by priority names a step and a window is put behind it, the last T - 1 steps never begin one.
    found = drawn([[1, 1, 1, 1, 9], [1, 1, 1, 1, 9]], length=3)
    assert {(0, 2), (1, 2)} <= found.keys()
    assert found[0, 2] > 2 * found[0, 0]


def test_no_window_crosses_into_the_next_episode() -> None:
    found = drawn([[1, 1, 100], [100, 1, 1], [100, 100]], length=2)
    assert found.keys() == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)}


def test_alpha_is_applied_once() -> None:
    found = drawn([[1.0], [100.0]], length=1, alpha=0.5)
    assert found[1, 0] / found[0, 0] == pytest.approx(10.0, rel=0.1)  # 100 ** 0.25 would be 3.


def test_the_priority_of_every_row_of_a_window_counts() -> None:
    found = drawn([[1, 1, 1, 50], [50, 1, 1, 1], [1, 1, 1, 1]], length=4, eta=0.9)
    assert found[0, 0] == pytest.approx(found[1, 0], rel=0.1)
    assert found[0, 0] / found[2, 0] == pytest.approx(0.9 * 50 + 0.1 * 53 / 4, rel=0.25)


def test_an_episode_that_is_too_short_takes_no_share() -> None:
    assert drawn([[1000.0], [1, 1, 1]], length=3).keys() == {(1, 0)}
