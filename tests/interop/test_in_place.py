"""A dataset that is read in place gives the batches that its import would, wherever a dataset is taken."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.fields import Fields
from buffers.interop import InPlaceDataset
from buffers.sampler import EpisodeFilter, PrioritizedSampler, UniformEpisodeSampler
from tests import tagged

LENGTHS = [7, 1, 12, 3, 20, 5]


class ArraysInPlace(InPlaceDataset):
    """Tagged episodes, one after the other in an .npy file for each field."""

    num_opened = 0

    def __init__(self, path: Path) -> None:
        fields = Fields.from_episode(tagged.episode(1, 0))
        super().__init__(str(path), fields, LENGTHS, {2: {"task": "open"}, 4: {"task": "open"}})

    def _open_file(self) -> Any:
        type(self).num_opened += 1
        return {name: np.load(f"{self.path}/{name.replace('/', '-')}.npy", mmap_mode="r") for name in self.fields or ()}

    def _close_file(self, file: Any) -> None:
        file.clear()

    def _read_rows(self, file: Any, episode: int, start: int, stop: int, out: Mapping[str, np.ndarray]) -> None:
        before = sum(LENGTHS[:episode])
        for name, rows in out.items():
            rows[:] = file[name][before + start : before + stop]


@pytest.fixture
def opened(tmp_path: Path) -> ArraysInPlace:
    episodes = [tagged.flatten(tagged.episode(length, number)) for number, length in enumerate(LENGTHS)]
    for name in episodes[0]:
        np.save(tmp_path / f"{name.replace('/', '-')}.npy", np.concatenate([episode[name] for episode in episodes]))
    return ArraysInPlace(tmp_path)


def imported() -> RingBufferDataset:
    ring = RingBufferDataset(100)
    for number, length in enumerate(LENGTHS):
        ring.add_episode(tagged.episode(length, number), {"task": "open"} if number in (2, 4) else None)
    return ring


def batches(dataset: Any, num: int = 20, **options: Any) -> list[Any]:
    loader = iter(dataset.get_loader(batch_size=8, seed=3, **options))
    return [next(loader) for _ in range(num)]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        flat, flat_expected = tagged.flatten(one), tagged.flatten(other)
        assert list(flat) == list(flat_expected)
        assert all(torch.equal(flat[name], flat_expected[name]) for name in flat)


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_length": 3},
        {"sequence_length": 1, "include": ("index", "episode", "step", "is_first", "is_last", "weight")},
        {"sequence_length": 9, "pad_before": 4, "pad_after": 8, "pad": "edge", "include": ("mask",)},
        {"sequence_length": None},
        {"sequence_length": 4, "sampler": UniformEpisodeSampler()},
        {"sequence_length": 2, "sampler": EpisodeFilter(UniformEpisodeSampler(), lambda info: "task" in info)},
        {"offsets": {"obs": (-1, 0), "reward": range(0, 5)}},
    ],
)
def test_batches_are_those_of_the_import(options: dict[str, Any], opened: ArraysInPlace) -> None:
    assert_equal(batches(opened, **options), batches(imported(), **options))
    assert tagged.numbers(opened) == [*range(6)] and opened.episode_info(4) == {"task": "open"}


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_open_the_file_themselves(context: str, opened: ArraysInPlace) -> None:
    batches(opened, 1, sequence_length=3)  # The parent has it open.
    options = {"sequence_length": 3, "num_workers": 2, "multiprocessing_context": context}
    assert_equal(batches(opened, **options), batches(imported(), sequence_length=3))


def test_a_mixture_takes_it(opened: ArraysInPlace) -> None:
    shares = [[0.5, 0.5], [1, 0]]
    for weights in shares:
        found, expected = (MixtureDataset([imported(), member], weights) for member in (opened, imported()))
        assert_equal(batches(found, sequence_length=3), batches(expected, sequence_length=3))


def test_priorities_and_late_fields_work(opened: ArraysInPlace) -> None:
    ring = imported()
    for dataset in (opened, ring):
        dataset.sampler = PrioritizedSampler()
        loader = dataset.get_loader(4, 3, sampler=dataset.sampler, seed=1, include=("index", "weight"))
        batch = next(iter(loader))
        dataset.update(batch["index"], {"priority": torch.arange(12.0).reshape(4, 3)})
        dataset.batch = next(iter(loader))
    assert_equal([opened.batch], [ring.batch])


def test_nothing_can_be_added_or_evicted(opened: ArraysInPlace) -> None:
    with pytest.raises(RuntimeError, match="is open in place, only to be read. Import it"):
        opened.add_episode(tagged.episode(3, 9))
    with pytest.raises(RuntimeError, match="only to be read"):
        opened.evict_episode(0)
    with pytest.raises(RuntimeError, match="only to be read"):
        opened.extend(RingBufferDataset(100))
    with pytest.raises(RuntimeError, match="only to be read"):
        ReplayBuffer(opened, batch_size=2).add_step({"x": 1.0}, False)
    assert tagged.numbers(opened) == [*range(6)]


def test_it_can_extend_no_ring_but_a_buffer_draws_from_it(opened: ArraysInPlace) -> None:
    with pytest.raises(RuntimeError, match="only to be read"):
        RingBufferDataset(100).extend(opened)
    tagged.origins(ReplayBuffer(opened, batch_size=4, sequence_length=3).sample())


def test_a_save_refers_to_it(opened: ArraysInPlace, tmp_path: Path) -> None:
    mixture = MixtureDataset([imported(), opened], [0.5, 0.5])
    buffer = ReplayBuffer(mixture, batch_size=4, sequence_length=3, seed=1)
    buffer.sample()
    buffer.save(tmp_path / "saves")
    again = MixtureDataset([RingBufferDataset(100), ArraysInPlace(tmp_path)], [0.5, 0.5])
    resumed = ReplayBuffer.load(tmp_path / "saves", dataset=again)
    assert_equal([resumed.sample() for _ in range(5)], [buffer.sample() for _ in range(5)])
    with pytest.raises(ValueError, match="is of a ArraysInPlace, .*: open .* again, as before, and pass"):
        ReplayBuffer.load(tmp_path / "saves")


def test_a_copy_is_a_handle_and_closing_is_not_the_end(opened: ArraysInPlace) -> None:
    assert tagged.numbers(pickle.loads(pickle.dumps(opened))) == [*range(6)]
    with opened:
        tagged.numbers(opened)
    assert tagged.numbers(opened) == [*range(6)]
    assert "Read in place from" in repr(opened) and "6 episodes" in repr(opened)


def test_a_file_without_episodes_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LENGTHS", [])
    assert ArraysInPlace(tmp_path).is_empty
