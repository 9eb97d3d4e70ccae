"""ResumableBuffer: how a ReplayBuffer is saved, and goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.saving import SavedBeside
from buffers.episode_returns import EpisodeReturns
from buffers.limiter import SamplesPerInsert
from buffers.saving import Save, Snapshot
from buffers.utils import ThreadLock, one_of
from buffers.writer import EpisodeWriter

if TYPE_CHECKING:
    from typing_extensions import Self

    from buffers.loading import SequenceLoader

__all__ = ["ResumableBuffer"]

_OPEN_EPISODES = ("keep", "truncate", "drop")


class ResumableBuffer:
    """Saves, and states. `ReplayBuffer` is the class to use."""

    dataset: EpisodeSource
    dataloader: SequenceLoader
    limiter: SamplesPerInsert | None
    returns: EpisodeReturns
    #: What `save` was last given as `extra`, also after `load`.
    extra: Mapping[str, Any] = {}
    _writer: EpisodeWriter | None

    def _remember(self, given: Mapping[str, Any]) -> None:
        """Keep the arguments that a save can hold, and the kinds of those that it cannot."""
        self._options: dict[str, Any] = {}
        self._given: dict[str, str] = {}
        for name, value in given.items():
            if name == "seed":
                continue  # It is part of the state.
            try:
                self._options[name] = json.loads(json.dumps(_plain(value)))
            except TypeError:
                self._given[name] = getattr(value, "__name__", type(value).__name__)

    def state_dict(self) -> dict[str, Any]:
        """All that is not rows: seed, position and samplers of the loader, limiter, and returns of the last episodes.

        It is small, and fits beside the agent's. `save` keeps it, too, with the rows at the same moment.
        """
        limiter = None if self.limiter is None else self.limiter.state_dict()
        return {"loader": self.dataloader.state_dict(), "limiter": limiter, "returns": self.returns.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another buffer with the same rows stood; ValueError for a state of another kind."""
        if {*state} != {"loader", "limiter", "returns"}:
            names = ["limiter", "loader", "returns"]
            raise ValueError(f"The state of a buffer has {names}, as `state_dict()` gives them, found {sorted(state)}.")
        if (state["limiter"] is None) != (self.limiter is None):
            there, here = ("none" if limiter is None else "one" for limiter in (state["limiter"], self.limiter))
            raise ValueError(f"The state is of a buffer with {there} `limiter`, and this one has {here}.")
        self.dataloader.load_state_dict(state["loader"])
        if self.limiter is not None:
            self.limiter.load_state_dict(state["limiter"])
        self.returns.load_state_dict(state["returns"])

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 1,
        block: bool = True,
        progress: bool = False,
        also: Sequence[ResumableBuffer] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> Future[str]:
        """Save the dataset, open episodes, recorder, samplers, limiter, position and seed: `load` goes on exactly.

            >>> import tempfile
            >>> from buffers import ReplayBuffer
            >>> from buffers.dataset import RingBufferDataset
            >>> buffer, directory = ReplayBuffer(RingBufferDataset(1_000), batch_size=4, num_envs=1), tempfile.mkdtemp()
            >>> for step in range(25):
            ...     buffer.add_step({"obs": 0.5 * step}, done=step % 10 == 9)
            >>> _ = buffer.save(directory)
            >>> resumed = ReplayBuffer.load(directory)
            >>> bool((resumed.sample()["obs"] == buffer.sample()["obs"]).all())
            True

        Args:
            directory: As in `EpisodeSource.save`; so are `keep`, `block` and `progress`, what is returned, and errors.
            keep: As there.
            block: As there.
            progress: As there.
            also: Buffers whose state belongs to the same moment: those that add to members of a mixture from which
                this one draws.
            extra: What else belongs to the same moment, for `ReplayBuffer.extra`: nested dicts and lists of numbers,
                strings, arrays and tensors, which are copied now. The number of the step, for example, or the states
                of an agent and its optimizer.
        """
        if not isinstance(extra, Mapping | None):
            raise TypeError(f"`extra` must be a dict, found {type(extra).__name__}.")
        self.extra = {} if extra is None else extra
        beside = [
            SavedBeside(buffer.lock, partial(buffer.begin_save, number))
            for number, buffer in enumerate([self, *self._checked(also)])
        ]
        return self.dataset.save_with(beside, directory, keep, block, progress)

    def begin_save(self, number: int, snapshot: Snapshot) -> None:
        """Put all but the dataset into a snapshot, as the buffer of this number."""
        if self._writer is not None:
            self._writer.begin_save(snapshot, f"writer{number}")
        snapshot.state(f"extra{number}", self.extra)
        state = {"options": self._options, "given": self._given, "state": self.state_dict()}
        snapshot.state(f"buffer{number}", state)

    def _checked(self, also: Sequence[ResumableBuffer]) -> list[ResumableBuffer]:
        """Other buffers that record into stores of this one's source; TypeError or ValueError for anything else."""
        if not isinstance(also, (list, tuple)) or not all(isinstance(other, ResumableBuffer) for other in also):
            raise TypeError(f"`also` must be a list of ReplayBuffers, found {type(also).__name__}.")
        for other in also:
            if other is self or not any(other.dataset is store for store in self.dataset.stores):
                raise ValueError(
                    "Buffers in `also` must be others that record into members of this one's mixture. To load, make "
                    "the mixture and them as before, and pass both."
                )
        return list(also)

    @property
    def lock(self) -> ThreadLock:
        """Held by who adds."""
        return ThreadLock() if self._writer is None else self._writer.lock

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        dataset: EpisodeSource | None = None,
        *,
        newest_whole: bool = False,
        open_episodes: str = "keep",
        progress: bool = False,
        also: Sequence[ResumableBuffer] = (),
        **options: Any,
    ) -> Self:
        """A buffer that goes on where the newest save of a directory was made.

        Args:
            directory: As in `EpisodeSource.load`; so are `dataset`, `newest_whole`, `progress`, and errors.
            dataset: As there.
            newest_whole: As there.
            open_episodes: "keep" goes on with them, for streams, and for environments that were saved, too. An
                environment that was not begins with a reset, and the reset of a recorder or wrapper closes them as
                truncated. "truncate" does so now; "drop" leaves them out.
            progress: As there.
            also: Those that `save` was given, made anew, without a step: they go on, too.
            **options: Arguments of the buffer, in place of those that were saved. A sampler, limiter, transform, or
                what else a save cannot hold, has to be passed again, made as before.

        Raises:
            ValueError: An argument that a save cannot hold is missing, or another seed is given.
        """
        one_of("open_episodes", open_episodes, _OPEN_EPISODES)
        save = EpisodeSource.open_save(directory, newest_whole)
        told = save.state("buffer0") if "buffer0" in save.said else {"options": {}, "given": {}, "state": None}
        options = {**told["options"], **options}
        missing = {name: kind for name, kind in told["given"].items() if name not in options}
        if missing:
            raise ValueError(
                f"The buffer that was saved had arguments which a save cannot hold: {missing}. Pass them to `load`, "
                "made as before, or None."
            )
        num_others = max(0, sum(name.startswith("buffer") for name in save.said) - 1)
        if len(also) != num_others:
            raise ValueError(
                f"The save was made with {num_others} buffers in `also`, found {len(also)}: those that record into "
                "members of the mixture. Make them as before, and pass them with the mixture."
            )
        if "batch_size" not in options:
            raise ValueError(
                "The save is of a dataset without a buffer: pass `batch_size`, and what else the buffer needs."
            )
        seed = options.pop("seed", None)
        if told["state"] is not None and seed not in (None, saved := told["state"]["loader"]["seed"]):
            raise ValueError(f"The save goes on with `seed`={saved}, found {seed}: leave it out.")
        source = EpisodeSource.load_save(save, dataset, progress)
        buffer: Any = cls(source, **options, **({} if seed is None else {"seed": seed}))  # type: ignore[call-arg]
        is_dropped = {name for name in ("sampler", "limiter") if options.get(name) is None}
        for number, other in enumerate([buffer, *buffer._checked(also)]):
            other.go_on(save, number, open_episodes, is_dropped if number == 0 else set())
        return buffer

    def go_on(self, save: Save, number: int, open_episodes: str, dropped: set[str]) -> None:
        """Take the state that `begin_save` has put into a save, but for samplers or a limiter that are `dropped`."""
        if f"buffer{number}" in save.said:
            state = save.state(f"buffer{number}")["state"]
            if "sampler" in dropped:
                state["loader"].pop("samplers", None)
            self.load_state_dict(state | {"limiter": None} if "limiter" in dropped else state)
            self.extra = save.state(f"extra{number}")
        if self._writer is not None and f"writer{number}" in save.said:
            self._writer.restore(save, f"writer{number}", open_episodes)


def _plain(value: Any) -> Any:
    """Ranges, tuples, iterables of numbers and devices as JSON has them."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (range, list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.device):
        return str(value)
    with contextlib.suppress(AttributeError, ValueError, RuntimeError):
        return value.item()  # Of numpy.
    return value
