"""Shards on Ray: the only module that talks to it.

What Ray 2.60 does, and what follows from it here:

    a retried call is executed twice, and out of order       no retries of Ray's: `max_task_retries=0`
    an error does not say whether a call was executed        ShardLostError, and repeated calls are harmless
    a process that hangs raises nothing                      deadlines above; no `ray.get` without a timeout
    received arrays are shared memory, read-only             learners copy, see `wire.from_wire`
    `max_restarts=-1` runs `__init__` again                  a shard goes on from its last save there
    an error in `__init__` ends the actor for good           after a restart, it rather waits: `_hold`
"""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.disk import NO_SURPRISES, Descriptor
from buffers.limiter import SamplesPerInsert
from buffers.objects import check_local
from buffers.remote.limits import Limits
from buffers.remote.shard import Shard, place_of
from buffers.remote.shards import Shards, ask_all
from buffers.remote.transport import ShardLostError
from buffers.utils import how_to_install, integer, number

__all__ = ["RayTransport", "start_shards"]

#: Fetching an answer that is ready, from another machine perhaps.
_SECONDS_TO_FETCH = 10.0
_MOST_IDLE = 0.02
#: One that was killed may take a while to end, which a shard that Ray starts again waits for much longer: it is the one
#: before it that has the directory, not another run.
_SECONDS_TO_END, _SECONDS_TO_END_BEFORE_A_RESTART = 10.0, 600.0
_OURS = {"max_restarts": -1, "max_task_retries": 0}


def _ray() -> ModuleType:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(f"`buffers.remote` needs ray ({error}): {how_to_install('ray')}.") from None


def _hold(directory: str) -> Descriptor:
    """Keep others from the saves of a shard until its process ends; RuntimeError if another one has them."""
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    held = Descriptor(os.open(f"{directory}.lock", os.O_RDWR | os.O_CREAT | NO_SURPRISES, 0o666))
    is_restart = _ray().get_runtime_context().was_current_actor_reconstructed
    end = time.monotonic() + (_SECONDS_TO_END_BEFORE_A_RESTART if is_restart else _SECONDS_TO_END)
    while True:
        try:
            fcntl.flock(held.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"{directory} belongs to a shard that runs: two runs at a time cannot save there. End the other "
                    "one, or choose another `directory`."
                ) from None
        time.sleep(0.1)


class ShardActor(Shard):
    """A shard that keeps other processes from its saves."""

    def __init__(
        self, number: int, make_dataset: Callable[[int], EpisodeDataset], directory: str | None, save_every: float
    ) -> None:
        self._held = None if directory is None else _hold(place_of(directory, number))
        super().__init__(number, make_dataset, directory, save_every)


class RayTransport:
    """Asks actors of Ray. A copy in another process asks the same ones.

    Args:
        handles: Of the actors, in the order of their shards.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = list(handles)

    @property
    def num_shards(self) -> int:
        """How many there are."""
        return len(self.handles)

    def submit(self, shard: int, method: str, *arguments: Any) -> Any:
        """Ask a shard; ShardLostError if Ray knows already that it is gone."""
        if not _ray().is_initialized():
            # Ray would start, or join, another cluster.
            raise ShardLostError("Ray was shut down")
        errors = _ray().exceptions
        try:
            return getattr(self.handles[shard], method).remote(*arguments)
        except (errors.RayActorError, errors.RaySystemError) as error:
            raise ShardLostError(_text(error)) from error

    def done(self, calls: Collection[Any], seconds: float) -> set[Any]:
        """Those of the calls that have an answer, after waiting up to so many seconds for the first."""
        if not (calls and _ray().is_initialized()):
            # Whoever waits longer asks again, and may have something to ask of shards by then.
            time.sleep(min(seconds, _MOST_IDLE))
            return set()
        ray, waiting = _ray(), list(calls)
        # All that are there by now: of a caller that was busy for long, none may pass for one without an answer.
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        if not ready and seconds > 0:
            ready, _ = ray.wait(waiting, num_returns=1, timeout=seconds)
        return set(ready)

    def result(self, call: Any) -> Any:
        """The answer of a call that is done; ShardLostError, or what the method has raised."""
        ray = _ray()
        try:
            return ray.get(call, timeout=_SECONDS_TO_FETCH)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except ray.exceptions.RayError as error:
            raise ShardLostError(_text(error)) from error

    def now(self) -> float:
        """Seconds."""
        return time.monotonic()

    def end(self) -> None:
        """End the actors, and let none start again."""
        ray = _ray()
        if ray.is_initialized():
            for handle in self.handles:
                ray.kill(handle, no_restart=True)


def _text(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    if "creation task" in lines[0]:
        # Behind it are where it ran, its stack, and in the last line what it was.
        return f"it could not start: {lines[-1].strip()}"
    return type(error).__name__


def start_shards(
    num_shards: int,
    make_dataset: Callable[[int], EpisodeDataset],
    *,
    directory: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    limiter: SamplesPerInsert | None = None,
    start_timeout: float = 300.0,
    **ray_options: Any,
) -> Shards:
    """Start actors of Ray that hold a dataset each, and wait until all answer.

        ray.init(address="local")
        shards = start_shards(2, lambda shard: RingBufferDataset(1_000_000), directory="/shared/replay")

    Ray starts a shard that dies again, wherever it has room. With a `directory`, it then goes on from its last save,
    and writers send it again what came after; so does another run that is given the same directory. On a cluster, that
    must be a directory that all machines share, unless shards are bound to machines. Without one, what a shard held is
    lost with it.

    Args:
        num_shards: How many.
        make_dataset: Called with the number of the shard, where it runs, at each start. Returns an empty dataset, or
            one of files in a directory of the shard's own.
        directory: Of the saves, with a folder for each shard.
        save_every: Seconds between saves, if something was added. Writers whose windows are half full ask earlier.
        limiter: Keeps (drawn steps) / (added steps) near a ratio, over all writers and learners: see
            `RemoteWriter.may_add` and `RemoteLoader.num_batches_due`. Its `tolerance` is by default a batch and what
            1,000 steps are worth, B * T + 1,000 * ratio.
        start_timeout: Seconds for all shards to start, and to load their saves.
        **ray_options: Of `ray.remote` actors: `num_cpus`, `resources`, `memory`, `scheduling_strategy`, `runtime_env`,
            ...; `name` gets the number of the shard behind it.

    Raises:
        ImportError: Ray is not installed.
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range.
        RuntimeError: A shard did not start; says why. None is left. Or `ray.init` was not called.
    """
    ray = _ray()
    if not ray.is_initialized():
        raise RuntimeError('Call `ray.init(address="local")` first, or with the address of a cluster.')
    num_shards = integer("num_shards", num_shards, 1)
    if not callable(make_dataset):
        raise TypeError(
            f"`make_dataset` must be a function of the shard's number, found {type(make_dataset).__name__}."
        )
    if unfit := [name for name in ("max_concurrency", "concurrency_groups", *_OURS) if name in ray_options]:
        raise ValueError(f"Shards answer in order, and their retries are their own: leave out {unfit}.")
    limits = None if limiter is None else Limits.of(limiter)
    path = None
    if directory is not None:
        check_local(os.fspath(directory), "Shards save to a directory; on a cluster, to one that all machines share")
        path = os.path.abspath(os.fspath(directory))
    seconds = number("save_every", save_every, 0.0), number("start_timeout", start_timeout, 0.0)
    if path is not None:
        _check_saves(path, num_shards)
    actor, name = ray.remote(ShardActor), ray_options.pop("name", None)
    handles = []
    for shard in range(num_shards):
        named = {} if name is None else {"name": f"{name}-{shard}"}
        made = actor.options(**_OURS, **named, **ray_options).remote(shard, make_dataset, path, seconds[0])
        handles.append(made)
    transport = RayTransport(handles)
    answers = ask_all(transport, "describe", seconds=seconds[1])
    failures = {n: answer for n, answer in enumerate(answers) if isinstance(answer, Exception)}
    if failures:
        transport.end()
        texts = "; ".join(f"shard {n}: {error}" for n, error in failures.items())
        raise RuntimeError(f"{len(failures)} of {num_shards} shards did not start: {texts.rstrip('.')}.")
    # Any shard may be given the longest episode.
    longest = min(answer.episode_capacity for answer in answers)
    return Shards(transport, answers[0]._replace(episode_capacity=longest), limits)


def _check_saves(directory: str, num_shards: int) -> None:
    """ValueError if a directory has the saves of shards that would not be started."""
    found = os.listdir(directory) if os.path.isdir(directory) else []
    numbers = [int(match[1]) for name in found if (match := re.fullmatch(r"shard-([0-9]{4})", name))]
    if max(numbers, default=-1) >= num_shards:
        raise ValueError(
            f"{directory} has the saves of {max(numbers) + 1} shards: `num_shards`={num_shards} would leave episodes "
            "out. Start as many, or choose another directory."
        )
