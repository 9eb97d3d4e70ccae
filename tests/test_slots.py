"""How batches cross from workers: they stay as they were drawn, whatever a transform makes of them."""

from __future__ import annotations

import gc
import itertools
import os
from typing import Any

import pytest
import torch

from buffers.dataset import RingBufferDataset
from buffers.loading.slots import Slots, _opened, _unpack
from tests import tagged


def filled(num_steps: int = 500) -> RingBufferDataset:
    dataset = RingBufferDataset(2 * num_steps)
    dataset.add_episode(tagged.episode(num_steps, 0))
    return dataset


def workers_of(batches: Any) -> list[int]:
    return [worker.pid for worker in batches._batches._workers]


@pytest.mark.parametrize(("keep_every", "persistent"), [(1, False), (3, True)])
def test_kept_batches_are_never_written_over(keep_every: int, persistent: bool) -> None:
    loader = filled().get_loader(8, 4, num_workers=2, include=("index",), persistent_workers=persistent, seed=0)
    kept = []
    for n, batch in enumerate(itertools.islice(loader, 200)):
        if n % keep_every == 0:
            flat = tagged.flatten(batch)
            kept.append((flat, {name: tensor.clone() for name, tensor in flat.items()}))
            kept = kept[-100:]
    del loader, batch
    gc.collect()
    for flat, copies in kept:
        for name, tensor in flat.items():
            assert torch.equal(tensor, copies[name])


def test_a_part_of_a_batch_keeps_it_here_and_in_children() -> None:
    loader = filled().get_loader(4, 4, num_workers=1, seed=0)
    batches = iter(loader)
    part = next(batches)["obs"]["pixels"][1, 2:]
    expected = part.clone()
    child = os.fork()
    if child == 0:
        del part  # The finalizer of this copy must not free the trainer's slot.
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    for _ in range(30):
        next(batches)
    assert torch.equal(part, expected)


def test_slots_are_used_again_unless_batches_are_kept() -> None:
    slots, kept = Slots(2), []
    for n in range(20):
        slots.begin(1000)
        tensor = slots.empty((10, 10), torch.float32)
        assert tensor is not None
        tensor.fill_(n)
        function, arguments = slots.pack({"x": tensor, "y": torch.full((3,), n)}).__reduce__()
        assert function is _unpack
        batch = function(*arguments)
        assert (batch["x"] == n).all() and (batch["y"] == n).all()
        is_single_use = arguments[2]
        assert is_single_use is (len(kept) >= 2)
        if n >= 10:
            kept.append(batch)
        del batch
    assert all((batch["x"] == 10 + i).all() for i, batch in enumerate(kept))
    assert len(slots._open) == 2


def test_a_batch_of_a_worker_that_is_gone_is_an_error() -> None:
    slots = Slots(2)
    slots.begin(1000)
    _, arguments = slots.pack({"x": torch.zeros(3)}).__reduce__()
    del slots
    gc.collect()
    with pytest.raises(RuntimeError, match="DataLoader worker .* ended before its batch was taken"):
        _unpack(0, *arguments[1:])


def test_a_batch_whose_transform_failed_gives_its_slot_back() -> None:
    slots = Slots(2)
    for _ in range(5):
        slots.begin(1000)
    slots.begin(1000)
    assert slots._current is slots._shared


def of_all_kinds(batch: dict[str, Any]) -> dict[str, Any]:
    pixels, reward = batch["obs"]["pixels"].float(), batch["reward"]
    conjugate = torch.view_as_complex(pixels[..., :2].contiguous()).conj()
    views = {"conj": conjugate, "part": reward[:, 1:]}
    return {"larger": pixels / 255, "sum": reward.sum(), "list": [reward, "text"], **views}


def test_what_a_transform_makes_crosses_in_slots_whatever_it_is() -> None:
    dataset, options = filled(2000), {"transform": of_all_kinds, "seed": 0}
    batches = iter(dataset.get_loader(64, 100, num_workers=1, **options))
    for expected in itertools.islice(dataset.get_loader(64, 100, **options), 8):
        found = next(batches)
        assert found.keys() == expected.keys()
        (reward, text), (expected_reward, _) = found.pop("list"), expected.pop("list")
        assert torch.equal(reward, expected_reward) and text == "text"
        assert all(torch.equal(value.resolve_conj(), expected[name].resolve_conj()) for name, value in found.items())
        del found, reward
    mine = [f"torch_{process}_" for process in (os.getpid(), *workers_of(batches))]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(tuple(mine))]
    assert set(workers_of(batches)) <= set(_opened)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_state_that_is_loaded_reaches_workers(persistent: bool) -> None:
    dataset = filled()
    expected = [dataset.get_loader(4, 3, seed=9).stream.batch(n) for n in range(5, 8)]
    loader = dataset.get_loader(4, 3, num_workers=2, seed=0, persistent_workers=persistent)
    batches = iter(loader)
    next(batches)
    workers = workers_of(batches)
    assert set(workers) & set(_opened)
    loader.load_state_dict({"seed": 9, "position": 5})
    for one, two in zip(expected, loader, strict=False):
        assert torch.equal(one["code"], two["code"])
    del batches
    gc.collect()
    assert not set(workers) & set(_opened), "slots of workers that are gone are given up"
