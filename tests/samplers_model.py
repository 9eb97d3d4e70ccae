"""The reference model of samplers: every window with its probability, one at a time, from the rows of a dataset."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.evictor import Evictor
from buffers.sampler import (
    EpisodeFilter,
    MixedSampler,
    PrioritizedSampler,
    RecencySampler,
    Sampler,
    UniformEpisodeSampler,
    UniformSampler,
)
from tests import tagged
from tests.list_dataset import ListDataset

Window = tuple[int, int, int]  # (member of a mixture, episode id, step of its first row)
#: "uniform", "episodes", ("recency", half_life), ("prioritized", alpha, eta), ("filter", spec), or ("mixed", spec,
#: share, spec, share, ...).
Spec = Any
EVERYTHING = ("index", "episode", "step", "mask", "weight")


def build(spec: Spec) -> Sampler:
    """The sampler that a spec stands for."""
    kind, *arguments = (spec,) if isinstance(spec, str) else spec
    if kind == "mixed":
        pairs = zip(arguments[::2], arguments[1::2], strict=True)
        return MixedSampler({build(part): share for part, share in pairs})
    if kind == "filter":
        return EpisodeFilter(build(arguments[0]), is_accepted)
    if kind == "prioritized":
        return PrioritizedSampler(*arguments[:1], eta=arguments[1], beta=0.7)
    kinds = {"uniform": UniformSampler, "episodes": UniformEpisodeSampler, "recency": RecencySampler}
    return kinds[kind](*arguments)  # type: ignore[abstract]


def is_accepted(info: dict[str, Any]) -> bool:
    return bool(info.get("ok", False))


@dataclass(frozen=True)
class Shape:
    """The windows that are asked for."""

    length: int | None = 1
    before: int = 0
    after: int = 0
    offsets: bool = False  # Then each row is an anchor.

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `get_loader`."""
        if self.offsets:
            return {"offsets": {"x": (-2, 0, 1)}}
        return {"sequence_length": self.length, "pad_before": self.before, "pad_after": self.after}

    def starts(self, num_rows: int) -> range:
        if self.offsets:
            return range(num_rows)
        if self.length is None:
            return range(1)
        return range(-self.before, num_rows - self.length + self.after + 1)

    def rows(self, start: int, num_rows: int) -> slice:
        """The real rows of a window that count."""
        length = num_rows if self.length is None else 1 if self.offsets else self.length
        return slice(max(start, 0), min(start + length, num_rows))


@dataclass
class Model:
    """One dataset: its live episodes, oldest first, with the priorities of their rows."""

    shape: Shape
    episodes: list[tuple[int, np.ndarray, bool]] = field(default_factory=list)  # id, priorities (L,), is accepted

    @staticmethod
    def of(dataset: Any, shape: Shape, priorities: Mapping[int, float] | None = None) -> Model:
        """From the table of a dataset, and priorities by step id (1 where there is none)."""
        given = priorities or {}
        episodes = []
        for start, length, episode_id, _ in dataset.table.rows.tolist():
            rows = np.array([given.get(start + t, 1.0) for t in range(length)], np.float64)
            episodes.append((episode_id, rows, is_accepted(dataset.episode_info(episode_id))))
        return Model(shape, episodes)

    @property
    def num_windows(self) -> int:
        return sum(len(self.shape.starts(len(rows))) for _, rows, _ in self.episodes)

    def distribution(self, spec: Spec) -> dict[tuple[int, int], float]:
        """(episode id, start) -> probability, in the order of episodes and steps; {} where there is none."""
        kind, *arguments = (spec,) if isinstance(spec, str) else spec
        if kind == "filter":
            return replace(self, episodes=[e for e in self.episodes if e[2]]).distribution(arguments[0])
        if kind == "mixed":
            shares = np.array(arguments[1::2], np.float64)
            found: Counter[tuple[int, int]] = Counter()
            for part, share in zip(arguments[::2], shares / shares.sum(), strict=True):
                for window, probability in self.distribution(part).items():
                    found[window] += share * probability
            return found
        weights = {}
        for number, rows, _ in self.episodes:
            starts = self.shape.starts(len(rows))
            for start in starts:
                weights[number, start] = 1 / len(starts) if kind == "episodes" else 1.0
                if kind == "prioritized":
                    weights[number, start] = priority(rows[self.shape.rows(start, len(rows))], *arguments)
        if kind == "recency":
            newest = len(weights) - 1
            weights = {window: 2.0 ** ((n - newest) / arguments[0]) for n, window in enumerate(weights)}
        total = sum(weights.values())
        return {window: weight / total for window, weight in weights.items()} if total else {}


def priority(rows: np.ndarray, alpha: float, eta: float) -> float:
    return float(eta * rows.max() + (1 - eta) * rows.mean()) ** alpha


def joined(models: list[Model], shares: list[float], spec: Spec) -> dict[Window, float]:
    """Of a mixture: each member's distribution, in its share."""
    return {
        (n, *window): share / sum(shares) * probability
        for n, (model, share) in enumerate(zip(models, shares, strict=True))
        for window, probability in model.distribution(spec).items()
    }


def places(batch: Mapping[str, Any]) -> list[Window]:
    """The window of each sequence of a batch."""
    steps, sources = batch["step"].numpy(), batch.get("source")
    t = (steps >= 0).argmax(1)
    starts = steps[np.arange(len(steps)), t] - t
    members = [0] * len(steps) if sources is None else sources.tolist()
    return list(zip(members, batch["episode"].tolist(), starts.tolist(), strict=True))


def check_batch(
    batch: Mapping[str, Any], expected: Mapping[Window, float], beta: float | None, num: int
) -> list[Window]:
    """Every window is one that can be drawn, and has the weight of the definition; returns the windows."""
    found = places(batch)
    strangers = [window for window in found if not expected.get(window)]
    assert not strangers, f"drawn with probability 0: {strangers[:3]}"
    weights = np.ones(len(found))
    if beta is not None:
        weights = np.array([(num * expected[window]) ** -beta for window in found])
        weights /= weights.max()
    np.testing.assert_allclose(batch["weight"].numpy(), weights, rtol=2e-4, err_msg="weight")
    return found


def check_draws(source: Any, spec: Spec, shape: Shape, priorities: Any = None, num: int = 12_000, **more: Any) -> None:
    """Windows come as the model says: each batch by its windows and weights, all together by chi-square."""
    sampler = build(spec)
    is_mixture = isinstance(source, MixtureDataset)
    include = (*EVERYTHING, "source") if is_mixture else EVERYTHING
    loader = source.get_loader(400, sampler=sampler, include=include, seed=7, **shape.options, **more)
    write(source, priorities)
    members = source.datasets if is_mixture else [source]
    given = priorities if is_mixture else [priorities]
    models = [Model.of(m, shape, p) for m, p in zip(members, given or [None] * len(members), strict=True)]
    expected = joined(models, source.weights.tolist() if is_mixture else [1.0], spec)
    counts: Counter[Window] = Counter()
    for batch in itertools.islice(loader, num // 400):
        counts.update(check_batch(batch, expected, sampler.beta, sum(model.num_windows for model in models)))
    assert_plausible(counts, expected)


def assert_plausible(counts: Mapping[Window, int], expected: Mapping[Window, float]) -> None:
    """Chi-square, with all windows that are expected fewer than 8 times in one bin."""
    num = sum(counts.values())
    rare = [window for window, probability in expected.items() if probability * num < 8]
    often = [window for window in expected if expected[window] * num >= 8]
    found = np.array([*(counts.get(window, 0) for window in often), sum(counts.get(window, 0) for window in rare)])
    probabilities = np.array([*(expected[window] for window in often), sum(expected[window] for window in rare)])
    if probabilities[-1] * num < 8:
        found, probabilities = found[:-1], probabilities[:-1]
    if len(found) > 1:
        is_plausible = tagged.chi_square_is_plausible(found, probabilities)
        assert is_plausible, f"drawn {found[:40]}, expected {probabilities[:40] * num}"


def write(source: Any, priorities: Any) -> None:
    """Give steps their priorities; of a mixture, a dict for each member."""
    for member, given in zip(getattr(source, "datasets", [source]), _listed(source, priorities), strict=True):
        if given and member.late:
            ids, values = np.array(list(given)), np.array(list(given.values()), np.float32)
            assert member.update(ids, {"priority": values}) == 0


def _listed(source: Any, priorities: Any) -> list[Any]:
    num = len(getattr(source, "datasets", [source]))
    return [None] * num if priorities is None else priorities if num > 1 else [priorities]


def random_priorities(dataset: Any, seed: int = 0, zeros: float = 0.1) -> dict[int, float]:
    """Of all steps, over six orders of magnitude, some 0; as float32 keeps them."""
    rng, found = np.random.default_rng(seed), {}
    for start, length, *_ in dataset.table.rows.tolist():
        values = (10.0 ** rng.uniform(-3, 3, length)).astype(np.float32)
        values[rng.random(length) < zeros] = 0
        found |= dict(zip(range(start, start + length), values.astype(np.float64).tolist(), strict=True))
    return found


class RandomEvictor(Evictor):
    """Any episode."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def evict(self, dataset: Any) -> int:
        return int(self._rng.integers(dataset.num_episodes))


def add(dataset: EpisodeDataset, length: int) -> int:
    """An episode; two of three are accepted by a filter."""
    return dataset.add_episode({"x": np.arange(length)}, info={"ok": dataset.table.next_id % 3 != 1})


KINDS = ["ring", "files", "files, any evicted", "list", "mixture"]
LENGTHS = [9, 3, 20, 1, 7, 2, 30, 5, 17, 11, 4, 1, 19]


@contextmanager
def stored(kind: str, directory: Path, lengths: list[int] = LENGTHS, capacity: int = 90) -> Iterator[Any]:
    """A source that has evicted some of its episodes."""
    if kind == "mixture":
        with stored("ring", directory, lengths) as ring, stored("list", directory, lengths[::2]) as others:
            yield MixtureDataset([ring, others], [0.3, 0.7])
        return
    evictor = RandomEvictor() if "any" in kind else None
    dataset: EpisodeDataset
    if "files" in kind:
        dataset = IndividualFileDataset(capacity, evictor=evictor, directory=directory / "files", durability="rename")
    else:
        dataset = (RingBufferDataset if "ring" in kind else ListDataset)(capacity, evictor=evictor)
    for length in lengths:
        add(dataset, length)
    yield dataset
