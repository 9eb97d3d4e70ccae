from __future__ import annotations

import copy
import gc
import itertools
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
from buffers.utils import to_torch
from tests import logged_game, reading, tagged
from tests.contract import assert_same_batch


def buffer_of(
    capacity: int = 1000, batch_size: int = 4, sequence_length: int | None = 2, **options: Any
) -> ReplayBuffer:
    return ReplayBuffer(RingBufferDataset(capacity), batch_size, sequence_length, **options)


def stored(buffer: ReplayBuffer) -> list[tuple[int, int, list[int]]]:
    return logged_game.stored(buffer.dataset)


# A single environment.


def test_an_episode_of_a_single_environment_can_be_drawn_in_the_very_call_that_ends_it() -> None:
    buffer = buffer_of(sequence_length=3)
    for number in range(3):
        for step in range(2):
            buffer.add_step(tagged.rows(0, number, step), False)
            if number == 0:
                with pytest.raises(RuntimeError, match=f"No episode is complete yet: {step + 1} steps are in open"):
                    buffer.sample()
        buffer.add_step(tagged.rows(0, number, 2), True)
        assert stored(buffer) == [(0, n, [0, 1, 2]) for n in range(number + 1)]
        assert set(tagged.origins(buffer.sample())) <= {(0, n, 0, 3) for n in range(number + 1)}


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (np.float64(1), 0.5, None),
        (np.float32(1), 2, None),
        (np.uint8(1), 255, None),
        (np.uint8(1), 256, "`x` has dtype int64"),
        (np.uint8(1), -1, "`x` has dtype int64"),
        (np.int8(1), np.int64(300), "`x` has dtype int64"),
        (np.float16(1), np.float32(1e5), "`x` has dtype float32"),
        (3, 0.5, "expected int64"),
        (0, 1.0, r"expected int64 and \(\)\. Cast it, or let what comes first have float32\."),
        (0, np.array([1, 2]), r"shape \(2,\), expected int64 and \(\)\.$"),
        (True, 1, "expected bool"),
        (1, np.array(0.5), "expected int64"),
        (1.5, np.zeros(1, np.float32), r"shape \(1,\), expected float32"),
        (1.5, torch.tensor(2.0, dtype=torch.float64), "expected float32"),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5, r"float32 and shape \(\), expected bfloat16 .* have float32"),
        (1.5, 2**24 + 1, "`x` has dtype int64"),
        ([0, 0.5], [0, 1], None),
        ([0.5, 0], [np.float64(0.25), 1], None),
        ([0.5, np.float32(0.25)], [torch.tensor(1.0), 0.5], None),
        ([0, np.float64(0.1)], [0.5, 1], None),
        ([0.5, torch.tensor(0.1, dtype=torch.float64, requires_grad=True)], [1.0, 2], None),
        ([np.uint8(1)] * 2, [2, 255], None),
        ([np.uint8(1)] * 2, [2, 256], "`x` has dtype int64"),
        ([0.5, 1], [2**24 + 1, 1], "`x` has dtype int64"),
        ([0, 1], [0, 0.5], "`x` has dtype float32 .* expected int64 .* let what comes first have float32"),
    ],
)
def test_numbers_and_lists_take_the_dtype_of_their_field_if_that_loses_nothing(first, then, message) -> None:
    buffer = buffer_of(num_envs=1)
    buffer.add_step({"x": first}, False)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            buffer.add_step({"x": then}, True)
        then = first
    buffer.add_step({"x": then}, True)
    assert buffer.dataset.get_episode(0)["x"].tolist() == [first, then]


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
        row = tagged.rows(np.arange(num_envs), episode, step)
        buffer.add_step(*((to_torch(row), torch.from_numpy(done)) if as_tensors else (row, done)))
        for value in tagged.flatten(row).values():
            value[...] = 0  # As by environments that use their arrays again.
        step = step + 1
        assert stored(buffer) == expected
    buffer.flush()
    assert stored(buffer)[len(expected) :] == [(e, int(episode[e]), list(range(step[e]))) for e in range(num_envs)]


@pytest.mark.parametrize("cast", [np.int64, np.float32, torch.tensor, lambda flags: torch.tensor(flags).half(), list])
def test_flags_may_be_zeros_and_ones(cast) -> None:
    def flag(*values: int) -> Any:
        return cast(values)

    buffer, envs = buffer_of(num_envs=2), np.arange(2)
    buffer.add_step(tagged.rows(envs, 0, 0), flag(0, 0))
    buffer.add_step(tagged.rows(envs, [1, 0], [0, 1]), flag(1, 0))
    assert stored(buffer) == [(0, 0, [0])]
    buffer.add(tagged.rows(envs, [1, 0], [1, 0]), is_first=flag(0, 1), is_last=flag(1, 0), mask=flag(1, 0))
    assert stored(buffer) == [(0, 0, [0]), (0, 1, [0, 1])]
    buffer.add(tagged.rows(envs, [2, 0], [0, 2]), is_last=flag(0, 1))
    assert stored(buffer)[2:] == [(1, 0, [0, 1, 2])]


def test_one_environment_with_an_axis_is_told_what_to_write() -> None:
    buffer = buffer_of()
    with pytest.warns(UserWarning, match=r"Say so by `done` as an array of shape \(1,\); `num_envs=1` means that st"):
        buffer.add_step(tagged.rows(np.arange(1), 0, 0), False)
    other = buffer_of(num_envs=1)
    for each in (buffer, other):
        each.add_step(tagged.rows(np.arange(1), 0, 0), np.array([False]))


def test_a_mask_without_an_axis_adds_no_row() -> None:
    buffer = buffer_of()
    buffer.add(tagged.rows(0, 0, 0), is_last=np.array(1), mask=np.array(True))
    for mask in (False, np.array(0.0), torch.tensor(False)):
        buffer.add(tagged.rows(0, 0, 1), mask=mask)
    assert stored(buffer) == [(0, 0, [0])] and buffer.writer.num_open_rows == 0


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


_KNOWN = EpisodeDatasetInfo(Fields(obs=Vector(4), action=Vector(4)))


@pytest.mark.parametrize(
    ("info", "num_envs", "row", "done", "shapes"),
    [
        (None, 1, {"obs": np.zeros(4), "action": np.zeros(4)}, True, [(4,), (4,)]),
        (None, 4, {"obs": np.zeros(4), "action": np.zeros((4, 2))}, False, [(), (2,)]),
        (None, 1, {"obs": np.zeros((1, 4))}, np.array([False]), [(4,)]),
        (None, None, {"obs": np.zeros((2, 4))}, torch.tensor([False, False]), [(4,)]),
        (None, None, {"obs": np.zeros(4), "reward": 1.0}, np.True_, [(4,), ()]),
        (None, None, {"obs": np.zeros(4), "action": np.zeros(4)}, np.array(True), [(4,), (4,)]),
        (None, None, {"obs": np.zeros((4, 2))}, torch.tensor(1.0), [(4, 2)]),
        (None, 4, {"obs": np.zeros((4, 2))}, np.array(0), [(2,)]),
        (_KNOWN, None, {"obs": np.zeros(4, np.float32), "action": np.zeros(4, np.float32)}, True, [(4,), (4,)]),
    ],
)
def test_num_envs_done_or_known_fields_settle_what_the_first_step_means(info, num_envs, row, done, shapes) -> None:
    buffer = ReplayBuffer(RingBufferDataset(10, info), 2, num_envs=num_envs)
    buffer.add_step(row, done)  # Warnings are errors.
    assert [field.shape for field in (buffer.fields or {}).values()] == shapes


# Boundaries stated, masks, flush, cuts.


def test_add_takes_plain_flags_for_all_environments() -> None:
    buffer = buffer_of(num_envs=3)
    for step in range(2):
        buffer.add(tagged.rows(np.arange(3), 0, step), is_first=step == 0, mask=[True, True, step == 0])
    buffer.add(tagged.rows(np.arange(3), 9, 9), is_first=True, is_last=True, mask=False)
    assert buffer.is_empty
    buffer.add(tagged.rows(np.arange(3), 1, 0), is_first=True, is_last=True)
    assert stored(buffer) == [(0, 0, [0, 1]), (1, 0, [0, 1]), (2, 0, [0]), *[(env, 1, [0]) for env in range(3)]]


def test_add_episode_leaves_open_ones_alone() -> None:
    buffer = buffer_of(num_envs=1)
    buffer.add_step(tagged.rows(0, 0, 0), False)
    assert buffer.add_episode(tagged.episode(4, 1)) == 0
    buffer.add_step(tagged.rows(0, 0, 1), True)
    assert stored(buffer) == [(0, 1, [0, 1, 2, 3]), (0, 0, [0, 1])]


def test_two_buffers_of_one_dataset_must_agree_on_its_fields() -> None:
    dataset = RingBufferDataset(100)
    one, other = (ReplayBuffer(dataset, 2, num_envs=1) for _ in range(2))
    one.add_step({"x": 1.0}, False)
    with pytest.raises(ValueError, match="`x` has dtype float64 .* expected float32"):
        other.add_step({"x": np.zeros(())}, False)
    for buffer in (other, one):
        buffer.add_step({"x": 2.0}, True)
    assert dataset.episode_lengths == [1, 2]


@pytest.mark.parametrize("env", [0, np.arange(3)], ids=["single", "of three"])
def test_a_copy_of_a_buffer_has_open_episodes_of_its_own(env) -> None:
    buffer = buffer_of(num_envs=np.size(env))
    buffer.add_step(tagged.rows(env, 0, 0), False)
    copied = copy.deepcopy(buffer)
    for step in range(1, 100):
        buffer.add_step(tagged.rows(env, 0, step), False)
    copied.add_step(tagged.rows(env, 0, 1), False)
    for flushed, num_steps in ((copied, 2), (buffer, 100)):
        assert flushed.is_empty
        flushed.flush()
        assert [steps for _, _, steps in stored(flushed)] == [list(range(num_steps))] * np.size(env)


BASE = np.arange(32.0, dtype=np.float32).reshape(8, 4)
VIEWS: list[Any] = [BASE[:, ::2], BASE[::-1, ::-1], BASE[..., 0], np.broadcast_to(BASE[0, 0], BASE.shape)]
VIEWS += [(BASE + 1j).real, torch.zeros(()).expand(8, 4), np.asfortranarray(BASE)]


@pytest.mark.parametrize("view", VIEWS)
def test_vectorized_rows_may_be_any_view(view) -> None:
    buffer = buffer_of(num_envs=8)
    for done in (False, True):
        buffer.add_step({"x": view}, done)
    for env in range(8):
        np.testing.assert_array_equal(buffer.dataset.get_episode(env)["x"][0].numpy(), np.asarray(view[env]))


def test_half_precision_refuses_a_row_at_once_and_the_buffer_closes() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100, half_precision=True), 2, num_envs=1)
    buffer.add_step({"x": 1.0}, False)
    with pytest.raises(ValueError, match="beyond 65504"):
        buffer.add_step({"x": 1e6}, True)
    buffer.add_step({"x": 2.0}, True)
    buffer.close()
    assert buffer.dataset.get_episode(0)["x"].tolist() == [1.0, 2.0]


def test_a_buffer_that_cannot_store_its_open_episodes_can_be_closed_again() -> None:
    buffer = ReplayBuffer(logged_game.FlakyRing(10, fails_at={0, 1}), 4, num_envs=1)
    buffer.add_step({"x": 1.0}, False)
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            buffer.close()
    buffer.close()
    assert buffer.num_timesteps == 1


def test_an_episode_that_is_read_while_a_thread_adds_is_whole() -> None:
    ring = reading.tiny_ring(60)
    ring.add_episode(reading.tagged_episode(ring, 5))
    with reading.adding(ring):
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
    row = tagged.rows(0, 0, 2)
    adds = (lambda: buffer.add_step(row, False), lambda: buffer.add(row), lambda: buffer.add_episode(row))
    for use in (buffer.sample, buffer.flush, *adds):
        with pytest.raises(RuntimeError, match="is closed"):
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
        (spoiled(), np.array([2, 0]), ValueError, r"`done` must be bool, or numbers that are 0 or 1, found .*2, 0"),
        (spoiled(), torch.tensor([0.5, np.nan]), ValueError, "`done` must be bool, or numbers that are 0 or 1"),
        (spoiled(), np.array(["a", "b"]), TypeError, "`done` must be bool or an array of bool, found <U1"),
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


def test_sample_the_iterator_and_the_dataloader_are_one_sequence_of_batches_that_resumes() -> None:
    def filled(seed: int | None = 3) -> ReplayBuffer:
        buffer = buffer_of(seed=seed)
        for number in range(5):
            buffer.add_episode(tagged.episode(6, number))
        return buffer

    reference = [filled().dataloader.stream.batch(n) for n in range(7)]
    buffer, resumed = filled(), filled(None)
    drawn = [buffer.sample(), *itertools.islice(buffer, 2), *itertools.islice(buffer.dataloader, 2), buffer.sample()]
    resumed.sample()
    resumed.dataloader.load_state_dict(buffer.dataloader.state_dict())
    for one, two in zip(reference, [*drawn, resumed.sample()], strict=True):
        assert_same_batch(one, two)


@pytest.mark.parametrize("length", [3, None])
def test_can_sample_says_whether_sample_finds_a_window(length) -> None:
    buffer = buffer_of(num_envs=1, sequence_length=length)
    for number, num_rows in enumerate((2, 1, 3)):
        for step in range(num_rows):
            if not buffer.can_sample:
                with pytest.raises(RuntimeError, match="complete yet|longer than every stored episode|is empty"):
                    buffer.sample()
            buffer.add_step(tagged.rows(0, number, step), step == num_rows - 1)
        assert buffer.can_sample is (number == 2 or length is None)
    buffer.sample()
    buffer.close()
    assert not buffer.can_sample


def test_counts_and_the_table_tell_open_from_stored() -> None:
    buffer = buffer_of(num_envs=1)
    assert buffer.is_empty and len(buffer) == buffer.num_episodes == 0 and buffer.fields is None
    for step in range(7):
        buffer.add_step({"x": np.zeros(3, np.float32), "y": 1.0}, step == 4)
    assert not buffer.is_empty and len(buffer) == buffer.num_timesteps == 5 and buffer.num_episodes == 1
    assert "batches of 4 x 2, 2 steps in open episodes\nRingBufferDataset: 1 episodes, 5 of" in repr(buffer)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stats_are_numbers_for_a_logger(num_workers: int) -> None:
    buffer = buffer_of(capacity=20, batch_size=3, num_workers=num_workers, num_envs=1)
    assert set(buffer.stats().values()) == {0}
    buffer.dataloader.load_state_dict({"seed": 0, "position": 50})
    assert "newest_age" not in buffer.stats()
    for number in range(5):
        buffer.add_episode({"reward": np.full(6, number, np.float32), "t": 6 * number + np.arange(6)})
    buffer.sample()
    newest = int(buffer.sample()["t"].max())
    buffer.add_step({"reward": 0.5, "t": 30}, False)
    buffer.add_step({"reward": 0.5, "t": 31}, True)
    stats = buffer.stats()
    # A worker that drew ahead while rows were overwritten draws those windows again, and says how many.
    assert stats.pop("num_rejected_windows") >= 0 if num_workers else stats.pop("num_rejected_windows") == 0
    # None lies over the end of 20 places: the six begin at 0, 6, 12, 20, 26 and 32, and what is before 34 - 20 is gone.
    assert stats == {
        "num_episodes": 3,
        "num_timesteps": 14,
        "reachable": 1.0,
        "fill": 0.7,
        "mean_episode_length": 14 / 3,
        "num_evicted": 3,
        "num_batches": 52,
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
        (np.float16(60_000), 180_000.0),
        (torch.tensor(2**-7 + 1, dtype=torch.bfloat16), 3 + 3 * 2**-7),
        (torch.tensor(2**24 + 2, dtype=torch.float32), 3.0 * (2**24 + 2)),
        (1 + 2j, None),
        ({"inner": 1.0, "outer": 2.0}, None),
        (np.zeros(2), None),
    ],
)
def test_a_reward_of_any_dtype_completes_an_episode_and_has_a_return_if_it_is_real(reward, expected) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 4, num_envs=1)
    for step in range(6):
        buffer.add_step({"reward": reward}, step % 3 == 2)
    assert buffer.dataset.episode_lengths == [3, 3]
    assert buffer.stats().get("mean_episode_return") == expected


def test_a_buffer_that_is_dropped_is_gone_at_once() -> None:
    buffer = buffer_of(num_envs=1)
    buffer.add_step({"x": 1.0}, True)
    is_alive = weakref.ref(buffer)
    gc.disable()
    try:
        del buffer
        assert is_alive() is None
    finally:
        gc.enable()
