"""Recorder: every convention against environments that keep their own log."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import Recorder, ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.dataset.fields import Fields, Scalar, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.verification import VerificationMode
from tests.logged_game import Games, actions, assert_recorded, final_as_gymnasium, make_buffer, play, recorded
from tests.tagged import flatten

N = 4
MODES = ("next_step", "same_step", "disabled")


def test_a_buffer_keeps_the_number_of_environments_that_its_rows_had() -> None:
    buffer = make_buffer()
    play(Games(3, "next_step"), Recorder(buffer, 3, "next_step"), num_steps=9)
    with pytest.raises(ValueError, match="`num_envs`=4 here, but 3 in the ReplayBuffer, .* Make another"):
        Recorder(buffer, 4, "next_step")
    play(Games(4, "next_step"), Recorder(ReplayBuffer(buffer.dataset, 4), 4, "next_step"), num_steps=9)


# The log is the oracle.


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(MODES), st.sampled_from([1, 2, 5, 20]), st.integers(1, 40))
def test_resets_at_any_time_close_episodes_as_truncated_and_drop_those_without_a_transition(
    data: st.DataObject, mode: str, num_envs: int, num_steps: int
) -> None:
    masks = st.none() | st.lists(st.booleans(), min_size=num_envs, max_size=num_envs).map(np.array)
    reset_at = data.draw(st.dictionaries(st.integers(0, num_steps - 1), masks, max_size=6))
    games, buffer = Games(num_envs, mode), make_buffer(num_envs=num_envs)
    play(games, Recorder(buffer, num_envs, mode), num_steps, reset_at)
    assert_recorded(recorded(buffer), games.logs)


def test_an_episode_that_ends_on_the_call_that_resets_has_no_transition_and_is_dropped() -> None:
    buffer = make_buffer()
    recorder = Recorder(buffer, 1, "next_step")
    zeros, action = np.zeros(1), np.ones((1, 1), np.float32)

    def step(value: float, done: bool) -> None:
        recorder.step(action, np.full((1, 1), value), zeros, np.array([done]), np.array([False]))

    recorder.reset(np.zeros((1, 1)))
    for value, done in ((1.0, True), (10.0, True), (20.0, False), (21.0, True)):
        step(value, done)
    assert [episode["obs"].flatten().tolist() for episode in recorded(buffer)] == [[0.0, 1.0], [20.0, 21.0]]


@pytest.mark.parametrize("mode", MODES)
def test_a_flush_completes_open_episodes_but_not_first_rows_alone(mode: str) -> None:
    games, buffer = Games(N, mode), make_buffer()
    recorder = Recorder(buffer, N, mode)
    recorder.reset(games.reset())
    buffer.flush()
    assert buffer.is_empty
    taken = actions(N, 0)
    recorder.step(taken, *games.step(taken), final_obs=games.full_final())
    buffer.close()
    assert_recorded(recorded(buffer), [log[:1] for log in games.logs])


# Mutants: the comparison with the log must find each of them.


class _PutsNextEpisodesObs(Recorder):
    def step(self, action: Any, obs: Any, *rest: Any, infos: Any = None, **options: Any) -> None:
        super().step(action, obs, *rest, final_obs=obs, **options)


class _KeepsTheDummyRow(Recorder):
    def step(self, *arguments: Any, **options: Any) -> None:
        self._was_done = None
        super().step(*arguments, **options)


class _ShiftsRewards(Recorder):
    last: Any = 0.0

    def step(self, action: Any, obs: Any, reward: Any, *rest: Any, **options: Any) -> None:
        shifted, self.last = np.zeros_like(reward) + self.last, reward.copy()
        super().step(action, obs, shifted, *rest, **options)


class _LeavesTheMiddleOpen(Recorder):
    def reset(self, obs: Any, mask: Any = None) -> None:
        self.writer.flush()
        super().reset(obs, mask)


@pytest.mark.parametrize(
    ("mutant", "mode"),
    [
        (_PutsNextEpisodesObs, "same_step"),
        (_KeepsTheDummyRow, "next_step"),
        *((_ShiftsRewards, mode) for mode in MODES),
        *((_LeavesTheMiddleOpen, mode) for mode in MODES),
    ],
)
def test_mutants_do_not_pass_the_comparison_with_the_log(mutant: type[Recorder], mode: str) -> None:
    games, buffer = Games(N, mode), make_buffer()
    play(games, mutant(buffer, N, mode), reset_at={20: None, 21: None, 40: np.arange(N) < 2})
    with pytest.raises(AssertionError):
        assert_recorded(recorded(buffer), games.logs)


# Where final observations are found.


def _mask(games: Games) -> np.ndarray:
    return np.array([item is not None for item in games.final])


class _JaxArray:
    """Like a JAX array in that numpy can read it, and it is none."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.array, dtype)


LAYOUTS = {
    "argument, full batch": lambda games, call: {"final_obs": games.full_final()},
    "argument, tensor": lambda games, call: {"final_obs": torch.from_numpy(games.full_final())},
    "argument, list": lambda games, call: {"final_obs": list(games.final)},
    "argument before infos": lambda games, call: {"final_obs": list(games.final), "infos": {"final_obs": games.obs}},
    "final_obs, object array": lambda games, call: {"infos": {"final_obs": final_as_gymnasium(games)}},
    "final_obs, float64 items": lambda games, call: {
        "infos": {"final_obs": [None if item is None else item.astype(np.float64) for item in games.final]}
    },
    "final_obs, full batch": lambda games, call: {"infos": {"final_obs": games.full_final()}},
    "final_observation, object array": lambda games, call: {
        "infos": {"final_observation": final_as_gymnasium(games), "_final_observation": _mask(games)}
    },
    "final_observation, full batch": lambda games, call: {
        "infos": {"final_observation": games.full_final(), "_final_observation": torch.from_numpy(_mask(games))}
    },
    **{
        f"{name}, list of dicts": lambda games, call, name=name: {
            "infos": [{} if item is None else {name: item} for item in games.final]
        }
        for name in ("final_obs", "final_observation", "terminal_observation")
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_final_observations_are_found_in_every_layout(layout: str) -> None:
    games, buffer = Games(N, "same_step"), make_buffer()
    play(games, Recorder(buffer, N, "same_step"), returns=LAYOUTS[layout])
    assert_recorded(recorded(buffer), games.logs)


def _without_every_second(games: Games, call: Any) -> dict[str, Any]:
    return {"infos": {"final_obs": games.full_final(), "_final_obs": _mask(games) & (np.arange(N) % 2 == 0)}}


def _with_the_last_known(log: list[dict[str, list[Any]]]) -> list[dict[str, list[Any]]]:
    return [
        {**episode, "obs": [*episode["obs"][:-1], episode["obs"][-2]]} if episode["ended"][-1:] == [True] else episode
        for episode in log
    ]


def test_a_missing_final_observation_is_the_last_known_one_and_marked() -> None:
    dataset = RingBufferDataset(20_000)
    for options in ({"final_obs_may_be_missing": True}, {}):  # Of the second, the dataset knows it already.
        num_before, games, buffer = dataset.num_episodes, Games(N, "same_step"), ReplayBuffer(dataset, 8)
        play(games, Recorder(buffer, N, "same_step", **options), returns=_without_every_second)
        episodes = recorded(buffer)[num_before:]
        assert_recorded(episodes, [_with_the_last_known(log) if env % 2 else log for env, log in enumerate(games.logs)])
        for episode in episodes:
            env, number = (int(value) for value in episode["obs"][0, :2])
            expected = [False, *(flag and env % 2 == 1 for flag in games.logs[env][number]["ended"])]
            assert episode["final_obs_missing"].tolist() == expected


# Stand-ins for simulators: each gives what that library returns, as the arguments of `Recorder.step`.


def _as_tensors(call: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in call.items()}


def _isaac_gym(games: Games, call: dict[str, Any]) -> dict[str, Any]:
    """Dones of int64."""
    tensors = _as_tensors(call)
    return {**tensors, "terminated": tensors["terminated"].long()}


def _isaac_lab(games: Games, call: dict[str, Any]) -> dict[str, Any]:
    """Dicts of tensors, with a full batch of final observations where any is done."""
    tensors = _as_tensors(call)
    infos: dict[str, Any] = {"log": {}}
    if (call["terminated"] | call["truncated"]).any():
        infos["final_obs"] = {"policy": torch.from_numpy(games.full_final())}
    return {**tensors, "obs": {"policy": tensors["obs"]}, "infos": infos}


class _OfIsaacLab(Recorder):
    def reset(self, obs: Any, mask: Any = None) -> None:
        super().reset({"policy": torch.from_numpy(obs)}, mask)


def _brax(games: Games, call: dict[str, Any]) -> dict[str, Any]:
    """Arrays that are not numpy's, flags of float32."""
    flags = {name: call[name].astype(np.float32) for name in ("terminated", "truncated")}
    arrays = {name: _JaxArray(array) for name, array in {**call, **flags}.items()}
    return {**arrays, "infos": {"final_obs": _JaxArray(games.full_final())}}


def _on_a_gpu(games: Games, call: dict[str, Any]) -> dict[str, Any]:
    tensors = _as_tensors({**call, "final_obs": games.full_final()})
    return {name: tensor.cuda() for name, tensor in tensors.items()}


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(
    ("library", "mode"),
    [
        (_isaac_gym, "next_step"),
        (_isaac_lab, "same_step"),
        (_brax, "same_step"),
        pytest.param(_on_a_gpu, "same_step", marks=NEEDS_CUDA),
    ],
)
def test_what_a_library_returns_is_recorded_as_the_log_says(library: Any, mode: str) -> None:
    games, buffer = Games(N, mode), make_buffer()
    of_isaac_lab = library is _isaac_lab
    play(games, (_OfIsaacLab if of_isaac_lab else Recorder)(buffer, N, mode), returns=library)
    found = recorded(buffer)
    assert_recorded([{**e, "obs": e["obs"]["policy"]} for e in found] if of_isaac_lab else found, games.logs)


# Fields and forms of data.


def test_extra_fields_are_stored_with_the_action_and_zero_in_first_rows() -> None:
    buffer = make_buffer()
    recorder = Recorder(buffer, 2, "same_step")
    recorder.reset(np.zeros((2, 1), np.float32))
    for step in (1, 2):
        done = np.full(2, step == 2)
        extras = {"policy": {"log_prob": np.full(2, -step, np.float32)}}
        obs, action = np.full((2, 1), step, np.float32), np.full((2,), step)
        recorder.step(action, obs, np.ones(2), done, ~done & False, final_obs=obs, extras=extras)
    (first, second) = recorded(buffer)
    for episode in (first, second):
        assert episode["policy"]["log_prob"].tolist() == [0.0, -1.0, -2.0]
        assert episode["action"].tolist() == [0, 1, 2]
        assert episode["reward"].dtype == torch.float64, "rewards are stored as they are delivered"


def test_nested_and_tuple_observations_and_actions_become_dicts() -> None:
    buffer = make_buffer()
    recorder = Recorder(buffer, None, "disabled")

    def obs(step: int) -> Any:
        return {"image": np.full((2, 2, 3), step, np.uint8), "pair": (torch.tensor([step]), (step, True))}

    recorder.reset(obs(0))
    recorder.step((np.int64(1), {"grip": 0.5}), obs(1), 1, True, False)
    (episode,) = map(flatten, recorded(buffer))
    assert {name: value.tolist() for name, value in episode.items() if "/" in name and "image" not in name} == {
        "obs/pair/0": [[0], [1]],
        "obs/pair/1/0": [0, 1],
        "obs/pair/1/1": [True, True],
        "action/0": [0, 1],
        "action/1/grip": [0.0, 0.5],
    }
    assert episode["obs/image"].shape == (2, 2, 2, 3) and episode["reward"].dtype == torch.float32


def test_lists_of_ints_and_floats_may_follow_each_other() -> None:
    buffer = make_buffer()
    recorder = Recorder(buffer, 2, "next_step")
    recorder.reset([[0.5], [1]])
    for value, done in ((1, False), (0.25, True)):
        row = {"action": [0.5, value], "obs": [[1], [value]], "reward": [0, value]}
        recorder.step(**row, terminated=[done, done], truncated=[0, 0])
    episode = recorded(buffer)[1]
    found = {name: (value.dtype, value.flatten().tolist()) for name, value in episode.items()}
    for name, values in (("obs", [1, 1, 0.25]), ("action", [0, 1, 0.25]), ("reward", [0, 1, 0.25])):
        assert found[name] == (torch.float32, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.float64, torch.int32])
def test_tensors_keep_their_dtypes(dtype: torch.dtype) -> None:
    buffer = make_buffer()
    recorder = Recorder(buffer, 2, "same_step")
    obs = torch.arange(6).reshape(2, 3).to(dtype)
    recorder.reset(obs)
    done = torch.tensor([True, False])
    recorder.step(torch.ones(2, 1), obs + 1, torch.ones(2), done, ~done & done, final_obs=[obs[0] + 2, None])
    (episode,) = recorded(buffer)
    assert episode["obs"].dtype == dtype
    assert torch.equal(episode["obs"], torch.stack([obs[0], obs[0] + 2]))


@pytest.mark.parametrize("mode", MODES)
def test_no_warning_and_no_episode_axis_whatever_the_buffer_was_told(mode: str) -> None:
    # Warnings are errors here. Without `num_envs`, a buffer guesses, but a recorder leaves it nothing to guess.
    for options in ({}, {"num_envs": 1}):
        buffer = make_buffer(**options)
        recorder = Recorder(buffer, 1, mode)
        recorder.reset(np.zeros((1, 1)))
        done = np.array([True])
        recorder.step(np.ones((1, 1)), np.ones((1, 1)), np.ones(1), done, ~done, final_obs=np.ones((1, 1)))
        assert recorded(buffer)[0]["obs"].shape == (2, 1)


def test_long_episodes_are_cut_by_the_buffer_and_a_reset_truncates_the_open_piece() -> None:
    buffer = make_buffer(max_episode_length=4)
    recorder = Recorder(buffer, None, "disabled")
    recorder.reset(0.0)
    for step in range(1, 6):
        recorder.step(step, float(step), 1.0, False, False)
    recorder.reset(0.0)
    pieces = recorded(buffer)
    assert [piece["obs"].tolist() for piece in pieces] == [[0.0, 1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]
    assert [piece["truncated"].tolist() for piece in pieces] == [[False] * 4, [False, False, True]]


# Errors.


def _begun(mode: str = "next_step", steps: int = 1) -> tuple[ReplayBuffer, Recorder]:
    buffer = make_buffer()
    recorder = Recorder(buffer, 2, mode)
    recorder.reset(np.zeros((2, 3), np.float32))
    for _ in range(steps):
        recorder.step(**_call())
    return buffer, recorder


def _call(**changes: Any) -> dict[str, Any]:
    call = {
        "action": np.ones((2, 1), np.float32),
        "obs": np.ones((2, 3), np.float32),
        "reward": np.ones(2),
        "terminated": np.zeros(2, np.bool_),
        "truncated": np.zeros(2, np.bool_),
    }
    return {**call, **changes}


_DONE = np.array([True, False])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"obs": np.ones((2, 4), np.float32)}, ValueError, r"`obs` has dtype float32 and shape \(2, 4\), expected"),
        ({"obs": np.ones((3, 3), np.float32)}, ValueError, r"`obs` has dtype float32 and shape \(3, 3\)"),
        ({"obs": np.ones((2, 3))}, ValueError, "`obs` has dtype float64"),
        ({"obs": {"a": np.ones((2, 3))}}, ValueError, r"`obs` is a dict with the keys \['a'\], expected float32"),
        ({"obs": torch.ones(2, 3, dtype=torch.bfloat16)}, TypeError, "`obs` is of bfloat16"),
        ({"obs": "north"}, TypeError, "Field `obs` must be a tensor, an array or a number, found str"),
        ({"action": np.ones((2, 2), np.float32)}, ValueError, "`action` has"),
        ({"reward": 1.0}, ValueError, "`reward` has"),
        ({"terminated": False}, ValueError, r"`terminated` has shape \(\), expected \(2,\)"),
        ({"terminated": np.array([0.5, 0])}, ValueError, "`terminated` must be bool, or numbers that are 0 or 1"),
        ({"truncated": None}, ValueError, "`truncated` is None, which needs `infos` to be a list"),
        ({"truncated": None, "infos": [{}]}, ValueError, "`truncated` is None"),
        ({"extras": {"reward": 1}}, ValueError, r"`extras` has \['reward'\], which the recorder writes itself"),
        ({"extras": 3}, TypeError, "`extras` must be a dict"),
        ({"extras": {"value": np.ones(2)}}, ValueError, r"unexpected \['value'\]"),
        ({"terminated": _DONE}, ValueError, r"Environments \[0\] ended without a final observation"),
        ({"terminated": _DONE, "final_obs": [None, None]}, ValueError, "ended without a final observation"),
        ({"terminated": _DONE, "final_obs": [None]}, ValueError, "`final_obs` has 1 items"),
        ({"terminated": _DONE, "final_obs": np.ones((1, 3), np.float32)}, ValueError, "`obs` has dtype"),
        ({"terminated": _DONE, "final_obs": [np.ones(4), None]}, ValueError, "environment 0 in `final_obs` has dtype"),
        ({"terminated": _DONE, "infos": [{}, {}]}, ValueError, "ended without a final observation"),
        ({"terminated": _DONE, "infos": {"final_obs": None}}, ValueError, "ended without a final observation"),
        ({"obs": np.zeros((2, 4), np.float32), "mask": None}, ValueError, "`obs` has"),
        ({"obs": np.zeros((1, 3), np.float32), "mask": _DONE}, ValueError, "`obs` has"),
        ({"obs": np.zeros((2, 3), np.float32), "mask": _DONE[:1]}, ValueError, r"`mask` .* \(1,\), expected \(2,\)"),
    ],
)
def test_a_bad_step_or_reset_says_what_is_wrong_and_changes_nothing(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    buffer, recorder = _begun("same_step")
    for _ in range(2):
        with pytest.raises(error, match=message):
            recorder.reset(**changes) if "mask" in changes else recorder.step(**_call(**changes))
    final = np.full((2, 3), 9, np.float32)
    recorder.step(**_call(terminated=np.ones(2, np.bool_), final_obs=final))
    assert [episode["obs"][:, 0].tolist() for episode in recorded(buffer)] == [[0.0, 1.0, 9.0]] * 2


@pytest.mark.parametrize("bad", [{"obs": np.ones((2, 4))}, {"reward": 1.0}, {"action": "left"}, {"truncated": None}])
def test_a_bad_first_step_changes_nothing(bad: dict[str, Any]) -> None:
    buffer, recorder = _begun(steps=0)
    with pytest.raises((TypeError, ValueError)):
        recorder.step(**_call(**bad))
    recorder.step(**_call(terminated=np.ones(2, np.bool_)))
    assert [episode["obs"][:, 0].tolist() for episode in recorded(buffer)] == [[0.0, 1.0]] * 2


def test_numbers_that_all_checks_refuse_leave_no_row_behind() -> None:
    info = EpisodeDatasetInfo(verification_mode=VerificationMode.ALL_CHECKS)
    buffer = ReplayBuffer(RingBufferDataset(100, info), batch_size=1)
    recorder = Recorder(buffer, 2, "same_step")
    recorder.reset(np.zeros((2, 3), np.float32))
    bad = np.full((2, 3), np.nan, np.float32)
    for changes in ({"obs": bad}, {"terminated": _DONE, "final_obs": list(bad)}):
        with pytest.raises(ValueError, match="`obs` holds NaN"):
            recorder.step(**_call(**changes))
    recorder.reset(np.zeros((2, 3), np.float32))
    assert buffer.is_empty


def test_an_environment_must_be_reset_before_it_is_stepped() -> None:
    recorder = Recorder(make_buffer(), 2, "disabled")
    with pytest.raises(RuntimeError, match="Nothing was reset yet"):
        recorder.step(**_call())
    recorder.reset(np.zeros((2, 3), np.float32), np.array([True, False]))
    with pytest.raises(RuntimeError, match=r"Environments \[1\] have ended, never begun"):
        recorder.step(**_call())
    recorder.reset(np.zeros((2, 3), np.float32))
    recorder.step(**_call(terminated=_DONE))
    with pytest.raises(RuntimeError, match=r"Environments \[0\] have ended, never begun"):
        recorder.step(**_call())


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_environments_that_moved_in_the_reset_of_others_are_named(mode: str, num_steps: int) -> None:
    recorder = Recorder(make_buffer(), 3, mode)
    last = np.full((3, 2), np.nan)
    for step in range(num_steps + 1):
        last = np.stack([np.full(3, step), np.full(3, np.nan)], -1)
        if step == 0:
            recorder.check_others(last, np.array([True, False, False]))
            recorder.reset(last)
        else:
            done = np.array([False, step == num_steps, False])
            recorder.step(np.ones(3), last, np.ones(3), done, ~done & done, final_obs=last + 50)
    mask = np.array([True, False, False])
    recorder.check_others(last + [[100], [0], [0]], mask)
    for env in (1, 2):
        moved = last.copy()
        moved[env, 0] += 1
        with pytest.raises(RuntimeError, match=rf"Environments \[{env}\] have other .* after a reset of \[0\] alone"):
            recorder.check_others(moved, mask)
    recorder.invalidate()
    recorder.check_others(last + 1, mask)


def test_a_buffer_takes_the_rows_of_its_newest_recorder_alone() -> None:
    buffer, old = _begun()
    new = Recorder(buffer, 2, "next_step")
    with pytest.raises(RuntimeError, match="Another recorder writes to this buffer by now"):
        old.step(**_call())
    new.reset(np.zeros((2, 3), np.float32))
    assert [episode["truncated"].tolist() for episode in recorded(buffer)] == [[False, True]] * 2
    # Two recorders, each with its own front-end, share one dataset.
    other = Recorder(ReplayBuffer(buffer.dataset, batch_size=1), 2, "next_step")
    other.reset(np.full((2, 3), 5, np.float32))
    for recorder in (new, other, new, other):
        recorder.step(**_call())
        old.invalidate()
    new.reset(np.zeros((2, 3), np.float32))
    assert [episode["obs"][:, 0].tolist() for episode in recorded(buffer)[2:]] == [[0.0, 1.0, 1.0]] * 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_a_recorder_goes_on_in_a_buffer_that_had_steps_of_one_environment_without_an_axis(dtype: Any) -> None:
    buffer = make_buffer(num_envs=1)
    row = {"obs": 0.5, "action": 1, "reward": dtype(1), "terminated": True, "truncated": False, "is_first": True}
    buffer.add_step(row, True)
    recorder = Recorder(buffer, None, "disabled")
    recorder.reset(np.float64(1.0))
    if dtype is np.int64:
        with pytest.raises(ValueError, match="`reward` has dtype float32 .* expected int64"):
            recorder.step(np.int32(2), 2.0, 0.5, True, False)
    recorder.step(np.int32(2), 2.0, dtype(1), True, False)
    assert [episode["obs"].tolist() for episode in recorded(buffer)] == [[0.5], [1.0, 2.0]]


def test_a_dataset_of_other_fields_is_refused_and_keeps_its_episodes() -> None:
    info = EpisodeDatasetInfo(Fields(obs=Vector(3), reward=Scalar()))
    buffer = ReplayBuffer(RingBufferDataset(100, info), batch_size=1)
    recorder = Recorder(buffer, 2, "next_step")
    recorder.reset(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"unexpected \['action', 'terminated', 'truncated', 'is_first'\]"):
        recorder.step(**_call())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 2, "next_step"), TypeError, "`buffer` must be a ReplayBuffer"),
        (("buffer", 0, "next_step"), ValueError, "`num_envs` must be at least 1"),
        (("buffer", 2, "sometime"), ValueError, "`autoreset_mode` must be one of"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recorder(make_buffer() if arguments[0] == "buffer" else arguments[0], *arguments[1:])
