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

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from buffers import observations
from buffers.conversion import cast_if_kept
from buffers.dataset.verification import VerificationMode, check_rows
from buffers.fields import Fields
from buffers.utils import integer
from buffers.writer import EpisodeWriter

__all__ = ["Recorder"]

Arrays = list[np.ndarray]
Mask = np.ndarray | None
MODES = ("next_step", "same_step", "disabled")
_MISSING = "final_obs_missing"
_RESERVED = {"obs", "action", "reward", "terminated", "truncated", "is_first", "mask", "next_obs", _MISSING}


class HasWriter(Protocol):
    """A front-end of a writer: a `ReplayBuffer`."""

    @property
    def writer(self) -> EpisodeWriter:
        """What takes the rows."""


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
    aligned on arrival: the row of an observation holds the action that led to it. In first rows all but `obs` and
    `is_first` is zero. dtypes are kept as they are delivered. Tuples become dicts with the keys "0", "1", ...

    Args:
        buffer: Where the rows go, a `ReplayBuffer` or an `EpisodeWriter`. It takes the rows of one recorder at a time:
            the newest.
        num_envs: N; all that is passed has N as leading size, also for N = 1. None for a single environment, whose
            values have no such axis; its rewards, if they are plain numbers, are stored as float32.
        autoreset_mode: "next_step" (the call after the last one of an episode resets), "same_step" (the last call
            itself resets, and the final observation is passed aside) or "disabled" (the caller resets).
        final_obs_may_be_missing: Whether an episode may end under "same_step" without its final observation. The
            closing row then repeats the last one known, and the bool field `final_obs_missing` says so. The field is
            also there if it happens at the first step, or if the buffer has it already.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An unknown mode, or a `num_envs` that is not positive, or not that of the buffer.
    """

    def __init__(
        self,
        buffer: HasWriter | EpisodeWriter,
        num_envs: int | None,
        autoreset_mode: str,
        *,
        final_obs_may_be_missing: bool = False,
    ) -> None:
        writer = buffer if isinstance(buffer, EpisodeWriter) else getattr(buffer, "writer", None)
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
        # Observations that are not rows yet: where `_is_pending`, the first of an episode; elsewhere the last one known
        # if that may be needed.
        self._kept: Arrays = []
        self._first_rest: Arrays = []
        self._arrived: Arrays = []
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
            TypeError: A value that is no tensor, array or number.
            ValueError: Other keys, dtypes, shapes or N than before. Nothing has changed.
            RuntimeError: Another recorder has taken over the buffer.
        """
        self._check_owner()
        tree = {"obs": observations.tree_of("obs", obs, self._array)}
        fields = Fields.from_rows(tree, 1) if self._obs_fields is None else self._obs_fields
        leaves = self._leaves(fields, tree)
        is_reset = np.ones(self.num_envs, np.bool_) if mask is None else self._flag("mask", mask)
        self.writer.truncate(bool(is_reset[0]) if self._is_single else is_reset)
        if self._obs_fields is None:
            self._obs_fields = fields
            self._kept = [np.zeros_like(leaf) for leaf in leaves]
        self._keep(leaves, is_reset)
        self._is_pending = is_reset.copy() if self._is_pending is None else self._is_pending | is_reset
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
            action: The actions that the environments were given, `(N, *shape)`; nested dicts and tuples allowed.
            obs: The observations that they returned, as in `reset`.
            reward: `(N,)`.
            terminated: bool `(N,)`, or numbers that are 0 or 1.
            truncated: The same; both may be set. None where `infos` is SB3's: then `terminated` takes its dones, and
                which of them are truncations is found there.
            final_obs: Under "same_step", the final observations of the environments that are done: a full batch, or
                one item an environment (a list, an object array), None where there is none. If it is not given, it
                is looked for in `infos`.
            infos: As the environments return them. Looked at under "same_step" alone: `infos["final_obs"]` or
                `infos["final_observation"]` in the forms of `final_obs`, each with its mask `infos["_final_obs"]` if
                there is one, or a list of dicts with "terminal_observation" and "TimeLimit.truncated".
            extras: Further fields of the rows, `name -> (N, *shape)`: what belongs to the action, as its
                log-probability. It is zero in first rows; what belongs to the observation is better put into `obs`.

        Raises:
            TypeError: A value that is no tensor, array or number.
            ValueError: Other fields, dtypes, shapes or N than before, or a final observation that was not found.
                Nothing has changed.
            RuntimeError: An environment was not reset, or another recorder has taken over the buffer.
        """
        self._check_ready()
        is_terminated, is_truncated = self._ends(terminated, truncated, infos)
        is_done = is_terminated | is_truncated
        any_done = bool(is_done.any())
        obs_leaves = self._obs_leaves(obs)
        arrived, is_missing = obs_leaves, None
        if self.autoreset_mode == "same_step" and any_done:
            arrived, is_missing = self._with_final_obs(obs_leaves, is_done, final_obs, infos)
        rest = self._rest(action, reward, is_terminated, is_truncated, is_missing, extras)
        fields = Fields.from_rows(rest, 1) if self._rest_fields is None else self._rest_fields
        rest_leaves = self._leaves(fields, rest)
        rest_of_first = self._first_rest or observations.first_rest(fields, rest_leaves)
        if self._is_pending is not None:
            self._write(fields, self._kept, rest_of_first, self._is_pending, None, self._is_pending)
            self._rest_fields, self._first_rest = fields, rest_of_first
            # At once: should what follows be refused and called again, the first rows must not come twice.
            self._is_pending = None
        is_last, mask = is_done if any_done else None, None if self._was_done is None else ~self._was_done
        self._write(fields, arrived, rest_leaves, None, is_last, mask)
        self._move_on(obs_leaves, is_last)
        self.writer.check_stored()

    def _move_on(self, obs: Arrays, is_done: Mask) -> None:
        """What each environment is waiting for after a step."""
        if self.autoreset_mode == "disabled":
            self._needs_reset = is_done
            return
        is_first = is_done
        if self.autoreset_mode == "next_step":
            # An episode may even end on the call that resets: it has no transition, so its first row is not kept.
            is_first = observations.and_not(self._was_done, is_done)
            self._was_done = is_done
        elif self._may_be_missing:
            for kept, leaf in zip(self._kept, obs, strict=True):
                np.copyto(kept, leaf)
        if is_first is not None:
            self._keep(obs, is_first)
        self._is_pending = is_first

    def _keep(self, obs: Arrays, mask: np.ndarray) -> None:
        """Copy observations: environments use their arrays again."""
        envs = mask.nonzero()[0]
        for kept, leaf in zip(self._kept, obs, strict=True):
            kept[envs] = leaf[envs]

    def _write(self, rest_fields: Fields, obs: Arrays, rest: Arrays, is_first: Mask, is_last: Mask, mask: Mask) -> None:
        """Hand over one row of each environment under `mask`."""
        if not self._order:
            self._begin(rest_fields, obs, rest)
        leaves = [*obs, *rest]
        self.writer.add_rows([leaves[i] for i in self._order], is_first, is_last, mask)

    def _begin(self, rest_fields: Fields, obs: Arrays, rest: Arrays) -> None:
        """Settle the fields of the writer, and find the order in which it has them."""
        row: dict[str, Any] = {}
        names: list[str] = []
        for fields, leaves in ((self._known_obs_fields, obs), (rest_fields, rest)):
            values = [leaf[0] for leaf in leaves] if self._is_single else leaves
            row.update(fields.unflatten(dict(zip(fields.names, values, strict=True))))
            names += fields.names
        self.writer.begin(row, None if self._is_single else self.num_envs)
        assert self.writer.fields is not None  # It has begun.
        self._order = [names.index(name) for name in self.writer.fields]

    # What came in, as arrays that are known to fit.

    def _rest(
        self, action: Any, reward: Any, terminated: np.ndarray, truncated: np.ndarray, is_missing: Mask, extras: Any
    ) -> dict[str, Any]:
        """All of a row but its observation."""
        reward = self._array("reward", reward)
        if self._is_single and reward.ndim == 1:
            reward = reward.astype(np.float32)
        rest = {
            "action": observations.tree_of("action", action, self._array),
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
            "is_first": np.zeros(self.num_envs, np.bool_),
        }
        if extras is not None:
            if not isinstance(extras, Mapping):
                raise TypeError(f"`extras` must be a dict from field to value, found {type(extras).__name__}.")
            taken = sorted(_RESERVED.intersection(extras))
            if taken:
                raise ValueError(f"`extras` has {taken}, which the recorder writes itself. Rename them.")
            rest.update({name: observations.tree_of(name, value, self._array) for name, value in extras.items()})
        if self._may_be_missing:
            rest[_MISSING] = np.zeros(self.num_envs, np.bool_) if is_missing is None else is_missing
        return rest

    def invalidate(self) -> None:
        """Take no further step before a reset: one was made that could not be recorded.

        What is recorded up to there is closed as truncated by the reset; going on would leave a gap in an episode.
        """
        self._needs_reset = np.ones(self.num_envs, np.bool_)

    def _array(self, name: str, value: Any) -> np.ndarray:
        """`(N, *shape)`, N = 1 for a single environment."""
        array = observations.to_array(name, value)
        return array[None] if self._is_single else array

    def _obs_leaves(self, obs: Any) -> Arrays:
        return self._leaves(self._known_obs_fields, {"obs": observations.tree_of("obs", obs, self._array)})

    def _leaves(self, fields: Fields, tree: dict[str, Any]) -> Arrays:
        """The arrays in the order of the fields."""
        leaves = observations.leaves_of(fields, tree)
        if self._is_single:
            # An action may be np.int32(1) once and 1 then: numbers take the dtype that the first had.
            for i, (_, dtype, shape) in enumerate(fields.layout):
                if not shape and leaves[i].dtype != dtype and np.can_cast(leaves[i].dtype, dtype, "same_kind"):
                    leaves[i] = cast_if_kept(leaves[i], dtype)
        check_rows(fields, leaves, (self.num_envs,), self.writer.sink.verification_mode)
        return leaves

    def _flag(self, name: str, value: Any) -> np.ndarray:
        """An array of bool `(N,)`."""
        return observations.as_flags(name, self._array(name, value), self.num_envs)

    def _ends(self, terminated: Any, truncated: Any, infos: Any) -> tuple[np.ndarray, np.ndarray]:
        """`terminated` and `truncated` as bool `(N,)`."""
        is_terminated = self._flag("terminated", terminated)
        if truncated is not None:
            return is_terminated, self._flag("truncated", truncated)
        return observations.split_dones(is_terminated, infos)

    # Final observations.

    def _with_final_obs(
        self, obs: Arrays, is_done: np.ndarray, final_obs: Any, infos: Any
    ) -> tuple[Arrays, np.ndarray]:
        """The observations that were arrived at: `obs`, where done replaced by the final ones.

        Returns:
            The observations, valid until the next call, and bool `(N,)`, whose final observation is missing.
        """
        fields = self._known_obs_fields
        if not self._arrived:
            self._arrived = [np.empty_like(leaf) for leaf in obs]
        for arrived, leaf in zip(self._arrived, obs, strict=True):
            np.copyto(arrived, leaf)
        name, source, mask = observations.find_final_obs(final_obs, infos)
        is_missing = is_done.copy()
        if source is not None:
            envs = (is_done if mask is None else is_done & self._flag(f"_{name}", mask)).nonzero()[0]
            is_missing[observations.put_final_obs(fields, self._arrived, envs, name, source, self._obs_leaves)] = False
        if is_missing.any():
            self._check_may_be_missing(is_missing)
            for arrived, kept in zip(self._arrived, self._kept, strict=True):
                arrived[is_missing] = kept[is_missing]
        if self.writer.sink.verification_mode is VerificationMode.ALL_CHECKS:
            check_rows(fields, self._arrived, (self.num_envs,), VerificationMode.ALL_CHECKS)
        return self._arrived, is_missing

    def _check_may_be_missing(self, is_missing: np.ndarray) -> None:
        # Before the first row is stored, its fields are still open.
        if not self._may_be_missing and self._rest_fields is None and self.writer.fields is None:
            self._may_be_missing = True
            warnings.warn(
                "An environment ended without a final observation. From now on rows have `final_obs_missing`, and such "
                "episodes close with the last known observation repeated. Say that this is expected with "
                "`final_obs_may_be_missing=True`.",
                stacklevel=2,
            )
        if not self._may_be_missing:
            raise ValueError(
                f"Environments {np.flatnonzero(is_missing).tolist()} ended without a final observation: with "
                "'same_step', `obs` is already the next episode's first, and neither `final_obs` nor `infos` "
                "('final_obs', 'final_observation', or SB3's 'terminal_observation') has it. Pass `final_obs`, or make "
                "the recorder with `final_obs_may_be_missing=True`: it repeats the last one known and says so in the "
                "field `final_obs_missing`."
            )

    # The state.

    @property
    def _known_obs_fields(self) -> Fields:
        assert self._obs_fields is not None  # A step comes after a reset.
        return self._obs_fields

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
