"""Ctrl-C at every call and return inside of a draw and of an addition; with files, at one in so many.

An addition that it cuts off is there or it is not, no other episode is harmed, and nothing stays locked.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from tests import reading, tagged
from tests.tagged import numbers

BEFORE, CUT, LATER = range(8), 100, (101, 102)


def is_cut_off(function: Callable[[], object], num_events: int) -> bool:
    """Whether Ctrl-C at the n-th call or return inside of a function, of Python or of C, came before its end."""
    left = num_events

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        # Between the end of a `with` and the exit of a lock, which is C, Python handles no signal.
        left -= not (event == "c_call" and argument.__name__ == "__exit__")
        if left == 0:
            raise KeyboardInterrupt

    try:
        sys.setprofile(profile)
        try:
            function()
        finally:
            sys.setprofile(None)
    except KeyboardInterrupt:
        return True
    return left <= 0  # It came, and the collector passed over it.


def each_cut(make: Callable[[int], Any], action: Callable[[Any], object], every: int) -> Iterator[Any]:
    """What `make` makes, after `action` on it was cut off, at one in `every` events; the last time it was not."""
    for num_events in range(1, 6000, every):
        made = make(num_events)
        cut_off = is_cut_off(lambda made=made: action(made), num_events)
        yield made
        if not cut_off:
            assert num_events > 100, "it was hardly ever cut off"
            return
    raise AssertionError("It never came to its end.")


def in_a_thread(action: Callable[[], object]) -> None:
    """Only another thread notices that a lock is still held by this one."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "a lock is still held"


class Drawing:
    """Draws from a source, and remembers which episode had which id."""

    def __init__(self, source: Any, length: int = 3) -> None:
        self.stream, self.ids = source.get_loader(8, length, include=("episode", "step"), seed=0).stream, {}

    def check(self) -> set[int]:
        """The numbers of the episodes drawn, after checking that each sequence is whole and of the episode it says."""
        batch = self.stream.batch(self.stream.position)
        self.stream.position += 1
        origins = tagged.origins(batch)
        assert [first for _, _, first, _ in origins] == batch["step"][:, 0].tolist()
        for (_, number, _, _), episode_id in zip(origins, batch["episode"].tolist(), strict=True):
            assert self.ids.setdefault(episode_id, number) == number, "another episode has this id"
        return {number for _, number, _, _ in origins}


def make_dataset(kind: str, capacity: int, directory: Path) -> EpisodeDataset:
    if kind == "ring":
        return RingBufferDataset(capacity)
    return IndividualFileDataset(capacity, directory=directory, durability="rename")


def add(dataset: EpisodeDataset, *numbers: int) -> None:
    for number in numbers:
        dataset.add_episode(tagged.episode(3 + number % 5, number))


class Chain:
    """Datasets that extend one another, and all who draw from them: before and after two episodes more were added."""

    def __init__(self, kinds: str, directory: Path) -> None:
        self.datasets = [
            make_dataset(kind, 31 if n == 0 else 400, directory / str(n)) for n, kind in enumerate(kinds.split("+"))
        ]
        self.front, self.last = self.datasets[0], self.datasets[-1]
        for front, behind in reversed(list(itertools.pairwise(self.datasets))):
            front.extend(behind, other_batch_size=2, seed=0)
        add(self.front, *BEFORE[:-2])
        readers = [reading.reader_of(dataset) for dataset in self.datasets]
        self.drawings = [Drawing(source) for source in (*self.datasets, *readers)]
        for drawing in self.drawings:
            drawing.check()
        add(self.front, *BEFORE[-2:])
        # Windows of 2 steps were not counted before.
        self.drawings.append(Drawing(MixtureDataset([self.front], [1]), 2))
        self.stored = numbers(self.last)

    def add(self) -> None:
        add(self.front, CUT)

    def draw(self) -> None:
        self.drawings[0].stream.take()

    def draw_from_mixture(self) -> None:
        self.drawings[-1].stream.take()

    def check(self) -> tuple[bool, bool]:
        """Whether the episode is in the front and in the last, after checking that all else is as it should be."""
        found = numbers(self.last)
        others = [number for number in found if number != CUT]
        assert found in (others, [*others, CUT]), "it is there once, as the newest, or it is not"
        num_evicted = len(self.stored) - len(others)
        assert others == self.stored[num_evicted:] and num_evicted <= (self.front is self.last)
        assert set(numbers(self.front)) <= {*BEFORE, CUT}
        is_there = CUT in numbers(self.front), CUT in found
        in_a_thread(lambda: add(self.front, *LATER))
        for drawing in self.drawings:
            assert drawing.check() <= {*BEFORE, CUT, *LATER}
        assert set(LATER) <= set(numbers(self.front)) and numbers(self.last)[-2:] == list(LATER)
        for dataset in self.datasets:
            if isinstance(dataset, IndividualFileDataset):
                dataset.close()
        return is_there


# What was cut off while it opened a file is closed by the collector, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("kinds", "action", "every"),
    [
        ("ring", Chain.draw, 3),
        ("ring", Chain.draw_from_mixture, 7),
        ("file", Chain.draw, 17),
        ("ring", Chain.add, 3),
        ("file", Chain.add, 29),
        ("ring+file", Chain.add, 71),
        ("file+ring", Chain.add, 71),
        ("ring+file+ring", Chain.add, 71),
        pytest.param("ring", Chain.draw, 1, marks=pytest.mark.slow),
        pytest.param("ring", Chain.add, 1, marks=pytest.mark.slow),
        pytest.param("file", Chain.draw, 1, marks=pytest.mark.slow),
        pytest.param("file", Chain.add, 1, marks=pytest.mark.slow),
        pytest.param("ring+file", Chain.add, 1, marks=pytest.mark.slow),
        pytest.param("file+ring", Chain.add, 1, marks=pytest.mark.slow),
        pytest.param("ring+file+ring", Chain.add, 1, marks=pytest.mark.slow),
    ],
)
def test_what_is_cut_off_anywhere_harms_no_other_episode(kinds, action, every, tmp_path) -> None:
    is_there = False, False
    for chain in each_cut(lambda num_events: Chain(kinds, tmp_path / str(num_events)), action, every):
        is_there = chain.check()
    assert is_there == (action is Chain.add, action is Chain.add), "where it was not cut off"
