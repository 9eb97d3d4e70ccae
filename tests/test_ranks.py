"""Ranks share out the batches of one stream, however many they are."""

from __future__ import annotations

import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.loading import SequenceLoader
from tests import tagged
from tests import windows_model as model
from tests.windows_model import EVERYTHING, PROPERTY, place

LENGTHS = [5, 3, 9, 1, 4, 20]
# How many ranks there are, and how many batches each takes.
RUNS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4)


def places(batch: dict[str, Any]) -> list[Any]:
    return [place(batch, b) for b in range(len(batch["step"]))]


def taken_in_turn(loaders: list[SequenceLoader], num: int) -> list[Any]:
    """The batches of all ranks, in the order of one stream."""
    parts = [[places(batch) for batch in itertools.islice(loader, num)] for loader in loaders]
    return [batch for batches in itertools.zip_longest(*parts) for batch in batches if batch is not None]


def is_over(loader: SequenceLoader) -> bool:
    one_pass = loader.stream.one_pass
    assert one_pass is not None
    has_begun = one_pass.state[2] > 0
    return has_begun and loader.stream.position >= one_pass.end


@given(RUNS)
@PROPERTY
def test_other_numbers_of_ranks_go_on_with_the_same_stream(runs: list[tuple[int, int]]) -> None:
    with model.stored("ring", LENGTHS) as ring:
        one = ring.get_loader(3, 2, seed=7, include=EVERYTHING)
        state, found = None, []
        for world_size, num in runs:
            ranks = [
                ring.get_loader(3, 2, seed=0, include=EVERYTHING, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            for loader in ranks:
                loader.load_state_dict(state or {"seed": 7, "position": 0})
            found += taken_in_turn(ranks, num)
            state = ranks[-1].state_dict()
        assert found == [places(batch) for batch in itertools.islice(one, len(found))]
        assert len(found) == sum(world_size * num for world_size, num in runs)


@pytest.mark.parametrize("drop_last", [False, True])
@given(RUNS, st.integers(1, 9), st.integers(1, 3), st.booleans())
@PROPERTY
def test_other_numbers_of_ranks_finish_the_passes(
    drop_last: bool, runs: list[tuple[int, int]], batch_size: int, epochs: int, shuffle: bool
) -> None:
    # If some ranks have a batch more than others, they are in step within one pass only.
    epochs = epochs if drop_last else 1
    options: dict[str, Any] = {"shuffle": shuffle, "epochs": epochs, "include": EVERYTHING, "seed": 3}
    options["drop_last"] = drop_last
    with model.stored("ring", LENGTHS) as ring:
        one = [places(batch) for batch in ring.get_loader(batch_size, 2, **options)]
        state, found = ring.get_loader(batch_size, 2, **options).state_dict(), []
        for world_size, num in [*runs, (1, 10**6)]:
            ranks = [
                ring.get_loader(batch_size, 2, rank=rank, world_size=world_size, **options)
                for rank in range(world_size)
            ]
            for loader in ranks:
                loader.load_state_dict(state)
            if is_over(ranks[0]):
                break
            found += taken_in_turn(ranks, num)
            state = ranks[0].state_dict()
        if not drop_last:
            assert found == one
        else:
            rest = iter(one)
            assert all(batch in rest for batch in found)  # In this order, each once.
            most = max([1, *(world_size for world_size, _ in runs)])
            assert len(one) - len(found) <= epochs * (most - 1) * len(runs)


def test_a_finished_pass_is_followed_by_others_of_new_orders() -> None:
    options: dict[str, Any] = {"epochs": 2, "include": EVERYTHING, "seed": 3, "drop_last": True}
    with model.stored("ring", LENGTHS) as ring:
        one = ring.get_loader(2, 2, **options)
        expected = [[places(batch) for batch in one] for _ in range(2)]
        two = [ring.get_loader(2, 2, rank=rank, world_size=2, **options) for rank in range(2)]
        assert len(taken_in_turn(two, 99)) == len(expected[0]) // 2 * 2
        again = ring.get_loader(2, 2, **options)
        again.load_state_dict(two[0].state_dict())
        assert [places(batch) for batch in again] == expected[1]


def test_a_state_of_impossible_ranks_changes_nothing() -> None:
    with model.stored("ring", LENGTHS) as ring:
        loader = ring.get_loader(2, 2, seed=1, rank=1, world_size=2)
        before = loader.state_dict()
        assert before == {"seed": 1, "position": 0, "rank": 1, "world_size": 2, "offset": 0}
        for wrong, message in (
            ({"rank": 2, "world_size": 2}, "`rank` must be less than `world_size`=2, found 2"),
            ({"world_size": 0}, "`world_size` must be at least 1, found 0"),
            ({"position": 3, "offset": -7}, "`offset` must be at least -6, found -7"),
        ):
            with pytest.raises(ValueError, match=message):
                loader.load_state_dict({**before, "seed": 5, **wrong})
            assert loader.state_dict() == before
        assert "world_size" not in ring.get_loader(2, 2, seed=1).state_dict()


# A job of torch.distributed.


def in_a_job(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'job'}", rank=rank, world_size=2)
    small, large = RingBufferDataset(50), RingBufferDataset(200)
    small.extend(large, seed=0)
    for number in range(20):
        small.add_episode(tagged.episode(5, number))
    options: dict[str, Any] = {"include": EVERYTHING}

    def shared_out(seed: int | None = None, **others: Any) -> tuple[int, int]:
        stream = small.get_loader(2, 2, seed=seed, **options, **others).stream
        return stream.rank, stream.world_size

    found: dict[str, Any] = {
        "seeded": shared_out(7),
        "a pass": shared_out(epochs=1, shuffle=False),
        "at random": shared_out(),
        "given": shared_out(7, rank=0, world_size=1),
        "batches": [places(batch) for batch in itertools.islice(small.get_loader(2, 2, seed=7, **options), 3)],
        "stored": [episode["code"].tolist() for episode in small.episodes()],
    }
    with pytest.raises(ValueError, match="give the same to all"):
        small.get_loader(2, 2, epochs=1)
    with ReplayBuffer(small, 2, 2, seed=7, include=EVERYTHING) as buffer:
        found["buffer"] = [places(buffer.sample()) for _ in range(3)]
    torch.save(found, folder / str(rank))
    torch.distributed.destroy_process_group()


def test_ranks_are_those_of_the_job_unless_given(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "buffers"])
    processes = [context.Process(target=in_a_job, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    zero, one = (torch.load(tmp_path / str(rank), weights_only=False) for rank in range(2))
    assert (zero["seeded"], one["seeded"]) == (zero["a pass"], one["a pass"]) == ((0, 2), (1, 2))
    assert zero["at random"] == one["at random"] == zero["given"] == one["given"] == (0, 1)
    # What comes back from a larger dataset is stored, not drawn: the same everywhere.
    assert zero["stored"] == one["stored"]
    ring = RingBufferDataset(50)
    alone = zero["batches"], one["batches"]
    assert zero["buffer"] == zero["batches"] and one["buffer"] == one["batches"] and not ring.num_episodes
    assert not {str(batch) for batch in alone[0]} & {str(batch) for batch in alone[1]}
