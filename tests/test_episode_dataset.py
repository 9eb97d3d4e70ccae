"""What an EpisodeDataset does whatever its storage, shown on the simplest one; `contract.py` has what each must do."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.verification import VerificationMode
from tests import tagged
from tests.list_dataset import ListDataset


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda e: e.update(extra=np.zeros(4)), ValueError, r"unexpected \['extra'\]"),
        (lambda e: e.update(reward=["a"] * 4), TypeError, "`reward` has dtype <U1"),
        (lambda e: e.update(reward="abcd"), TypeError, "`reward` must be .* found str"),
        (lambda e: e.update(code=[[1], [2, 3], [4], [5]]), ValueError, "`code` is a ragged list"),
        (lambda e: e.update(code=np.array([None] * 4)), ValueError, "`code` has dtype object .* expected int64"),
        (lambda e: e.update({3: np.zeros(4)}), TypeError, "must be strings, found 3"),
    ],
)
def test_what_is_no_episode_is_refused(spoil, error, message) -> None:
    dataset = ListDataset(20)
    dataset.add_episode(tagged.episode(4, 0))
    bad = tagged.episode(4, 1)
    spoil(bad)
    with pytest.raises(error, match=message):
        dataset.add_episode(bad)
    assert tagged.numbers(dataset) == [0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, found 0"),
        ({"batch_size": 2.0}, TypeError, "`batch_size` must be an integer, found float"),
        ({"batch_size": True}, TypeError, "`batch_size` must be an integer, found bool"),
        ({"sequence_length": 0}, ValueError, "`sequence_length` must be at least 1"),
        ({"sequence_length": 11}, ValueError, "`sequence_length`=11 exceeds the `capacity` of 10"),
        ({"chunk_size": 3}, ValueError, "`chunk_size`=3 does not divide `batch_size`=4"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
        ({"num_workers": -1}, ValueError, "`num_workers` must be at least 0"),
        ({"include": ("speed",)}, ValueError, r"found \['speed'\]"),
        ({"include": "mask"}, TypeError, "found the string 'mask'"),
        ({"sampler": 3}, TypeError, "`sampler` must be a Sampler, found int"),
        ({"transform": 3}, TypeError, "`transform` must be a function"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
    ],
)
def test_bad_arguments_of_a_loader_are_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        ListDataset(10).get_loader(**{"batch_size": 4, "sequence_length": 2, **arguments})


def test_include_does_not_overwrite_a_field() -> None:
    dataset = ListDataset(10)
    dataset.add_episode({"mask": np.zeros(4)})
    with pytest.raises(ValueError, match="'mask' of `include` .* is also a field"):
        next(iter(dataset.get_loader(2, 2, include=("mask",))))


def test_views_of_all_kinds_are_taken_in() -> None:
    base = np.arange(48, dtype=np.float32).reshape(6, 8)
    kinds: list[Any] = [
        base[:, ::2],
        base[::-1, :4],
        np.asfortranarray(base[:, :4]),
        base[:, :4].astype(">f4"),
        torch.from_numpy(base)[:, 1:5],
        torch.from_numpy(base)[:, :4].clone().requires_grad_(),
        [row[:4] for row in base],
        [torch.from_numpy(row[:4]) for row in base],
        base[:, :4].tolist(),
    ]
    for kind in kinds:
        dataset = ListDataset(8)
        dataset.add_episode({"x": kind})
        rows = kind.detach() if isinstance(kind, torch.Tensor) else kind
        assert dataset.get_episode(0)["x"].tolist() == [[float(value) for value in row] for row in rows]
        assert dataset.get_episode(0)["x"].dtype == torch.float32


def test_a_transform_is_applied_to_the_batch() -> None:
    dataset = ListDataset(10)
    dataset.add_episode(tagged.episode(5, 0))
    loader = dataset.get_loader(4, 2, transform=lambda batch: (batch["reward"].sum(), batch))
    total, batch = next(iter(loader))
    assert total == batch["reward"].sum()
    single = next(iter(dataset.sequences(2, transform=lambda sequence: sequence["reward"].shape)))
    assert single == (2,)


def test_verification_does_what_its_level_says() -> None:
    nan = {"x": np.full(3, np.nan, np.float32)}
    for mode in VerificationMode:
        dataset = ListDataset(10, EpisodeDatasetInfo(verification_mode=mode))
        dataset.add_episode({"x": np.zeros(3, np.float32)})
        is_refused = mode is VerificationMode.ALL_CHECKS
        with pytest.raises(ValueError, match="`x` holds NaN") if is_refused else contextlib.nullcontext():
            dataset.add_episode(nan)
    dataset = ListDataset(10, info=EpisodeDatasetInfo(verification_mode=VerificationMode.NO_CHECKS))
    dataset.add_episode({"x": np.zeros((3, 2), np.float32)})
    dataset.add_episode({"x": np.ones((3, 2), np.float64)})  # The caller vouches; it is cast.
    assert dataset.get_episode(1)["x"].dtype == torch.float32
    dataset = ListDataset(10, info=EpisodeDatasetInfo(verification_mode=VerificationMode.NO_CHECKS))
    dataset.add_episode({"x": np.zeros(3), "y": np.zeros(3)})
    with pytest.raises(ValueError, match="`y` has 4 rows, `x` has 3"):
        dataset.add_episode({"x": np.zeros(3), "y": np.zeros(4)})
    assert dataset.episode_lengths == [3]


def test_the_table_names_every_field() -> None:
    dataset = ListDataset(10)
    assert "no fields yet" in repr(dataset)
    dataset.add_episode(tagged.episode(4, 0))
    table = repr(dataset)
    assert "1 episodes, 4 of 10 steps (40%), length 4 to 4, mean 4.0" in table
    for line in ("obs/pixels  ColorImage  uint8    (4, 2, 3)  24", "reward      Scalar      float32  ()         4"):
        assert line in table
