"""Recorder: from what environments return, by their different conventions, to rows with boundaries.

An episode of T transitions is T + 1 rows, aligned on arrival: a row has an observation and all that led to it.

    row            0     1     2    ...   T
    obs            o0    o1    o2         oT       the true final observation is a row of its own
    action         0     a0    a1         aT-1     taken at the observation of the row before
    reward         0     r1    r2         rT       received on arriving
    terminated     -     -     -          x        either, or both
    truncated      -     -     -          x
    is_first       x     -     -          -

The episode of environment i ends at call t, by action a and with reward r; o0' is the first observation of the next.

                 call t                      the next for i                what is recorded
    next_step    a -> oT, r, done            (a*) -> o0', (r*), not done   t: (oT, a, r, done) closes
                                                                           next: o0' is held; a*, r* are dropped
    same_step    a -> o0', r, done, and      a' -> o1', r'                 t: (oT, a, r, done) closes; o0' is held
                 oT in final_obs or infos                                  next: first row o0', then (o1', a', r')
    disabled     a -> oT, r, done            reset(mask) -> o0'            t: (oT, a, r, done) closes
                                                                           reset: o0' is held

A first row is held until a transition follows it, so an episode without a transition is never stored. Which calls reset
is known from the done before them, never from a reward of 0: some environments pay a reward at a reset.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils._pytree import tree_map

from buffers import observations
from buffers.conversion import as_array, number_as
from buffers.dataset.verification import check_rows
from buffers.disk import described_fields, parse_fields
from buffers.fields import Fields, as_tensor
from buffers.flags import as_flag
from buffers.replay_buffer import ReplayBuffer
from buffers.utils import integer, one_of
from buffers.writer import EpisodeWriter

__all__ = ["Recorder"]

Mask = np.ndarray | None
MODES = ("next_step", "same_step", "disabled")
_FLOAT32 = np.dtype(np.float32)
_MISSING = "final_obs_missing"
_RESERVED = {"obs", "action", "reward", "terminated", "truncated", "is_first", "mask", "next_obs", _MISSING}


class Recorder:
    """Records the calls of an environment, or of N environments that step together, as whole episodes.

        >>> from buffers import ReplayBuffer
        >>> from buffers.dataset import RingBufferDataset
        >>> buffer = ReplayBuffer(RingBufferDataset(capacity=1_000), batch_size=32)
        >>> recorder = Recorder(buffer, num_envs=None, autoreset_mode="disabled")
        >>> recorder.reset(obs=0.0)
        >>> recorder.step(action=1, obs=0.1, reward=0.5, terminated=False, truncated=False)
        >>> recorder.step(action=0, obs=0.2, reward=0.7, terminated=True, truncated=False)
        >>> buffer.dataset.get_episode(0)["action"]
        tensor([0, 1, 0])

    The rows have the fields `obs`, `action`, `reward`, `terminated`, `truncated`, `is_first`, and those of `extras`. In
    first rows everything but `obs` and `is_first` is zero. dtypes are kept. Tuples become dicts with the keys "0", "1",
    and so on.

    Args:
        buffer: Where the rows go, a `ReplayBuffer` or an `EpisodeWriter`. Only its newest recorder may write.
        num_envs: N; everything passed has N as leading size, also for N = 1. None for a single environment, whose
            values have no such axis, and whose rewards are stored as float32.
        autoreset_mode: "next_step" (the call after an episode's last resets), "same_step" (the last call itself resets,
            and the final observation is passed separately) or "disabled" (the caller resets).
        final_obs_may_be_missing: Whether an episode may end under "same_step" without its final observation. The
            closing row then repeats the last known one, and is marked by the bool field `final_obs_missing`. Implied
            if the buffer has this field already.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An unknown mode, or a `num_envs` that is not positive or differs from the buffer's.
    """

    def __init__(
        self,
        buffer: ReplayBuffer | EpisodeWriter,
        num_envs: int | None,
        autoreset_mode: str,
        *,
        final_obs_may_be_missing: bool = False,
    ) -> None:
        writer = buffer.writer if isinstance(buffer, ReplayBuffer) else buffer
        if not isinstance(writer, EpisodeWriter):
            raise TypeError(f"`buffer` must be a ReplayBuffer or an EpisodeWriter, found {type(buffer).__name__}.")
        self.writer = writer
        self.autoreset_mode = one_of("autoreset_mode", autoreset_mode, MODES)
        self.num_envs = 1 if num_envs is None else integer("num_envs", num_envs, 1)
        self._is_single = num_envs is None
        if writer.num_envs not in (None, self.num_envs):
            raise ValueError(
                f"`num_envs`={num_envs} here, but {writer.num_envs} in the ReplayBuffer, which does not change. Make "
                "another ReplayBuffer; they may share one dataset."
            )
        self._may_be_missing = bool(final_obs_may_be_missing) or _MISSING in (writer.fields or ())
        self._token = writer.owner = object()
        writer.recorder = weakref.ref(self)
        if writer.max_episode_length is not None:
            writer.overlap_at_least(1)  # So that the transition across a cut is stored.
        writer.leading = (self.num_envs,)
        # For numbers and lists, which take the dtype of their field.
        self._dtypes = observations.dtypes_of(writer.fields)
        # Those of `obs`, from the first reset on.
        self._obs_fields: Fields | None = None
        # First observations that wait for a transition where `_is_pending`; elsewhere the last known ones, if needed.
        self._kept: list[np.ndarray] = []
        # `_kept` with zeros for everything else, from the first step on.
        self._first_row: dict[str, Any] = {}
        # An environment is in one of these states, or in the middle of an episode. None stands for no environment.
        self._needs_reset: Mask = np.ones(self.num_envs, np.bool_)
        self._is_pending: Mask = None
        self._was_done: Mask = None
        if writer.saved_recorder is not None:
            self.load_state_dict(writer.saved_recorder)
            writer.saved_recorder = None

    def state_dict(self) -> dict[str, Any]:
        """What another recorder needs to go on, besides the open episodes; one on a loaded buffer has it by itself."""
        fields = self._obs_fields
        kept = [] if fields is None else zip(self._kept, fields.values(), strict=True)
        masks = {"needs_reset": self._needs_reset, "is_pending": self._is_pending, "was_done": self._was_done}
        return {
            "autoreset_mode": self.autoreset_mode,
            "num_envs": None if self._is_single else self.num_envs,
            "obs_fields": None if fields is None else described_fields(fields),
            "kept": [as_tensor(array, kind).clone() for array, kind in kept],
            **{name: None if mask is None else mask.tolist() for name, mask in masks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stood, with environments that do; ValueError for one of another mode or `num_envs`."""
        found = self.autoreset_mode, None if self._is_single else self.num_envs
        if (saved := (state["autoreset_mode"], state["num_envs"])) != found:
            advice = '`ReplayBuffer.load(..., open_episodes="truncate")` begins with a new one'
            raise ValueError(f"The state is of a recorder (mode, `num_envs`) {saved}, this is {found}. {advice}.")
        fields = None if state["obs_fields"] is None else parse_fields(state["obs_fields"])
        self._obs_fields, self._first_row = fields, {}
        self._kept = [np.array(as_array("obs", tensor)) for tensor in state["kept"]]
        self._dtypes = observations.dtypes_of(fields) | observations.dtypes_of(self.writer.fields)
        masks = [state["needs_reset"], state["is_pending"], state["was_done"]]
        self._needs_reset, self._is_pending, self._was_done = [None if m is None else np.array(m) for m in masks]

    def reset(self, obs: Any, mask: Any = None) -> None:
        """Take the first observations after a reset of all environments, or of some.

        An open episode is closed as truncated; if it has no transition, it is dropped.

        Args:
            obs: Observations `(N, *shape)`; nested dicts and tuples of arrays or tensors allowed.
            mask: bool `(N,)`, which environments were reset; None for all. Observations of the others are ignored.

        Raises:
            Exception: As in `step`.
        """
        self._check_owner()
        fields, leaves = self._obs_leaves(self._tree("obs", obs))
        is_reset = np.ones(self.num_envs, np.bool_) if mask is None else self._flag("mask", mask)
        with self.writer.moment:
            self.writer.truncate(is_reset)
            if self._obs_fields is None:
                self._obs_fields, self._kept = fields, [np.zeros_like(leaf) for leaf in leaves]
                self._dtypes = observations.dtypes_of(fields) | self._dtypes
            self._keep(leaves, is_reset)
            self._is_pending = is_reset if self._is_pending is None else self._is_pending | is_reset
            self._was_done = observations.and_not(self._was_done, is_reset)
            self._needs_reset = observations.and_not(self._needs_reset, is_reset)
        self.writer.check_stored()

    def step(
        self,
        action: Any,
        obs: Any,
        reward: Any,
        terminated: Any,
        truncated: Any,
        final_obs: Any = None,
        infos: Any = None,
        *,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        """Take what one call of the environments was given and has returned.

        Args:
            action: What the environments were given, `(N, *shape)`; nested dicts and tuples allowed.
            obs: What they returned, as in `reset`.
            reward: `(N,)`; from a list, it becomes float32.
            terminated: bool `(N,)`, or numbers that are 0 or 1.
            truncated: The same; both may be set. None with SB3's infos: `terminated` then takes its dones, and "infos"
                tell which of them are truncations.
            final_obs: Under "same_step", the final observations of the environments that are done: a full batch, or
                one item per environment (a list, an object array), None where there is none.
            infos: As the environments return them. Under "same_step", final observations that are not passed are looked
                up here: "final_obs", "final_observation", with its mask if there is one, in a dict, or in one dict an
                environment, as SB3's "terminal_observation".
            extras: Further fields of the rows, `name -> (N, *shape)`, zero in first rows: what belongs to the action,
                such as its log-probability. What belongs to the observation goes into `obs`.

        Raises:
            TypeError: A value that is no tensor, array or number.
            ValueError: Other fields, dtypes, shapes or N than before, or a final observation that was not found.
                Nothing has changed.
            RuntimeError: An environment was not reset, or the buffer has a newer recorder.
            Exception: The dataset could not store an episode, as in `ReplayBuffer.add_step`.
        """
        self._check_ready()
        is_terminated = self._flag("terminated", terminated)
        if truncated is None:
            is_terminated, is_truncated = observations.split_dones(is_terminated, infos)
        else:
            is_truncated = self._flag("truncated", truncated)
        is_done = is_terminated | is_truncated
        is_last = is_done if is_done.any() else None
        arrived = self._tree("obs", obs)
        _, leaves = self._obs_leaves(arrived)
        is_missing = np.zeros(self.num_envs, np.bool_)
        if self.autoreset_mode == "same_step" and is_last is not None:
            arrived, is_missing = self._with_final_obs(leaves, is_done, final_obs, infos)
        row = self._row(action, arrived, reward, is_terminated, is_truncated, is_missing, extras)
        rows = self.writer.checked(row, {})
        with self.writer.moment:
            self._take(rows, row, leaves, is_last)
        self.writer.check_stored()

    def _take(self, rows: list[np.ndarray], row: dict[str, Any], leaves: list[np.ndarray], is_last: Mask) -> None:
        """Add the first rows that wait, and the rows of a step."""
        if self._is_pending is not None:
            if not self._first_row:
                first = {"obs": self._obs_tree(self._kept), "is_first": np.ones(self.num_envs, np.bool_)}
                self._first_row = {**tree_map(np.zeros_like, row), **first}
                self._dtypes = observations.dtypes_of(self.writer.fields)
            first_rows = self.writer.checked(self._first_row, {})
            self.writer.take(first_rows, mask=self._is_pending)
            self._is_pending = None
        self.writer.take(rows, None, is_last, None if self._was_done is None else ~self._was_done)
        self._move_on(leaves, is_last)

    def _move_on(self, leaves: list[np.ndarray], is_done: Mask) -> None:
        """Set the states after a step that returned these observations."""
        is_first = is_done
        if self.autoreset_mode == "disabled":
            self._needs_reset = is_done
            return
        if self.autoreset_mode == "next_step":
            # An episode may even end on the call that resets: it has no transition, so its first row is not kept.
            is_first = observations.and_not(self._was_done, is_done)
            self._was_done = is_done
            if is_done is not None:
                self._keep(leaves, is_done)  # For `check_others`.
        elif self._may_be_missing:
            for kept, leaf in zip(self._kept, leaves, strict=True):
                np.copyto(kept, leaf)
        if is_first is not None:
            self._keep(leaves, is_first)
        self._is_pending = is_first

    def check_others(self, obs: Any, mask: Any) -> None:
        """RuntimeError if a reset of the environments under the mask has also moved others: call it before `reset`."""
        if self._obs_fields is None:
            return
        leaves = self._obs_leaves(self._tree("obs", obs))[1]
        is_reset = self._flag("mask", mask)
        last = dict(zip(self._obs_fields.names, [kept.copy() for kept in self._kept], strict=True))
        is_known = self.writer.read_last(last)
        for state in (self._is_pending, self._was_done):
            is_known = is_known if state is None else is_known | state
        has_moved = observations.differing_rows(leaves, [*last.values()])
        moved = np.flatnonzero(has_moved & is_known & ~is_reset).tolist()
        if moved:
            raise RuntimeError(
                f"Environments {moved} have other observations after a reset of {np.flatnonzero(is_reset).tolist()} "
                "alone. Do they ignore the mask, as Gymnasium's `CartPoleVectorEnv` does? Then reset all, or make them "
                'with `vectorization_mode="sync"`. Does a wrapper below change observations of environments that stand '
                "still? Then put it above the recording one."
            )

    def _keep(self, leaves: list[np.ndarray], mask: np.ndarray) -> None:
        envs = mask.nonzero()[0]
        for kept, leaf in zip(self._kept, leaves, strict=True):
            kept[envs] = leaf[envs]  # Copied, as environments reuse their arrays.

    # Values in, as arrays `(N, *shape)`; N = 1 for a single environment.

    def _row(
        self, action: Any, obs: Any, reward: Any, terminated: Any, truncated: Any, is_missing: Any, extras: Any
    ) -> dict[str, Any]:
        if not isinstance(extras, Mapping | None):
            raise TypeError(f"`extras` must be a dict from field to value, found {type(extras).__name__}.")
        reserved = sorted(_RESERVED.intersection(extras or ()))
        if reserved:
            raise ValueError(f"`extras` has {reserved}, which the recorder writes itself. Rename them.")
        rewards, dtype = self._array("reward", reward), self._dtypes.get("reward", _FLOAT32)
        if (self._is_single or isinstance(reward, (list, tuple))) and dtype.kind == "f":
            rewards = rewards.astype(dtype)
        row = {
            "obs": obs,
            "action": self._tree("action", action),
            "reward": rewards,
            "terminated": terminated,
            "truncated": truncated,
            "is_first": np.zeros(self.num_envs, np.bool_),
            **{name: self._tree(name, value) for name, value in (extras or {}).items()},
        }
        if self._may_be_missing:
            row[_MISSING] = is_missing
        return row

    def _array(self, name: str, value: Any) -> np.ndarray:
        array = observations.to_array(name, value)
        # A single environment may return np.int32(1) once and 1 then.
        if self._is_single or isinstance(value, list):
            array = number_as(self._dtypes.get(name, array.dtype), array, value if isinstance(value, list) else array)
        return array[None] if self._is_single else array

    def _tree(self, name: str, value: Any) -> Any:
        return observations.tree_of(name, value, self._array)

    def _obs_leaves(self, tree: Any) -> tuple[Fields, list[np.ndarray]]:
        """The fields of observations, and arrays that fit in their order."""
        fields = self._obs_fields or Fields.from_rows({"obs": tree}, 1)
        leaves = fields.arrays({"obs": tree})
        check_rows(fields, leaves, (self.num_envs,), self.writer.sink.verification_mode)
        return fields, leaves

    def _obs_tree(self, leaves: list[np.ndarray]) -> Any:
        assert self._obs_fields is not None  # A reset comes first.
        return self._obs_fields.unflatten(dict(zip(self._obs_fields.names, leaves, strict=True)))["obs"]

    def _flag(self, name: str, value: Any) -> np.ndarray:
        """A copy as bool `(N,)`."""
        array = self._array(name, value)
        if array.shape == (self.num_envs,):
            return np.array(as_flag(name, array))
        raise ValueError(f"`{name}` has shape {array.shape}, expected {(self.num_envs,)}.")

    def _with_final_obs(
        self, leaves: list[np.ndarray], is_done: np.ndarray, final_obs: Any, infos: Any
    ) -> tuple[Any, np.ndarray]:
        """The observations with final ones where done, and bool `(N,)`, where these are missing."""
        assert self._obs_fields is not None  # A reset comes first.
        arrived = [leaf.copy() for leaf in leaves]
        name, source, mask = observations.find_final_obs(final_obs, infos)
        found = is_done if mask is None else is_done & self._flag(f"_{name}", mask)
        if source is None:
            found = np.zeros_like(is_done)
        elif observations.is_per_env(source):
            found = observations.put_items(self._obs_fields, arrived, found, name, source)
        else:
            for array, leaf in zip(arrived, self._obs_leaves(self._tree("obs", source))[1], strict=True):
                array[found] = leaf[found]
        is_missing = is_done & ~found
        if is_missing.any():
            if not self._may_be_missing:
                raise ValueError(
                    f"Environments {np.flatnonzero(is_missing).tolist()} ended without a final observation: it is "
                    "neither in `final_obs` nor in `infos` ('final_obs', 'final_observation', or SB3's "
                    "'terminal_observation'). Pass it, or make the recorder with `final_obs_may_be_missing=True`."
                )
            for array, kept in zip(arrived, self._kept, strict=True):
                array[is_missing] = kept[is_missing]
        return self._obs_tree(arrived), is_missing

    # Who may step.

    def invalidate(self) -> None:
        """Close open episodes as truncated and refuse steps until a reset: call it if the environments have raised."""
        self._needs_reset = np.ones(self.num_envs, np.bool_)
        self._is_pending = self._was_done = None
        if self.writer.owner is self._token and not self.writer.is_closed:
            self.writer.truncate(self._needs_reset)

    def _check_owner(self) -> None:
        if self.writer.owner is not self._token:
            raise RuntimeError(
                "Another recorder writes to this buffer by now; together they would mix their episodes. Give each its "
                "own ReplayBuffer; they may share one dataset."
            )

    def _check_ready(self) -> None:
        self._check_owner()
        if self._obs_fields is None:
            raise RuntimeError("Nothing was reset yet: pass the first observations to `reset` before `step`.")
        if self._needs_reset is not None:
            envs = np.flatnonzero(self._needs_reset).tolist()
            raise RuntimeError(
                f"Environments {envs} have ended, never begun, or were cut off by an exception, and were stepped. With "
                f"{self.autoreset_mode!r}, reset them first: pass their first observations to `reset(obs, mask)`."
            )
