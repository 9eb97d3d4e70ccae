"""RemoteSink: takes the complete episodes of a writer, and sends them to shards."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import weakref
from typing import Any

import numpy as np

from buffers.compression import Codec
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.verification import VerificationMode
from buffers.fields import Fields
from buffers.remote.limits import balance_of
from buffers.remote.memory import ReusedMemory
from buffers.remote.shards import Shards, ask_all
from buffers.remote.transport import warn_of_new
from buffers.remote.window import Kept, Window
from buffers.remote.wire import copied, num_bytes
from buffers.utils import format_bytes

__all__ = ["RemoteSink"]

_PAUSE = 0.05
#: Bytes of an episode whose memory is used again: smaller ones get theirs from the allocator without page faults.
_LARGE = 262_144


class RemoteSink:
    """An `EpisodeSink`. A thread sends what waits, and asks what is saved, also while nothing is added.

    Args:
        shards: Where episodes go.
        name: Of the writer, for errors.
        window_bytes: As for `RemoteWriter`; so are the others.
        pack_bytes: As there.
        deadline: As there.
        has_thread: False for tests in which time does not pass.
    """

    refuses_values = False

    def __init__(
        self,
        shards: Shards,
        name: str | None = None,
        window_bytes: int = 256_000_000,
        pack_bytes: int = 1_000_000,
        deadline: float = 10.0,
        has_thread: bool = True,
    ) -> None:
        self._shards, self._deadline, self._window_bytes = shards, deadline, window_bytes
        # Nobody else sends under this name: a process that takes the place of this one begins with new numbers.
        self.name = f"{name or f'{socket.gethostname()}:{os.getpid()}'}/{secrets.token_hex(8)}"
        self._transport = shards.transport
        self._window = Window(self._transport, self.name, None, window_bytes, deadline, pack_bytes)
        self._window.is_listening = shards.limits is not None
        self._fields: Fields | None = None
        self._stop, self._has_thread = threading.Event(), has_thread
        # Of the window; whoever changes it notifies those that wait for that. `with` takes the lock itself: Ctrl-C on
        # the way into the condition can leave it locked. Of one thread at a time, which Ctrl-C in `wait` relies on.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._memory = ReusedMemory(most_free=128, most_ratio=1.25)
        self.num_added = 0
        # Shards of which a warning has told.
        self._named: set[int] = set()
        self._find_fields()
        if has_thread:
            arguments = weakref.ref(self), self._stop
            threading.Thread(target=_send, args=arguments, name="buffers-remote-writer", daemon=True).start()

    def _find_fields(self) -> None:
        answers = ask_all(self._transport, "describe", seconds=self._deadline)
        self._check_answers(answers)
        for answer in answers:
            if not isinstance(answer, Exception) and answer.fields is not None:
                self._fields = self._window.fields = answer.fields

    def _check_answers(self, answers: list[Any]) -> None:
        """Raise what a shard has raised, or that no shard has answered."""
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, RuntimeError):
                raise answer
        if all(isinstance(answer, Exception) for answer in answers):
            texts = "; ".join(f"shard {n}: {answer}" for n, answer in enumerate(answers))
            raise RuntimeError(f"No shard answers: {texts}.")

    # As EpisodeSink.

    @property
    def fields(self) -> Fields | None:
        """The fields, None before they are settled."""
        return self._fields

    @property
    def episode_capacity(self) -> int:
        """Steps of the longest episode that a shard takes."""
        return self._shards.description.episode_capacity

    @property
    def codecs(self) -> dict[str, Codec]:
        """As `EpisodeSink.codecs`: shards compress."""
        return {}

    @property
    def verification_mode(self) -> VerificationMode:
        """How closely rows are checked."""
        return self._shards.description.verification_mode

    def settle_fields(self, fields: Fields) -> None:
        """Tell all shards; ValueError if one has others. A shard that does not answer is told with its first pack."""
        if self._fields is None:
            self._check_answers(ask_all(self._transport, "settle", fields, seconds=self._deadline))
            self._fields = self._window.fields = fields
        elif (conflict := fields.conflict_with(self._fields)) is not None:
            raise ValueError(f"The fields differ from those of the shards: {conflict}.")

    def check_writable(self) -> None:
        """RuntimeError if the writer is closed."""
        if self._stop.is_set():
            raise RuntimeError("The writer is closed.")

    def check(self, rows: dict[str, np.ndarray]) -> None:
        """Shards check values when they store them."""

    def check_info(self, info: EpisodeInfo) -> None:
        """Shards check infos when they store them."""

    def add(self, episode: dict[str, np.ndarray], cut: int = 0, info: EpisodeInfo | None = None) -> int:
        """Keep a copy of an episode until it is safe, and return how many were added before.

        Raises:
            RuntimeError: There was no room within the deadline; names who holds it up. Or a shard has refused an
                episode that was added before, which is said once. This episode was not taken.
        """
        rows = self._copy(episode)
        length = len(next(iter(rows.values())))
        # Episodes are dealt by their bytes, and rows may have none.
        kept = Kept(rows, length, cut, info, max(num_bytes(rows), 1))
        end = self._transport.now() + self._deadline
        while True:
            self._warn_of_troubles()
            with self._lock:
                self.check_writable()
                self._advance_without_thread()
                self._raise_refusals()
                if self._window.has_room(kept.num_bytes):
                    self._window.put(kept)
                    self._window.send()
                    self._changed.notify_all()
                    self.num_added += 1
                    return self.num_added - 1
                if self._transport.now() >= end:
                    raise RuntimeError(
                        f"The writer's window of {format_bytes(self._window_bytes)} had no room for an episode within "
                        f"{self._deadline:g} s: {self._window.why_full()}. The episode was not taken."
                    )
                self._rest()

    def _copy(self, episode: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if num_bytes(episode) < _LARGE:
            return {name: np.array(values, order="C") for name, values in episode.items()}
        with self._lock:
            new_array = self._memory.begin([values.nbytes for values in episode.values()])
        return {name: copied(values, new_array) for name, values in episode.items()}

    def _rest(self) -> None:
        """Wait a moment for answers, and take them. Whoever calls holds the lock."""
        # The thread takes them, if there is one: two that ask would do all of it twice.
        if not (self._has_thread and self._changed.wait(_PAUSE)):
            self._window.advance(0.0 if self._has_thread else _PAUSE)

    def _advance_without_thread(self) -> None:
        if not self._has_thread:
            self._window.advance()

    def _warn_of_troubles(self) -> None:
        with self._lock:
            if self._window.troubles.keys() - self._named:
                # The answers may be there, if the thread had no turn for long: this process was stopped, or computed.
                self._window.advance()
        # Also of a shard that cannot save, and takes new ones until its share of the window is full.
        consequence = "Its episodes are kept by this writer until it is well; new ones go to shards that take them."
        self._named = warn_of_new(self.troubles, self._named, consequence, stacklevel=3)

    def _raise_refusals(self) -> None:
        if self._window.refusals:
            refusals, self._window.refusals = self._window.refusals, []
            more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
            raise RuntimeError(f"{refusals[0]}{more} It was left out. Go on, the next episodes are taken.")

    # What a writer asks.

    def wait(self, timeout: float, until_saved: bool) -> None:
        """Wait until all is stored, or saved; RuntimeError if it is not within the timeout."""
        end = self._transport.now() + timeout
        with self._lock:
            self._window.wants_save = until_saved
            self._window.advance()
            while True:
                self._raise_refusals()
                left = self._window.num_unsaved if until_saved else self._window.num_unstored
                self._window.wants_save = until_saved and left > 0
                if not left:
                    return
                if self._transport.now() >= end:
                    what, why = "saved" if until_saved else "stored", self._window.why_full()
                    raise RuntimeError(f"{left} episodes were not {what} within {timeout:g} s: {why}. They are kept.")
                self._rest()

    def may_add(self, num_open_rows: int) -> bool:
        """Whether a step may be added on top of those in open episodes."""
        limits = self._shards.limits
        if limits is None:
            return True
        with self._lock:
            self._advance_without_thread()
            balance = balance_of(self._window.news)
            num_steps = num_open_rows + self._window.num_steps_unstored + 1
        return limits.may_add(balance, num_steps)

    def stats(self) -> dict[str, float]:
        """`RemoteWriter.stats`."""
        with self._lock:
            self._window.advance()
            return {
                "num_added": self.num_added,
                "num_unstored": self._window.num_unstored,
                "num_unsaved": self._window.num_unsaved,
                "window": self._window.num_bytes / self._window_bytes,
            }

    @property
    def troubles(self) -> dict[int, str]:
        """`RemoteWriter.troubles`."""
        with self._lock:
            return self._window.troubles

    def step(self) -> None:
        """What the thread does again and again: wait a moment for answers, take them, send what can be sent."""
        with self._lock:
            if self._has_thread and not self._window.pending:
                self._changed.wait(_PAUSE)
            pending = self._window.pending
        done = self._transport.done(pending, _PAUSE if pending else 0.0)
        with self._lock:
            self._window.go_on(done)
            self._changed.notify_all()

    def close(self, timeout: float = 60.0) -> None:
        """End the thread, and wait until all is stored; RuntimeError as for `wait`."""
        with self._lock:
            self._stop.set()
        # Another thread may have added an episode after the last look.
        self.wait(timeout, until_saved=False)


def _send(sink: weakref.ref[RemoteSink], stop: threading.Event) -> None:
    while not stop.is_set():
        found = sink()
        if found is None:
            return
        found.step()
        del found
