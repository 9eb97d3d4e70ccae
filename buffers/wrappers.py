"""Gymnasium wrappers that record everything that is stepped through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from buffers.utils import how_to_install

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
except ImportError as error:
    raise ImportError(
        f"`buffers.wrappers` needs gymnasium 1.1 or newer: {how_to_install('extras')}. `buffers.Recorder` does without."
    ) from error

from buffers.conversion import cast_if_kept
from buffers.observations import to_array
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
    """

    def __init__(self, env: gymnasium.Env, buffer: ReplayBuffer | EpisodeWriter) -> None:
        super().__init__(env)
        self.recorder = Recorder(buffer, None, _single_mode(env))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; an open episode is closed as truncated."""
        obs, info = self.env.reset(seed=seed, options=options)
        self.recorder.reset(_as_in(self.env.observation_space, obs))
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step and record."""
        taken = _as_in(self.env.action_space, action, copy=True)
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.recorder.step(taken, _as_in(self.env.observation_space, obs), reward, terminated, truncated)
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
        ValueError: The mode is neither given nor in the metadata, or the two differ.
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
        mode = _vector_mode(envs, autoreset_mode)
        self.recorder = Recorder(buffer, envs.num_envs, mode, final_obs_may_be_missing=final_obs_may_be_missing)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset all, or those under `options["reset_mask"]` or in ManiSkill's `options["env_idx"]`.

        Their open episodes are closed as truncated.
        """
        # Before the call, because gymnasium removes the mask from the options.
        mask = _reset_mask(self.num_envs, options)
        obs, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        self.recorder.reset(obs, mask)
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step and record."""
        taken = _as_in(self.env.action_space, actions, copy=True)
        try:
            obs, rewards, terminated, truncated, infos = self.env.step(actions)
            # Gymnasium's rewards are float64 by numpy's default, and would make a loss float64.
            stored_rewards = to_array("reward", rewards).astype(np.float32)
            self.recorder.step(taken, obs, stored_rewards, terminated, truncated, infos=infos)
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
    if options.get("env_idx") is None:
        return None
    mask = np.zeros(num_envs, np.bool_)
    mask[to_array("env_idx", options["env_idx"])] = True
    return mask


def _as_in(space: gymnasium.Space, value: Any, copy: bool = False) -> Any:
    """The value as arrays, cast to the dtypes of its space where `cast_if_kept` allows it."""
    if isinstance(space, gymnasium.spaces.Dict) and isinstance(value, Mapping):
        return {key: _as_in(space[key], item, copy) if key in space.spaces else item for key, item in value.items()}
    if isinstance(space, gymnasium.spaces.Tuple) and isinstance(value, (tuple, list)):
        return tuple(_as_in(member, item, copy) for member, item in zip(space, value, strict=True))
    array = to_array("value", value)
    cast = array if space.dtype is None else cast_if_kept(array, space.dtype)
    return cast.copy() if copy and cast is array else cast
