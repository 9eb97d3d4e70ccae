"""The Gymnasium wrappers around real environments that keep their own log."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from buffers import Recorder
from buffers.wrappers import RecordEpisodes, VectorRecordEpisodes
from tests.logged_game import Game, Games, assert_recorded, make_buffer, recorded

N = 3
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
OBSERVATION_SPACES = {
    "box": VECTOR,
    "discrete": spaces.Discrete(100_000),
    "dict": spaces.Dict({"vector": VECTOR, "deep": spaces.Dict({"image": spaces.Box(0, 255, (2, 2, 3), np.uint8)})}),
    "tuple": spaces.Tuple((VECTOR, spaces.Box(0, 100, (1,), np.int64))),
}
ACTION_SPACES = {
    "box": spaces.Box(-1, 1, (2,), np.float32),
    "discrete": spaces.Discrete(5, start=1),
    "dict": spaces.Dict({"move": spaces.Box(-1, 1, (2,), np.float32), "grip": spaces.Discrete(3)}),
    "tuple": spaces.Tuple((spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(2))),
}


class LoggedEnv(gymnasium.Env):
    """`Game` as a Gymnasium environment; one that `reuses` its array writes to its actions, too."""

    def __init__(self, env: int, kind: str = "box", reuses: bool = False, action_kind: str | None = None) -> None:
        self.game = Game(env, kind, reuses)
        self.observation_space = OBSERVATION_SPACES[kind]
        self.action_space = ACTION_SPACES[action_kind or kind]

    @property
    def log(self) -> list[dict[str, list[Any]]]:
        return self.game.log

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.game.reset(), {"kind": self.game.kind}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated = self.game.step(copy.deepcopy(action))
        if self.game.array is not None:
            action[...] = 0
        return obs, reward, terminated, truncated, {"step": self.game.step_index}


def play(envs: VectorEnv, num_steps: int = 40, reset_at: dict[int, Any] | None = None) -> None:
    """Step as a user would, by random actions; close what is open by a reset at the end."""
    mode = envs.metadata.get("autoreset_mode")
    envs.reset(seed=0)
    envs.action_space.seed(0)
    for step in range(num_steps):
        if step in (reset_at or {}):
            mask = (reset_at or {})[step]
            envs.reset(options=None if mask is None else {"reset_mask": mask})
        _, _, terminated, truncated, _ = envs.step(envs.action_space.sample())
        if mode is AutoresetMode.DISABLED and (terminated | truncated).any():
            envs.reset(options={"reset_mask": terminated | truncated})
    envs.reset()


def makers(num_envs: int, **options: Any) -> list[Callable[[], gymnasium.Env]]:
    return [lambda env=env: LoggedEnv(env, **options) for env in range(num_envs)]


def played_and_checked(envs: VectorEnv, mode: Any = None, reset_at: dict[int, Any] | None = None) -> list[Any]:
    """What is recorded of environments, after comparing it with their logs."""
    buffer = make_buffer()
    play(VectorRecordEpisodes(envs, buffer, mode), reset_at=reset_at)
    assert_recorded(recorded(buffer), envs.unwrapped.get_attr("log"))
    return recorded(buffer)


# Vector environments.


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("kind", OBSERVATION_SPACES)
@pytest.mark.parametrize("num_envs", [1, N])
@pytest.mark.parametrize("copies", [True, False])
def test_what_sync_environments_do_is_recorded_as_their_log_says(
    mode: AutoresetMode, kind: str, num_envs: int, copies: bool
) -> None:
    # An environment that reuses its array and resets within a step writes over the final observation itself.
    reuses = not copies and kind == "box" and mode is not AutoresetMode.SAME_STEP
    envs = SyncVectorEnv(makers(num_envs, kind=kind, reuses=reuses), copy=copies, autoreset_mode=mode)
    some = np.arange(num_envs) % 2 == 0
    reset_at = {3: None, 4: None, 7: some, 8: some, 9: ~some, 20: None} if kind == "box" and num_envs > 1 else None
    assert played_and_checked(envs, reset_at=reset_at)[0]["reward"].dtype == torch.float32


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize(("kind", "options"), [("box", {"copy": False}), ("dict", {})])
def test_what_async_environments_do_is_recorded_as_their_log_says(
    mode: AutoresetMode, kind: str, options: dict[str, Any]
) -> None:
    envs = AsyncVectorEnv(makers(2, kind=kind), autoreset_mode=mode, context="fork", **options)
    with contextlib.closing(envs):
        played_and_checked(envs)


class _ChangesEverything(VectorWrapper):
    """Lies above the recorder, and writes to all that passes through it."""

    def step(self, actions: Any) -> Any:
        *arrays, infos = self.env.step(actions)
        for array in arrays:
            array[:] = 0
        infos.clear()
        return *arrays, infos


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_other_wrappers_may_lie_below_and_above(mode: AutoresetMode) -> None:
    buffer = make_buffer()
    envs: VectorEnv = SyncVectorEnv(makers(N), copy=False, autoreset_mode=mode)
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
    envs = gymnasium.wrappers.vector.TransformReward(envs, lambda rewards: rewards * 2)
    envs = VectorRecordEpisodes(envs, buffer)
    log = envs.unwrapped.get_attr("log")
    play(_ChangesEverything(gymnasium.wrappers.vector.RecordEpisodeStatistics(envs, stats_key="again")))
    doubled = [[{**e, "reward": [2 * reward for reward in e["reward"]]} for e in episodes] for episodes in log]
    assert_recorded(recorded(buffer), doubled)


def test_infos_may_be_a_list_of_dicts() -> None:
    envs = SyncVectorEnv(makers(N), autoreset_mode=AutoresetMode.SAME_STEP)
    played_and_checked(gymnasium.wrappers.vector.DictInfoToList(envs))


class _Remembers(VectorWrapper):
    last: Any = None

    def reset(self, **options: Any) -> Any:
        self.last = self.env.reset(**options)
        return self.last

    def step(self, actions: Any) -> Any:
        self.last_actions = actions
        self.last = self.env.step(actions)
        return self.last


def test_what_passes_through_is_left_as_it_is() -> None:
    remembers = _Remembers(SyncVectorEnv(makers(N), autoreset_mode=AutoresetMode.SAME_STEP))
    wrapped = VectorRecordEpisodes(remembers, make_buffer())
    result = wrapped.reset(seed=[1, 2, 3], options={"reset_mask": np.ones(N, np.bool_)})
    assert all(found is given for found, given in zip(result, remembers.last, strict=True))
    for _ in range(20):
        actions = wrapped.action_space.sample()
        before = actions.copy()
        found = wrapped.step(actions)
        assert all(item is given for item, given in zip(found, remembers.last, strict=True))
        assert remembers.last_actions is actions and np.array_equal(actions, before)


@pytest.mark.parametrize("action_type", [list, tuple, lambda a: np.asarray(a, np.int32)])
def test_actions_have_the_dtype_of_their_space_however_they_are_given(action_type: Callable[[Any], Any]) -> None:
    buffer = make_buffer()
    envs = VectorRecordEpisodes(SyncVectorEnv(makers(2, kind="box", action_kind="discrete")), buffer)
    envs.reset()
    for step in range(30):
        envs.step(action_type([1, 2]) if step % 2 else np.array([1, 2]))
    assert recorded(buffer)[0]["action"].dtype == torch.int64
    envs.reset()
    assert_recorded(recorded(buffer), envs.unwrapped.get_attr("log"))


class _Modeless(SyncVectorEnv):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        del self.metadata["autoreset_mode"]


@pytest.mark.parametrize("stated", ["next_step", AutoresetMode.NEXT_STEP])
def test_the_mode_must_be_known_and_is_never_guessed(stated: Any) -> None:
    with pytest.raises(ValueError, match="does not say when it resets"):
        VectorRecordEpisodes(_Modeless(makers(N)), make_buffer())
    played_and_checked(_Modeless(makers(N)), stated)
    assert VectorRecordEpisodes(SyncVectorEnv(makers(N)), make_buffer(), stated).recorder.autoreset_mode == "next_step"


def test_a_stated_mode_that_contradicts_the_environments_is_refused() -> None:
    with pytest.raises(ValueError, match="`autoreset_mode`='same_step', but the metadata of .* say 'next_step'"):
        VectorRecordEpisodes(SyncVectorEnv(makers(N)), make_buffer(), "same_step")
    with pytest.raises(ValueError, match="`autoreset_mode` must be one of"):
        VectorRecordEpisodes(_Modeless(makers(N)), make_buffer(), "never")


class _OwnSpace(spaces.Space):
    """Gives arrays, but Gymnasium does not know how to batch them."""

    def __init__(self) -> None:
        super().__init__((N,), np.float32)


_NO_ARRAYS = {
    "Text": spaces.Text(5),
    "Sequence": spaces.Sequence(VECTOR),
    "Graph": spaces.Graph(VECTOR, None),
    "OneOf": spaces.OneOf((VECTOR, VECTOR)),
    "_OwnSpace": _OwnSpace(),
}


@pytest.mark.parametrize("name", _NO_ARRAYS)
@pytest.mark.parametrize("place", ["observation", "action"])
def test_spaces_that_give_no_arrays_are_refused_by_their_path(name: str, place: str) -> None:
    def make(space: spaces.Space) -> gymnasium.Env:
        env = LoggedEnv(0)
        setattr(env, f"{place}_space", space)
        return env

    path = "obs" if place == "observation" else "action"
    space = _NO_ARRAYS[name]
    nested = spaces.Dict({"image": VECTOR, "deep": spaces.Tuple((VECTOR, space))})
    for whole, field in ((space, path), (nested, f"{path}/deep/1")):
        envs = SyncVectorEnv([lambda whole=whole: make(whole)] * N)
        message = f"`{field}` has the space {name}, which gives no arrays of .*, or make it a Box"
        with pytest.raises(ValueError, match=message):
            VectorRecordEpisodes(envs, make_buffer())
        with contextlib.nullcontext() if name == "_OwnSpace" else pytest.raises(ValueError, match=message):
            RecordEpisodes(make(whole), make_buffer())


@pytest.mark.parametrize(
    ("space", "items", "field"),
    [
        (VECTOR, (np.ones(N),) * N, "obs"),
        (spaces.Dict({"a": VECTOR}), ({"a": np.ones(N)},) * N, "obs"),
        (spaces.Dict({"a": VECTOR}), {"a": (np.ones(N),) * N}, "obs/a"),
        (spaces.Tuple((VECTOR,) * N), ((np.ones(N),) * N,) * N, "obs/0"),
    ],
)
def test_a_tuple_of_n_observations_is_not_taken_for_one_of_a_tuple_space(space: Any, items: Any, field: str) -> None:
    class Lists(VectorWrapper):
        def reset(self, **options: Any) -> Any:
            return items, self.env.reset(**options)[1]

    envs = Lists(SyncVectorEnv(makers(N)))
    envs.single_observation_space = space
    with pytest.raises(ValueError, match=rf"`{field}` is a tuple of 3 items, .* Return arrays `\(N, \*shape\)`"):
        VectorRecordEpisodes(envs, make_buffer()).reset()


def test_errors_about_values_name_their_field() -> None:
    env = RecordEpisodes(LoggedEnv(0, action_kind="dict"), make_buffer())
    env.reset()
    with pytest.raises(TypeError, match="Field `action/grip` must be a tensor, an array or a number, found str"):
        env.step({"move": np.zeros(2), "grip": "close"})


class _LikeManiSkill(VectorEnv):
    """Resets by `options["env_idx"]`, says nothing of its mode, and returns tensors in place."""

    def __init__(self, mode: str) -> None:
        self.games, self.num_envs = Games(N, mode), N
        self.single_observation_space, self.single_action_space = VECTOR, ACTION_SPACES["box"]
        self.observation_space = gymnasium.vector.utils.batch_space(VECTOR, N)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, N)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[torch.Tensor, dict[str, Any]]:
        mask = None if options is None else np.isin(np.arange(N), options["env_idx"].numpy())
        return torch.from_numpy(self.games.reset(mask)), {}

    def step(self, actions: torch.Tensor) -> Any:
        results = [torch.from_numpy(array) for array in self.games.step(np.asarray(actions))]
        final = {"final_observation": torch.from_numpy(self.games.full_final())}
        has_final = torch.tensor([item is not None for item in self.games.final])
        return *results, {**final, "_final_observation": has_final} if has_final.any() else {}


@pytest.mark.parametrize("mode", ["same_step", "disabled"])
def test_maniskill_with_and_without_its_own_resets(mode: str) -> None:
    buffer = make_buffer()
    envs = VectorRecordEpisodes(_LikeManiSkill(mode), buffer, mode)
    envs.reset()
    for step in range(40):
        envs.step(torch.full((N, 2), step + 1.0))
        if envs.games.is_over.any():
            envs.reset(options={"env_idx": torch.from_numpy(envs.games.is_over.nonzero()[0])})
        if step == 20:
            envs.reset(options={"env_idx": torch.tensor([1])})
    envs.reset()
    assert_recorded(recorded(buffer), envs.games.logs)


class _LikeEnvPool(_LikeManiSkill):
    """Returns the rows that were reset, and no others."""

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        envs = np.flatnonzero(np.ones(N) if options is None else options["reset_mask"])
        return self.games.reset(np.isin(np.arange(N), envs))[envs], {"env_id": envs.astype(np.int32)}


def test_envpool_is_recorded_though_a_masked_reset_returns_some_rows_only() -> None:
    buffer, envs = make_buffer(), _LikeEnvPool("next_step")
    masks = [np.array(mask) for mask in ([True, False, False], [False, True, True], [True, True, True])]
    play(VectorRecordEpisodes(envs, buffer, "next_step"), 60, {step: masks[step % 3] for step in range(5, 55, 4)})
    assert_recorded(recorded(buffer), envs.games.logs)


def test_environments_that_ignore_the_mask_of_a_reset_are_told_and_leave_no_jump() -> None:
    buffer = make_buffer()
    envs = VectorRecordEpisodes(gymnasium.make_vec("CartPole-v1", num_envs=8), buffer)
    for _ in range(10):
        envs.reset()
        for _ in range(5):
            envs.step(np.zeros(8, int))
        with pytest.raises(RuntimeError, match=r"Environments \[1, 2, 3, 4, 5, 6, 7\] .* `CartPoleVectorEnv`"):
            envs.reset(options={"reset_mask": np.arange(8) == 0})
        assert not buffer.writer.num_open_rows
        with pytest.raises(RuntimeError, match="were cut off by an exception"):
            envs.step(np.zeros(8, int))
    assert {(len(e["obs"]), int(e["truncated"].sum()), bool(e["truncated"][-1])) for e in recorded(buffer)} == {
        (6, 1, True)
    }
    assert max(float(e["obs"][:, 2].diff().abs().max()) for e in recorded(buffer)) < 0.1


def test_final_observations_may_be_missing_if_the_wrapper_is_told() -> None:
    class Forgetful(VectorWrapper):
        def step(self, actions: Any) -> Any:
            return *self.env.step(actions)[:4], {}

    envs = Forgetful(SyncVectorEnv(makers(N), autoreset_mode=AutoresetMode.SAME_STEP))
    buffer = make_buffer()
    play(VectorRecordEpisodes(envs, buffer, final_obs_may_be_missing=True))
    assert any(episode["final_obs_missing"][-1] for episode in recorded(buffer))


# Single environments.


def play_single(env: gymnasium.Env, num_episodes: int = 20) -> None:
    """Every fifth episode is left in its middle, and some right after their reset."""
    env.action_space.seed(0)
    for episode in range(num_episodes):
        env.reset(seed=episode)
        if episode % 7 == 0:
            env.reset()
        for step in range(100):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated or (episode % 5 == 0 and step == 1):
                break
    env.reset()


@pytest.mark.parametrize("kind", OBSERVATION_SPACES)
@pytest.mark.parametrize("num_envs", [None, 1])
@pytest.mark.parametrize("reuses", [False, True])
def test_what_a_single_environment_does_is_recorded_as_its_log_says(
    kind: str, num_envs: int | None, reuses: bool
) -> None:
    buffer = make_buffer(num_envs=num_envs)
    env = RecordEpisodes(LoggedEnv(0, kind, reuses and kind == "box"), buffer)
    play_single(env)
    assert_recorded(recorded(buffer), [env.unwrapped.log])
    assert recorded(buffer)[0]["reward"].dtype == torch.float32


@pytest.mark.parametrize("is_below", [True, False])
def test_autoreset_may_lie_below_and_above(is_below: bool) -> None:
    buffer, logged, autoreset = make_buffer(), LoggedEnv(0), gymnasium.wrappers.Autoreset
    env = RecordEpisodes(autoreset(logged), buffer) if is_below else autoreset(RecordEpisodes(logged, buffer))
    env.reset()
    for _ in range(60):
        env.step(env.action_space.sample())
    env.reset()
    assert_recorded(recorded(buffer), [logged.log])


def test_numbers_in_and_out_take_the_dtypes_of_their_spaces() -> None:
    class Sloppy(LoggedEnv):
        """Returns float64 from `step` and float32 from `reset`, and rewards of three types."""

        def step(self, action: Any) -> Any:
            obs, reward, *rest = super().step(action)
            types: list[Callable[[float], Any]] = [float, np.float64, np.float32]
            return obs.astype(np.float64), types[self.game.step_index % 3](reward), *rest

    buffer = make_buffer()
    env = RecordEpisodes(Sloppy(0, action_kind="discrete"), buffer)
    for _ in range(10):
        env.reset()
        for action in (1, np.int64(2), np.int32(3), np.array(4), 5):
            if any(env.step(action)[2:4]):
                break
    env.reset()
    assert_recorded(recorded(buffer), [env.unwrapped.log])
    (dtypes,) = {tuple(e[name].dtype for name in ("obs", "action", "reward")) for e in recorded(buffer)}
    assert dtypes == (torch.float32, torch.int64, torch.float32)


@pytest.mark.parametrize(
    "reward", [1, True, 0.1, np.float64(0.1), np.array(1), np.array([1]), np.array([0.1]), np.array([1, 2]), [0, 0.5]]
)
def test_rewards_of_a_single_environment_are_float32_of_one_or_k_numbers(reward: Any) -> None:
    class Pays(LoggedEnv):
        def step(self, action: Any) -> Any:
            obs, _, *flags = super().step(action)
            return obs, reward, *flags

    buffer = make_buffer()
    env = RecordEpisodes(Pays(0), buffer)
    env.reset()
    env.step(env.action_space.sample())
    env.reset()
    expected = torch.tensor(reward, dtype=torch.float32)
    assert torch.equal(recorded(buffer)[0]["reward"], torch.stack([expected * 0, expected]))


@pytest.mark.parametrize("is_single", [True, False])
def test_extras_of_a_step_are_stored_with_its_action(is_single: bool) -> None:
    buffer = make_buffer()
    envs = LoggedEnv(0) if is_single else SyncVectorEnv(makers(N))
    env: Any = (RecordEpisodes if is_single else VectorRecordEpisodes)(envs, buffer)
    env.reset()
    step, has_ended = 0, False
    while not has_ended:
        step += 1
        hidden = np.full(() if is_single else N, step, np.float32)
        _, _, *flags, _ = env.step(env.action_space.sample(), extras={"policy": {"hidden": hidden}})
        has_ended = bool(np.ravel(np.logical_or(*flags))[0])
    env.reset()
    (episode,) = [episode for episode in recorded(buffer) if episode["obs"][0, :2].tolist() == [0, 0]]
    assert episode["policy"]["hidden"].tolist() == list(range(step + 1))


# Stable-Baselines3, where it is installed.


@pytest.mark.parametrize("subprocesses", [False, True])
def test_stable_baselines3_is_recorded_as_the_log_says(subprocesses: bool) -> None:
    vec_env = pytest.importorskip(
        "stable_baselines3.common.vec_env", reason="stable-baselines3 is not installed (pip install -e '.[dev]')"
    )
    fns = makers(2)
    envs = vec_env.SubprocVecEnv(fns, start_method="fork") if subprocesses else vec_env.DummyVecEnv(fns)
    buffer = make_buffer()
    recorder = Recorder(buffer, 2, "same_step")
    with contextlib.closing(envs):
        recorder.reset(envs.reset())
        for step in range(60):
            actions = np.full((2, 2), step, np.float32)
            obs, rewards, dones, infos = envs.step(actions)
            recorder.step(actions, obs, rewards, dones, None, infos=infos)
        recorder.reset(envs.reset())
        logs = envs.get_attr("log")
    for log in logs:
        for episode in (episode for episode in log if episode["action"] and episode["ended"][-1]):
            # SB3 does not tell an episode that was cut where it also ended from one that ended.
            episode["truncated"][-1] = episode["truncated"][-1] and not episode["terminated"][-1]
    assert_recorded(recorded(buffer), logs)


@pytest.mark.parametrize("mode", [*AutoresetMode, "single", "autoreset"])
def test_an_exception_out_of_a_reset_leaves_no_gap_in_an_episode(mode: Any) -> None:
    class Fragile(LoggedEnv):
        is_broken = False

        def reset(self, **options: Any) -> Any:
            result = super().reset(**options)
            self.game.length = 4
            if self.is_broken:
                raise KeyboardInterrupt
            return result

    buffer = make_buffer()
    games = [Fragile(env) for env in range(2 if isinstance(mode, AutoresetMode) else 1)]
    if isinstance(mode, AutoresetMode):
        envs = SyncVectorEnv([lambda game=game: game for game in games], autoreset_mode=mode)
        env: Any = VectorRecordEpisodes(envs, buffer)
    else:
        env = RecordEpisodes(gymnasium.wrappers.Autoreset(games[0]) if mode == "autoreset" else games[0], buffer)
    for _ in range(2):
        games[-1].is_broken = False
        env.reset()
        for _ in range(2):
            env.step(env.action_space.sample())
        games[-1].is_broken = True
        with pytest.raises(KeyboardInterrupt):
            env.reset()
    assert len(recorded(buffer)) == 2 * len(games)
    for episode in recorded(buffer):
        assert episode["obs"][:, 2].tolist() == [0, 1, 2] and episode["truncated"].tolist() == [False, False, True]
    with pytest.raises(RuntimeError, match="were cut off by an exception"):
        env.step(env.action_space.sample())
    buffer.close()
    with pytest.raises(KeyboardInterrupt):
        env.reset()


def test_an_exception_inside_a_step_leaves_no_gap_in_an_episode() -> None:
    class Fragile(LoggedEnv):
        is_broken = False

        def step(self, action: Any) -> Any:
            result = super().step(action)
            if self.is_broken:
                raise OSError("simulator")
            return result

    buffer, fragile = make_buffer(), Fragile(0)
    env = RecordEpisodes(fragile, buffer)
    env.reset()
    fragile.game.length = 5
    env.step(env.action_space.sample())
    fragile.is_broken = True
    with pytest.raises(OSError, match="simulator"):
        env.step(env.action_space.sample())
    fragile.is_broken = False
    with pytest.raises(RuntimeError, match="were stepped"):
        env.step(env.action_space.sample())
    env.reset()
    (episode,) = recorded(buffer)
    assert episode["obs"][:, 2].tolist() == [0, 1] and episode["truncated"].tolist() == [False, True]


def test_what_the_environments_have_is_reached_but_for_unrecorded_steps() -> None:
    envs = AsyncVectorEnv(makers(1), context="fork")
    with contextlib.closing(envs):
        recording = VectorRecordEpisodes(envs, make_buffer())
        assert recording.call("log") == recording.get_attr("log")
        for name in ("step_async", "step_wait", "reset_async", "reset_wait"):
            with pytest.raises(AttributeError, match=f"`{name}` would go unrecorded"):
                getattr(recording, name)
        with pytest.raises(AttributeError):
            _ = recording.nothing
