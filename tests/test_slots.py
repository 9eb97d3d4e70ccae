"""How batches cross from workers: they stay as they were drawn, whatever a transform makes of them."""

from __future__ import annotations

import gc
import itertools
import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buffers.dataset import RingBufferDataset
from buffers.loading.slots import Slots, _opened, _unpack
from buffers.transforms import stack_frames
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


def stacked_and_transposed(batch: dict[str, Any]) -> dict[str, Any]:
    stacked = stack_frames(batch, "obs/pixels", 4, "first")
    return {**stacked, "transposed": stacked["obs"]["pixels"].transpose(0, 1), "rest": batch["reward"][:, 3:]}


def test_stacks_of_frames_cross_as_views_in_the_bytes_of_one_batch() -> None:
    dataset = filled(2000)
    plain = iter(dataset.get_loader(64, 100, num_workers=1, seed=0))
    num_bytes = sum(value.nbytes for value in tagged.flatten(next(plain)).values())
    of_plain = _opened[workers_of(plain)[0]][1]["slots"].shape[1]
    options = {"transform": stacked_and_transposed, "seed": 0}
    batches = iter(dataset.get_loader(64, 100, num_workers=1, **options))
    for expected in itertools.islice(dataset.get_loader(64, 100, **options), 5):
        found = next(batches)
        flat, flat_expected = tagged.flatten(found), tagged.flatten(expected)
        assert flat.keys() == flat_expected.keys()
        for name, value in flat_expected.items():
            assert torch.equal(flat[name], value) and flat[name].stride() == value.stride()
        pixels = found["obs"]["pixels"]
        assert pixels.shape == (64, 97, 16, 2, 3)
        pixels[0, 0, 12:] = 77
        assert (pixels[0, 1, 8:12] == 77).all() and (found["transposed"][3, 0, :4] == 77).all()
        assert found["reward"].data_ptr() == found["rest"].data_ptr()
    # Of the same size: no batch has outgrown its slot.
    assert _opened[workers_of(batches)[0]][1]["slots"].shape[1] == of_plain < 2 * num_bytes


@st.composite
def views(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    """A view of a tensor, of any kind that keeps its dtype."""
    view = base
    for _ in range(draw(st.integers(0, 4))):
        axis = draw(st.integers(0, view.dim() - 1)) if view.dim() else 0
        size = view.shape[axis] if view.dim() else 0
        kinds = ["narrow", "transpose", "select", "unfold", "skip"] if size else []
        kind = draw(st.sampled_from([*kinds, "unsqueeze", "expand", "conj"]))
        if kind == "narrow":
            start = draw(st.integers(0, size))
            view = view.narrow(axis, start, draw(st.integers(0, size - start)))
        elif kind == "transpose":
            view = view.transpose(axis, draw(st.integers(0, view.dim() - 1)))
        elif kind == "select":
            view = view.select(axis, draw(st.integers(0, size - 1)))
        elif kind == "unfold":
            view = view.unfold(axis, draw(st.integers(1, size)), draw(st.integers(1, 2))).movedim(-1, 0)
        elif kind == "skip":
            view = view[(slice(None),) * axis + (slice(None, None, 2),)]
        elif kind == "unsqueeze":
            view = view.unsqueeze(0)
        elif kind == "expand":
            view = view.expand(3, *view.shape)
        else:
            view = view.conj()
    return view


@given(st.data(), st.sampled_from([torch.uint8, torch.bool, torch.bfloat16, torch.float64, torch.complex64]))
def test_views_of_a_batch_cross_without_a_copy_and_others_with_at_most_their_bytes(
    data: st.DataObject, dtype: torch.dtype
) -> None:
    slots = Slots(1)
    slots.begin(0)
    values = (torch.arange(60).view(3, 4, 5) * (1 + 1j if dtype.is_complex else 1)).to(dtype)
    slots.empty((5,), torch.uint8)  # So that the base does not begin at 0.
    base = slots.empty((3, 4, 5), dtype).copy_(values)
    used = slots._used
    inside, outside = data.draw(views(base)), data.draw(views(values.clone()))
    function, arguments = slots.pack({"base": base, "inside": inside, "outside": outside}).__reduce__()
    copied = slots._used - used
    found = function(*arguments)
    for name, view in (("inside", inside), ("outside", outside)):
        assert torch.equal(found[name], view.resolve_conj()) and found[name].dtype == dtype
        found[name].copy_(found[name].clone())  # As pinning it does: an item that stands for many is an error.
    repeats = not inside.is_contiguous() and 0 in inside.stride()
    if inside.numel() and not (repeats or inside.is_conj()):  # So all that was copied is `outside`.
        assert found["inside"].data_ptr() - found["base"].data_ptr() == inside.data_ptr() - base.data_ptr()
        assert found["inside"].stride() == inside.stride()
        items = 1 + sum(step * (size - 1) for size, step in zip(outside.shape, outside.stride(), strict=True))
        most = outside.numel() if outside.is_conj() or 0 in outside.stride() else min(items, outside.numel())
        assert copied < most * dtype.itemsize + 64


def test_stacks_of_what_a_transform_made_need_no_more_room_than_it_does() -> None:
    slots = Slots(1)
    slots.begin(80_000)
    made = torch.arange(20_000.0)
    function, arguments = slots.pack({"stacks": made.unfold(0, 100, 1)}).__reduce__()
    is_single_use = arguments[2]
    assert not is_single_use and torch.equal(function(*arguments)["stacks"][:, 0], made[:-99])


def test_a_view_that_reaches_behind_the_batch_is_copied() -> None:
    slots = Slots(1)
    slots.begin(0)
    tensor = slots.empty((8,), torch.int64).copy_(torch.arange(8))
    whole = torch.from_numpy(slots._memory[: 64 * 3]).view(torch.int64)
    used = slots._used
    function, arguments = slots.pack({"x": tensor, "behind": whole[4::8]}).__reduce__()
    assert slots._used > used, "what lies behind is not the batch's, and may be written to"
    assert function(*arguments)["behind"][0] == 4


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
