"""Samplers after Ctrl-C, refused states, wrong densities, and batches that are drawn again: all is as it should be."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.fields import Scalar
from buffers.late import LateFields
from buffers.loading.stream import SequenceStream
from buffers.sampler import EpisodeFilter, MixedSampler, OnlineSampler, PrioritizedSampler, UniformSampler, Windows
from buffers.sampler.priority_index import WindowIndex
from buffers.sampler.sum_tree import SumTree
from buffers.table import NO, UNKNOWN, YES, EpisodeTable, PartTable
from tests.test_interrupted import each_cut, is_cut_off

# Ctrl-C.


def test_a_part_that_was_cut_off_has_each_episode_once() -> None:
    known = np.array([YES, NO, YES, YES, NO, YES, UNKNOWN, YES], np.int8)
    for num_events in itertools.count(1):
        table, part = EpisodeTable(), PartTable(known.__getitem__, "empty")
        for length in (3, 4, 5):
            table.append(length)
        part.show(table)
        for length in (6, 7, 8, 9, 10):
            table.append(length)
        table.remove(0)
        cut_off = is_cut_off(lambda part=part, table=table: part.show(table), num_events)
        part.show(table)
        assert part.ids.tolist() == [2, 3, 5] and part.lengths.tolist() == [5, 6, 8]
        if not cut_off:
            break
    assert num_events > 10, "it was hardly ever cut off"


class Prioritized:
    """A ring whose priorities and episodes have changed; since the last draw, if that is not the last."""

    def __init__(self, length: int | None, has_drawn: bool) -> None:
        self.ring, self.length = RingBufferDataset(200), length
        for num_rows in (30, 9, 60, 4):
            self.ring.add_episode({"x": np.zeros(num_rows)})
        self.rng = np.random.default_rng(0)
        self.stream = self.new_stream()
        self.update()
        self.stream.take()
        self.update()
        self.ring.evict_episode(0)
        self.ring.add_episode({"x": np.zeros(50)})
        if has_drawn:
            self.draw()

    def new_stream(self) -> SequenceStream:
        sampler = PrioritizedSampler(1.0, beta=1.0)
        return self.ring.get_loader(256, self.length, sampler=sampler, include=("index", "weight"), seed=0).stream

    def update(self) -> None:
        table = self.ring.table
        ids = np.arange(table.oldest_start, table.next_start)
        self.ring.update(ids, {"priority": self.rng.exponential(size=len(ids)).astype(np.float32)})

    def draw(self) -> None:
        self.stream.batch(self.stream.position)

    def check(self) -> None:
        """Whoever looks at all priorities anew draws the same."""
        anew, position = self.new_stream(), self.stream.position
        self.stream.batch(position), anew.batch(position)
        table = self.ring.table
        # Pieces have other numbers there, so the same random numbers may stand for other windows.
        index, other = (stream.drawer.samplers[0]._indexes.popitem()[1] for stream in (self.stream, anew))
        np.testing.assert_allclose(_weights(index, table), _weights(other, table))
        assert index.total(table) == pytest.approx(other.total(table))
        np.testing.assert_allclose(index.tree.total(), other.tree.total())
        assert index.field.largest >= index.field.windows(np.arange(table.oldest_start, table.next_start), 1).max()


def _weights(index: Any, table: EpisodeTable) -> np.ndarray:
    """Of all pieces, in the order of episodes."""
    begin, end = index._count(table).bounds
    return index.tree.weights[begin:end]


@pytest.mark.parametrize("action", [Prioritized.draw, Prioritized.update])
@pytest.mark.parametrize(("length", "every"), [(1, 2), (5, 3), (None, 2), pytest.param(5, 1, marks=pytest.mark.slow)])
def test_what_is_cut_off_leaves_priorities_as_they_are_given(action, length, every) -> None:
    for made in each_cut(lambda _: Prioritized(length, action is Prioritized.update), action, every):
        made.check()


# States.


def test_a_state_that_one_sampler_refuses_changes_none() -> None:
    def mixed() -> MixedSampler:
        return MixedSampler({PrioritizedSampler(beta=0.1): 0.5, OnlineSampler(PrioritizedSampler(beta=0.2)): 0.5})

    mixture = MixtureDataset([RingBufferDataset(100), RingBufferDataset(100)], [0.5, 0.5])
    for member in mixture.datasets:
        member.add_episode({"x": np.zeros(20)})
    loader = mixture.get_loader(4, 2, sampler=mixed(), seed=0)
    for member in mixture.datasets:
        member.add_episode({"x": np.zeros(20)})
    next(iter(loader))
    good = loader.state_dict()
    assert [[part["beta"] for part in (a, b["then"])] for a, b in (s["samplers"] for s in good["samplers"])] == [
        [0.1, 0.2],
        [0.1, 0.2],
    ]
    changed = {"beta": 0.9}, {"episode": 1, "window": 1, "then": {"beta": 0.8}}
    for bad in ({"beta": -1.0}, {"beta": 0.9, "more": 1}, {}):
        wrong = {"shares": [0.1, 0.9], "samplers": [changed[0], {**changed[1], "then": bad}]}
        right = {"shares": [0.2, 0.8], "samplers": list(changed)}
        for samplers in ([right, wrong], [wrong, right]):
            with pytest.raises(ValueError, match="`beta` must be|The state is not one"):
                loader.load_state_dict({"position": 7, "seed": 3, "samplers": samplers})
            assert loader.state_dict() == good
            assert loader.stream.counters["first"][0] != 7


@pytest.mark.parametrize("of", ["shares", "weights"])
def test_numbers_that_are_looked_at_cannot_be_set_one_by_one(of) -> None:
    ring = RingBufferDataset(10)
    owner: Any = MixtureDataset([ring, RingBufferDataset(10)], [1, 3])
    if of == "shares":
        owner = MixedSampler({UniformSampler(): 1, PrioritizedSampler(): 3})
    with pytest.raises(ValueError, match="read-only"):
        getattr(owner, of)[0] = 1.0
    assert getattr(owner, of).tolist() == [0.25, 0.75]
    given = np.array([1.0, 1.0])
    setattr(owner, of, given)
    assert given.tolist() == [1, 1] and getattr(owner, of).tolist() == [0.5, 0.5]


# Bad input.


class _Dense(UniformSampler):
    """Gives windows this density."""

    beta = 1.0

    def __init__(self, density: Callable[[int], Any]) -> None:
        self.make = density

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        windows = super().draw(table, num_windows, length, rng)
        windows.density = self.make(num_windows)
        return windows


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (lambda num: np.ones(num - 1), r"density of shape \(3,\), expected \(4,\)"),
        (lambda num: np.ones((num, 1)), r"density of shape \(4, 1\), expected \(4,\)"),
        (lambda num: np.full(num, np.nan), "_Dense drew windows whose density is not finite"),
        (lambda num: np.full(num, np.inf), "_Dense drew windows whose density is not finite"),
    ],
)
def test_a_wrong_density_is_an_error(density, message) -> None:
    ring = RingBufferDataset(100)
    ring.add_episode({"x": np.zeros(20)})
    with pytest.raises(ValueError, match=message):
        ring.get_loader(4, 2, sampler=_Dense(density), include=("weight",)).stream.take()


def test_values_that_are_no_dict_are_refused() -> None:
    ring = RingBufferDataset(100)
    ring.add_late_field("v", Scalar())
    ring.add_episode({"x": np.zeros(20)})
    with pytest.raises(TypeError, match="must be a dict from late fields to arrays, found list"):
        ring.update([0, 1], [0.0, 1.0])  # type: ignore[arg-type]


def _add_field(ring: RingBufferDataset, connection: Connection) -> None:
    try:
        ring.add_late_field("w", Scalar())
        connection.send("it could")
    except RuntimeError as error:
        connection.send(str(error))


@pytest.mark.filterwarnings("ignore:This process .* multi-threaded")
def test_only_the_process_that_made_a_dataset_adds_a_late_field() -> None:
    ring = RingBufferDataset(100)
    ring.add_late_field("v", Scalar())
    context: Any = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_add_field, args=(ring, theirs), daemon=True)
    process.start()
    assert "Only the process that made the dataset can add a late field, such as `w`" in mine.recv()
    process.join()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: MixedSampler({s: 1.0}), lambda s: EpisodeFilter(s, all)])
def test_single_sequences_are_not_counted_as_batches(wrap) -> None:
    with pytest.raises(ValueError, match="counts batches of windows: use it with `get_loader`"):
        RingBufferDataset(100).sequences(2, sampler=wrap(OnlineSampler()))


@pytest.mark.parametrize("length", [1, None])
def test_a_window_of_priority_0_that_rounding_brings_is_not_taken(length, monkeypatch) -> None:
    ring, locate = RingBufferDataset(100), SumTree.locate
    for _ in range(4):
        ring.add_episode({"x": np.zeros(1)})
    stream = ring.get_loader(64, length, sampler=PrioritizedSampler(), include=("index",), seed=0).stream
    ring.update([0, 1, 2, 3], {"priority": [0.0, 1.0, 1.0, 1.0]})

    def rounded(self: SumTree, u: np.ndarray) -> Any:
        numbers: Any = locate(self, u)
        numbers[0] = 0
        return numbers

    monkeypatch.setattr(SumTree, "locate", lambda self, u: rounded(self, u) if len(u) > 1 else locate(self, u))
    assert set(stream.take()["index"].flatten().tolist()) == {1, 2, 3}


# Episodes that other processes add, and that leave.


@pytest.mark.parametrize(
    "make", [PrioritizedSampler, lambda: EpisodeFilter(PrioritizedSampler(), lambda info: info.get("ok", False))]
)
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This process .* multi-threaded")
def test_a_reader_of_files_sees_what_their_writer_adds(make, num_workers, tmp_path) -> None:
    with IndividualFileDataset(1000, directory=tmp_path, durability="rename") as writer:
        writer.add_episode({"x": np.zeros(10)}, info={"ok": True})
        reader = IndividualFileDataset(directory=tmp_path, mode="r")
        loader = reader.get_loader(64, 2, num_workers=num_workers, sampler=make(), include=("episode",), seed=0)
        batches, found, deadline = iter(loader), set[int](), time.monotonic() + 60
        assert set(next(batches)["episode"].tolist()) == {0}
        for number in range(1, 5):
            writer.add_episode({"x": np.zeros(10)}, info={"ok": number % 2 == 0})
        expected = {0, 2, 4} if isinstance(loader.stream.sampler, EpisodeFilter) else {0, 1, 2, 3, 4}
        while found != expected and time.monotonic() < deadline:
            found |= set(next(batches)["episode"].tolist())
        assert found == expected
        del batches


def test_new_rows_of_another_process_have_priorities_whoever_looked_before() -> None:
    def make(_: int) -> tuple[EpisodeTable, LateFields, WindowIndex]:
        table = EpisodeTable()
        late = LateFields(1000, False, torch.device("cpu"), table)
        index = WindowIndex(late.add_priorities("max", table), 1.0, 0.9, 2, None)
        for length in (10, 20, 30):
            table.append(length)
        index.follow(table)  # As a worker may, before the rows hold their priority.
        assert index.total(table) == 0
        return table, late, index

    for table, late, index in each_cut(make, lambda made: made[1].follow(made[0]), 1):
        late.follow(table)
        index.follow(table)
        assert index.total(table) == pytest.approx(9 + 19 + 29)


@pytest.mark.parametrize("num_new", [4, 2])
def test_a_new_window_that_has_left_is_replaced_with_its_weight(num_new, monkeypatch) -> None:
    ring = RingBufferDataset(40)
    for _ in range(2):
        ring.add_episode({"x": np.zeros(8)})
    sampler = OnlineSampler(PrioritizedSampler(1.0, beta=1.0))
    stream = ring.get_loader(4, 1, sampler=sampler, include=("index", "weight"), seed=0).stream
    ring.update(np.arange(16), {"priority": np.full(16, 100.0)})
    ring.add_episode({"x": np.zeros(num_new)})
    ring.update(np.arange(16, 16 + num_new), {"priority": np.ones(num_new)})
    read, num_reads = SequenceStream._read, 0

    def read_without_the_first(self: SequenceStream, windows: Windows) -> Any:
        nonlocal num_reads
        rows, _ = read(self, windows)
        num_reads += 1
        was_read = np.ones(len(windows), np.bool_)
        was_read[0] = num_reads > 1
        return rows, was_read

    monkeypatch.setattr(SequenceStream, "_read", read_without_the_first)
    batch = stream.take()
    index, weights = batch["index"][:, 0].numpy(), batch["weight"].numpy()
    assert num_reads == 2 and index[1:num_new].tolist() == list(range(17, 16 + num_new))
    # New windows weigh as uniform ones. Relative to those, ones of priority p are drawn so often:
    density = np.where(index < 16, 100.0, 1.0) * (16 + num_new) / (1600 + num_new)
    density[1:num_new] = 1.0
    expected = density.min() / density
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert stream.drawer.samplers[0].num_missed == 1
