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

A first row is held back until a transition follows it, so that an episode without one is never stored. Which calls
are resets is known from the done before them, never from a reward of 0: there are environments that pay at a reset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from buffers import observations
from buffers.conversion import cast_if_kept
from buffers.dataset.verification import check_rows
from buffers.fields import Fields
from buffers.replay_buffer import ReplayBuffer
from buffers.utils import integer
from buffers.writer import EpisodeWriter

__all__ = ["Recorder"]

Arrays = list[np.ndarray]
Mask = np.ndarray | None
MODES = ("next_step", "same_step", "disabled")
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

    The rows have the fields `obs`, `action`, `reward`, `terminated`, `truncated`, `is_first`, and those of `extras`,
    aligned on arrival. In first rows all but `obs` and `is_first` is zero. dtypes are kept as they are delivered.
    Tuples become dicts with the keys "0", "1", ...

    Args:
        buffer: Where the rows go, a `ReplayBuffer` or an `EpisodeWriter`. It takes the rows of one recorder at a time:
            the newest.
        num_envs: N; all that is passed has N as leading size, also for N = 1. None for a single environment, whose
            values have no such axis; its rewards, if they are single numbers, are stored as float32.
        autoreset_mode: "next_step" (the call after the last one of an episode resets), "same_step" (the last call
            itself resets, and the final observation is passed aside) or "disabled" (the caller resets).
        final_obs_may_be_missing: Whether an episode may end under "same_step" without its final observation. The
            closing row then repeats the last one known, and the bool field `final_obs_missing` says so. A buffer that
            has this field already needs no telling.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An unknown mode, or a `num_envs` that is not positive, or not that of the buffer.
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
        if autoreset_mode not in MODES:
            raise ValueError(f"`autoreset_mode` must be one of {MODES}, found {autoreset_mode!r}.")
        self.writer, self.autoreset_mode = writer, autoreset_mode
        self.num_envs = 1 if num_envs is None else integer("num_envs", num_envs, 1)
        self._is_single = num_envs is None
        if writer.num_envs not in (None, self.num_envs):
            raise ValueError(
                f"`num_envs`={num_envs} here, but {writer.num_envs} in the ReplayBuffer, which does not change. Make "
                "another ReplayBuffer; they may share one dataset."
            )
        self._may_be_missing = bool(final_obs_may_be_missing) or _MISSING in (writer.fields or ())
        self._token = writer.owner = object()
        # A row in two parts, as the first observation comes before anything is known about the rest.
        self._obs_fields: Fields | None = None
        self._rest_fields: Fields | None = None
        # Where `_is_pending`, first observations that are not rows yet; elsewhere the last ones known, if needed.
        self._kept: Arrays = []
        self._first_rest: Arrays = []
        # Where each of the buffer's fields is among those of the two parts.
        self._order: list[int] = []
        # An environment is in one of these states, or in the middle of an episode. None stands for no environment.
        self._needs_reset: Mask = np.ones(self.num_envs, np.bool_)
        self._is_pending: Mask = None
        self._was_done: Mask = None

    def reset(self, obs: Any, mask: Any = None) -> None:
        """Take the first observations after a reset of the environments, or of some.

        An episode in whose middle it comes is closed as truncated; one without a transition is dropped.

        Args:
            obs: Observations `(N, *shape)`; nested dicts and tuples of arrays or tensors allowed.
            mask: bool `(N,)`, which environments were reset; None for all. The others' observations are not looked at.

        Raises:
            Exception: As in `step`.
        """
        self._check_owner()
        fields, leaves = self._leaves(self._obs_fields, {"obs": self._tree("obs", obs)})
        is_reset = np.ones(self.num_envs, np.bool_) if mask is None else self._flag("mask", mask)
        self.writer.truncate(is_reset)
        if self._obs_fields is None:
            self._obs_fields, self._kept = fields, [np.zeros_like(leaf) for leaf in leaves]
        self._keep(leaves, is_reset)
        self._is_pending = is_reset if self._is_pending is None else self._is_pending | is_reset
        self._was_done = _and_not(self._was_done, is_reset)
        self._needs_reset = _and_not(self._needs_reset, is_reset)
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
            reward: `(N,)`.
            terminated: bool `(N,)`, or numbers that are 0 or 1.
            truncated: The same; both may be set. None with SB3's infos: then `terminated` takes its dones, and "infos"
                tell truncations.
            final_obs: Under "same_step", the final observations of the environments that are done: a full batch, or
                one item an environment (a list, an object array), None where there is none.
            infos: As the environments return them; under "same_step", searched for final observations that are not
                passed: "final_obs", "final_observation", with its mask if there is one, or SB3's
                "terminal_observation".
            extras: Further fields of the rows, `name -> (N, *shape)`, zero in first rows: what belongs to the action,
                as its log-probability; what belongs to the observation is better put into `obs`.

        Raises:
            TypeError: A value that is no tensor, array or number.
            ValueError: Other fields, dtypes, shapes or N than before, or a final observation that was not found.
                Nothing has changed.
            RuntimeError: An environment was not reset, or another recorder has taken over the buffer.
        """
        self._check_ready()
        is_terminated = self._flag("terminated", terminated)
        if truncated is None:
            is_terminated, is_truncated = observations.split_dones(is_terminated, infos)
        else:
            is_truncated = self._flag("truncated", truncated)
        is_done = is_terminated | is_truncated
        is_last = is_done if is_done.any() else None
        _, leaves = self._leaves(self._obs_fields, {"obs": self._tree("obs", obs)})
        arrived, is_missing = leaves, np.zeros(self.num_envs, np.bool_)
        if self.autoreset_mode == "same_step" and is_last is not None:
            arrived, is_missing = self._with_final_obs(leaves, is_done, final_obs, infos)
        fields, rest = self._rest(action, reward, is_terminated, is_truncated, is_missing, extras)
        if self._is_pending is not None:
            first_rest = self._first_rest or _first_rest(fields, rest)
            self._write(fields, self._kept, first_rest, self._is_pending, None, self._is_pending)
            self._rest_fields, self._first_rest = fields, first_rest
            # At once: should what follows be refused and called again, the first rows must not come twice.
            self._is_pending = None
        self._write(fields, arrived, rest, None, is_last, None if self._was_done is None else ~self._was_done)
        self._move_on(leaves, is_last)
        self.writer.check_stored()

    def _move_on(self, obs: Arrays, is_done: Mask) -> None:
        """What each environment is waiting for after a step."""
        if self.autoreset_mode == "disabled":
            self._needs_reset = is_done
            return
        is_first = is_done
        if self.autoreset_mode == "next_step":
            # An episode may even end on the call that resets: it has no transition, so its first row is not kept.
            is_first = _and_not(self._was_done, is_done)
            self._was_done = is_done
        elif self._may_be_missing:
            for kept, leaf in zip(self._kept, obs, strict=True):
                np.copyto(kept, leaf)
        if is_first is not None:
            self._keep(obs, is_first)
        self._is_pending = is_first

    def _keep(self, obs: Arrays, mask: np.ndarray) -> None:
        envs = mask.nonzero()[0]  # Copied, as environments use their arrays again.
        for kept, leaf in zip(self._kept, obs, strict=True):
            kept[envs] = leaf[envs]

    def _write(self, rest_fields: Fields, obs: Arrays, rest: Arrays, is_first: Mask, is_last: Mask, mask: Mask) -> None:
        """Write one row of each environment under `mask`."""
        if not self._order:
            self._begin(rest_fields, obs, rest)
        leaves = [*obs, *rest]
        self.writer.add_rows([leaves[i] for i in self._order], is_first, is_last, mask)

    def _begin(self, rest_fields: Fields, obs: Arrays, rest: Arrays) -> None:
        assert self._obs_fields is not None  # A step comes after a reset.
        row: dict[str, Any] = {}
        for fields, leaves in ((self._obs_fields, obs), (rest_fields, rest)):
            values = [leaf[0] for leaf in leaves] if self._is_single else leaves
            row.update(fields.unflatten(dict(zip(fields.names, values, strict=True))))
        self.writer.begin(row, False if self._is_single else np.zeros(self.num_envs, np.bool_))
        names = [*self._obs_fields.names, *rest_fields.names]
        self._order = [names.index(name) for name in self.writer.fields or ()]

    # What came in, as arrays that are known to fit.

    def _rest(
        self, action: Any, reward: Any, terminated: Any, truncated: Any, is_missing: Any, extras: Any
    ) -> tuple[Fields, Arrays]:
        """All of a row but its observation."""
        if not isinstance(extras, Mapping | None):
            raise TypeError(f"`extras` must be a dict from field to value, found {type(extras).__name__}.")
        reserved = sorted(_RESERVED.intersection(extras or ()))
        if reserved:
            raise ValueError(f"`extras` has {reserved}, which the recorder writes itself. Rename them.")
        reward = self._array("reward", reward)
        rest = {
            "action": self._tree("action", action),
            "reward": reward.astype(np.float32) if self._is_single and reward.ndim == 1 else reward,
            "terminated": terminated,
            "truncated": truncated,
            "is_first": np.zeros(self.num_envs, np.bool_),
            **{name: self._tree(name, value) for name, value in (extras or {}).items()},
        }
        if self._may_be_missing:
            rest[_MISSING] = is_missing
        return self._leaves(self._rest_fields, rest)

    def _array(self, name: str, value: Any) -> np.ndarray:
        """`(N, *shape)`, N = 1 for a single environment."""
        array = observations.to_array(name, value)
        return array[None] if self._is_single else array

    def _tree(self, name: str, value: Any) -> Any:
        return observations.tree_of(name, value, self._array)

    def _leaves(self, fields: Fields | None, tree: dict[str, Any]) -> tuple[Fields, Arrays]:
        """The arrays in the order of the fields, which are inferred if there are none yet."""
        fields = fields or Fields.from_rows(tree, 1)
        leaves = observations.leaves_of(fields, tree)
        if self._is_single:
            # An action may be np.int32(1) once and 1 then: numbers take the dtype that the first had.
            for i, (_, dtype, shape) in enumerate(fields.layout):
                if not shape and leaves[i].dtype != dtype and np.can_cast(leaves[i].dtype, dtype, "same_kind"):
                    leaves[i] = cast_if_kept(leaves[i], dtype)
        check_rows(fields, leaves, (self.num_envs,), self.writer.sink.verification_mode)
        return fields, leaves

    def _flag(self, name: str, value: Any) -> np.ndarray:
        """The value as bool `(N,)`."""
        array = self._array(name, value)
        if array.shape != (self.num_envs,):
            raise ValueError(f"`{name}` has shape {array.shape}, expected {(self.num_envs,)}.")
        flags = array.astype(np.bool_)
        if array.dtype != np.bool_ and (array != flags).any():
            raise ValueError(f"`{name}` must be bool, or numbers that are 0 or 1, found {array!r:.60}.")
        return flags

    def _with_final_obs(
        self, obs: Arrays, is_done: np.ndarray, final_obs: Any, infos: Any
    ) -> tuple[Arrays, np.ndarray]:
        """`obs` with the final observations where done, and bool `(N,)`, whose is missing."""
        fields = self._obs_fields
        assert fields is not None  # A step comes after a reset.
        arrived = [leaf.copy() for leaf in obs]
        name, source, mask = observations.find_final_obs(final_obs, infos)
        wanted = is_done if mask is None else is_done & self._flag(f"_{name}", mask)
        if observations.is_per_env(source):
            found = observations.put_items(fields, arrived, wanted, name, source)
        elif source is None:
            found = np.zeros_like(wanted)
        else:
            found = wanted
            for array, leaf in zip(arrived, self._leaves(fields, {"obs": self._tree("obs", source)})[1], strict=True):
                array[found] = leaf[found]
        is_missing = is_done & ~found
        if is_missing.any():
            if not self._may_be_missing:
                raise ValueError(
                    f"Environments {np.flatnonzero(is_missing).tolist()} ended without a final observation: with "
                    "'same_step', `obs` is already the next episode's first, and neither `final_obs` nor `infos` "
                    "('final_obs', 'final_observation', or SB3's 'terminal_observation') has it. Pass `final_obs`, or "
                    "make the recorder with `final_obs_may_be_missing=True`: it repeats the last one known and says so "
                    "in the field `final_obs_missing`."
                )
            for array, kept in zip(arrived, self._kept, strict=True):
                array[is_missing] = kept[is_missing]
        check_rows(fields, arrived, (self.num_envs,), self.writer.sink.verification_mode)
        return arrived, is_missing

    # The state.

    def invalidate(self) -> None:
        """Take no further step before a reset, which closes the open episodes: a step could not be recorded."""
        self._needs_reset = np.ones(self.num_envs, np.bool_)

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
                f"Environments {envs} have ended, or never begun, and were stepped. With "
                f"{self.autoreset_mode!r}, pass their first observations to `reset(obs, mask)` first."
            )


def _first_rest(fields: Fields, rest: Arrays) -> Arrays:
    first = [np.zeros_like(leaf) for leaf in rest]
    first[fields.names.index("is_first")][:] = True
    return first


def _and_not(mask: Mask, other: Mask) -> Mask:
    """Those of `mask` that are not of `other`, None if there are none."""
    if mask is None or other is None:
        return mask
    left = mask & ~other
    return left if left.any() else None
