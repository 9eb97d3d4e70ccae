"""Batches of shards: shares, order, what is asked again, and what a learner is told."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from buffers import SamplesPerInsert
from buffers.dataset import EpisodeDataset, RingBufferDataset
from buffers.fields import Fields
from buffers.remote import RemoteLoader, Shards
from buffers.remote.dealing import Dealer
from buffers.remote.limits import Limits
from buffers.remote.sink import RemoteSink
from buffers.sampler import EpisodeFilter, PrioritizedSampler, UniformSampler
from tests.remote.simulated import Simulated


def rows(shard: int, length: int, number: int = 0) -> dict[str, np.ndarray]:
    """Rows that say where they are from."""
    steps = np.arange(length, dtype=np.int64)
    return {"shard": np.full(length, shard), "number": np.full(length, number), "row": steps}


def filled(*num_steps: int, **options: Any) -> tuple[Simulated, Shards]:
    """Shards with an episode of so many steps each."""
    world = Simulated(len(num_steps), **options)
    for number, length in enumerate(num_steps):
        if length:
            dataset_of(world, number).add_episode(rows(number, length))
    return world, shards_of(world)


def shards_of(world: Simulated, limits: Limits | None = None) -> Shards:
    shard = world.shards[0]
    assert shard is not None
    return Shards(world, shard.describe(), limits)


def dataset_of(world: Simulated, number: int) -> EpisodeDataset:
    shard = world.shards[number]
    assert shard is not None
    return shard.dataset


@example([300, 30, 3, 1, 1, 30, 1, 2, 300, 1, 30, 5], 400)  # Too many for a dealer that pays the largest debt first.
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.integers(1, 300))
@settings(max_examples=200)
def test_each_shard_has_its_share_but_for_less_than_one_batch(weights: list[int], num: int) -> None:
    dealer, counts, total = Dealer(), Counter[int](), sum(weights)
    for n in range(1, num + 1):
        counts[dealer.next(dict(enumerate(weights)))] += 1
        assert all(abs(counts[shard] - n * weight / total) < 1 for shard, weight in enumerate(weights))


@given(st.lists(st.lists(st.integers(1, 100), min_size=3, max_size=3), min_size=1, max_size=200))
@settings(max_examples=100)
def test_shares_that_change_are_followed(weights: list[list[int]]) -> None:
    dealer, counts, owed = Dealer(), np.zeros(3), np.zeros(3)
    for found in weights:
        counts[dealer.next(dict(enumerate(found)))] += 1
        owed += np.array(found) / sum(found)
        assert (np.abs(counts - owed) < 2).all()


def test_batches_come_in_exact_shares_of_windows() -> None:
    _, shards = filled(103, 0, 303)  # 100 and 300 windows of 4 steps
    loader = RemoteLoader(shards, 8, 4, include=("source",), seed=0)
    found = Counter[int]()
    for n in range(1, 201):
        batch = next(loader)
        (source,) = set(batch["source"].tolist())
        assert set(batch["shard"].unique().tolist()) == {source}
        found[source] += 1
        assert abs(found[0] - n / 4) < 1
    assert found == {0: 50, 2: 150}


def test_the_first_shard_to_answer_has_no_more_than_its_share() -> None:
    world, shards = filled(50, 50)
    world.stop(1)
    loader = RemoteLoader(shards, 8, 4, include=("source",))
    world.go_on(1)
    assert Counter(int(next(loader)["source"][0]) for _ in range(10)) == {0: 5, 1: 5}


def test_a_batch_is_the_one_that_a_local_loader_draws() -> None:
    _, shards = filled(50)
    loader = RemoteLoader(shards, 8, 4, seed=5, pad_before=2, include=("step", "episode"))
    dataset = RingBufferDataset(1_000)
    dataset.add_episode(rows(0, 50))
    local = dataset.get_loader(8, 4, seed=5, pad_before=2, include=("step", "episode"))
    for found, expected in zip(loader, local, strict=False):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        if loader.position == 20:
            break


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_batches_are_the_same_whatever_calls_suffer(seed: int) -> None:
    """A shard that answers each batch a second time says the same."""
    expected = [batch["row"] for batch, _ in zip(RemoteLoader(filled(50)[1], 8, 4, seed=1), range(20), strict=False)]
    world, shards = filled(50, seed=seed)
    loader = RemoteLoader(shards, 8, 4, seed=1)
    world.drop = world.double = world.delay = world.fail = 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        found = [next(loader)["row"] for _ in range(20)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("event", ["kill", "stop"])
def test_the_share_of_a_shard_that_is_gone_goes_to_the_others_until_it_is_back(event: str, tmp_path: Path) -> None:
    world, shards = filled(103, 103, 103, directory=tmp_path)
    for shard in world.shards:
        assert shard is not None
        shard.save()
    loader = RemoteLoader(shards, 8, 4, include=("source",), seed=0, deadline=10.0)
    for _ in range(9):
        next(loader)
    getattr(world, event)(1)
    begin, found = world.time, Counter[int]()
    world.log.clear()
    with pytest.warns(RuntimeWarning, match="Shard 1 (is lost|has not answered)"):
        for _ in range(100):
            found[int(next(loader)["source"][0])] += 1
    assert world.time - begin < 15 and found[1] <= 3 and abs(found[0] - found[2]) <= 3
    assert list(loader.troubles) == [1] and sum(shard == 1 for shard, _ in world.log) < 40
    if event == "kill":
        world.start(1)
    else:
        world.go_on(1)
    world.time += 20
    found.clear()
    for _ in range(150):
        world.time += 0.1
        found[int(next(loader)["source"][0])] += 1
    assert loader.troubles == {} and min(found.values()) > 40


def test_without_a_window_it_waits_and_says_what_each_shard_lacks() -> None:
    world, shards = filled(3, 0)
    loader = RemoteLoader(shards, 8, 4, timeout=20.0)
    assert not loader.can_sample
    world.stop(1)
    with (
        pytest.warns(RuntimeWarning, match="Shard 1"),
        pytest.raises(
            RuntimeError, match="within `timeout`=20 s: shard 0 has no episode that is long enough; shard 1 has not"
        ),
    ):
        next(loader)
    dataset_of(world, 0).add_episode(rows(0, 9))
    assert next(loader)["row"].shape == (8, 4)


def test_a_sampler_that_fails_for_an_episode_fails_its_learner_and_no_writer() -> None:
    """The episode was not stored, and no other one of any writer, for as long as the shard lived."""
    world, shards = filled(0, 0)
    sink = RemoteSink(shards, has_thread=False)
    sink.settle_fields(Fields.from_episode(rows(0, 5)))

    def add(infos: list[dict[str, Any]]) -> None:
        for info in infos:
            sink.add(rows(0, 5, info["number"]), 0, info)
        sink.wait(10.0, until_saved=False)

    add([{"number": number, "is_good": number % 2 == 0} for number in range(20)])
    options = {"seed": 0, "num_in_flight": 1}
    loader = RemoteLoader(
        shards, 8, 2, sampler=EpisodeFilter(UniformSampler(), lambda info: info["is_good"]), **options
    )
    other = RemoteLoader(shards, 8, 2, **options)
    next(loader), next(other)
    add([{"number": number} for number in range(20, 40)])
    with pytest.raises(RuntimeError, match="`accept` of an EpisodeFilter failed for episode .*KeyError"):
        for _ in range(10):
            next(loader)
    corrected = EpisodeFilter(UniformSampler(), lambda info: info.get("is_good", True))
    found = {number for _ in range(60) for number in next(other)["number"].flatten().tolist()}
    assert found == set(range(40)) and sink.troubles == {}
    loader = RemoteLoader(shards, 8, 2, sampler=corrected, **options)
    found = {number for _ in range(60) for number in next(loader)["number"].flatten().tolist()}
    assert found == {*range(0, 20, 2), *range(20, 40)}


def test_no_shard_that_answers_is_an_error_that_says_so() -> None:
    world, shards = filled(10)
    world.stop(0)
    with pytest.raises(RuntimeError, match="No shard answers: "):
        RemoteLoader(shards, 8, 4, deadline=2.0)


def test_what_a_batch_holds_is_never_overwritten_and_memory_is_used_again() -> None:
    _, shards = filled(500)
    loader = RemoteLoader(shards, 8, 4, seed=0)
    kept = [next(loader) for _ in range(30)]
    copies = [{name: value.clone() for name, value in batch.items()} for batch in kept]
    places = {batch["row"].data_ptr() for batch in kept}
    assert len(places) == 30
    del kept[5:]
    for _ in range(30):
        batch = next(loader)
        assert batch["row"].data_ptr() not in {old["row"].data_ptr() for old in kept}
    assert all(torch.equal(kept[n][name], copies[n][name]) for n in range(5) for name in copies[n])
    del batch
    again = {next(loader)["row"].data_ptr() for _ in range(30)}
    assert len(again) <= 5
    next(loader)["row"].zero_()  # It is the learner's own.


def test_dtypes_nests_and_transforms_cross_as_they_are() -> None:
    world = Simulated(1)
    tree = {"a": {"b": torch.arange(12).to(torch.bfloat16)}, "c": torch.arange(12) % 2 == 1, "d": torch.zeros(12, 2, 0)}
    dataset_of(world, 0).add_episode(tree)
    batch = next(RemoteLoader(shards_of(world), 2, 3, include=("source", "weight"), transform=doubled))
    assert batch["a"]["b"].dtype == torch.bfloat16 and batch["a"]["b"].shape == (2, 3)
    assert batch["c"].dtype == torch.bool and batch["d"].shape == (2, 3, 2, 0)
    assert batch["twice"].dtype == torch.float64 and batch["source"].tolist() == [0, 0] and batch["name"] == "x"
    assert batch["weight"].tolist() == [1.0, 1.0]


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "twice": batch["a"]["b"].double() * 2, "name": "x"}


def test_a_loader_is_no_handle() -> None:
    loader = RemoteLoader(filled(20)[1], 4, 2)
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="A RemoteLoader belongs to its process: pass the Shards"):
            copied(loader)  # type: ignore[operator]


def test_whole_episodes_come_padded() -> None:
    _, shards = filled(5, 7)
    for batch, _ in zip(RemoteLoader(shards, 3), range(4), strict=False):
        assert batch["mask"].shape == batch["row"].shape and batch["row"].shape[1] in (5, 7)


def test_priorities_reach_the_shard_that_owns_them() -> None:
    world, shards = filled(50, 50)
    options = {"sampler": PrioritizedSampler(alpha=1.0), "include": ("index", "source")}
    loader = RemoteLoader(shards, 16, 1, seed=0, **options)  # type: ignore[arg-type]
    for _ in range(100):
        batch = next(loader)
        own = (batch["row"][:, 0] == 7) & (batch["source"] == 1) | (batch["row"][:, 0] == 9) & (batch["source"] == 0)
        loader.update_priorities(batch["index"], own.float(), batch["source"])
    # What two shards sent, together.
    two = [batch for _, batch in zip(range(2), loader, strict=False)]
    both = [torch.cat([batch[name] for batch in two]) for name in ("index", "source", "row")]
    loader.update_priorities(both[0], ((both[2][:, 0] == 7) | (both[2][:, 0] == 9)).float(), both[1])
    world.time += 1
    for _ in range(8):
        next(loader)
    batches = [next(loader) for _ in range(20)]
    found = {(int(batch["source"][0]), row) for batch in batches for row in batch["row"][:, 0].tolist()}
    assert found == {(0, 9), (1, 7)}
    assert loader.stats()["num_ignored_ids"] == 0


def test_step_ids_of_an_earlier_life_are_ignored_and_counted(tmp_path: Path) -> None:
    world, shards = filled(50, directory=tmp_path)
    shard = world.shards[0]
    assert shard is not None
    shard.save()
    loader = RemoteLoader(shards, 8, 4, seed=0, sampler=PrioritizedSampler(), include=("index",))
    batch = next(loader)
    world.kill(0)
    world.start(0)
    with pytest.warns(RuntimeWarning, match="Shard 0 is lost"):
        loader.update_priorities(batch["index"], torch.zeros(8))
        while world.time < 5:
            world.time += 1
            later = next(loader)
    loader.update_priorities(later["index"], torch.ones(8))
    world.time += 1
    assert next(loader)["index"].shape == (8, 4)
    assert loader.stats()["num_ignored_ids"] == 32
    # Had they been taken, nothing could be drawn: all priorities of the batch would be 0.
    late = dataset_of(world, 0).late["priority"]
    assert float(late.rows(np.arange(50)).min()) == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"include": "index"}, TypeError, "must be a tuple"),
        ({"include": ("nothing",)}, ValueError, "`include` knows"),
        ({"pad_before": 9}, ValueError, "`pad_before` must be at most"),
        ({"epochs": 1}, ValueError, "have no end"),
        ({"sampler": 3}, TypeError, "`sampler` must be a Sampler"),
        ({"wrong": 3}, TypeError, "There is no argument `wrong` here"),
    ],
)
def test_wrong_arguments_are_errors_at_once(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    _, shards = filled(20)
    with pytest.raises(error, match=match):
        RemoteLoader(shards, **{"batch_size": 4, "sequence_length": 2, **arguments})


def test_what_a_transform_raises_reaches_the_learner_and_the_next_call_goes_on() -> None:
    _, shards = filled(20)
    calls = []

    def fail(batch: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise KeyError("camera")
        return batch

    loader = RemoteLoader(shards, 4, 2, transform=fail)
    next(loader), next(loader)
    with pytest.raises(KeyError, match="camera"):
        next(loader)
    assert next(loader)["row"].shape == (4, 2)


def test_a_transform_that_raises_stop_iteration_does_not_end_the_loop() -> None:
    def stop(batch: Any) -> Any:
        raise StopIteration

    _, shards = filled(20)
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        for _ in RemoteLoader(shards, 4, 2, transform=stop):
            pass


def test_a_float_index_is_an_error_at_once() -> None:
    loader = RemoteLoader(filled(20)[1], 4, 2)
    with pytest.raises(TypeError, match="`index` must be step ids, which are integers, found float32"):
        loader.update_priorities(torch.zeros(4, 2), torch.zeros(4), 0)


def test_a_shard_knows_all_of_64_learners() -> None:
    world, shards = filled(20)
    loaders = [RemoteLoader(shards, 1, 2, num_in_flight=1) for _ in range(64)]
    for loader in loaders:
        next(loader)
    shard = world.shards[0]
    assert shard is not None and len(shard._streams) == 64


@pytest.mark.parametrize(
    ("index", "values", "source", "match"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4), None, "pass `source`"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4), 2, "numbers of shards"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4), torch.zeros(3, dtype=torch.int64), "has shape"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(3, 2), 0, "must .* begin"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.full((4,), float("nan")), 0, "finite"),
    ],
)
def test_updates_that_do_not_fit_are_errors(index: Any, values: Any, source: Any, match: str) -> None:
    _, shards = filled(20, 20)
    with pytest.raises(ValueError, match=match):
        RemoteLoader(shards, 4, 2).update_priorities(index, values, source)


def test_a_limiter_keeps_the_ratio_over_all_writers_and_shards(tmp_path: Path) -> None:
    world = Simulated(2, tmp_path)
    shards = shards_of(world, Limits.of(SamplesPerInsert(ratio=4.0, tolerance=44, min_steps=100)))
    sinks = [RemoteSink(shards, has_thread=False) for _ in range(3)]
    loader = RemoteLoader(shards, 8, 5)
    added = 0
    for sink in sinks:
        sink.settle_fields(Fields.from_episode(rows(0, 10)))
    for turn in range(2_000):
        world.time += 0.02
        sink = sinks[turn % 3]
        if sink.may_add(9):
            sink.add(rows(0, 10, added))
            added += 1
        for _ in range(min(2, loader.num_batches_due)):
            next(loader)
        if turn > 100:
            # An episode of each writer, and a batch.
            assert abs(4 * (added * 10 - 100) - loader.position * 40) <= 44 + 3 * 40 + 40, turn
    assert added > 300
    # One that draws all that is due comes to an end.
    for _ in range(100):
        while loader.num_batches_due:
            next(loader)
        world.time += 0.1
        assert loader.position * 40 <= 4 * (added * 10 - 100) + 44
    # A learner that draws nothing holds the writers up, and nobody waits.
    while sinks[0].may_add(9):
        sinks[0].add(rows(0, 10, added))
        world.time += 0.2
        added += 1
        assert added < 2_000
    assert 4 * (added * 10 - 100) - loader.position * 40 <= 44 + 3 * 40
    assert loader.stats()["samples_per_insert"] == pytest.approx(4.0, rel=0.15)


def test_next_waits_until_a_batch_is_due_and_says_for_what() -> None:
    world = Simulated(1)
    dataset_of(world, 0).add_episode(rows(0, 50))
    loader = RemoteLoader(shards_of(world, Limits.of(SamplesPerInsert(1.0, min_steps=10, timeout=5.0))), 8, 5)
    assert loader.num_batches_due == 0
    with pytest.raises(RuntimeError, match="waited 5 s for steps to be added: 0 were added and 0 drawn, 40 a batch"):
        next(loader)


def test_a_batch_has_its_seconds_once_it_is_due() -> None:
    world = Simulated(1)
    limits = Limits.of(SamplesPerInsert(1.0, timeout=600.0))
    loader = RemoteLoader(shards_of(world, limits), 8, 5, timeout=5.0)
    shard = world.shards[0]
    assert shard is not None
    draw_as_before = shard.draw

    def draw(*arguments: Any) -> Any:
        if world.time > 20.0 and not shard.dataset.num_episodes:
            shard.dataset.add_episode(rows(0, 50))
            shard._ledger.num_added = 50
        return draw_as_before(*arguments)

    shard.draw = draw  # type: ignore[method-assign]
    assert next(loader)["row"].shape == (8, 5) and world.time > 20.0


@pytest.mark.filterwarnings("ignore:Shard 1 is lost:RuntimeWarning")
def test_a_limiter_counts_what_a_shard_without_saves_had_stored() -> None:
    world = Simulated(2)
    shards = shards_of(world, Limits.of(SamplesPerInsert(1.0, tolerance=40.0, timeout=5.0)))
    sink, loader = RemoteSink(shards, has_thread=False), RemoteLoader(shards, 8, 5)
    sink.settle_fields(Fields.from_episode(rows(0, 10)))

    def run(num_steps: int) -> None:
        added = 0
        while added < num_steps:
            if sink.may_add(0):
                sink.add(rows(0, 10))
                added += 10
            world.time += 0.1
            for _ in range(loader.num_batches_due):
                next(loader)

    run(2_000)
    for _ in range(2):
        drawn = loader.position
        world.kill(1)
        world.start(1)
        run(1_000)
        assert 20 <= loader.position - drawn <= 30
    assert loader.stats()["num_added"] == pytest.approx(4_000, abs=50)
