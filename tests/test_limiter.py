"""A limiter keeps drawn and added steps in their ratio: neither side runs ahead, and they never wait for each other.

With `timeout=0`, a call that would wait raises at once, so that most of it needs no threads.
"""

from __future__ import annotations

import copy
import itertools
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import Recorder, ReplayBuffer, SamplesPerInsert
from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from tests import logged_game, tagged

# Seconds in which what hangs is known to hang. Waits end later, as they look again when their time is over.
ENDLESS = 30.0


def limited(
    ratio: float = 1,
    tolerance: float | None = None,
    min_steps: int = 0,
    timeout: float = 0,
    *,
    capacity: int = 1000,
    batch_size: int = 2,
    sequence_length: int | None = 2,
    num_envs: int | None = 1,
    **options: Any,
) -> ReplayBuffer:
    limiter = SamplesPerInsert(ratio, tolerance, min_steps, timeout)
    dataset = RingBufferDataset(capacity)
    return ReplayBuffer(dataset, batch_size, sequence_length, num_envs=num_envs, limiter=limiter, **options)


def counts(buffer: ReplayBuffer) -> tuple[int, int]:
    """Added and drawn steps."""
    assert buffer.limiter is not None
    state = buffer.limiter.state_dict()
    assert all(type(value) is int for value in state.values())
    return state["num_added"], state["num_drawn"]


def is_done(call: Callable[[], object]) -> bool:
    """Whether a call went through; if not, it has waited for the other side."""
    try:
        call()
    except RuntimeError as error:
        assert " waited 0 s for " in str(error)
        return False
    return True


# The rule.


@dataclass
class Model:
    """The rule, in fractions. What can be drawn, the test knows."""

    ratio: Fraction
    tolerance: Fraction
    min_steps: int
    batch_steps: int
    added: int = 0
    drawn: int = 0

    @property
    def due(self) -> Fraction:
        return self.ratio * (self.added - self.min_steps) - self.drawn

    def may_draw(self, is_drawable: bool) -> bool:
        return is_drawable and self.added >= self.min_steps and self.due - self.batch_steps >= -self.tolerance

    def may_add(self, num_steps: int, is_drawable: bool) -> bool:
        fits = self.due + self.ratio * num_steps <= self.tolerance
        return fits or self.added < self.min_steps or not is_drawable

    def may_add_episode(self, num_steps: int, is_drawable: bool) -> bool:
        return self.due + self.ratio * num_steps <= self.tolerance or not self.may_draw(is_drawable)


RATIOS = {0.1: Fraction(1, 10), 0.3: Fraction(3, 10), 1 / 3: Fraction(1, 3), 1: Fraction(1), 2.5: Fraction(5, 2)}
RATIOS |= {7: Fraction(7)}


@st.composite
def settings_and_calls(draw: st.DrawFn) -> Any:
    ratio, num_envs = draw(st.sampled_from([*RATIOS, 1, 1, 2.5])), draw(st.integers(1, 3))
    sizes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    more = draw(st.sampled_from([None, 0, 0.5, 4]))
    flags = st.lists(st.booleans(), min_size=num_envs, max_size=num_envs)
    calls = st.one_of(
        st.tuples(st.just("step"), flags, st.lists(st.sampled_from([True] * 3 + [False]), min_size=3, max_size=3)),
        st.tuples(st.just("episode"), st.integers(1, 12)),
        st.tuples(st.just("batch")),
    )
    return ratio, num_envs, sizes, more, draw(st.integers(0, 12)), draw(st.lists(calls, max_size=60))


@settings(max_examples=1000)
@given(settings_and_calls())
def test_each_call_goes_through_or_waits_as_in_the_model(drawn: Any) -> None:
    ratio, num_envs, (batch_size, length), more, min_steps, calls = drawn
    exact, batch_steps = RATIOS[ratio], batch_size * length
    least = (batch_steps + exact * num_envs) / 2
    tolerance = 2 * least if more is None else least + Fraction(more)
    given_tolerance = None if more is None else float(tolerance)
    options = {"batch_size": batch_size, "sequence_length": length, "capacity": 30}
    buffer = limited(ratio, given_tolerance, min_steps, num_envs=num_envs, **options)
    model = Model(exact, tolerance, min_steps, batch_steps)
    # A step tells N, before which the tolerance is that of one environment.
    rows = {"x": np.zeros(num_envs, np.float32)}
    for call, *arguments in calls:
        is_drawable = any(each >= length for each in buffer.dataset.episode_lengths)
        before = model.due
        if call == "step":
            is_first, mask = arguments[0], np.array(arguments[1][:num_envs])
            add = partial(buffer.add, rows, is_first=np.array(is_first), mask=mask)
            if num_envs == 1:
                add = partial(buffer.add, {"x": np.float32(0)}, is_first=is_first[0], mask=bool(mask[0]))
            num, may_add = int(mask.sum()), model.may_add(int(mask.sum()), is_drawable)
            assert is_done(add) == may_add
            model.added += num * may_add
            assert (
                not may_add or model.due <= max(before, tolerance) or model.added - num < min_steps or not is_drawable
            )
        elif call == "episode":
            may_add = model.may_add_episode(arguments[0], is_drawable)
            assert is_done(lambda: buffer.add_episode({"x": np.zeros(arguments[0], np.float32)})) == may_add  # noqa: B023
            model.added += arguments[0] * may_add
        else:
            may_draw = model.may_draw(is_drawable)
            assert is_done(buffer.sample) == may_draw
            model.drawn += batch_steps * may_draw
            assert not may_draw or model.due >= -tolerance
        assert counts(buffer) == (model.added, model.drawn)
        is_drawable = any(each >= length for each in buffer.dataset.episode_lengths)
        assert model.may_draw(is_drawable) or model.may_add(num_envs, is_drawable), "there is always a way on"
        num_due = (model.due + tolerance) // batch_steps if model.may_draw(is_drawable) else 0
        assert buffer.num_batches_due == num_due


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1 / 3, 0.7, 2.5, 32])
@pytest.mark.parametrize("min_steps", [0, 37, 500])
def test_a_plain_loop_never_waits_and_keeps_the_ratio(ratio: float, min_steps: int) -> None:
    buffer = limited(ratio, min_steps=min_steps, capacity=100)
    for step in range(1000):
        buffer.add_step({"x": 0.0}, step % 10 == 9)
        num_due = buffer.num_batches_due
        for _ in range(num_due):
            buffer.sample()
        assert buffer.num_batches_due == 0
    added, drawn = counts(buffer)
    assert added == 1000
    assert abs(ratio * (added - min_steps) - drawn) <= 4 + ratio
    assert buffer.stats()["samples_per_insert"] == drawn / added


def test_long_episodes_keep_the_ratio() -> None:
    buffer = limited(2, 3)
    for _ in range(50):
        buffer.add_episode({"x": np.zeros(97, np.float32)})
        assert not is_done(lambda: buffer.add_episode({"x": np.zeros(97, np.float32)}))
        for _ in range(buffer.num_batches_due):
            buffer.sample()
    added, drawn = counts(buffer)
    assert added == 50 * 97 and abs(2 * added - drawn) <= 4


# Settings for which both sides would wait.

TINY = list(itertools.product([Fraction(1, 3), Fraction(1), Fraction(2)], [1, 3, 4], [1, 2, 5]))


def stuck_balance(ratio: Fraction, batch_steps: int, num_steps: int, tolerance: Fraction) -> Fraction | None:
    """A balance at which neither a batch nor a step fits within the tolerance, searched for on a grid of 1/12."""
    for twelfths in range(-500, 500):
        due = Fraction(twelfths, 12)
        if due - batch_steps < -tolerance and due + ratio * num_steps > tolerance:
            return due
    return None


@pytest.mark.parametrize(("ratio", "batch_steps", "num_envs"), TINY)
def test_the_tolerances_that_are_refused_are_those_at_which_both_sides_would_wait(ratio, batch_steps, num_envs) -> None:
    # The least that can be kept is a multiple of 1/6.
    twelfths = int(6 * (batch_steps + ratio * num_envs))
    for number in (*range(-12, 300, 9), *range(twelfths - 2, twelfths + 3)):
        tolerance = Fraction(number, 12)
        make = partial(limited, ratio, float(tolerance), batch_size=batch_steps, sequence_length=1, num_envs=num_envs)
        if stuck_balance(ratio, batch_steps, num_envs, tolerance) is None:
            make()
        else:
            with pytest.raises(ValueError, match=re.escape(f"`tolerance`={float(tolerance):.10g} cannot be kept")):
                make()


def test_a_tolerance_that_cannot_be_kept_is_refused_with_the_least_that_can() -> None:
    message = (
        "`tolerance`=4 cannot be kept: at some balance, neither a batch of 4 steps nor a call that adds 3 (times "
        "`ratio`=2) fits within it. It must be at least 5, which is (B * T + ratio * N) / 2."
    )
    with pytest.raises(ValueError) as refused:
        limited(2, 4, num_envs=3)
    assert str(refused.value) == message
    limited(2, 5, num_envs=3)
    # N that only the first step tells: nothing has changed.
    buffer = limited(2, 4, num_envs=None)
    for _ in range(2):
        with pytest.raises(ValueError) as refused:
            buffer.add_step({"x": np.zeros(3)}, np.zeros(3, np.bool_))
        assert str(refused.value) == message
        assert buffer.fields is None and buffer.writer.num_envs is None and counts(buffer) == (0, 0)
    buffer.add_step({"x": np.zeros(2, np.float32)}, np.zeros(2, np.bool_))
    assert counts(buffer) == (2, 0)


class Unchecked(SamplesPerInsert):
    """A mutant, for a ratio of 1, that takes any tolerance."""

    def _set_limits(self, batch_steps: int, num_envs: int) -> None:
        assert self.given_tolerance is not None
        self._tolerance, self._batch_steps = self.given_tolerance, batch_steps
        self._per_added, self._per_drawn, self._slack = 2, 2, int(2 * self._tolerance)


class OnlyWhatFits(Unchecked):
    """A mutant that also adds no step that does not fit, though no batch may be drawn."""

    def _may_add(self, num_steps: int) -> bool:
        return self._due(self._added.total + num_steps, self._drawn.total) <= self._slack


@pytest.mark.parametrize(
    ("mutant", "tolerance", "found"),
    [
        (OnlyWhatFits, 2, (True, True)),
        (OnlyWhatFits, 1.5, (False, False)),  # Both sides wait.
        (Unchecked, 1.5, (False, True)),  # Now due is 2.
    ],
)
def test_without_the_check_both_sides_would_wait_or_the_tolerance_be_exceeded(mutant, tolerance, found) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 3, 1, num_envs=1, limiter=mutant(1, tolerance, timeout=0))
    add = partial(buffer.add_step, {"x": 0.0}, True)
    add()
    assert counts(buffer) == (1, 0)
    assert (is_done(buffer.sample), is_done(add)) == found


def test_two_threads_would_hang_without_the_check() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 3, 1, num_envs=1, limiter=OnlyWhatFits(1, 1.5, timeout=0.2))
    threads = [Thread(lambda: [buffer.add_step({"x": 0.0}, True) for _ in range(9)]), Thread(buffer.sample)]
    for thread in threads:
        with pytest.raises(RuntimeError, match=" waited 0.2 s for "):
            thread.result()


# What counts.


def test_rows_that_are_masked_do_not_count() -> None:
    buffer = limited(num_envs=4)
    rows = {"x": np.zeros(4, np.float32)}
    buffer.add_step(rows, np.zeros(4, np.bool_))
    buffer.add(rows, mask=np.array([True, False, True, False]))
    buffer.add(rows, mask=np.zeros(4, np.bool_))
    buffer.add(rows, mask=True)
    assert counts(buffer)[0] == 10
    single = limited()
    single.add({"x": 0.0}, mask=True)
    single.add({"x": 0.0}, mask=False)
    assert counts(single)[0] == 1


def test_rows_that_pieces_repeat_do_not_count() -> None:
    buffer = limited(100, timeout=0, max_episode_length=5, overlap=2, min_steps=100)
    for _ in range(30):
        buffer.add_step({"x": 0.0}, False)
    buffer.flush()
    assert buffer.num_timesteps > 30 and counts(buffer) == (30, 0)


def test_rows_of_a_recorder_count() -> None:
    buffer = limited(min_steps=100, num_envs=2)
    recorder = Recorder(buffer, 2, "next_step")
    recorder.reset(np.zeros(2, np.float32))
    zeros, done = np.zeros(2, np.float32), np.array([True, False])
    recorder.step(zeros, zeros, zeros, done, ~done & False)  # Both first rows, and those of the step.
    recorder.step(zeros, zeros, zeros, ~done & False, ~done & False)  # The first environment resets.
    assert counts(buffer)[0] == 5


@pytest.mark.parametrize(
    ("options", "batch_steps"),
    [
        ({"sequence_length": 3}, 6),
        ({"sequence_length": 3, "pad_before": 2}, 6),
        ({"sequence_length": None, "pack": 7}, 14),
        ({"sequence_length": 1, "offsets": {"x": (-2, -1, 0)}}, 2),
    ],
)
def test_a_batch_counts_its_sequences_times_their_steps(options: dict[str, Any], batch_steps: int) -> None:
    buffer = limited(5, **options)
    buffer.add_episode({"x": np.zeros(10, np.float32)})
    buffer.sample()
    next(iter(buffer))
    assert counts(buffer) == (10, 2 * batch_steps)


def test_what_fails_does_not_count() -> None:
    failing = itertools.chain([True], itertools.repeat(False))

    def transform(batch: Any) -> Any:
        if next(failing):
            raise KeyError("in the transform")
        return batch

    buffer = limited(5, transform=transform)
    buffer.add_episode({"x": np.zeros(10, np.float32)})
    due = buffer.num_batches_due
    with pytest.raises(KeyError, match="in the transform"):
        buffer.sample()
    assert counts(buffer) == (10, 0) and buffer.num_batches_due == due
    buffer.sample()
    assert counts(buffer) == (10, 4)
    for _ in range(buffer.num_batches_due):
        buffer.sample()
    before = counts(buffer)
    refused: list[Any] = [{"y": np.zeros(3)}, {"x": 1.0}, {}, 3, {"x": np.zeros(0)}, {"x": np.zeros(2000, np.float32)}]
    for episode in refused:
        with pytest.raises((TypeError, ValueError)):
            buffer.add_episode(episode)
    with pytest.raises(ValueError):
        buffer.add_step({"y": 1.0}, False)
    assert counts(buffer) == before


def test_a_batch_that_is_being_made_is_no_longer_due_but_counts_only_once_it_is_delivered() -> None:
    found: list[Any] = []
    buffer = limited(transform=lambda batch: found.append((counts(buffer), buffer.num_batches_due)))
    buffer.add_episode({"x": np.zeros(10, np.float32)})
    assert buffer.num_batches_due == 3
    buffer.sample()
    assert found == [((10, 0), 2)]
    assert (counts(buffer), buffer.num_batches_due) == ((10, 4), 2)


def test_a_step_that_was_taken_counts_though_its_episode_could_not_be_stored_yet() -> None:
    limiter = SamplesPerInsert(1, timeout=0)
    buffer = ReplayBuffer(logged_game.FlakyRing(10, fails_at={0}), 1, num_envs=1, limiter=limiter)
    with pytest.raises(OSError, match="disk full"):
        buffer.add_step({"x": 1.0}, True)
    assert counts(buffer) == (1, 0)


def test_what_is_prefetched_counts_when_it_is_delivered() -> None:
    with limited(2, 20, num_workers=2) as buffer:
        for step in range(200):
            buffer.add_step({"x": 0.0}, step % 10 == 9)
            for _ in range(buffer.num_batches_due):
                before = counts(buffer)[1]
                buffer.sample()
                assert counts(buffer)[1] == before + 4
        assert buffer.num_batches_due == 0 and abs(400 - counts(buffer)[1]) <= 20


# Waiting.


def test_the_errors_say_who_waits_for_what() -> None:
    buffer = limited(2, 3, min_steps=1000, timeout=0.01, capacity=2000)
    numbers = "4 a batch (`ratio`=2, `tolerance`=3, `min_steps`=1000)."
    after = "batches after each step."

    def message(call: Callable[[], object]) -> str:
        with pytest.raises(RuntimeError) as refused:
            call()
        return str(refused.value)

    assert message(buffer.sample) == (
        f"`sample` waited 0.01 s for 1,001 more steps to be added: 0 were added and 0 drawn, {numbers} Add in another "
        f"thread, or draw `num_batches_due` {after}"
    )
    for _ in range(1001):
        buffer.add_step({"x": 0.0}, False)
    assert message(buffer.sample) == (
        f"`sample` waited 0.01 s for a complete episode that is long enough: 1,001 were added and 0 drawn, {numbers} "
        "`flush()` completes open episodes."
    )
    buffer.add_step({"x": 0.0}, False)
    buffer.flush()
    buffer.sample()
    assert message(buffer.sample) == (
        f"`sample` waited 0.01 s for 1 more step to be added: 1,002 were added and 4 drawn, {numbers} Add in another "
        f"thread, or draw `num_batches_due` {after}"
    )
    buffer.add_step({"x": 0.0}, False)
    assert message(lambda: buffer.add_step({"x": 0.0}, False)) == (
        f"Adding 1 step waited 0.01 s for 1 batch to be drawn: 1,003 were added and 4 drawn, {numbers} Draw in another "
        f"thread, or draw `num_batches_due` {after}"
    )
    buffer.sample()
    buffer.add_episode({"x": np.zeros(20, np.float32)})
    assert message(lambda: buffer.add_episode({"x": np.zeros(6, np.float32)})) == (
        f"Adding 6 steps waited 0.01 s for 10 batches to be drawn: 1,023 were added and 8 drawn, {numbers} Draw in "
        f"another thread, or draw `num_batches_due` {after}"
    )
    assert buffer.num_batches_due == 10


@pytest.mark.parametrize("env", [0, np.arange(3)], ids=["single", "of three"])
def test_a_step_that_was_refused_can_be_repeated(env) -> None:
    num_envs = np.size(env)
    buffer = limited(3, num_envs=num_envs, batch_size=1)
    num_refused = 0
    for step in itertools.count():
        done = step % 5 == 4 if num_envs == 1 else np.full(3, step % 5 == 0)
        while not is_done(partial(buffer.add_step, tagged.rows(env, step // 5, step % 5), done)):
            num_refused += 1
            tagged.origins(buffer.sample())
        if num_refused >= 100:
            break
    lengths = {len(steps) for _, _, steps in logged_game.stored(buffer.dataset)}
    assert lengths == {5}


def waits(buffer: ReplayBuffer) -> bool:
    """Whether a thread comes to wait."""
    assert buffer.limiter is not None
    deadline = time.monotonic() + ENDLESS
    while not buffer.limiter._changed._waiters and time.monotonic() < deadline:  # type: ignore[attr-defined]
        time.sleep(0.001)
    return bool(buffer.limiter._changed._waiters)  # type: ignore[attr-defined]


class Thread(threading.Thread):
    """A call in a thread; `result` waits for it, and raises what it has raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call, self.value, self.error = call, None, None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.call()
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.join(ENDLESS)
        assert not self.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error
        return self.value


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("slow", ["actor", "learner", None])
def test_an_actor_and_a_learner_keep_the_ratio_from_both_sides(slow: str | None, num_workers: int) -> None:
    buffer = limited(4, 10, 50, float("inf"), num_envs=2, num_workers=num_workers)
    num_steps, balances = 300, []

    def note(who: str) -> None:
        added, drawn = counts(buffer)
        balances.append(4 * (added - 50) - drawn)
        if who == slow:
            time.sleep(0.001)

    def act() -> None:
        for step in range(num_steps):
            buffer.add_step({"x": np.zeros(2, np.float32)}, np.full(2, step % 10 == 0))
            note("actor")

    def learn() -> None:
        for _ in range(4 * (2 * num_steps - 50) // 4):
            assert buffer.sample()["x"].shape == (2, 2)
            note("learner")

    with buffer:
        for thread in [Thread(act), Thread(learn)]:
            thread.result()
    assert counts(buffer) == (600, 2200)
    assert min(balances) >= -200 and max(balances) <= 10
    assert min(balances[balances.index(max(balances)) :]) >= -10


def test_two_threads_on_each_side_do_not_get_past_the_tolerance() -> None:
    buffer = limited(1, 4, 0, float("inf"))
    buffer.add_episode({"x": np.zeros(4, np.float32)})
    balances = []

    def repeat(call: Callable[[], object], num: int) -> None:
        for _ in range(num):
            call()
            added, drawn = counts(buffer)
            balances.append(added - drawn)

    add = partial(buffer.add_episode, {"x": np.zeros(2, np.float32)})
    threads = [Thread(partial(repeat, call, num)) for call, num in [(add, 200), (buffer.sample, 100)] for _ in range(2)]
    for thread in threads:
        thread.result()
    assert counts(buffer) == (804, 800)
    assert min(balances) >= -4 and max(balances) <= 4


@pytest.mark.parametrize("side", ["sample", "add_step", "add_episode"])
def test_closing_the_buffer_ends_the_wait(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = limited(timeout=float("inf"))
    monkeypatch.setattr(buffer.limiter, "notify", lambda: None)  # The flush alone does not end it.
    calls: dict[str, Callable[[], object]] = {
        "sample": buffer.sample,
        "add_step": lambda: buffer.add_step({"x": 0.0}, False),
        "add_episode": lambda: buffer.add_episode({"x": np.zeros(2, np.float32)}),
    }
    if side != "sample":
        buffer.add_episode({"x": np.zeros(10, np.float32)})
    thread = Thread(calls[side])
    assert waits(buffer)
    buffer.close()
    with pytest.raises(RuntimeError, match="^The buffer is closed.$"):
        thread.result()
    with pytest.raises(RuntimeError, match="is closed"):
        calls[side]()


def test_what_completes_an_episode_ends_the_wait_for_it() -> None:
    buffer = limited(timeout=float("inf"))
    for _ in range(5):
        buffer.add_step({"x": 0.0}, False)
    thread = Thread(buffer.sample)
    assert waits(buffer)
    buffer.flush()
    assert thread.result()["x"].shape == (2, 2)


def test_an_episode_that_is_stored_before_a_step_waits_ends_the_wait_for_it() -> None:
    limiter = SamplesPerInsert(10, timeout=float("inf"))
    buffer = ReplayBuffer(logged_game.FlakyRing(10, fails_at={0}), 1, num_envs=1, limiter=limiter)
    with pytest.raises(OSError, match="disk full"):
        buffer.add_step({"x": 1.0}, True)
    thread = Thread(lambda: [buffer.sample() for _ in range(10)])
    assert waits(buffer)
    # Stores the episode, and then waits for batches.
    Thread(lambda: buffer.add_step({"x": 1.0}, False)).result()
    thread.result()


# Its buffer.


def test_a_resumed_run_goes_on_with_the_counts() -> None:
    def run(buffer: ReplayBuffer, num_steps: int) -> list[int]:
        found = []
        for _ in range(num_steps):
            buffer.add_step({"x": 0.0}, True)
            found.append(buffer.num_batches_due)
            for _ in range(found[-1]):
                buffer.sample()
        return found

    options = {"sequence_length": 1, "min_steps": 13}
    whole = run(limited(0.7, **options), 100)
    first, second = limited(0.7, **options), limited(0.7, **options)
    found = run(first, 41)
    assert first.limiter is not None and second.limiter is not None
    second.add_step({"x": 0.0}, True)
    second.limiter.load_state_dict(first.limiter.state_dict())
    assert found + run(second, 59) == whole
    for state in ({}, {"num_added": 1}, {"num_added": 1, "num_drawn": 2, "more": 3}):
        with pytest.raises(ValueError, match=re.escape("The state of a limiter has ['num_added', 'num_drawn'], found")):
            second.limiter.load_state_dict(state)
    for state in ({"num_added": -1, "num_drawn": 1}, {"num_added": 1, "num_drawn": 1.5}):
        with pytest.raises((ValueError, TypeError), match="`num_"):
            second.limiter.load_state_dict(state)  # type: ignore[arg-type]
    assert counts(second)[0] == 100


def test_a_copy_of_a_buffer_counts_for_itself() -> None:
    buffer = limited()
    buffer.add_episode({"x": np.zeros(10, np.float32)})
    copied = copy.deepcopy(buffer)
    copied.sample()
    assert (counts(buffer), counts(copied)) == ((10, 0), (10, 4))
    copied.close()
    buffer.sample()


def test_a_limiter_belongs_to_one_buffer() -> None:
    limiter, dataset = SamplesPerInsert(1, 3), RingBufferDataset(10)
    # One that could not be made has not got it.
    with pytest.raises(ValueError, match="cannot be kept"):
        ReplayBuffer(dataset, 100, limiter=limiter)
    with pytest.raises(ValueError, match="`max_episode_length`"):
        ReplayBuffer(dataset, 2, limiter=limiter, max_episode_length=11)
    ReplayBuffer(dataset, 2, limiter=limiter)
    with pytest.raises(ValueError, match="counts for another buffer: give each a SamplesPerInsert of its own"):
        ReplayBuffer(dataset, 2, limiter=limiter)


def test_what_a_limiter_cannot_count_is_refused(tmp_path) -> None:
    ring = RingBufferDataset(10)
    with pytest.raises(ValueError, match="a MixtureDataset takes none: add and draw through a buffer of one of its"):
        ReplayBuffer(MixtureDataset([ring], [1.0]), 2, limiter=SamplesPerInsert(1))
    with pytest.raises(ValueError, match="have no fixed T: give a `sequence_length`, or `pack`"):
        ReplayBuffer(ring, 2, None, limiter=SamplesPerInsert(1))
    IndividualFileDataset(10, directory=tmp_path).close()
    with pytest.raises(RuntimeError, match="opened with mode='r'"):
        reader = IndividualFileDataset(10, directory=tmp_path, mode="r")
        ReplayBuffer(reader, 2, limiter=SamplesPerInsert(1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "`ratio` must be more than 0, found 0."),
        ({"ratio": -1.5}, ValueError, "`ratio` must be more than 0, found -1.5."),
        ({"ratio": float("inf")}, ValueError, "`ratio` must be finite, found inf."),
        ({"ratio": float("nan")}, ValueError, "`ratio` must be finite, found nan."),
        ({"ratio": "2"}, TypeError, "`ratio` must be a number, found str: '2'."),
        ({"ratio": True}, TypeError, "`ratio` must be a number, found bool: True."),
        ({"ratio": 1, "tolerance": float("inf")}, ValueError, "`tolerance` must be finite, found inf."),
        ({"ratio": 1, "min_steps": -1}, ValueError, "`min_steps` must be at least 0, found -1."),
        ({"ratio": 1, "min_steps": 1.5}, TypeError, "`min_steps` must be an integer, found float: 1.5."),
        ({"ratio": 1, "timeout": -1}, ValueError, "`timeout` must be at least 0 seconds, found -1."),
        ({"ratio": 1, "timeout": None}, TypeError, "`timeout` must be a number, found NoneType: None."),
    ],
)
def test_arguments_out_of_their_range_are_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error) as refused:
        SamplesPerInsert(**arguments)
    assert str(refused.value) == message


def test_without_a_limiter_nothing_is_due_or_counted() -> None:
    buffer = ReplayBuffer(RingBufferDataset(10), 2)
    with pytest.raises(RuntimeError, match=re.escape("`ReplayBuffer(..., limiter=SamplesPerInsert(ratio))`")):
        _ = buffer.num_batches_due
    buffer.add_episode({"x": np.zeros(3)})
    buffer.sample()
    assert "samples_per_insert" not in buffer.stats()
    with pytest.raises(TypeError, match="`limiter` must be a SamplesPerInsert, found float."):
        ReplayBuffer(RingBufferDataset(10), 2, limiter=2.0)  # type: ignore[arg-type]
