"""Gymnasium wrappers that record everything that is stepped through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from buffers.utils import how_to_install

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError(
        f"`buffers.wrappers` needs gymnasium 1.1 or newer: {how_to_install('extras')}. `buffers.Recorder` does without."
    ) from error

from buffers.conversion import cast_if_kept
from buffers.observations import to_array, tree_of
from buffers.recorder import MODES, Recorder
from buffers.replay_buffer import ReplayBuffer
from buffers.writer import EpisodeWriter

__all__ = ["RecordEpisodes", "VectorRecordEpisodes"]

# They bypass `step` and `reset`, so what they do would be missing in the buffer.
_UNRECORDED = ("step_async", "step_wait", "reset_async", "reset_wait")


class RecordEpisodes(gymnasium.Wrapper):
    """Records a single environment.

        >>> from buffers import ReplayBuffer
        >>> from buffers.dataset import RingBufferDataset
        >>> buffer = ReplayBuffer(RingBufferDataset(capacity=1_000), batch_size=32)
        >>> env = RecordEpisodes(gymnasium.make("CartPole-v1"), buffer)
        >>> obs, info = env.reset(seed=0)
        >>> while not env.step(0)[2]:  # Until it terminates.
        ...     pass
        >>> buffer.dataset.episode_lengths  # Eleven transitions are twelve rows.
        [12]

    The fields and `buffer` are those of `Recorder`. Observations and actions take the dtypes of their spaces if nothing
    is lost but precision of floats; rewards are float32. An `Autoreset` wrapper may lie below or above this one.
    ValueError for a space that gives no arrays of one shape, such as `Text` or `Sequence`.
    """

    def __init__(self, env: gymnasium.Env, buffer: ReplayBuffer | EpisodeWriter) -> None:
        super().__init__(env)
        _check_space("obs", env.observation_space)
        _check_space("action", env.action_space)
        self.recorder = Recorder(buffer, None, _single_mode(env))

    def state_dict(self) -> dict[str, Any]:
        """`Recorder.state_dict`; the environment is not in it."""
        return self.recorder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`Recorder.load_state_dict`, for an environment that was brought to where it stood."""
        self.recorder.load_state_dict(state)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; an open episode is closed as truncated, also if this fails."""
        try:
            obs, info = self.env.reset(seed=seed, options=options)
            self.recorder.reset(_as_in("obs", self.env.observation_space, obs))
        except BaseException:
            self.recorder.invalidate()
            raise
        return obs, info

    def step(self, action: Any, *, extras: Mapping[str, Any] | None = None) -> tuple[Any, Any, bool, bool, dict]:
        """Step and record; `extras` are those of `Recorder.step`."""
        taken = _as_in("action", self.env.action_space, action, copy=True)
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            obs_in_space = _as_in("obs", self.env.observation_space, obs)
            self.recorder.step(taken, obs_in_space, reward, terminated, truncated, extras=extras)
        except BaseException:
            # The environment may have stepped without a record of it.
            self.recorder.invalidate()
            raise
        return obs, reward, terminated, truncated, info


class VectorRecordEpisodes(VectorWrapper):
    """Records environments that step together.

        >>> from buffers import ReplayBuffer
        >>> from buffers.dataset import RingBufferDataset
        >>> buffer = ReplayBuffer(RingBufferDataset(capacity=1_000), batch_size=32)
        >>> envs = VectorRecordEpisodes(gymnasium.make_vec("CartPole-v1", num_envs=8), buffer)
        >>> obs, infos = envs.reset(seed=0)
        >>> for _ in range(15):
        ...     _ = envs.step(np.zeros(8, int))
        >>> buffer.num_episodes
        8

    The fields and arguments are those of `Recorder`. Observations are stored as they are returned, actions take the
    dtype of their space as in `RecordEpisodes`, and rewards are float32. Other attributes of the environments are
    reached through the wrapper, but for `step_async` and the like, which would go unrecorded.

    Args:
        envs: The environments.
        buffer: Where the episodes go.
        autoreset_mode: As in `Recorder`, or gymnasium's; None takes it from `envs.metadata["autoreset_mode"]`.
        final_obs_may_be_missing: As in `Recorder`.

    Raises:
        ValueError: The mode is neither given nor in the metadata, or the two differ; a space that gives no arrays
            `(N, *shape)`, such as `Text` or `Sequence`.
    """

    def __init__(
        self,
        envs: VectorEnv,
        buffer: ReplayBuffer | EpisodeWriter,
        autoreset_mode: str | AutoresetMode | None = None,
        *,
        final_obs_may_be_missing: bool = False,
    ) -> None:
        super().__init__(envs)
        _check_space("obs", envs.single_observation_space, is_batched=True)
        _check_space("action", envs.single_action_space, is_batched=True)
        mode = _vector_mode(envs, autoreset_mode)
        self.recorder = Recorder(buffer, envs.num_envs, mode, final_obs_may_be_missing=final_obs_may_be_missing)

    def state_dict(self) -> dict[str, Any]:
        """`Recorder.state_dict`; the environment is not in it."""
        return self.recorder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`Recorder.load_state_dict`, for an environment that was brought to where it stood."""
        self.recorder.load_state_dict(state)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset all, or those under `options["reset_mask"]` or in ManiSkill's `options["env_idx"]`.

        Their open episodes are closed as truncated; if this fails, all are. RuntimeError if others than those were
        reset, too: where the mask is False, observations must be the last ones.
        """
        # Before the call, because gymnasium removes the mask from the options.
        mask = _reset_mask(self.num_envs, options)
        try:
            obs, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
            _check_batched("obs", self.single_observation_space, obs)
            envs = infos.get("env_id") if isinstance(infos, Mapping) else None
            if mask is not None and envs is not None and len(envs) < self.num_envs:
                # EnvPool returns the rows that were reset, and no others.
                self.recorder.reset(_in_place(self.num_envs, obs, envs), _mask_of(self.num_envs, envs))
            else:
                if mask is not None:
                    self.recorder.check_others(obs, mask)
                self.recorder.reset(obs, mask)
        except BaseException:
            self.recorder.invalidate()
            raise
        return obs, infos

    def step(self, actions: Any, *, extras: Mapping[str, Any] | None = None) -> tuple[Any, Any, Any, Any, dict]:
        """Step and record; `extras` are those of `Recorder.step`."""
        taken = _as_in("action", self.env.action_space, actions, copy=True)
        try:
            obs, rewards, terminated, truncated, infos = self.env.step(actions)
            # Gymnasium's rewards are float64 by numpy's default, and would make a loss float64.
            stored_rewards = to_array("reward", rewards).astype(np.float32)
            self.recorder.step(taken, obs, stored_rewards, terminated, truncated, infos=infos, extras=extras)
        except BaseException:
            # The environments may have stepped without a record of it.
            self.recorder.invalidate()
            raise
        return obs, rewards, terminated, truncated, infos

    def __getattr__(self, name: str) -> Any:
        if name in _UNRECORDED:
            raise AttributeError(f"`{name}` would go unrecorded. Use `step` and `reset`.")
        if name.startswith("_") or name in ("env", "recorder"):
            raise AttributeError(f"{type(self).__name__} has no attribute '{name}'.")
        env = self.env
        while isinstance(env, VectorWrapper) and not hasattr(env, name):
            env = env.env
        return getattr(env, name)


def _single_mode(env: gymnasium.Env) -> str:
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.Autoreset):
            return "next_step"
        env = env.env
    return "disabled"


def _vector_mode(envs: VectorEnv, stated: str | AutoresetMode | None) -> str:
    found = (envs.metadata or {}).get("autoreset_mode")
    if found is None and stated is None:
        raise ValueError(
            f'{envs} does not say when it resets: there is no `metadata["autoreset_mode"]`. Pass `autoreset_mode`, '
            f"one of {MODES}."
        )
    found, name = _mode_name(found or stated), _mode_name(stated or found)
    if found != name:
        raise ValueError(
            f"`autoreset_mode`={name!r}, but the metadata of {envs} say {found!r}. Leave it out, or correct them."
        )
    return name


def _mode_name(mode: Any) -> str:
    if isinstance(mode, AutoresetMode):
        return mode.name.lower()
    return {member.value: member.name.lower() for member in AutoresetMode}.get(mode, mode)


def _reset_mask(num_envs: int, options: Mapping[str, Any] | None) -> np.ndarray | None:
    """Which environments the options ask to reset, bool `(N,)`; None for all."""
    options = options or {}
    if options.get("reset_mask") is not None:
        return np.array(to_array("reset_mask", options["reset_mask"]))
    return None if options.get("env_idx") is None else _mask_of(num_envs, options["env_idx"])


def _mask_of(num_envs: int, envs: Any) -> np.ndarray:
    mask = np.zeros(num_envs, np.bool_)
    mask[to_array("envs", envs)] = True
    return mask


def _in_place(num_envs: int, obs: Any, envs: np.ndarray) -> Any:
    """Observations of some environments as arrays `(N, *shape)`, which repeat a row for the others."""
    rows = np.zeros(num_envs, np.int64)
    rows[envs] = np.arange(len(envs))
    return tree_of("obs", obs, lambda name, value: to_array(name, value)[rows])


def _check_space(name: str, space: gymnasium.Space, is_batched: bool = False) -> None:
    """Refuse a space that gives no arrays of one shape, or that a vector environment does not batch to arrays."""
    members = _members(space)
    for key, member in members:
        _check_space(f"{name}/{key}", member, is_batched)
    if not members and (space.shape is None or (is_batched and isinstance(batch_space(space), spaces.Tuple))):
        expected = "shape `(N, *shape)`" if is_batched else "one shape"
        raise ValueError(
            f"`{name}` has the space {type(space).__name__}, which gives no arrays of {expected}. Leave it out, or "
            "make it a Box, by a wrapper below this one: gymnasium's `FilterObservation`, `TransformObservation` or "
            "`TransformAction`."
        )


def _check_batched(name: str, space: gymnasium.Space, obs: Any) -> None:
    """Refuse a tuple of N observations: it would be taken for one of a Tuple space."""
    if isinstance(obs, tuple) and not isinstance(space, spaces.Tuple):
        found = f"a tuple of {len(obs)} items, but its space is a {type(space).__name__}"
        raise ValueError(f"`{name}` is {found}. Return arrays `(N, *shape)`.")
    items = dict(enumerate(obs)) if isinstance(obs, tuple) else obs if isinstance(obs, Mapping) else {}
    for key, member in _members(space):
        _check_batched(f"{name}/{key}", member, items.get(key))


def _members(space: gymnasium.Space) -> list[tuple[Any, gymnasium.Space]]:
    if isinstance(space, spaces.Dict):
        return list(space.items())
    return list(enumerate(space)) if isinstance(space, spaces.Tuple) else []


def _as_in(name: str, space: gymnasium.Space, value: Any, copy: bool = False) -> Any:
    """The value as arrays, cast to the dtypes of its space where `cast_if_kept` allows it."""
    if isinstance(space, spaces.Dict) and isinstance(value, Mapping):
        known = space.spaces
        return {
            key: _as_in(f"{name}/{key}", known[key], item, copy) if key in known else item
            for key, item in value.items()
        }
    if isinstance(space, spaces.Tuple) and isinstance(value, (tuple, list)) and len(value) == len(space):
        return tuple(_as_in(f"{name}/{key}", member, value[key], copy) for key, member in enumerate(space))
    array = to_array(name, value)
    cast = array if space.dtype is None else cast_if_kept(array, space.dtype)
    return cast.copy() if copy and cast is array else cast
