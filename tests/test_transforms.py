"""Transitions, n-step returns, stacks of frames and chunks of actions, against loops that spell them out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from buffers import Recorder, ReplayBuffer
from buffers.transforms import action_chunks, n_step_returns, split_burn_in, stack_frames, to_transitions
from tests import tagged
from tests.logged_game import Games, make_buffer, play

N = 3


def recorded_games(buffer: ReplayBuffer) -> Games:
    games = Games(N, "next_step")
    play(games, Recorder(buffer, N, "next_step"), returns=lambda games, call: {"extras": {"value": call["reward"] * 2}})
    return games


def logged_transitions(games: Games) -> dict[tuple[float, ...], tuple[Any, ...]]:
    """From what identifies a transition (environment, episode, step of its first observation) to all of it."""
    transitions = {}
    for log in games.logs:
        for episode in log:
            for t, action in enumerate(episode["action"]):
                key = tuple(episode["obs"][t].tolist())
                flags = bool(episode["terminated"][t]), bool(episode["truncated"][t])
                next_obs = tuple(episode["obs"][t + 1].tolist())
                transitions[key] = (tuple(action.tolist()), episode["reward"][t], *flags, next_obs, t == 0)
    return transitions


def transitions_in(batch: dict[str, Any]) -> list[tuple[tuple[float, ...], tuple[Any, ...]]]:
    """The same, of what was drawn."""
    found = []
    for index in np.ndindex(*batch["terminated"].shape):
        names = ("action", "reward", "terminated", "truncated", "next_obs", "is_first")
        values = [batch[name][index].tolist() for name in ("obs", *names)]
        values = [tuple(value) if isinstance(value, list) else value for value in values]
        assert batch["value"][index] == 2 * batch["reward"][index]
        found.append((values[0], tuple(values[1:])))
    return found


@pytest.mark.parametrize("num_transitions", [1, 3])
def test_transitions_that_a_loader_draws_are_those_of_the_log(num_transitions: int) -> None:
    buffer = make_buffer()
    logged = logged_transitions(recorded_games(buffer))
    drawing = ReplayBuffer(buffer.dataset, 2000, num_transitions + 1, transform=to_transitions, seed=0)
    found = dict(transitions_in(drawing.sample()))
    assert found.items() <= logged.items()
    assert num_transitions > 1 or found == logged, "and all of them"


def test_index_and_step_are_of_the_row_before_and_other_included_names_on_arrival() -> None:
    buffer = make_buffer()
    recorded_games(buffer)
    include = ("index", "episode", "step", "is_last", "mask", "weight")
    batch = ReplayBuffer(buffer.dataset, 16, 3, include=include, seed=0).sample()
    found = to_transitions(batch)
    for name in ("is_last", "mask", "value"):
        assert torch.equal(found[name], batch[name][:, 1:])
    for name in ("index", "step"):
        assert torch.equal(found[name], batch[name][:, :2])
    assert found["episode"] is batch["episode"] and found["weight"] is batch["weight"]
    assert torch.equal(found["is_first"], batch["is_first"][:, :2])


def test_nested_fields_are_split_and_share_their_memory() -> None:
    image, state = torch.arange(24).reshape(2, 3, 4), torch.arange(6.0).reshape(2, 3)
    reward, no = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool)
    obs = {"image": image, "deep": {"state": state}}
    rows = {"obs": obs, "action": {"0": state}, "reward": reward, "terminated": no, "truncated": no}
    found = to_transitions(rows)
    assert torch.equal(found["obs"]["deep"]["state"], state[:, :2])
    assert torch.equal(found["next_obs"]["image"], image[:, 1:])
    assert found["next_obs"]["image"].untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
    assert found["action"]["0"].shape == (2, 2)
    with_returns = n_step_returns(found, 2, 0.9)
    assert torch.equal(with_returns["bootstrap_obs"]["image"][:, 0], image[:, 2])
    assert with_returns["return"].dtype == torch.float64


def masks(num_rows: int) -> st.SearchStrategy[list[bool]]:
    """False, then True, then False: the rows of a window that are within its episode."""
    bounds = st.lists(st.integers(0, num_rows), min_size=2, max_size=2)
    return bounds.map(lambda found: [min(found) <= t < max(found) for t in range(num_rows)])


def returns_by_loop(
    reward: list[float], terminated: list[bool], truncated: list[bool], real: list[bool], n: int, gamma: float
) -> list[tuple[float, float, int]]:
    """(return, discount, last transition) for each start."""
    found = []
    for start in range(len(reward)):
        total, discount, t = 0.0, 1.0, start
        if not real[start]:
            found.append((0.0, 0.0, start))
            continue
        while True:
            total, discount = total + discount * reward[t], discount * gamma
            is_end = t + 1 == len(reward) or not real[t + 1]
            if terminated[t] or truncated[t] or t + 1 - start == n or is_end:
                break
            t += 1
        found.append((total, 0.0 if terminated[t] else discount, t))
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data(), length=st.integers(1, 7), n=st.integers(1, 9), gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_n_step_returns_are_those_of_a_loop(data: st.DataObject, length: int, n: int, gamma: float) -> None:
    def column(values: st.SearchStrategy[Any]) -> list[list[Any]]:
        return data.draw(st.lists(st.lists(values, min_size=length, max_size=length), min_size=2, max_size=2))

    reward, terminated, truncated = column(st.integers(-3, 3)), column(st.booleans()), column(st.booleans())
    real = data.draw(st.none() | st.lists(masks(length), min_size=2, max_size=2))
    batch = {
        "reward": torch.tensor(reward, dtype=data.draw(st.sampled_from([torch.float32, torch.int64]))),
        "terminated": torch.tensor(terminated),
        "truncated": torch.tensor(truncated),
        "next_obs": torch.arange(2 * length).reshape(2, length, 1),
    }
    if real is not None:
        batch["mask"] = torch.tensor(real)
    found = n_step_returns(batch, n, gamma)
    for b in range(2):
        is_real = [True] * length if real is None else real[b]
        expected = returns_by_loop(reward[b], terminated[b], truncated[b], is_real, n, gamma)
        single = n_step_returns({name: value[b] for name, value in batch.items()}, n, gamma)
        for of_b in ({name: found[name][b] for name in ("return", "discount", "bootstrap_obs")}, single):
            np.testing.assert_allclose(of_b["return"], [item[0] for item in expected], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(of_b["discount"], [item[1] for item in expected], rtol=1e-5)
            np.testing.assert_array_equal(of_b["bootstrap_obs"][:, 0], [b * length + item[2] for item in expected])


_NO = torch.zeros(2, 3, dtype=torch.bool)
_ROWS = {"obs": _NO, "action": _NO, "reward": torch.zeros(2, 3), "terminated": _NO, "truncated": _NO}


@pytest.mark.parametrize(
    ("changes", "n", "gamma", "message"),
    [
        ({"obs": _NO, "terminated": _NO[:, :1]}, 0, 0, "found sequences of 1. Draw with `sequence_length=2`"),
        ({"truncated": None}, 0, 0, r"The batch has no \['truncated'\].*add them to the batch before"),
        ({"next_obs": _NO}, 0, 0, r"already has \['next_obs'\]"),
        ({}, 1, 0.9, "call `to_transitions` first"),
        ({}, 0, 0.9, "`n` must be at least 1 and `gamma` from 0 to 1, found 0 and 0.9"),
        ({}, 1, 1.5, "found 1 and 1.5"),
        (
            {"next_obs": _NO, "reward": torch.zeros(2, 3, 3)},
            1,
            0.9,
            r"`reward` has shape \(2, 3, 3\), expected \(2, 3\)",
        ),
        ({"next_obs": _NO, "discount": _NO}, 1, 0.9, r"already has \['discount'\]"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes: dict[str, Any], n: int, gamma: float, message: str) -> None:
    batch = {name: value for name, value in {**_ROWS, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        n_step_returns(batch, n, gamma) if gamma else to_transitions(batch)


def test_names_of_what_is_included_are_left_alone_unless_they_are_rows() -> None:
    found = to_transitions({**_ROWS, "weight": torch.arange(6.0).view(2, 3), "source": torch.arange(2)})
    assert found["weight"].tolist() == [[1.0, 2.0], [4.0, 5.0]] and found["source"].tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        to_transitions({**_ROWS, "extra": torch.zeros(2, 1)})


@settings(max_examples=150)
@given(data=st.data(), num_rows=st.integers(2, 8), n=st.integers(1, 9), is_batch=st.booleans())
def test_only_transitions_between_two_real_rows_are_real(
    data: st.DataObject, num_rows: int, n: int, is_batch: bool
) -> None:
    mask = torch.tensor(data.draw(st.lists(masks(num_rows), min_size=2, max_size=2)))
    step = torch.arange(1, 2 * num_rows + 1).view(2, num_rows)
    no = torch.zeros_like(mask)
    # Padding is such that using it would show.
    batch = {"obs": step.float().masked_fill(~mask, torch.nan), "action": step, "mask": mask, "truncated": no}
    batch |= {"reward": batch["obs"], "terminated": ~mask, "index": step.masked_fill(~mask, -1), "step": step - 1}
    if not is_batch:
        batch = {name: value[0] for name, value in batch.items()}
    found = n_step_returns(to_transitions(batch), n, 0.5)
    for b, rows in enumerate(mask.tolist()[: 1 + is_batch]):
        for t in range(num_rows - 1):
            at = (b, t) if is_batch else t
            last = t
            while last + 1 < num_rows and last - t < n and all(rows[t : last + 2]):
                last += 1
            is_real = last > t
            assert found["mask"][at] == is_real
            assert found["index"][at] == (step[b, t] if is_real else -1)
            assert found["step"][at] == (step[b, t] - 1 if is_real else -1)
            expected = sum(0.5**k * step[b, t + 1 + k].item() for k in range(last - t))
            assert found["return"][at] == expected
            assert found["discount"][at] == (0.5 ** (last - t) if is_real else 0)
            assert not is_real or found["bootstrap_obs"][at] == step[b, last]


def test_a_field_called_mask_with_axes_of_its_own_is_a_field_like_others() -> None:
    legal = torch.ones(2, 3, 4, dtype=torch.bool)
    found = n_step_returns(to_transitions({**_ROWS, "mask": legal}), 2, 0.9)
    assert found["mask"].shape == (2, 2, 4) and (found["discount"] > 0).all()
    assert stack_frames({"obs": torch.zeros(2, 3, 4), "mask": legal}, "obs", 2)["mask"].shape == (2, 2, 4)
    assert action_chunks({"action": torch.zeros(2, 3, 4), "mask": legal}, 2)["action_mask"].shape == (2, 2, 2)


def some_rows(num_rows: int, is_batch: bool, shape: tuple[int, ...]) -> dict[str, Any]:
    """Rows that differ everywhere, with everything that a batch may have besides."""
    image = torch.arange(2 * num_rows * math.prod(shape)).view(2, num_rows, *shape)
    step = torch.arange(2 * num_rows).view(2, num_rows)
    batch = {"obs": {"image": image, "deep": {"state": image + 1}}, "action": -image, "mask": step % 3 > 0}
    batch |= {"index": step, "step": step, "is_first": step == 0}
    batch |= {"episode": torch.arange(2), "weight": torch.ones(2), "source": torch.arange(2)}
    return batch if is_batch else tree_map(lambda value: value[0], batch)


def assert_others_are(found: dict[str, Any], batch: dict[str, Any], rows: range, without: tuple[str, ...]) -> None:
    """All fields but some are the batch's, of these rows, and share its memory; one value a sequence stays."""
    flat, flat_found = tagged.flatten(batch), tagged.flatten(found)
    assert flat.keys() - set(without) == flat_found.keys() - set(without)
    for name, value in flat.items():
        if name in ("episode", "weight", "source"):
            assert flat_found[name] is value
        elif name not in without:
            expected = value[:, rows.start : rows.stop] if batch["step"].dim() == 2 else value[rows.start : rows.stop]
            assert torch.equal(flat_found[name], expected)
            assert is_view(flat_found[name], value)


def is_view(tensor: torch.Tensor, of: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


SHAPES = st.sampled_from([(), (3,), (2, 4, 5)])
FIELDS = st.sampled_from(["obs/image", "obs/deep/state", "action"])


@given(
    n=st.integers(1, 4),
    num_stacks=st.integers(1, 4),
    is_batch=st.booleans(),
    field=FIELDS,
    shape=SHAPES,
    channels=st.sampled_from([None, "first", "last"]),
)
def test_stacks_are_those_of_a_loop(
    n: int, num_stacks: int, is_batch: bool, field: str, shape: tuple[int, ...], channels: str | None
) -> None:
    batch = some_rows(num_stacks + n - 1, is_batch, shape)
    if channels and not shape:
        with pytest.raises(
            ValueError, match=f"`{field}` is one number a row: it has no axis for `channels`='{channels}'"
        ):
            stack_frames(batch, field, n, channels)
        return
    before = tagged.flatten(batch)
    found = stack_frames(batch, field, n, channels)
    rows, stacks = before[field], tagged.flatten(found)[field]
    assert is_view(stacks, rows) or channels == "last"
    assert all(value is before[name] for name, value in tagged.flatten(batch).items()), "the batch is as it was"
    for b in range(1 + is_batch):
        for t in range(num_stacks):
            frames = [(rows[b] if is_batch else rows)[t + k].numpy() for k in range(n)]
            axis = {"first": 0, "last": -1}.get(channels)
            expected = np.stack(frames) if axis is None else np.concatenate(frames, axis)
            np.testing.assert_array_equal((stacks[b] if is_batch else stacks)[t].numpy(), expected, strict=True)
    assert_others_are(found, batch, range(n - 1, num_stacks + n - 1), (field,))


@given(
    h=st.integers(1, 4),
    num_chunks=st.integers(1, 4),
    first=st.integers(0, 2),
    is_batch=st.booleans(),
    field=FIELDS,
    shape=SHAPES,
    has_mask=st.booleans(),
)
def test_chunks_are_those_of_a_loop(
    h: int, num_chunks: int, first: int, is_batch: bool, field: str, shape: tuple[int, ...], has_mask: bool
) -> None:
    num_rows = num_chunks + h - 1 + first
    batch = some_rows(num_rows, is_batch, shape)
    mask = batch["mask"].clone() if has_mask else torch.ones_like(batch.pop("mask"))
    found = action_chunks(batch, h, field, first)
    rows, flat = tagged.flatten(batch)[field], tagged.flatten(found)
    chunks, chunk_mask = flat[field], flat.pop(f"{field}_mask")
    assert is_view(chunks, rows) and chunk_mask.dtype == torch.bool
    for b in range(1 + is_batch):
        for t in range(num_chunks):
            at, here = ((b, t), slice(t + first, t + first + h)) if is_batch else (t, slice(t + first, t + first + h))
            assert torch.equal(chunks[at], (rows[b] if is_batch else rows)[here])
            assert torch.equal(chunk_mask[at], (mask[b] if is_batch else mask)[here])
    assert_others_are(found, batch, range(num_chunks), (field, f"{field}_mask"))


@given(st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_burn_in_is_the_first_rows_and_the_rest_is_what_follows(burn_in: int, num_rest: int, is_batch: bool) -> None:
    batch = some_rows(burn_in + num_rest, is_batch, (2,))
    warm_up, rest = split_burn_in(batch, burn_in)
    assert_others_are(warm_up, batch, range(burn_in), ())
    assert_others_are(rest, batch, range(burn_in, burn_in + num_rest), ())


def test_a_dict_of_fields_is_stacked_or_chunked_as_a_whole() -> None:
    batch = some_rows(5, True, (2,))
    stacked = stack_frames(batch, "obs", 3)["obs"]
    assert stacked["image"].shape == stacked["deep"]["state"].shape == (2, 3, 3, 2)
    chunked = action_chunks(batch, 2, "obs")
    assert chunked["obs"]["deep"]["state"].shape == (2, 4, 2, 2) and chunked["obs_mask"].shape == (2, 4, 2)


def test_time_is_found_without_any_name_that_has_one_value_a_row() -> None:
    batch = {"obs": torch.zeros(2, 5, 3), "reward": torch.zeros(2, 5), "weight": torch.ones(2)}
    assert stack_frames(batch, "obs", 2)["obs"].shape == (2, 4, 2, 3)
    sequence = {"obs": torch.zeros(5, 3), "reward": torch.zeros(5), "weight": torch.tensor(1.0)}
    assert stack_frames(sequence, "obs", 2)["obs"].shape == (4, 2, 3)
    assert stack_frames({"obs": torch.zeros(5, 3), "step": torch.arange(5)}, "obs", 2)["obs"].shape == (4, 2, 3)


def test_stacks_transitions_and_chunks_go_together() -> None:
    batch = {**some_rows(6, True, (2,)), "reward": torch.zeros(2, 6), "truncated": torch.zeros(2, 6, dtype=torch.bool)}
    batch["terminated"] = batch["truncated"]
    found = to_transitions(stack_frames(batch, "obs/image", 3))
    assert found["obs"]["image"].shape == found["next_obs"]["image"].shape == (2, 3, 3, 2)
    assert torch.equal(found["next_obs"]["image"][:, :, -1], batch["obs"]["image"][:, 3:])
    assert is_view(found["next_obs"]["image"], batch["obs"]["image"])
    chunked = action_chunks(stack_frames(batch, "obs/image", 3), 2, first=1)
    assert torch.equal(chunked["obs"]["image"][:, :, -1], batch["obs"]["image"][:, 2:4])
    assert torch.equal(chunked["action"][:, :, 0], batch["action"][:, 3:5])


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (stack_frames, ("obs/image", 0), "`n` must be at least 1, found 0"),
        (stack_frames, ("obs/image", 6), "`n`=6 frames need as many rows, found sequences of 5"),
        (stack_frames, ("obs/depth", 2), r"no field `depth`, found \['image', 'deep'\]"),
        (stack_frames, ("depth", 2), r"no field `depth`, found \['obs', 'action'"),
        (stack_frames, ("action", 2, "middle"), r"`channels` must be one of \['first', 'last'\], found 'middle'"),
        (split_burn_in, (-1,), "`burn_in` must be at least 0, found -1"),
        (split_burn_in, (5,), "A `burn_in` of 5 rows leaves none to learn from, found sequences of 5"),
        (action_chunks, (0,), "`h` must be at least 1, found 0"),
        (action_chunks, (2, "action", -1), "`first` must be at least 0, found -1"),
        (action_chunks, (4, "action", 2), "`h`=4 with `first`=2 needs 6 rows, found sequences of 5"),
        (action_chunks, (2, "actions"), "no field `actions`"),
    ],
)
def test_what_cannot_be_stacked_or_split_is_refused(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(some_rows(5, True, (2,)), *arguments)


def test_a_mask_of_actions_is_not_overwritten() -> None:
    batch = some_rows(5, True, (2,))
    with pytest.raises(ValueError, match=r"already has \['action_mask'\]"):
        action_chunks({**batch, "action_mask": batch["mask"]}, 2)


@pytest.mark.parametrize(
    "function", [to_transitions, lambda b: stack_frames(b, "obs", 2), lambda b: split_burn_in(b, 1)]
)
def test_packed_episodes_and_fields_at_offsets_are_refused(function) -> None:
    rows = {name: torch.zeros(2, 3) for name in ("obs", "action", "reward", "terminated", "truncated")}
    for more in ({"cu_seqlens": torch.tensor([0, 6])}, {"mask": {"obs": torch.ones(2, 3, dtype=torch.bool)}}):
        with pytest.raises(ValueError, match="This takes sequences: not packed episodes, nor"):
            function(rows | more)
