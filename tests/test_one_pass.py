"""One pass: every window once, shared out among workers and ranks, over one part of the episodes or all."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.loading.randomness import BatchRandom
from buffers.table import EpisodeTable, PartTable, Split
from tests import tagged
from tests import windows_model as model
from tests.list_dataset import ListDataset
from tests.windows_model import EVERYTHING, LENGTHS, PROPERTY, padded, place


@given(LENGTHS, padded(9), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**70))
@PROPERTY
def test_stride_takes_every_so_many_th_start_of_an_episode(lengths, shape, stride, batch_size, world, seed) -> None:
    length, before, after = shape
    expected = {
        (number, first)
        for number, num in enumerate(lengths)
        for first in model.starts(length, num, before, after)[::stride]
    }
    options: dict[str, Any] = {"pad_before": before, "pad_after": after, "include": EVERYTHING, "seed": seed}
    options |= {"epochs": 2, "stride": stride, "world_size": world}
    with model.stored("ring", lengths) as ring:
        if not expected:
            return
        passes: list[list[Any]] = [[], []]
        for rank in range(world):
            loader = ring.get_loader(batch_size, length, rank=rank, **options)
            batches = list(loader)
            assert len(batches) == len(loader) and all(len(batch["step"]) for batch in batches)
            for k, batch in enumerate(batches):
                passes[k >= len(batches) // 2] += [place(batch, b) for b in range(len(batch["step"]))]
        for found in passes:
            assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["ring", ".safetensors", "mixture"])
def test_workers_share_a_pass_and_it_goes_on_after_a_restart(kind, num_workers) -> None:
    options: dict[str, Any] = {"epochs": 2, "seed": 1, "include": EVERYTHING, "num_workers": num_workers}
    options["persistent_workers"] = num_workers > 0
    with model.stored(kind, [5, 3, 9, 1, 4]) as dataset:
        expected = sorted((number, first) for number, num in enumerate([5, 3, 9, 1, 4]) for first in range(num - 1))
        loader = dataset.get_loader(4, 2, **options)
        assert len(loader) == 10
        whole = [[place(batch, b) for b in range(len(batch["step"]))] for batch in loader]
        assert [sorted(sum(whole[k : k + 5], [])) for k in (0, 5)] == [expected] * 2
        assert loader.state_dict()["position"] == 10
        assert whole[:5] != whole[5:]
        again = [[place(batch, b) for b in range(len(batch["step"]))] for batch in loader]
        assert sorted(sum(again, [])) == sorted(expected * 2) and again[:5] not in (whole[:5], whole[5:])
        # Another, which stops and goes on elsewhere.
        first, second = (dataset.get_loader(4, 2, **options) for _ in range(2))
        begun = [[place(batch, b) for b in range(len(batch["step"]))] for batch in itertools.islice(first, 3)]
        second.load_state_dict(first.state_dict())
        assert begun + [[place(batch, b) for b in range(len(batch["step"]))] for batch in second] == whole
        assert len(second) == 10


def test_a_pass_is_over_what_was_stored_when_it_began() -> None:
    ring = RingBufferDataset(20)
    for number in range(3):
        ring.add_episode(tagged.episode(5, number))
    loader = ring.get_loader(2, 3, epochs=1, seed=0, include=EVERYTHING)
    found = []
    for batch in loader:
        found += [place(batch, b)[0] for b in range(len(batch["step"]))]
        if len(found) == 2:
            ring.add_episode(tagged.episode(5, 3))
    assert sorted(found) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(loader) == 6
    batches = iter(loader)
    next(batches)
    ring.add_episode(tagged.episode(5, 4))
    with pytest.raises(RuntimeError, match="Episodes were evicted during the pass"):
        list(batches)
    with pytest.raises(RuntimeError, match="Of 12 windows of this pass, 9 are left"):
        iter(loader)
    assert len(list(loader)) == 6, "the next iteration begins another pass"


def test_a_resumed_pass_whose_episodes_are_gone_says_so() -> None:
    ring = RingBufferDataset(10)
    ring.add_episode(tagged.episode(5, 0))
    loader = ring.get_loader(2, 3, epochs=1)
    next(iter(loader))
    state = loader.state_dict()
    for number in (1, 2):
        ring.add_episode(tagged.episode(5, number))
    other = ring.get_loader(2, 3, epochs=1)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Of 3 windows of this pass, 0 are left"):
        next(iter(other))


def spoiled(batches: Any) -> Counter[tuple[int, int]]:
    """The windows of batches, each checked to be one of its episode, without padding."""
    return Counter((number, first) for batch in batches for _, number, first, _ in tagged.origins(batch))


def test_a_pass_after_one_that_lost_episodes_has_an_order_of_its_own() -> None:
    ring = RingBufferDataset(400)
    for number in range(40):
        ring.add_episode(tagged.episode(10, number))
    loader = ring.get_loader(8, 3, epochs=1, seed=0)
    next(iter(loader))
    ring.add_episode(tagged.episode(2, 40))
    with pytest.raises(RuntimeError, match="Of 320 windows of this pass, 312 are left"):
        iter(loader)
    assert spoiled(loader) == Counter((number, first) for number in range(1, 40) for first in range(8))


def test_a_pass_of_a_loaded_state_has_the_order_of_that_seed() -> None:
    with model.stored("ring", [9, 9, 9]) as ring:
        one, other = (ring.get_loader(4, 3, epochs=1, seed=seed) for seed in (1, 2))
        begun = list(itertools.islice(one, 2))
        next(iter(other))
        other.load_state_dict(one.state_dict())
        assert len(other) == 6
        assert spoiled(begun + list(other)) == Counter((n, first) for n in range(3) for first in range(7))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_copy_of_a_loader_makes_passes_of_its_own(num_workers) -> None:
    with model.stored("ring", [9, 9, 9]) as ring:
        loader = ring.get_loader(4, 3, epochs=1, seed=0, num_workers=num_workers)
        copied = copy.deepcopy(loader)
        expected = Counter((n, first) for n in range(3) for first in range(7))
        assert spoiled(copied) == expected == spoiled(loader)
        assert copied.state_dict() == loader.state_dict()


def test_a_state_that_is_loaded_beside_an_iterator_is_followed_by_it() -> None:
    ring = RingBufferDataset(100)
    for number in range(4):
        ring.add_episode(tagged.episode(5, number))
    one, batches = ring.get_loader(2, 2, epochs=1, seed=0), None
    batches = iter(one)
    next(batches)
    for number in range(4, 12):
        ring.add_episode(tagged.episode(5, number))
    other = ring.get_loader(2, 2, epochs=1, seed=0)
    begun = [next(iter(other))]
    one.load_state_dict(other.state_dict())
    assert spoiled(begun + list(batches)) == Counter((n, first) for n in range(12) for first in range(4))


def test_a_pass_of_a_reader_begins_with_what_the_writer_has_now(tmp_path) -> None:
    with IndividualFileDataset(20, directory=tmp_path, durability="rename") as writer:
        for number in range(4):
            writer.add_episode(tagged.episode(5, number))
        reader = IndividualFileDataset(directory=tmp_path, mode="r")
        loader = reader.get_loader(4, 2, epochs=1, seed=0)
        assert len(loader) == 4
        writer.add_episode(tagged.episode(5, 4))
        assert spoiled(loader) == Counter((n, first) for n in range(1, 5) for first in range(4))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pass_that_meets_damage_names_the_episode(tmp_path, num_workers) -> None:
    with IndividualFileDataset(100, directory=tmp_path, durability="rename") as writer:
        for number in range(3):
            writer.add_episode(tagged.episode(9, number))
        path = sorted(tmp_path.glob("*.safetensors"))[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader = writer.get_loader(30, 2, epochs=1, num_workers=num_workers)
            path.write_bytes(path.read_bytes()[:-100])
            with pytest.raises(RuntimeError, match=r"or their files are damaged \(ids \[1\]\).*verify='full'"):
                list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_another_dataloader_makes_a_pass_or_says_that_it_cannot(num_workers) -> None:
    with model.stored("ring", [9, 9, 9]) as ring:
        stream = ring.get_loader(4, 3, epochs=1, seed=0).stream
        other = DataLoader(stream, batch_size=None, num_workers=num_workers)
        if num_workers:
            with pytest.raises(RuntimeError, match="Another DataLoader's workers cannot make a pass"):
                list(other)
        else:
            assert sum(spoiled(other).values()) == 21


def test_an_error_before_a_pass_leaves_nothing_behind() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(5, 0))
    loader = ring.get_loader(2, 3, epochs=1)
    assert len(list(loader)) == 2
    ring.evict_episode(0)
    assert len(loader) == 0
    with pytest.raises(RuntimeError, match="The dataset is empty"):
        iter(loader)
    ring.add_episode(tagged.episode(6, 1))
    assert spoiled(loader) == Counter((1, first) for first in range(4))


def test_what_is_added_while_a_pass_begins_is_not_in_it(monkeypatch) -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(5, 0))
    replace = EpisodeTable.replace

    def replace_after_an_addition(table: EpisodeTable, *arguments: Any) -> None:
        monkeypatch.undo()
        ring.add_episode(tagged.episode(5, 1))
        replace(table, *arguments)

    monkeypatch.setattr(EpisodeTable, "replace", replace_after_an_addition)
    loader = ring.get_loader(2, 3, epochs=1)
    next(iter(loader))
    assert len(list(loader)) == 1 and len(loader) == 3


def test_a_state_of_another_loader_is_refused_and_changes_nothing() -> None:
    with model.stored("ring", [9, 9, 9]) as ring:
        state = ring.get_loader(4, 3, epochs=1, seed=0).state_dict()
        others: list[dict[str, Any]] = [
            {"batch_size": 8},
            {"shuffle": False},
            {"sequence_length": 2},
        ]
        others += [{"pad_after": 1}, {"stride": 2}, {"epochs": 2}, {"split": ("train", 0.5, 0)}]
        with pytest.raises(ValueError, match=r"The state of this loader has \['position', 'seed'\]"):
            ring.get_loader(4, 3).load_state_dict(state)
        for options in others:
            loader = ring.get_loader(**{"batch_size": 4, "sequence_length": 3, "epochs": 1, "seed": 5, **options})
            before = loader.state_dict()
            with pytest.raises(ValueError, match="The state is of a loader of other windows, or in another order"):
                loader.load_state_dict(state)
            with pytest.raises(TypeError, match="`position` must be an integer"):
                loader.load_state_dict({**before, "seed": 7, "position": "x"})
            assert loader.state_dict() == before


def test_a_pass_that_has_begun_is_pickled_without_its_tables() -> None:
    with model.stored("ring", [9] * 50) as ring:
        one_pass = ring.get_loader(8, 2, epochs=1).stream.one_pass
        assert one_pass is not None
        one_pass.begin(0)
        one_pass.windows(0, BatchRandom(0))
        state = one_pass.__getstate__()
        assert state.keys() == one_pass.__dict__.keys() and not state["_tables"] and state["_order"] is None
        ring.statistics()
        assert len(pickle.dumps(ring.running_statistics)) < 200


def test_order_follows_from_the_seed_unless_it_is_not_shuffled() -> None:
    ring = RingBufferDataset(100)
    for number in range(6):
        ring.add_episode(tagged.episode(9, number))

    def order(**options: Any) -> list[tuple[int, int]]:
        loader = ring.get_loader(7, 2, epochs=1, include=EVERYTHING, **options)
        return [place(batch, b) for batch in loader for b in range(len(batch["step"]))]

    in_order = [(number, first) for number in range(6) for first in range(8)]
    assert order(shuffle=False) == in_order
    assert order(seed=1) == order(seed=1, shuffle=True) != order(seed=2)
    assert sorted(order(seed=1)) == in_order != order(seed=1)
    assert order(shuffle=False, drop_last=True) == in_order[:42]
    assert order(shuffle=False, drop_last=True, world_size=4, rank=3) == in_order[21:28]
    assert order(shuffle=False, world_size=4, rank=3) == in_order[21:28]
    assert order(shuffle=False, world_size=8, rank=7) == []


def test_ranks_make_the_batches_of_one_stream_in_turn() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(50, 0))
    whole = list(itertools.islice(ring.get_loader(4, 3, seed=7), 6))
    parts = [list(itertools.islice(ring.get_loader(4, 3, seed=7, rank=r, world_size=3), 2)) for r in range(3)]
    for n, batch in enumerate(whole):
        assert torch.equal(batch["code"], parts[n % 3][n // 3]["code"])


def test_whole_episodes_come_once_in_a_pass() -> None:
    with model.stored("mixture", [5, 3, 9, 1, 4]) as mixture:
        batches = list(mixture.get_loader(2, epochs=1, include=("episode", "source")))
        lengths = [int(length) for batch in batches for length in batch["mask"].sum(1)]
        assert sorted(lengths) == [1, 3, 4, 5, 9] and len(batches) == 3
        assert sorted(source for batch in batches for source in batch["source"].tolist()) == [0, 0, 0, 1, 1]


def test_an_empty_part_says_so_and_an_extended_dataset_is_not_split() -> None:
    ring, larger = RingBufferDataset(20), ListDataset(100)
    ring.add_episode(tagged.episode(5, 0))
    part = "val" if Split(True, 0.5, 0).judge(np.array([0]))[0] == 2 else "train"
    for options in ({}, {"epochs": 1}):
        with pytest.raises(RuntimeError, match="No stored episode belongs to this part of the split"):
            next(iter(ring.get_loader(2, 2, split=(part, 0.5, 0), **options)))
    ring.extend(larger)
    for source in (ring, MixtureDataset([ring], [1])):
        with pytest.raises(ValueError, match="take `split` of the larger dataset"):
            source.get_loader(2, 2, split=("train", 0.5, 0))
    larger.get_loader(2, 2, split=("train", 0.5, 0))


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=40), st.integers(0, 5), st.floats(0.1, 0.9))
@PROPERTY
def test_a_split_is_of_whole_episodes_and_stable(changes, seed, share) -> None:
    table = EpisodeTable()
    parts = [PartTable(Split(is_train, share, seed).judge, "empty") for is_train in (True, False)]
    belongs: dict[int, int] = {}
    for length, removes in changes:
        table.append(length)
        if removes:
            table.remove(length % len(table))
        for part in parts:
            part.show(table)
        assert sorted([*parts[0].ids, *parts[1].ids]) == table.ids.tolist()
        for n, part in enumerate(parts):
            assert part.rows.tolist() == [row for row in table.rows.tolist() if row[2] in part.ids]
            assert part.num_steps == part.lengths.sum()
            for episode_id in part.ids.tolist():
                assert belongs.setdefault(episode_id, n) == n


def test_the_parts_of_a_split_have_their_shares_and_depend_on_the_seed() -> None:
    ids = np.arange(100_000)
    train = Split(True, 0.9, 0).judge(ids) == 2
    assert abs(train.mean() - 0.9) < 0.005
    other = Split(True, 0.9, 1).judge(ids) == 2
    assert abs((train & other).mean() - 0.81) < 0.01
    assert ((Split(False, 0.9, 0).judge(ids) == 2) == ~train).all()


def test_loaders_of_both_parts_bring_everything_once() -> None:
    with model.stored("mixture", [3] * 20) as mixture:
        found = []
        for part in ("train", "val"):
            for batch in mixture.get_loader(4, 2, epochs=1, split=(part, 0.5, 3), include=EVERYTHING):
                found += [place(batch, b) for b in range(len(batch["step"]))]
        assert sorted(found) == [(number, first) for number in range(20) for first in range(2)]
        endless = mixture.get_loader(16, 2, split=("val", 0.5, 3), seed=0, include=EVERYTHING)
        drawn = {place(batch, b)[0] for batch in itertools.islice(endless, 20) for b in range(16)}
        assert 2 <= len(drawn) < 20
