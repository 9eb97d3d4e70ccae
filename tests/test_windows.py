"""Windows that reach beyond their episodes, and rows at offsets: each once, with the right values and masks."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.loading import layout
from buffers.loading.randomness import BatchRandom
from buffers.sampler import UniformEpisodeSampler, UniformSampler
from buffers.table import EpisodeTable, Selection, Split, SplitTable, Windows
from buffers.writer import EpisodeWriter
from tests import tagged
from tests import windows_model as model
from tests.list_dataset import ListDataset

EVERYTHING = ("index", "episode", "step", "is_first", "is_last", "mask")
PROPERTY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def check_a_pass(dataset: Any, batch_size: int, length: int, before: int, after: int, pad: str) -> None:
    """Every window comes once, with the rows, the mask and the ids that the model says."""
    episodes = live(dataset)
    expected = {
        (number, first) for number, num in episodes.items() for first in model.starts(length, num, before, after)
    }
    options: dict[str, Any] = {"pad_before": before, "pad_after": after, "pad": pad, "include": EVERYTHING}
    if length - before - after > dataset.longest_window:
        with pytest.raises(ValueError, match="exceeds the `capacity`"):
            dataset.get_loader(batch_size, length, epochs=1, **options)
        return
    loader = dataset.get_loader(batch_size, length, epochs=1, seed=0, **options)
    if not expected:
        with pytest.raises(RuntimeError, match="is longer than every stored episode"):
            next(iter(loader))
        return
    assert len(loader) == -(-len(expected) // batch_size)
    found: Counter[tuple[int, int]] = Counter()
    for batch in loader:
        for b in range(len(batch["step"])):
            number, first = place(batch, b)
            model.assert_sequence(batch, b, number, episodes[number], first, length, pad)
            found[number, first] += 1
    assert set(found) == expected and set(found.values()) == {1}


@given(st.sampled_from(model.KINDS), LENGTHS, st.integers(9, 30), padded(12), st.booleans(), st.integers(1, 9))
@example("ring", [9, 1], 9, (12, 11, 11), True, 3)
@example("list", [1, 9], 9, (12, 11, 11), False, 3)
@PROPERTY
def test_a_pass_has_every_window_once_and_padded_right(kind, lengths, capacity, shape, is_edge, batch_size) -> None:
    with model.stored(kind, lengths, capacity) as dataset:
        check_a_pass(dataset, batch_size, *shape, "edge" if is_edge else "zero")


MUTANTS = {
    "begins a row late": (Selection, "first_steps", lambda self, cut, length: 1 - self.pad_before),
    "begins a row early": (Selection, "first_steps", lambda self, cut, length: -1 - self.pad_before),
    "ends a row early": (Selection, "room", lambda self, cut: (self.pad_before, self.pad_after - 1)),
    "ends a row late": (Selection, "room", lambda self, cut: (self.pad_before, self.pad_after + 1)),
    "is real a row early": (Windows, "mask", property(lambda self: self.steps + 1 < self.episode_length[:, None])),
    "is real before": (Windows, "mask", property(lambda self: self.steps < self.episode_length[:, None])),
    "is real behind": (Windows, "mask", property(lambda self: self.steps >= 0)),
    "is not padded": (layout, "pad", lambda windows, rows, mask, with_edge: None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("pad", ["zero", "edge"])
def test_every_mutant_of_the_ends_is_found(mutant, pad, monkeypatch) -> None:
    with model.stored("ring", [5, 2, 7], 40) as ring:
        check_a_pass(ring, 4, 4, 2, 3, pad)
        monkeypatch.setattr(*MUTANTS[mutant])
        with pytest.raises((AssertionError, IndexError, RuntimeError)):
            check_a_pass(ring, 4, 4, 2, 3, pad)


OFFSETS = st.lists(st.integers(-6, 6), min_size=1, max_size=4).map(tuple) | st.tuples(
    st.integers(-5, 4), st.integers(1, 5)
).map(lambda run: tuple(range(run[0], run[0] + run[1])))


@given(
    st.sampled_from(model.KINDS),
    LENGTHS,
    st.integers(9, 30),
    st.fixed_dictionaries({}, optional={name: OFFSETS for name in ("obs", "obs/pixels", "reward", "flag")}),
    st.booleans(),
    st.integers(1, 9),
    st.sampled_from([None, 1, 3]),
)
@example("files", [9], 9, {"obs": (6,), "reward": (-6, -5)}, True, 2, None)
@PROPERTY
def test_offsets_read_each_field_at_its_own_rows(kind, lengths, capacity, offsets, is_edge, batch_size, chunk) -> None:
    pad = "edge" if is_edge else "zero"
    kind = ".safetensors" if kind == "files" else kind
    with model.stored(kind, lengths, capacity) as dataset:
        episodes = live(dataset)
        options: dict[str, Any] = {"offsets": offsets, "pad": pad, "include": EVERYTHING}
        if chunk is not None:
            batch_size, options["chunk_size"] = 6, chunk
        found = []
        for batch in dataset.get_loader(batch_size, epochs=1, seed=0, **options):
            flat, masks = tagged.flatten(batch), tagged.flatten(batch["mask"])
            for b in range(len(batch["step"])):
                number, step = divmod(int(batch["code"][b, 0]), 10**6)
                assert batch["step"][b].tolist() == [step]
                assert batch["is_first"][b].tolist() == [step == 0]
                assert batch["is_last"][b].tolist() == [step == episodes[number] - 1]
                for name in tagged.flatten(tagged.rows(0, 0, 0)):
                    at = offsets_of(name, offsets)
                    steps = [step + offset for offset in at]
                    expected = model.expected_rows(number, episodes[number], steps, pad)[name]
                    np.testing.assert_array_equal(flat[name][b].cpu().numpy(), expected, err_msg=name, strict=True)
                    assert masks[name][b].tolist() == model.real(episodes[number], steps).tolist()
                found.append((number, step))
        assert sorted(found) == sorted((number, step) for number, num in episodes.items() for step in range(num))


def offsets_of(name: str, offsets: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    keys = [key for key in offsets if f"{name}/".startswith(f"{key}/")]
    return offsets[max(keys, key=len)] if keys else (0,)


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


@pytest.mark.parametrize("sampler", [UniformSampler(), UniformEpisodeSampler()])
@pytest.mark.parametrize("kind", ["ring", "mixture"])
def test_padded_windows_are_as_likely_as_the_sampler_says(sampler, kind) -> None:
    lengths = [5, 5, 1, 3, 9, 2]
    counts: Counter[tuple[int, int]] = Counter()
    with model.stored(kind, lengths) as dataset:
        loader = dataset.get_loader(128, 4, pad_before=2, pad_after=3, sampler=sampler, seed=3, include=EVERYTHING)
        for batch in itertools.islice(loader, 60):
            counts.update(place(batch, b) for b in range(128))
    shares = {}
    for number, num in enumerate(lengths):
        windows = model.starts(4, num, 2, 3)
        of_member = [lengths[n] for n in range(len(lengths)) if kind == "ring" or n % 2 == number % 2]
        if isinstance(sampler, UniformSampler):
            whole = sum(len(model.starts(4, n, 2, 3)) for n in of_member)
            shares |= {(number, first): 1 / whole for first in windows}
        else:
            able = sum(len(model.starts(4, n, 2, 3)) > 0 for n in of_member)
            shares |= {(number, first): 1 / len(windows) / able for first in windows}
    assert counts.keys() == shares.keys()
    assert tagged.chi_square_is_plausible(
        np.array([counts[window] for window in shares]), np.array(list(shares.values()))
    )


def test_loaders_of_one_dataset_do_not_mix_up_their_windows() -> None:
    options: list[dict[str, Any]] = [
        {},
        {"pad_before": 2},
        {"pad_after": 2},
        {"split": ("train", 0.5, 0), "pad_before": 2},
    ]
    with model.stored("ring", [5, 3, 9, 1, 4]) as ring:
        alone = [list(itertools.islice(ring.get_loader(8, 3, seed=0, **each), 4)) for each in options]
        loaders = [iter(ring.get_loader(8, 3, seed=0, **each)) for each in options]
        for n in range(4):
            for loader, batches in zip(loaders, alone, strict=True):
                assert torch.equal(next(loader)["code"], batches[n]["code"])


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    padded(6),
)
@PROPERTY
def test_pieces_have_the_windows_of_their_stream_and_no_padding_at_cuts(lengths, cut, shape) -> None:
    length, before, after = shape
    ring = RingBufferDataset(1000)
    writer = EpisodeWriter(ring, 1, *cut)
    for number, num in enumerate(lengths):
        for step in range(num):
            writer.add_step(tagged.rows(0, number, step), step == num - 1)
    possible = {
        (number, first) for number, num in enumerate(lengths) for first in model.starts(length, num, before, after)
    }
    loader = ring.get_loader(8, length, epochs=1, pad_before=before, pad_after=after, pad="edge", include=EVERYTHING)
    found: Counter[tuple[int, int]] = Counter()
    for batch in loader if ring.table.reachable(length, Selection(before, after)) else []:
        for b in range(len(batch["step"])):
            t = int(batch["mask"][b].to(torch.int8).argmax())
            number, step = batch["obs"]["state"][b, t, 1:].long().tolist()
            first = step - t
            steps = range(first, first + length)
            # Real wherever the stream has a row.
            assert batch["mask"][b].tolist() == model.real(lengths[number], steps).tolist()
            rows = model.expected_rows(number, lengths[number], steps, "edge")
            np.testing.assert_array_equal(batch["code"][b].numpy(), rows["code"])
            found[number, first] += 1
    assert set(found) <= possible and set(found.values()) <= {1}
    if length <= cut[1] + 1:
        assert set(found) == possible


@pytest.mark.parametrize("kind", ["ring", ".safetensors", "mixture"])
@pytest.mark.parametrize(
    "options",
    [
        {"pad_before": 3, "pad_after": 2, "sequence_length": 5},
        {"offsets": {"obs": (-3, -1, 0), "code": range(4)}},
        {"pack": 11},
    ],
)
def test_workers_make_the_same_batches(kind, options) -> None:
    with model.stored(kind, [5, 3, 9, 1, 4]) as dataset:
        loaders = [dataset.get_loader(6, num_workers=n, seed=5, include=("index",), **options) for n in (0, 2)]
        for one, other in zip(*(itertools.islice(loader, 6) for loader in loaders), strict=True):
            one, other = tagged.flatten(one), tagged.flatten(other)
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
        for options in ({"batch_size": 8}, {"batch_size": 4, "world_size": 2}):
            loader = ring.get_loader(sequence_length=3, epochs=1, seed=5, **options)
            before = loader.state_dict()
            with pytest.raises(ValueError, match="another number of datasets, `batch_size` or `world_size`"):
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


def test_packs_of_long_episodes_say_what_they_reach() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(30, 0))
    ring.add_episode(tagged.episode(10, 1))
    assert ReplayBuffer(ring, 2, pack=15).stats()["reachable"] == pytest.approx(25 / 40)


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


def test_a_window_is_kept_as_long_as_its_rows_live() -> None:
    """The step id at which a padded window begins may be that of a row, of another episode, that is gone."""
    ring = RingBufferDataset(12)
    for number in range(4):
        ring.add_episode(tagged.episode(4, number))
    assert live(ring).keys() == {1, 2, 3}
    loader = ring.get_loader(256, 4, pad_before=3, seed=0, include=EVERYTHING)
    batches = iter(loader)
    counts = Counter(place(next(batches), b) for b in range(256))
    assert {first for number, first in counts if number == 1} == {-3, -2, -1, 0}
    # Evicted while they are read: what is left of the oldest is drawn again.
    drawn = loader.stream.source.draw(UniformSampler(), 256, 4, np.random.Generator(np.random.Philox(0)), Selection(3))
    ring.add_episode(tagged.episode(4, 4))
    rows, was_read = ring.read(drawn)
    np.testing.assert_array_equal(was_read, drawn.episode != 1)
    assert was_read is not None and 0 < was_read.sum() < 256


@given(
    st.sampled_from(model.KINDS), LENGTHS, st.integers(9, 30), st.integers(1, 25), st.integers(1, 3), st.integers(0, 99)
)
@PROPERTY
def test_packs_are_whole_episodes_and_tails_end_to_end(kind, lengths, capacity, num_rows, batch_size, seed) -> None:
    with model.stored(kind, lengths, capacity) as dataset:
        episodes = live(dataset)
        include = ("index", "is_first", "is_last")
        batch = next(iter(dataset.get_loader(batch_size, pack=num_rows, seed=seed, include=include)))
        for name, values in tagged.flatten(tagged.rows(0, 0, np.zeros((batch_size, num_rows), int))).items():
            assert tagged.flatten(batch)[name].shape == values.shape
        bounds = batch["cu_seqlens"].tolist()
        assert batch["cu_seqlens"].dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == batch_size * num_rows
        code, step, episode, is_first, is_last = (
            batch[name].flatten().tolist() for name in ("code", "step", "episode", "is_first", "is_last")
        )
        flat = {
            name: tensor.flatten(0, 1).cpu().numpy()
            for name, tensor in tagged.flatten(batch).items()
            if name != "cu_seqlens"
        }
        for begin, end in itertools.pairwise(bounds):
            number, first = divmod(code[begin], 10**6)
            assert len({*episode[begin:end]}) == 1 and begin // num_rows == (end - 1) // num_rows
            assert step[begin:end] == list(range(first, episodes[number])), "to the end of the episode"
            assert first == 0 or end % num_rows == 0, "only the last of a long row is cut"
            assert is_first[begin:end] == [t == 0 for t in range(first, episodes[number])]
            assert is_last[begin:end] == [t == episodes[number] - 1 for t in range(first, episodes[number])]
            for name, values in model.expected_rows(
                number, episodes[number], range(first, episodes[number]), "zero"
            ).items():
                np.testing.assert_array_equal(flat[name][begin:end], values)


@pytest.mark.parametrize("kind", ["ring", "mixture"])
def test_packed_episodes_are_as_likely_as_drawn(kind) -> None:
    lengths, counts = [1, 2, 3, 5, 8], Counter()
    with model.stored(kind, lengths) as dataset:
        for batch in itertools.islice(dataset.get_loader(4, pack=20, seed=2), 200):
            counts.update(code // 10**6 for code in batch["code"].flatten()[batch["cu_seqlens"][:-1].long()].tolist())
    weights = [1 / 5] * 5 if kind == "ring" else [1 / 6, 1 / 4, 1 / 6, 1 / 4, 1 / 6]
    assert tagged.chi_square_is_plausible(np.array([counts[n] for n in range(5)]), np.array(weights))


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=40), st.integers(0, 5), st.floats(0.1, 0.9))
@PROPERTY
def test_a_split_is_of_whole_episodes_and_stable(changes, seed, share) -> None:
    table = EpisodeTable()
    parts = [SplitTable(Split(is_train, share, seed)) for is_train in (True, False)]
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
    train = Split(True, 0.9, 0).accepts(ids)
    assert abs(train.mean() - 0.9) < 0.005
    other = Split(True, 0.9, 1).accepts(ids)
    assert abs((train & other).mean() - 0.81) < 0.01
    assert (Split(False, 0.9, 0).accepts(ids) == ~train).all()


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


def test_a_buffer_takes_the_options_of_windows_and_says_what_it_reaches() -> None:
    ring = RingBufferDataset(100)
    for number, length in enumerate([30, 8, 8]):
        ring.add_episode(tagged.episode(length, number))
    short = ReplayBuffer(ring, 4, 12, pad_before=3, seed=0)
    assert short.stats()["reachable"] == pytest.approx(30 / 46) and "65% of the stored steps" in repr(short)
    for number in range(3, 7):
        ring.add_episode(tagged.episode(8, number))
    with pytest.warns(UserWarning, match=r"Pad windows \(`pad_before`, `pad_after`\)"):
        short.sample()
    assert ReplayBuffer(ring, 4, 12, pad_before=4).stats()["reachable"] == 1.0
    padded_buffer = ReplayBuffer(ring, 4, 31, pad_before=30, pad_after=30, include=EVERYTHING, seed=0)
    assert padded_buffer.stats()["reachable"] == 1.0 and "padding" not in padded_buffer.stats()
    batch = padded_buffer.sample()
    assert padded_buffer.stats()["padding"] == pytest.approx(1 - float(batch["mask"].float().mean()))
    assert padded_buffer.stats()["newest_age"] == ring.table.num_steps_after(int(batch["index"].max()))
    with pytest.raises(ValueError, match="A buffer's batches have no end"):
        ReplayBuffer(ring, 4, 3, epochs=1)


def test_single_sequences_take_the_same_options() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(5, 0))
    sequence = next(iter(ring.sequences(4, pad_before=3, pad_after=3, pad="edge", seed=1, include=EVERYTHING)))
    assert sequence["mask"].shape == (4,) and sequence["obs"]["state"].shape == (4, 3)
    for options, message in (({"pack": 8}, "use `get_loader`"), ({"epochs": 1}, "in a loader's batches")):
        with pytest.raises(ValueError, match=message):
            ring.sequences(**options)
    with pytest.raises(TypeError, match="There is no argument `num_workers`"):
        ring.sequences(3, num_workers=2)
    sequence = next(iter(ring.sequences(offsets={"obs": (-1, 0)}, seed=1)))
    assert sequence["mask"]["obs"]["state"].shape == (2,) and sequence["code"].shape == (1,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pad_before": 4, "sequence_length": 4}, ValueError, "`pad_before` must be at most 3, .* found 4"),
        ({"pad_after": -1, "sequence_length": 4}, ValueError, "`pad_after` must be at least 0, found -1"),
        ({"pad_after": 1}, ValueError, "Whole episodes are padded by themselves: leave out"),
        (
            {"pad": "mirror", "sequence_length": 4},
            ValueError,
            r"`pad` must be one of .*, found 'mirror'",
        ),
        ({"offsets": {"obs": (0,)}, "sequence_length": 4}, ValueError, "leave out `sequence_length`, found 4"),
        ({"offsets": {"obs": (0,)}, "pad_before": 1}, ValueError, "`pad_before` must be at most 0"),
        ({"offsets": {"obs": ()}}, ValueError, "`offsets` of `obs` are empty"),
        ({"offsets": {"obs": 3}}, TypeError, r"`offsets` of `obs` must be integers, such as \(-1, 0\), found 3"),
        ({"offsets": {"obs": (0.5,)}}, TypeError, "`offsets` of `obs` must be integers"),
        ({"offsets": [1]}, TypeError, "`offsets` must be a dict from fields to integers, found list"),
        ({"pack": 0}, ValueError, "`pack` must be at least 1, found 0"),
        ({"pack": 8, "sequence_length": 4}, ValueError, "`pack` says which rows are read: leave out `sequence_length`"),
        ({"pack": 8, "epochs": 1}, ValueError, "leave out `sampler` and `pack`"),
        ({"epochs": 1, "sampler": UniformEpisodeSampler()}, ValueError, "leave out `sampler` and `pack`"),
        ({"pack": 8, "offsets": {"obs": (0,)}}, ValueError, "leave out `offsets` and `pad`"),
        ({"stride": 2, "epochs": 1}, ValueError, "leave out `stride`"),
        ({"epochs": 1, "world_size": 2}, ValueError, "give the same to all"),
        ({"epochs": 1, "shuffle": "yes"}, TypeError, "`shuffle` must be a bool, found 'yes'"),
        ({"epochs": 1, "drop_last": 1}, TypeError, "`drop_last` must be a bool, found 1"),
        ({"offsets": {"obs": (2**40,)}}, ValueError, "`offsets` of `obs` must be within 2147483648 rows"),
        ({"pad_befor": 1}, TypeError, "There is no argument `pad_befor`"),
        ({"epochs": 0}, ValueError, "`epochs` must be at least 1, found 0"),
        ({"stride": 2, "sequence_length": 4}, ValueError, "`shuffle`, `drop_last` and `stride` need `epochs`"),
        ({"rank": 2, "world_size": 2}, ValueError, "`rank` must be less than `world_size`=2, found 2"),
        ({"split": "train"}, TypeError, r"`split` must be \(part, share, seed\), such as \('train', 0.9, 0\)"),
        ({"split": ("all", 0.5, 0)}, ValueError, r"`split` must be one of \['train', 'val'\]|\('train', 'val'\)"),
        ({"split": ("val", 90, 0)}, ValueError, "The share of `split` must be between 0 and 1, found 90"),
    ],
)
def test_options_that_make_no_sense_say_so(options, error, message) -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(5, 0))
    with pytest.raises(error, match=message):
        ring.get_loader(4, **options)


def test_offsets_of_no_field_and_names_that_are_taken_say_so() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode({"obs": np.zeros(5), "episode": np.zeros(5), "mask": np.zeros(5)})
    with pytest.raises(ValueError, match=r"`offsets` names \['obs/image', 'action'\], which are no fields"):
        next(iter(ring.get_loader(4, offsets={"obs": (0,), "obs/image": (1,), "action": (0,)})))
    with pytest.raises(ValueError, match="'episode' of `include` is also a field"):
        next(iter(ring.get_loader(4, pack=10)))
    with pytest.raises(ValueError, match="'mask' of `include` .* is also a field"):
        next(iter(ring.get_loader(4, 3, pad_after=1)))


@pytest.mark.parametrize("pad", ["zero", "edge"])
def test_fields_of_any_dtype_and_no_bytes_are_padded(pad) -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.int8, torch.float64]
    dtypes += [torch.uint16, torch.uint32, torch.uint64] if hasattr(torch, "uint16") else []
    rows = torch.arange(1, 5)
    ring = RingBufferDataset(10)
    ring.add_episode({str(dtype): rows.to(dtype) for dtype in dtypes} | {"nothing": torch.zeros(4, 0), "x": rows})
    for batch in ring.get_loader(3, 9, epochs=1, pad_before=8, pad_after=8, pad=pad):
        for dtype in dtypes:
            assert torch.equal(batch[str(dtype)].to(torch.complex128), batch["x"].to(dtype).to(torch.complex128))
        assert batch["nothing"].shape[1:] == (9, 0) and bool((batch["x"] > 0).all()) is (pad == "edge")


def test_fields_of_no_bytes_are_packed_and_read_at_offsets() -> None:
    for dataset in (RingBufferDataset(10), ListDataset(10)):
        dataset.add_episode({"nothing": np.zeros((4, 0)), "x": np.arange(4)})
        assert next(iter(dataset.get_loader(2, pack=7)))["nothing"].shape == (2, 7, 0)
        assert next(iter(dataset.get_loader(3, offsets={"nothing": (-2, 0)})))["nothing"].shape == (3, 2, 0)


@pytest.mark.parametrize("pad", ["zero", "edge"])
@pytest.mark.parametrize("kind", ["ring", "list"])
def test_rows_of_many_bytes_are_padded(kind, pad) -> None:
    with model.stored(kind, []) as dataset:
        dataset.add_episode({"x": np.arange(1, 10)[:, None] * np.ones(10_000)})
        for batch in dataset.get_loader(5, 9, epochs=1, pad_before=8, pad_after=8, pad=pad, include=("step",)):
            steps = (
                batch["step"].max(1, keepdim=True).values - batch["mask"].cumsum(1).argmax(1, keepdim=True)
            ) + torch.arange(9)
            expected = steps.clamp(0, 8) + 1 if pad == "edge" else (batch["step"] + 1)
            assert torch.equal(batch["x"][..., 0], expected.double()) and torch.equal(
                batch["x"][..., -1], expected.double()
            )


def test_a_ring_of_half_precision_is_padded() -> None:
    ring = RingBufferDataset(10, half_precision=True)
    ring.add_episode({"x": np.arange(1, 5, dtype=np.float32)})
    (batch,) = ring.get_loader(9, 3, epochs=1, shuffle=False, pad_before=2, pad_after=2, pad="edge")
    assert batch["x"].tolist()[:2] == [[1, 1, 1], [1, 1, 2]] and batch["x"].tolist()[-1] == [4, 4, 4]
