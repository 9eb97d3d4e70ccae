from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from buffers.dataset import EpisodeDataset, RingBufferDataset
from buffers.sampler import UniformEpisodeSampler
from tests import tagged
from tests.contract import assert_same_batch
from tests.forgetful import Forgetful


def filled(dataset: EpisodeDataset | None = None) -> EpisodeDataset:
    dataset = RingBufferDataset(100) if dataset is None else dataset
    for number, length in enumerate([5, 9, 3, 12, 7]):
        dataset.add_episode(tagged.episode(length, number))
    return dataset


def take(loader: Any, num: int) -> list[Any]:
    return list(itertools.islice(loader, num))


# One endless sequence, whoever makes its batches.


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_the_number_of_workers_changes_nothing(num_workers: int, persistent: bool) -> None:
    dataset = filled()
    reference = take(dataset.get_loader(6, 3, seed=11, include=("index",)), 13)
    options: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": persistent}
    loader = dataset.get_loader(6, 3, seed=11, include=("index",), **options)
    found = [*take(loader, 5), *take(loader, 1), *take(loader, 7)]
    for one, two in zip(reference, found, strict=True):
        assert_same_batch(one, two)


def test_an_error_in_a_worker_reaches_the_trainer() -> None:
    dataset = RingBufferDataset(10)
    loader = dataset.get_loader(2, 3, num_workers=1)
    with pytest.raises(RuntimeError, match="The dataset is empty"):
        next(iter(loader))
    dataset.add_episode(tagged.episode(2, 0))
    with pytest.raises(RuntimeError, match="`sequence_length`=3 is longer"):
        next(iter(loader))
    dataset.add_episode(tagged.episode(3, 1))
    assert set(tagged.origins(next(iter(loader)))) == {(0, 1, 0, 3)}


def test_options_of_the_dataloader_are_passed_on() -> None:
    dataset = filled()
    options: dict[str, Any] = {"prefetch_factor": 5, "multiprocessing_context": "spawn", "timeout": 60}
    loader = dataset.get_loader(4, 3, num_workers=1, seed=2, **options)
    assert isinstance(loader, DataLoader)
    assert loader.prefetch_factor == 5 and loader.timeout == 60
    for one, two in zip(take(dataset.get_loader(4, 3, seed=2), 2), take(loader, 2), strict=True):
        assert_same_batch(one, two)
    with pytest.raises(TypeError, match="no argument `surprise` here"):
        dataset.get_loader(2, 3, surprise=True)


# Single sequences.


def test_workers_of_a_plain_dataloader_draw_different_sequences() -> None:
    dataset = RingBufferDataset(100_000)
    dataset.add_episode({"t": np.arange(100_000)})
    for seed in (None, 3):
        loader = DataLoader(dataset.sequences(1, seed=seed), batch_size=64, num_workers=2)
        one, two = take(loader, 2)
        assert not torch.equal(one["t"], two["t"])


def test_a_seeded_stream_of_sequences_repeats() -> None:
    dataset = filled()
    stream, again = dataset.sequences(3, seed=1), dataset.sequences(3, seed=1)
    first = take(stream, 80)
    for one, two in zip(first, take(again, 80), strict=True):
        assert_same_batch(one, two)
    assert any(not torch.equal(one["code"], two["code"]) for one, two in zip(first, take(stream, 80), strict=True))


# Windows whose episode is gone.


@pytest.mark.parametrize("length", [3, None])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_windows_of_episodes_that_are_gone_are_drawn_again(length: int | None, chunk_size: int | None) -> None:
    dataset = Forgetful(100)
    filled(dataset)
    dataset.gone = frozenset({1, 4})
    names = ("index", "episode", "mask")
    loader = dataset.get_loader(4, length, chunk_size=chunk_size, include=names, seed=0)
    seen = set()
    for batch in take(loader, 40):
        origins = tagged.origins(batch, batch["mask"])
        assert [number for _, number, _, _ in origins] == batch["episode"].tolist()
        seen.update(number for _, number, _, _ in origins)
    assert seen == {0, 2, 3}
    assert loader.stream.num_rejected > 0


def test_drawing_again_is_bounded() -> None:
    dataset = Forgetful(100)
    filled(dataset)
    dataset.gone = frozenset(range(5))
    dataset.max_sampling_attempts = 7
    with pytest.raises(RuntimeError, match="4 of 4 windows were gone before they could be read, 7 times over"):
        dataset.get_loader(4, 3).stream.batch(0)
    assert dataset.num_reads == 8


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_does_not_tell_a_position_that_another_dataloader_counts(num_workers) -> None:
    ring = RingBufferDataset(20)
    ring.add_episode({"x": np.arange(20)})
    loader = ring.get_loader(4, 3, seed=0, num_workers=num_workers)

    def start_of_others() -> list[int]:
        # What accelerate's `prepare` makes of a loader.
        other = DataLoader(loader.dataset, None, num_workers=loader.num_workers, collate_fn=loader.collate_fn)
        return next(iter(other))["x"][:, 0].tolist()

    batches = [loader.stream.batch(n)["x"][:, 0].tolist() for n in range(6)]
    assert next(iter(loader))["x"][:, 0].tolist() == batches[0]
    assert loader.state_dict() == {"seed": 0, "position": 1}
    start_of_others()
    with pytest.raises(RuntimeError, match="Another DataLoader has taken batches.* load {'seed': 0, 'position': their"):
        loader.state_dict()
    loader.load_state_dict({"seed": 0, "position": 4})
    assert loader.state_dict() == {"seed": 0, "position": 4}
    assert start_of_others() == batches[4]
    loader.load_state_dict({"seed": 0, "position": 5})
    assert next(iter(loader))["x"][:, 0].tolist() == batches[5]
    assert loader.state_dict() == {"seed": 0, "position": 6}


def test_another_dataloader_does_not_repeat_what_has_no_seed() -> None:
    ring = RingBufferDataset(1000)
    ring.add_episode({"x": np.arange(1000)})
    loader = ring.get_loader(8, 3, num_workers=1)
    other = DataLoader(loader.dataset, None, num_workers=1, collate_fn=loader.collate_fn)
    assert not next(iter(other))["x"].equal(next(iter(other))["x"])


def test_options_of_no_use_say_so() -> None:
    ring = RingBufferDataset(10)
    for name in ("shuffle", "drop_last"):
        with pytest.raises(
            ValueError, match="without end, and every batch is full: `shuffle`, `drop_last` and `stride`"
        ):
            ring.get_loader(4, 2, **{name: True})
    ring.get_loader(4, 2, drop_last=False)
    with pytest.raises(ValueError, match="need `epochs`"):
        ring.get_loader(4, 2, shuffle=False)
    with pytest.raises(ValueError, match="in the order of their numbers, which `state_dict` counts: drop `in_ord"):
        ring.get_loader(4, 2, in_order=False)
    ring.get_loader(4, 2, in_order=True)
    with pytest.raises(ValueError, match="`output_device`='gpu' cannot be used"):
        ring.get_loader(4, 2, output_device="gpu")
    with pytest.raises(TypeError, match=r"found the class UniformEpisodeSampler: pass UniformEpisodeSampler\(\)"):
        ring.get_loader(4, 2, sampler=UniformEpisodeSampler)
    with pytest.raises(ValueError, match=r"The state of this loader has \['position', 'seed'\], .* found \['seed'\]"):
        ring.get_loader(4, 2).load_state_dict({"seed": 3})
