"""A learner that goes on where another stood: the same batches, from the same shards, whatever was under way."""

from __future__ import annotations

import json
import warnings
from itertools import islice
from typing import Any

import pytest
import torch
import torch.distributed

from buffers import SamplesPerInsert
from buffers.remote import RemoteLoader, Shards
from buffers.remote.limits import Limits
from buffers.sampler import PrioritizedSampler
from tests.remote.simulated import Simulated
from tests.remote.test_loader import dataset_of, filled, rows, shards_of

OPTIONS: dict[str, Any] = {"include": ("source", "step", "episode")}


def taken(loader: RemoteLoader, num: int) -> list[dict[str, torch.Tensor]]:
    return list(islice(loader, num))


def assert_same(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def resumed(shards: Shards, loader: RemoteLoader, **options: Any) -> RemoteLoader:
    other = RemoteLoader(shards, 8, 4, **{**OPTIONS, **options})
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    return other


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("num_taken", [0, 1, 2, 5, 40])
def test_a_resumed_loader_gives_the_batches_that_had_come_next(seed: int | None, num_taken: int) -> None:
    _, shards = filled(103, 40, 303, 13)
    whole = RemoteLoader(shards, 8, 4, seed=seed, **OPTIONS)
    taken(whole, num_taken)
    # It asks for batches that this one has under way, with another number of them.
    other = resumed(shards, whole, num_in_flight=2)
    assert other.position == num_taken and other.seed == whole.seed
    assert_same(taken(other, 60), taken(whole, 60))
    assert_same(taken(resumed(shards, other), 20), taken(whole, 20))


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("num_taken", [0, 3, 4, 5, 6, 7, 12])
def test_a_shard_that_has_hung_does_not_change_what_comes_next(stopped: int, num_taken: int) -> None:
    world, shards = filled(103, 303, 53)
    whole = RemoteLoader(shards, 8, 4, seed=3, num_in_flight=6, deadline=1.0, **OPTIONS)
    taken(whole, 4)
    world.stop(stopped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        taken(whole, num_taken)
        world.go_on(stopped)
        while whole.troubles:
            world.time += 0.1
            assert whole.can_sample
    other = resumed(shards, whole, num_in_flight=2)
    # And once more, with batches under way that the first one had asked for.
    again = resumed(shards, other)
    expected = taken(whole, 30)
    assert_same(taken(other, 30), expected)
    assert_same(taken(again, 30), expected)


def test_a_loader_that_goes_back_draws_the_same_again() -> None:
    _, shards = filled(103, 303)
    loader = RemoteLoader(shards, 8, 4, **OPTIONS)
    taken(loader, 7)
    state = loader.state_dict()
    expected = taken(loader, 20)
    loader.load_state_dict(state)
    assert_same(taken(loader, 20), expected)


def test_shards_that_come_back_give_the_batches_that_had_come_next(tmp_path: Any) -> None:
    world, shards = filled(103, 303, directory=tmp_path)
    shards.save()
    whole = RemoteLoader(shards, 8, 4, sampler=PrioritizedSampler(), **OPTIONS)
    taken(whole, 10)
    shards.save()
    state, expected = whole.state_dict(), taken(whole, 20)
    for number in range(2):
        world.kill(number)
        world.start(number)
    other = RemoteLoader(shards, 8, 4, sampler=PrioritizedSampler(), **OPTIONS)
    other.load_state_dict(state)
    assert_same(taken(other, 20), expected)


@pytest.mark.parametrize("num_ranks", [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_ranks_share_out_one_stream_of_one_shard_and_another_number_goes_on(num_ranks: tuple[int, int]) -> None:
    _, shards = filled(103)
    expected = taken(RemoteLoader(shards, 8, 4, seed=1, **OPTIONS), 12)
    before, after = num_ranks
    position = 6 // before
    first = [RemoteLoader(shards, 8, 4, seed=1, rank=r, world_size=before, **OPTIONS) for r in range(before)]
    for rank, loader in enumerate(first):
        assert_same(taken(loader, position), expected[rank:6:before])
    for rank in range(after):
        other = resumed(shards, first[0], rank=rank, world_size=after)
        again = resumed(shards, other, rank=rank, world_size=after)
        assert_same(taken(other, 6 // after), expected[6 + rank :: after])
        assert_same(taken(again, 6 // after), expected[6 + rank :: after])


def test_ranks_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    _, shards = filled(103)
    expected = taken(RemoteLoader(shards, 8, 4, seed=1, **OPTIONS), 8)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert_same(taken(RemoteLoader(shards, 8, 4, seed=1, **OPTIONS), 4), expected[1::2])


def limited(ratio: float = 1.0) -> tuple[Simulated, Shards]:
    world = Simulated(2)
    for number in range(2):
        dataset_of(world, number).add_episode(rows(number, 100))
        shard = world.shards[number]
        assert shard is not None
        shard._ledger.open("writer", 0)
        shard._ledger.stored("writer", 1_000)
    return world, shards_of(world, Limits.of(SamplesPerInsert(ratio, tolerance=32)))


def let_know(world: Simulated, loaders: list[RemoteLoader]) -> None:
    """Let each tell shards of itself, and hear of the others."""
    for _ in range(5):
        world.time += 0.2
        assert all(loader.num_batches_due for loader in loaders)


def test_a_limiter_counts_what_was_drawn_before_once() -> None:
    world, shards = limited()
    loader = RemoteLoader(shards, 8, 4, seed=0)
    taken(loader, 10)
    state = loader.state_dict()
    taken(loader, 5)
    assert state["num_drawn"] == 10 * 32
    other = RemoteLoader(shards, 8, 4, seed=0)
    other.load_state_dict(state)
    assert other.num_batches_due == (2_000 - 10 * 32 + 32) // 32
    taken(other, 10)
    assert other.stats()["samples_per_insert"] == 20 * 32 / 2_000


def test_a_limiter_counts_the_ranks_of_a_state_apart() -> None:
    world, shards = limited()
    first = [RemoteLoader(shards, 8, 4, seed=0, rank=rank, world_size=2) for rank in range(2)]
    for loader in first:
        taken(loader, 5)
    let_know(world, first)
    # Only rank 0 has saved its state.
    second = [RemoteLoader(shards, 8, 4, seed=0, rank=rank, world_size=2) for rank in range(2)]
    for loader in second:
        loader.load_state_dict(first[0].state_dict())
        taken(loader, 5)
    let_know(world, second)
    assert [loader.stats()["samples_per_insert"] for loader in second] == [20 * 32 / 2_000] * 2


def test_a_state_for_other_shards_loads_and_deals_anew() -> None:
    _, shards = filled(50, 50)
    loader = RemoteLoader(shards, 8, 4, **OPTIONS)
    taken(loader, 5)
    _, more = filled(50, 50, 50)
    # Those that were under way come from where they were asked for.
    sources = [int(batch["source"][0]) for batch in taken(resumed(more, loader), 3 + 9)[3:]]
    assert sorted(sources) == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"position": 1.5}, TypeError, "`position` must be an integer"),
        ({"num_drawn": -1}, ValueError, "`num_drawn` must be at least 0"),
        ({"learner": ["x"]}, TypeError, "`learner` must be a string, found list"),
        ({"dealt": [0, -2]}, ValueError, "`dealt` must be at least -1"),
        ({"deal": [[-1, 0.5]]}, ValueError, "`deal` must be at least 0"),
        ({"deal": [[0, float("nan")]]}, ValueError, "`deal` must be finite"),
        ({"rank": 2, "world_size": 2}, ValueError, "`rank` must be less than `world_size`=2"),
        ({"offset": -6}, ValueError, "`offset` must be at least -5"),
    ],
)
def test_a_wrong_state_is_an_error_and_changes_nothing(change: Any, error: type[Exception], match: str) -> None:
    _, shards = filled(50, 50)
    loader = RemoteLoader(shards, 8, 4, seed=1, **OPTIONS)
    taken(loader, 5)
    before = loader.state_dict()
    with pytest.raises(error, match=match):
        loader.load_state_dict({**before, "seed": 9, "learner": "other", **change})
    assert loader.state_dict() == before


@pytest.mark.parametrize("state", [None, [1]])
def test_a_state_that_is_no_dict_is_a_named_error(state: Any) -> None:
    _, shards = filled(50)
    with pytest.raises(TypeError, match="`state` must be a dict"):
        RemoteLoader(shards, 8, 4).load_state_dict(state)


def test_the_state_of_a_local_loader_is_refused() -> None:
    world, shards = filled(50)
    local = dataset_of(world, 0).get_loader(8, 4)
    names = r"\['deal', 'dealt', 'learner', 'num_drawn', 'position', 'seed'\]"
    with pytest.raises(ValueError, match=rf"has {names}, as `state_dict\(\)` gives them, found \['position', 'seed'\]"):
        RemoteLoader(shards, 8, 4).load_state_dict(local.state_dict())
