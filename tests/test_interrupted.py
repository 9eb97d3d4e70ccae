"""Ctrl-C at every call and return inside of a draw and of an addition; with files, at one in so many.

An addition that it cuts off is there or it is not, no other episode is harmed, and nothing stays locked.
"""

from __future__ import annotations

import itertools
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from tests import tagged
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

    def __init__(self, source: Any) -> None:
        self.stream, self.ids = source.get_loader(8, 3, include=("episode", "step"), seed=0).stream, {}

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


def close(datasets: list[EpisodeDataset]) -> None:
    for dataset in datasets:
        if isinstance(dataset, IndividualFileDataset):
            dataset.close()


# What was cut off while it opened a file is closed by the collector, which says so.
FILES_STAY_OPEN = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


@FILES_STAY_OPEN
@pytest.mark.parametrize(
    ("kind", "num_before", "num_since", "every"),
    [("ring", 5, 0, 1), ("ring", 62, 2, 5), ("mixture", 5, 1, 3), ("file", 5, 1, 17)]
    + [pytest.param(kind, 5, 1, 1, marks=pytest.mark.slow) for kind in ("mixture", "file")],
)
def test_a_draw_cut_off_anywhere_harms_no_later_one(kind, num_before, num_since, every, tmp_path) -> None:
    def make(num_events: int) -> tuple[EpisodeDataset, Drawing]:
        dataset = make_dataset(kind.replace("mixture", "ring"), 1000, tmp_path / str(num_events))
        add(dataset, *range(num_before))
        drawing = Drawing(MixtureDataset([dataset], [1]) if kind == "mixture" else dataset)
        if num_since:  # What was counted for the first draw is counted on.
            drawing.check()
            add(dataset, *range(50, 50 + num_since))
        return dataset, drawing

    for dataset, drawing in each_cut(make, lambda made: made[1].stream.take(), every):
        drawing.check()
        in_a_thread(lambda dataset=dataset, drawing=drawing: (drawing.check(), add(dataset, *LATER)))
        drawing.check()
        assert numbers(dataset) == [*range(num_before), *range(50, 50 + num_since), *LATER]
        close([dataset])


@FILES_STAY_OPEN
@pytest.mark.parametrize(
    ("kinds", "every"),
    [("ring", 1), ("file", 23), ("ring+file", 41), ("file+ring", 41), ("ring+file+ring", 41)]
    + [
        pytest.param(kinds, 1, marks=pytest.mark.slow) for kinds in ("file", "ring+file", "file+ring", "ring+file+ring")
    ],
)
def test_an_addition_cut_off_anywhere_harms_no_other_episode(kinds, every, tmp_path) -> None:
    def make(num_events: int) -> tuple[list[EpisodeDataset], list[Drawing], list[int]]:
        directory = tmp_path / str(num_events)
        datasets = [
            make_dataset(kind, 23 if n == 0 else 400, directory / str(n)) for n, kind in enumerate(kinds.split("+"))
        ]
        for front, behind in reversed(list(itertools.pairwise(datasets))):
            front.extend(behind, other_batch_size=2, seed=0)
        add(datasets[0], *BEFORE)
        readers = [pickle.loads(pickle.dumps(dataset)) for dataset in datasets]
        drawings = [Drawing(source) for source in (*datasets, *readers)]
        for drawing in drawings:
            drawing.check()
        return datasets, drawings, numbers(datasets[-1])

    for datasets, drawings, stored in each_cut(make, lambda made: add(made[0][0], CUT), every):
        front, last = datasets[0], datasets[-1]
        found = numbers(last)
        others = [number for number in found if number != CUT]
        assert found in (others, [*others, CUT]), "it is there once, as the newest, or it is not"
        num_evicted = len(stored) - len(others)
        assert others == stored[num_evicted:] and num_evicted <= (front is last)
        assert set(numbers(front)) <= {*BEFORE, CUT}
        is_there = CUT in numbers(front), CUT in numbers(last)
        in_a_thread(lambda front=front: add(front, *LATER))
        for drawing in drawings:
            assert drawing.check() <= {*BEFORE, CUT, *LATER}
        assert set(LATER) <= set(numbers(front)) and numbers(last)[-2:] == list(LATER)
        close(datasets)
    assert is_there == (True, True), "where it was not cut off"
