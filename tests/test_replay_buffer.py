from __future__ import annotations

import copy
import gc
import itertools
import random
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.dataset.fields import Fields, Scalar, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from tests import reading, tagged
from tests.contract import assert_same_batch


def buffer_of(
    capacity: int = 1000, batch_size: int = 4, sequence_length: int | None = 2, **options: Any
) -> ReplayBuffer:
    return ReplayBuffer(RingBufferDataset(capacity), batch_size, sequence_length, **options)


def stored(buffer: ReplayBuffer) -> list[tuple[int, int, list[int]]]:
    """(environment, episode, steps) of every stored episode, each checked whole."""
    found = []
    for episode in buffer.dataset.episodes():
        env, number, first = (int(value) for value in episode["obs"]["state"][0])
        steps = list(range(first, first + len(episode["reward"])))
        tagged.assert_same_episode(episode, tagged.rows(env, number, np.array(steps)))
        found.append((env, number, steps))
    return found


# A single environment.


def test_an_episode_can_be_drawn_in_the_very_call_that_ends_it() -> None:
    buffer = buffer_of(sequence_length=3, num_envs=1)
    for step in range(2):
        buffer.add_step(tagged.rows(0, 0, step), False)
        with pytest.raises(RuntimeError, match=f"No episode is complete yet: {step + 1} steps are in open episodes"):
            buffer.sample()
    buffer.add_step(tagged.rows(0, 0, 2), True)
    assert set(tagged.origins(buffer.sample())) == {(0, 0, 0, 3)}


@given(st.lists(st.integers(1, 6), min_size=1, max_size=10))
@settings(max_examples=30, deadline=None)
def test_a_single_environment_gives_its_episodes(lengths: list[int]) -> None:
    buffer = buffer_of()
    for number, length in enumerate(lengths):
        for step in range(length):
            buffer.add_step(tagged.rows(0, number, step), step == length - 1)
    assert stored(buffer) == [(0, number, list(range(length))) for number, length in enumerate(lengths)]


def test_python_numbers_become_float32_int64_and_bool() -> None:
    buffer = buffer_of()
    buffer.add_step({"f": 1.5, "i": 3, "b": True}, False)
    buffer.add_step({"f": np.float64(2.5), "i": np.int32(4), "b": np.bool_(False)}, True)
    episode = buffer.dataset.get_episode(0)
    assert {name: value.dtype for name, value in episode.items()} == {
        "f": torch.float32,
        "i": torch.int64,
        "b": torch.bool,
    }
    assert [value.tolist() for value in episode.values()] == [[1.5, 2.5], [3, 4], [True, False]]


@pytest.mark.parametrize(
    ("first", "then", "is_accepted"),
    [
        (np.float64(1), 0.5, True),
        (np.float32(1), 2, True),
        (np.uint8(1), 255, True),
        (np.uint8(1), 256, False),
        (np.uint8(1), -1, False),
        (np.int8(1), np.int64(300), False),
        (np.float16(1), np.float32(1e5), False),
        (3, 0.5, False),
        (True, 1, False),
        (1, np.array(0.5), False),
        (1.5, np.zeros(1, np.float32), False),
        (1.5, torch.tensor(2.0, dtype=torch.float64), False),
    ],
)
def test_a_number_takes_the_dtype_of_its_field_if_that_loses_nothing_of_its_kind(first, then, is_accepted) -> None:
    buffer = buffer_of(num_envs=1)
    buffer.add_step({"x": first}, False)
    if is_accepted:
        buffer.add_step({"x": then}, True)
        assert buffer.dataset.get_episode(0)["x"].tolist() == [first, then]
        return
    with pytest.raises(ValueError, match="`x` has dtype .* expected"):
        buffer.add_step({"x": then}, True)
    buffer.add_step({"x": first}, True)
    assert buffer.num_timesteps == 2


def test_values_are_copied_when_the_environment_reuses_its_arrays() -> None:
    buffer = buffer_of(num_envs=2)
    row = tagged.rows(np.arange(2), 0, 0)
    for step in range(5):
        new = tagged.flatten(tagged.rows(np.arange(2), 0, step))
        for name, value in tagged.flatten(row).items():
            value[...] = new[name]
        buffer.add_step(row, False)
    buffer.flush()
    assert stored(buffer) == [(env, 0, list(range(5))) for env in range(2)]


# Vectorized environments.


@given(st.integers(1, 6), st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_done_opens_a_new_episode_in_each_of_n_environments(num_envs, seed, rate, as_tensors) -> None:
    rng = np.random.default_rng(seed)
    buffer = buffer_of(10_000)
    episode, step = np.zeros(num_envs, int), np.zeros(num_envs, int)
    expected = []
    for call in range(40):
        done = (rng.random(num_envs) < rate) & (call > 0)
        expected += [(env, int(episode[env]), list(range(step[env]))) for env in np.flatnonzero(done)]
        episode, step = episode + done, np.where(done, 0, step)
        row, flags = tagged.rows(np.arange(num_envs), episode, step), done
        if as_tensors:
            row, flags = {k: torch.from_numpy(v) for k, v in tagged.flatten(row).items()}, torch.from_numpy(done)
            row["obs"] = {"state": row.pop("obs/state"), "pixels": row.pop("obs/pixels")}
        buffer.add_step(row, flags)
        step = step + 1
        assert stored(buffer) == expected
    buffer.flush()
    assert stored(buffer)[len(expected) :] == [(e, int(episode[e]), list(range(step[e]))) for e in range(num_envs)]


def test_a_plain_bool_on_batched_rows_stands_for_all_environments_with_one_warning() -> None:
    buffer = buffer_of()
    with pytest.warns(UserWarning, match="leading size 3, .* `num_envs=3`, or `num_envs=1`") as caught:
        buffer.add_step(tagged.rows(np.arange(3), 0, 0), False)
    assert len(caught) == 1 and caught[0].filename == __file__
    buffer.add_step(tagged.rows(np.arange(3), 0, 1), False)
    buffer.add_step(tagged.rows(np.arange(3), 1, 0), True)
    assert stored(buffer) == [(env, 0, [0, 1]) for env in range(3)]
    buffer.add_step(tagged.rows(np.arange(3), [1, 2, 1], [1, 0, 1]), np.array([False, True, False]))
    assert stored(buffer)[3:] == [(1, 1, [0])]


def test_num_envs_settles_what_the_first_step_means() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = buffer_of(num_envs=1)
        single.add_step({"obs": np.zeros(4), "action": np.zeros(4)}, True)
        assert single.fields is not None and single.fields["obs"].shape == (4,)
        several = buffer_of(num_envs=4)
        several.add_step({"obs": np.zeros(4), "action": np.zeros((4, 2))}, False)
        assert several.fields is not None and several.fields["action"].shape == (2,)
        one_of_many = buffer_of(num_envs=1)
        one_of_many.add_step({"obs": np.zeros((1, 4))}, np.array([False]))
        assert one_of_many.fields is not None and one_of_many.fields["obs"].shape == (4,)
        by_done = buffer_of()
        by_done.add_step({"obs": np.zeros((2, 4))}, torch.tensor([False, False]))
        assert by_done.fields is not None and by_done.fields["obs"].shape == (4,)
        uneven = buffer_of()
        uneven.add_step({"obs": np.zeros(4), "reward": 1.0}, np.True_)
        assert uneven.num_episodes == 1
        info = EpisodeDatasetInfo(Fields(obs=Vector(4), action=Vector(4)))
        known = ReplayBuffer(RingBufferDataset(10, info), 2)
        known.add_step({"obs": np.zeros(4, np.float32), "action": np.zeros(4, np.float32)}, True)
        assert known.num_episodes == 1


# Boundaries stated, masks, flush, cuts.


def test_add_states_both_boundaries_and_masks_leave_environments_out() -> None:
    buffer = buffer_of(num_envs=3)
    buffer.add(tagged.rows(np.arange(3), 0, 0))
    buffer.add(tagged.rows(np.arange(3), 0, 1), mask=[True, False, True])
    buffer.add(tagged.rows(np.arange(3), 0, [2, 1, 2]), is_last=np.array([True, False, False]))
    assert stored(buffer) == [(0, 0, [0, 1, 2])]
    buffer.add(tagged.rows(np.arange(3), [1, 1, 0], [0, 0, 3]), is_first=np.array([True, True, False]))
    assert stored(buffer)[1:] == [(1, 0, [0, 1])]
    buffer.add(tagged.rows(np.arange(3), 9, 9), is_first=True, is_last=True, mask=False)
    assert buffer.num_episodes == 2
    buffer.flush()
    assert stored(buffer)[2:] == [(0, 1, [0]), (1, 1, [0]), (2, 0, [0, 1, 2, 3])]


def test_add_episode_leaves_open_ones_alone() -> None:
    buffer = buffer_of(num_envs=1)
    buffer.add_step(tagged.rows(0, 0, 0), False)
    assert buffer.add_episode(tagged.episode(4, 1)) == 0
    buffer.add_step(tagged.rows(0, 0, 1), True)
    assert stored(buffer) == [(0, 1, [0, 1, 2, 3]), (0, 0, [0, 1])]


def test_two_buffers_of_one_dataset_must_agree_on_its_fields() -> None:
    dataset = RingBufferDataset(100)
    one, other, third = (ReplayBuffer(dataset, 2, num_envs=1) for _ in range(3))
    one.add_step({"x": 1.0}, False)
    with pytest.raises(ValueError, match="`x` has dtype float64 .* expected float32"):
        other.add_step({"x": np.zeros(())}, False)
    third.add_step({"x": 2.0}, False)
    one.add_step({"x": 1.0}, True)
    third.add_step({"x": 2.0}, True)
    assert dataset.episode_lengths == [2, 2]


def test_a_copy_of_a_buffer_has_open_episodes_of_its_own() -> None:
    for num_envs in (1, 3):
        env = np.arange(3) if num_envs == 3 else 0
        buffer = buffer_of(num_envs=num_envs)
        buffer.add_step(tagged.rows(env, 0, 0), False)
        copied = copy.deepcopy(buffer)
        for step in range(1, 100):
            buffer.add_step(tagged.rows(env, 0, step), False)
        copied.add_step(tagged.rows(env, 0, 1), False)
        copied.flush()
        assert [steps for _, _, steps in stored(copied)] == [[0, 1]] * num_envs
        assert buffer.num_episodes == 0
        buffer.flush()
        assert [steps for _, _, steps in stored(buffer)] == [list(range(100))] * num_envs


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[:, ::2],
        lambda a: a[::-1, ::-1],
        lambda a: a[..., 0],
        lambda a: np.broadcast_to(a[0, 0], a.shape),
        lambda a: (a + 1j).real,
        lambda a: torch.zeros(()).expand(8, 4),
        lambda a: np.asfortranarray(a),
    ],
)
def test_vectorized_rows_may_be_any_view(view) -> None:
    buffer = buffer_of(num_envs=8)
    value = view(np.arange(32.0, dtype=np.float32).reshape(8, 4))
    expected = value.numpy() if isinstance(value, torch.Tensor) else np.array(value)
    for done in (False, True):
        buffer.add_step({"x": value}, done)
    for env in range(8):
        np.testing.assert_array_equal(buffer.dataset.get_episode(env)["x"][0].numpy(), expected[env])


def test_half_precision_refuses_a_row_at_once_and_the_buffer_closes() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100, half_precision=True), 2, num_envs=1)
    buffer.add_step({"x": 1.0}, False)
    with pytest.raises(ValueError, match="beyond 65504"):
        buffer.add_step({"x": 1e6}, True)
    buffer.add_step({"x": 2.0}, True)
    buffer.close()
    assert buffer.dataset.get_episode(0)["x"].tolist() == [1.0, 2.0]


def test_a_buffer_that_cannot_store_its_open_episodes_can_be_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = buffer_of(num_envs=1)
    buffer.add_step({"x": 1.0}, False)

    def fail(*arguments: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(buffer.dataset, "_write", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no room"):
            buffer.close()
    monkeypatch.undo()
    buffer.close()
    assert buffer.num_timesteps == 1
    with pytest.raises(RuntimeError, match="closed"):
        buffer.add_step({"x": 1.0}, False)


def test_threads_may_add_and_draw_at_the_same_time() -> None:
    ring = reading.tiny_ring(60)
    ring.add_episode(reading.tagged_episode(ring, 5))
    stream = ring.get_loader(16, 3, include=("index", "step"), seed=0).stream
    with reading.adding(ring):
        assert sum(reading.count_inconsistent(stream.take()) for _ in range(300)) == 0
        for _ in range(100):
            episode = ring.get_episode(0)
            assert (episode["x"][:, 0] - episode["x"][0, 0]).tolist() == list(range(5))
            assert (episode["y"] == episode["x"][:, :1]).all() and (episode["length"] == 5).all()


def test_closing_hands_over_what_is_open_and_ends_the_use() -> None:
    with buffer_of(num_envs=1) as buffer:
        buffer.add_step(tagged.rows(0, 0, 0), False)
        buffer.add_step(tagged.rows(0, 0, 1), False)
    assert stored(buffer) == [(0, 0, [0, 1])]
    buffer.close()
    for use in (buffer.sample, buffer.flush, lambda: buffer.add_step(tagged.rows(0, 0, 2), False)):
        with pytest.raises(RuntimeError, match="The buffer is closed"):
            use()


# Bad input.


def spoiled(**changes: Any) -> dict[str, Any]:
    return {**tagged.rows(np.arange(2), 0, 5), **changes}


@pytest.mark.parametrize(
    ("row", "done", "error", "message"),
    [
        (spoiled(extra=np.zeros(2)), False, ValueError, r"unexpected \['extra'\]"),
        ({"reward": np.zeros(2)}, False, ValueError, r"missing \['obs/state', 'obs/pixels', 'flag', 'code'\]"),
        (spoiled(reward=np.zeros(2)), False, ValueError, "`reward` has dtype float64 .* expected float32"),
        (spoiled(reward=np.zeros(3, np.float32)), False, ValueError, r"`reward` .* \(3,\), expected .* \(2,\)"),
        (spoiled(reward=np.float32(0)), False, ValueError, r"`reward` .* shape \(\), expected .* \(2,\)"),
        (spoiled(reward="ab"), False, TypeError, "`reward` must be a tensor, an array or a number, found str"),
        (spoiled(reward=None), False, TypeError, "`reward` must be .* found NoneType"),
        (spoiled(reward=np.array(["a", "b"])), False, ValueError, "`reward` has dtype <U1"),
        (
            spoiled(obs=np.zeros((2, 3))),
            False,
            ValueError,
            r"missing \['obs/state', 'obs/pixels'\], unexpected \['obs'\]",
        ),
        (tagged.rows(np.arange(3), 0, 5), False, ValueError, r"expected .* \(2, 3\)"),
        ([1, 2], False, TypeError, "Expected a dict from field to value, found list"),
        (spoiled(), np.array([True]), ValueError, r"has shape \(1,\), expected a bool array of shape \(2,\)"),
        (spoiled(), np.array([[True, False]]), ValueError, r"`done` must have at most one axis"),
        (spoiled(), np.array([1, 0]), TypeError, "`done` must be bool or an array of bool, found int64"),
        (spoiled(), 1, TypeError, "`done` must be bool"),
        (spoiled(), None, TypeError, "`done` must be bool"),
    ],
)
def test_a_bad_step_is_refused_and_changes_nothing(row, done, error, message) -> None:
    buffer = buffer_of(num_envs=2)
    buffer.add_step(tagged.rows(np.arange(2), 0, 0), False)
    with pytest.raises(error, match=message):
        buffer.add_step(row, done)
    buffer.add_step(tagged.rows(np.arange(2), 0, 1), False)
    buffer.flush()
    assert stored(buffer) == [(env, 0, [0, 1]) for env in range(2)]


def test_a_single_environment_takes_no_array_of_done() -> None:
    buffer = buffer_of(num_envs=1)
    buffer.add_step(tagged.rows(0, 0, 0), False)
    with pytest.raises(ValueError, match=r"has shape \(2,\), expected a plain bool"):
        buffer.add_step(tagged.rows(0, 0, 1), np.array([True, False]))
    buffer.add_step(tagged.rows(0, 0, 1), True)
    assert stored(buffer) == [(0, 0, [0, 1])]


@pytest.mark.parametrize(
    ("row", "done", "error"),
    [
        ({"x": "a"}, False, TypeError),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, np.zeros(3, bool), ValueError),
        ({"x": np.zeros(2)}, np.zeros(3, bool), ValueError),
        ({}, False, ValueError),
        ({"x": [[1], [1, 2]]}, False, ValueError),
        ({"x": {}}, False, ValueError),
        ({"x": np.zeros(3)}, "no", TypeError),
    ],
)
def test_a_bad_first_step_settles_nothing(row, done, error) -> None:
    buffer = buffer_of()
    with pytest.raises(error):
        buffer.add_step(row, done)
    assert buffer.fields is None
    buffer.add_step({"x": np.zeros(4), "y": 0.5}, True)
    assert buffer.num_episodes == 1


def test_a_first_step_that_an_array_of_flags_makes_one_of_several_says_so() -> None:
    buffer = buffer_of()
    with pytest.raises(ValueError, match=r"`reward` has shape \(\).* As `done` is an array.* pass a plain bool"):
        buffer.add_step({"x": np.zeros(3), "reward": 0.5}, np.array([False]))
    with pytest.raises(ValueError, match=r"`mask` has shape \(2,\), expected a bool array of shape \(3,\)"):
        buffer.add({"x": np.zeros(3)}, is_last=np.zeros(3, bool), mask=np.ones(2, bool))
    with pytest.raises(ValueError, match="missing") as error:
        ReplayBuffer(RingBufferDataset(9, EpisodeDatasetInfo(Fields(y=Scalar()))), 4).add({"x": 1.0}, is_last=True)
    assert "is an array" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_collate_fn_makes_the_batches_whatever_the_number_of_workers(num_workers) -> None:
    with ReplayBuffer(RingBufferDataset(9), 4, collate_fn=_number_of_fields, num_workers=num_workers) as buffer:
        buffer.add_episode({"x": np.arange(3.0), "y": np.arange(3.0)})
        assert buffer.sample() == next(iter(buffer)) == 2


def _number_of_fields(batch: dict[str, Any]) -> int:
    return len(batch)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset": [1]}, TypeError, "`dataset` must be an EpisodeSource, found list"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"sequence_length": -1}, ValueError, "`sequence_length` must be at least 1"),
        ({"chunk_size": 3}, ValueError, "does not divide"),
        ({"num_envs": 0}, ValueError, "`num_envs` must be at least 1"),
        ({"max_episode_length": 0}, ValueError, "`max_episode_length` must be at least 1"),
        ({"max_episode_length": 101}, ValueError, "`max_episode_length`=101 exceeds the `capacity` of 100"),
        ({"surprise": 3}, TypeError, "surprise"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        ReplayBuffer(**{"dataset": RingBufferDataset(100), "batch_size": 4, **arguments})


# Drawing.


def test_sample_the_iterator_and_the_dataloader_are_one_sequence_of_batches() -> None:
    def filled() -> ReplayBuffer:
        buffer = buffer_of(seed=3)
        for number in range(5):
            buffer.add_episode(tagged.episode(6, number))
        return buffer

    reference = [filled().dataloader.stream.batch(n) for n in range(6)]
    buffer = filled()
    drawn = [buffer.sample(), *itertools.islice(buffer, 2), *itertools.islice(buffer.dataloader, 2), buffer.sample()]
    for one, two in zip(reference, drawn, strict=True):
        assert_same_batch(one, two)


def test_a_resumed_run_goes_on_where_it_stopped() -> None:
    buffers = [buffer_of(), buffer_of(seed=5)]
    for buffer in buffers:
        for number in range(5):
            buffer.add_episode(tagged.episode(6, number))
    first, second = buffers
    for _ in range(3):
        first.sample()
    state = first.dataloader.state_dict()
    expected = [first.sample() for _ in range(3)]
    second.dataloader.load_state_dict(state)
    for batch in expected:
        assert_same_batch(batch, second.sample())


def test_global_random_states_are_left_alone() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    buffer = buffer_of(num_envs=1)
    for step in range(6):
        buffer.add_step(tagged.rows(0, 0, step), step == 5)
    next(iter(buffer.dataloader))
    next(iter(buffer.dataset))
    buffer.sample()
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_unseeded_buffers_draw_differently() -> None:
    batches = []
    for _ in range(2):
        buffer = buffer_of(batch_size=64)
        buffer.add_episode(tagged.episode(500, 0))
        batches.append(buffer.sample()["code"])
    assert not torch.equal(*batches)


def test_counts_and_the_table_tell_open_from_stored() -> None:
    buffer = buffer_of(num_envs=1)
    assert buffer.is_empty and len(buffer) == buffer.num_episodes == 0 and buffer.fields is None
    for step in range(7):
        buffer.add_step({"x": np.zeros(3, np.float32), "y": 1.0}, step == 4)
    assert not buffer.is_empty and len(buffer) == buffer.num_timesteps == 5 and buffer.num_episodes == 1
    assert dict(buffer.fields or {}) == {"x": Vector(3), "y": Scalar()}
    assert "batches of 4 x 2, 2 steps in open episodes\nRingBufferDataset: 1 episodes, 5 of" in repr(buffer)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stats_are_numbers_for_a_logger(num_workers: int) -> None:
    buffer = buffer_of(capacity=20, batch_size=3, num_workers=num_workers, num_envs=1)
    assert buffer.stats() == {
        "num_episodes": 0,
        "num_timesteps": 0,
        "fill": 0.0,
        "mean_episode_length": 0.0,
        "num_evicted": 0,
        "num_batches": 0,
        "num_rejected_windows": 0,
    }
    for number in range(5):
        buffer.add_episode({"reward": np.full(6, number, np.float32), "t": 6 * number + np.arange(6)})
    buffer.sample()
    newest = int(buffer.sample()["t"].max())
    buffer.add_step({"reward": 0.5, "t": 30}, False)
    buffer.add_step({"reward": 0.5, "t": 31}, True)
    assert buffer.stats() == {
        "num_episodes": 4,
        "num_timesteps": 20,
        "fill": 1.0,
        "mean_episode_length": 5.0,
        "num_evicted": 2,
        "num_batches": 2,
        "num_rejected_windows": 0,
        "mean_episode_return": (6 * (0 + 1 + 2 + 3 + 4) + 1) / 6,
        "newest_age": 31 - newest,
    }
    buffer.close()


def test_include_of_a_field_is_refused_with_the_first_step() -> None:
    buffer = buffer_of(num_envs=1, include=("is_first",))
    with pytest.raises(ValueError, match="'is_first' of `include` .* Drop it"):
        buffer.add_step({"is_first": True}, False)
    buffer.add_step({"x": 1.0}, False)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (torch.tensor(1.5, dtype=torch.bfloat16), 4.5),
        (torch.tensor(2, dtype=torch.uint8), 6.0),
        (True, 3.0),
        (np.float64(0.5), 1.5),
        (1 + 2j, None),
    ],
)
def test_a_reward_of_any_dtype_completes_an_episode_and_has_a_return_if_it_is_real(reward, expected) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 4, num_envs=1)
    for step in range(6):
        buffer.add_step({"reward": reward}, step % 3 == 2)
    assert buffer.dataset.episode_lengths == [3, 3]
    assert buffer.stats().get("mean_episode_return") == expected


def test_a_row_that_is_no_bfloat16_hears_what_it_is() -> None:
    buffer = buffer_of(num_envs=1)
    buffer.add_step({"x": torch.tensor(1.5, dtype=torch.bfloat16)}, False)
    with pytest.raises(ValueError, match=r"dtype float32 and shape \(\), expected bfloat16 .* first have float32"):
        buffer.add_step({"x": 1.5}, False)


def test_a_reward_of_several_parts_is_stored_and_has_no_return() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 2, num_envs=1)
    buffer.add_episode({"obs": np.zeros(5), "reward": {"inner": np.zeros(5), "outer": np.zeros(5)}})
    assert buffer.num_episodes == 1 and "mean_episode_return" not in buffer.stats()


def test_there_is_no_age_before_a_batch() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 2, num_envs=1)
    buffer.add_episode({"x": np.zeros(50)})
    buffer.dataloader.load_state_dict({"seed": 0, "position": 50})
    assert "newest_age" not in buffer.stats()
    buffer.sample()
    assert 0 <= buffer.stats()["newest_age"] < 50


def test_a_buffer_that_is_dropped_is_gone_at_once() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 2, num_envs=1)
    buffer.add_step({"x": 1.0}, True)
    is_alive = weakref.ref(buffer)
    gc.disable()
    try:
        del buffer
        assert is_alive() is None
    finally:
        gc.enable()


def test_a_reward_that_was_an_integer_first_says_what_can_be_done() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 4, num_envs=1)
    buffer.add_step({"reward": 0}, False)
    with pytest.raises(ValueError, match=r"expected int64 and \(\)\. Cast it, or let what comes first have float32\."):
        buffer.add_step({"reward": 1.0}, False)
    with pytest.raises(ValueError, match=r"shape \(2,\), expected int64 and \(\)\.$"):
        buffer.add_step({"reward": np.array([1, 2])}, False)
