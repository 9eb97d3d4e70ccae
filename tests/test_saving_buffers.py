"""A buffer that is saved goes on: options, open episodes, samplers, limiter, and what belongs to the same moment."""

from __future__ import annotations

import copy
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer, SamplesPerInsert
from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.fields import Vector
from buffers.sampler import MixedSampler, OnlineSampler, PrioritizedSampler, UniformSampler
from buffers.sharing.weights import SharedWeights
from tests import tagged
from tests.saving_helpers import add, contents, hold_the_writer, loaded, same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def steps(buffer: ReplayBuffer, first: int, end: int, num_envs: int = 3) -> list[Any]:
    """Add steps of environments, and draw a batch after each once there are some, or as many as are due."""
    batches = []
    for step in range(first, end):
        random = np.random.default_rng(step)
        rows = tagged.rows(np.arange(num_envs), step // 10, step)
        buffer.add_step(rows, random.random(num_envs) < 0.1)
        num_due = int(step > 30) if buffer.limiter is None else buffer.num_batches_due
        batches += [buffer.sample() for _ in range(num_due)]
    return batches


def made(ring: Any, **options: Any) -> ReplayBuffer:
    return ReplayBuffer(ring, batch_size=4, sequence_length=3, num_envs=3, seed=1, **options)


def test_a_buffer_goes_on_with_its_options_open_episodes_and_position(folder) -> None:
    buffer = made(RingBufferDataset(200), include=("index", "episode"), pad_after=1, pad="edge")
    steps(buffer, 0, 60)
    buffer.save(folder)
    resumed = ReplayBuffer.load(folder)
    assert same(steps(resumed, 60, 200), steps(buffer, 60, 200))
    assert contents(resumed.dataset) == contents(buffer.dataset) and resumed.stats() == buffer.stats()


@pytest.mark.parametrize(
    "sampler",
    [PrioritizedSampler, OnlineSampler, lambda: MixedSampler({UniformSampler(): 0.3, OnlineSampler(): 0.7})],
    ids=["prioritized", "online", "mixed"],
)
def test_samplers_and_limiter_go_on(sampler, folder) -> None:
    def options() -> dict[str, Any]:
        return {"sampler": sampler(), "limiter": SamplesPerInsert(4, min_steps=9)}

    buffer = made(RingBufferDataset(200), **options())
    steps(buffer, 0, 60)
    buffer.save(folder)
    with pytest.raises(ValueError, match="arguments which a save cannot hold: {'limiter': 'SamplesPerInsert', 'sam"):
        ReplayBuffer.load(folder)
    resumed = ReplayBuffer.load(folder, **options())
    assert resumed.num_batches_due == buffer.num_batches_due
    assert same(steps(resumed, 60, 150), steps(buffer, 60, 150))


@pytest.mark.parametrize(("mode", "num_rows"), [("keep", 3), ("truncate", 0), ("drop", 0)])
def test_open_episodes_are_kept_or_truncated_or_dropped(mode, num_rows, folder) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 4, num_envs=1)
    for step in range(8):
        buffer.add_step({"obs": float(step), "truncated": False}, step == 4)
    buffer.save(folder)
    resumed = ReplayBuffer.load(folder, open_episodes=mode)
    assert resumed.writer.num_open_rows == num_rows
    assert resumed.dataset.episode_lengths == ([5, 3] if mode == "truncate" else [5])
    if mode == "truncate":
        assert resumed.dataset.get_episode(1)["truncated"].tolist() == [False, False, True]


def test_an_episode_that_the_sink_could_not_store_is_saved_while_it_waits(folder, monkeypatch) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 4, num_envs=1)
    buffer.add_step({"obs": 0.0}, True)
    with monkeypatch.context() as patch:
        patch.setattr(RingBufferDataset, "add", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError):
            buffer.add_step({"obs": 1.0}, True)
    buffer.save(folder)
    resumed = ReplayBuffer.load(folder)
    resumed.flush()
    assert [episode["obs"].tolist() for episode in resumed.dataset.episodes()] == [[0.0], [1.0]]


def test_buffers_beside_a_mixture_are_saved_with_it(folder) -> None:
    def run() -> tuple[ReplayBuffer, ReplayBuffer, MixtureDataset]:
        rings = RingBufferDataset(100), RingBufferDataset(100)
        mixture = MixtureDataset(rings, [0.3, 0.7])
        return made(rings[0]), made(rings[1]), mixture

    def go_on(one: ReplayBuffer, other: ReplayBuffer, learner: ReplayBuffer, first: int) -> list[Any]:
        batches = []
        for step in range(first, first + 50):
            steps(one, step, step + 1)
            steps(other, step, step + 1)
            batches.append(learner.sample() if step > 40 else None)
        return batches

    one, other, mixture = run()
    learner = made(mixture)
    go_on(one, other, learner, 0)
    learner.save(folder, also=[one, other], extra={"step": 50, "weights": torch.ones(2), "moments": {0: [1.5]}})
    again, another, mixture = run()
    resumed = ReplayBuffer.load(folder, mixture, also=[again, another])
    assert resumed.extra["step"] == 50 and resumed.extra["moments"] == {0: [1.5]}
    assert torch.equal(resumed.extra["weights"], torch.ones(2))
    assert same(go_on(again, another, resumed, 50), go_on(one, other, learner, 50))
    with pytest.raises(ValueError, match="made with 2 buffers in `also`, found 0"):
        ReplayBuffer.load(folder, run()[2])


def test_another_seed_is_refused(folder) -> None:
    buffer = made(RingBufferDataset(100))
    buffer.save(folder)
    with pytest.raises(ValueError, match="The save goes on with `seed`=1, found 2"):
        ReplayBuffer.load(folder, seed=2)
    assert ReplayBuffer.load(folder, seed=1).state_dict() == buffer.state_dict()


def test_a_state_is_small_and_of_another_kind_refused() -> None:
    buffer = made(RingBufferDataset(200))
    steps(buffer, 0, 60)
    state = buffer.state_dict()
    assert len(str(state)) < 1000
    other = made(copy.deepcopy(buffer.dataset))
    other.load_state_dict(state)
    assert same([other.sample() for _ in range(5)], [buffer.sample() for _ in range(5)])
    with pytest.raises(ValueError, match="found \\['loader'\\]"):
        other.load_state_dict({"loader": state["loader"]})
    limited = made(RingBufferDataset(200), limiter=SamplesPerInsert(1))
    with pytest.raises(ValueError, match="with none `limiter`, and this one has one"):
        limited.load_state_dict(state)


def test_a_dataset_alone_is_loaded_into_a_new_buffer(folder) -> None:
    ring = RingBufferDataset(60)
    for number in range(5):
        add(ring, number)
    ring.save(folder)
    buffer = ReplayBuffer.load(folder, batch_size=2, sequence_length=3)
    assert buffer.sample()["reward"].shape == (2, 3) and not buffer.extra


def test_saves_follow_each_other_without_being_waited_for(folder) -> None:
    buffer = made(RingBufferDataset(200))
    expected = {}
    for number in range(10):
        steps(buffer, 20 * number, 20 * number + 20)
        saving = buffer.save(folder, keep=3, block=False)
        expected[number] = contents(buffer.dataset)
    saving.result()
    for number in range(9, 6, -1):
        assert contents(ReplayBuffer.load(folder).dataset) == expected[number]
        os.unlink(folder / f"save-{number:010d}.safetensors")


# The moment, where nothing else writes what is about to change.


def test_values_that_are_updated_while_a_save_is_written_are_saved_as_they_were(folder) -> None:
    ring = RingBufferDataset(60)
    for number in range(5):
        add(ring, number)
    ring.add_late_field("label", Vector(2), 0.5)
    expected, gate = contents(ring), threading.Event()
    hold_the_writer(ring, gate)
    saving = ring.save(folder, block=False)
    ring.update(np.arange(3, 20), {"label": np.ones((17, 2), np.float32)})
    gate.set()
    saving.result()
    assert contents(RingBufferDataset.load(folder)) == expected


def test_open_episodes_that_end_while_a_save_is_written_are_saved_as_they_were(folder) -> None:
    buffer = ReplayBuffer(RingBufferDataset(1000), 1, num_envs=3)

    def step(number: int) -> None:
        buffer.add_step(tagged.rows(np.arange(3), number // 100, number), np.full(3, number % 100 == 0))

    for number in range(1, 60):
        step(number)
    gate = threading.Event()
    hold_the_writer(buffer.dataset, gate)
    saving = buffer.save(folder, block=False)
    for number in range(60, 250):  # Past a run of 64 rows, and the ends of two episodes.
        step(number)
    gate.set()
    saving.result()
    resumed = ReplayBuffer.load(folder)
    assert resumed.is_empty and resumed.writer.num_open_rows == 3 * 59
    resumed.flush()
    for env, episode in enumerate(resumed.dataset.episodes()):
        expected = tagged.rows(env, 0, np.arange(1, 60))
        tagged.assert_same_episode(episode, {name: value for name, value in expected.items()})


def test_episodes_that_an_extension_has_drawn_and_not_stored_yet_are_saved(folder) -> None:
    def extended() -> RingBufferDataset:
        ring = RingBufferDataset(30)
        files = IndividualFileDataset(200, directory=folder / "episodes", durability="rename")
        ring.extend(files, other_batch_size=5, seed=0)
        return ring

    ring = extended()
    number = 0
    while number < 30 or not ring.extension._waiting:
        add(ring, number, 1 + number * 7 % 12)
        number += 1
    ring.save(folder / "saves")
    kept: list[Any] = []
    for after in range(number, number + 20):
        add(ring, after, 1 + after * 7 % 12)
        kept.append(contents(ring))
    for store in ring.stores[1:]:
        store._directory.close()
    resumed = loaded(folder / "saves", extended())
    for after in range(number, number + 20):
        add(resumed, after, 1 + after * 7 % 12)
        assert contents(resumed) == kept[after - number]


def test_weights_that_are_set_to_what_they_are_stay_the_same_to_the_last_bit() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        weights = SharedWeights(5)
        weights.set(random.random(5))
        before = weights.get()
        weights.set(before)
        assert weights.get().tobytes() == before.tobytes()
