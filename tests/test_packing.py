"""Packed episodes: whole ones and tails, end to end in long rows."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from tests import tagged
from tests import windows_model as model
from tests.windows_model import LENGTHS, PROPERTY, live


@given(
    st.sampled_from(model.KINDS), LENGTHS, st.integers(9, 30), st.integers(1, 25), st.integers(1, 3), st.integers(0, 99)
)
@PROPERTY
def test_packs_are_whole_episodes_and_tails_end_to_end(kind, lengths, capacity, num_rows, batch_size, seed) -> None:
    with model.stored(kind, lengths, capacity) as dataset:
        episodes = live(dataset)
        include = ("index", "is_first", "is_last")
        batch = next(iter(dataset.get_loader(batch_size, pack=num_rows, seed=seed, include=include)))
        for name, values in tagged.flatten(tagged.rows(0, 0, np.zeros((batch_size, num_rows), int))).items():
            assert tagged.flatten(batch)[name].shape == values.shape
        bounds = batch["cu_seqlens"].tolist()
        assert batch["cu_seqlens"].dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == batch_size * num_rows
        code, step, episode, is_first, is_last = (
            batch[name].flatten().tolist() for name in ("code", "step", "episode", "is_first", "is_last")
        )
        flat = {
            name: tensor.flatten(0, 1).cpu().numpy()
            for name, tensor in tagged.flatten(batch).items()
            if name != "cu_seqlens"
        }
        for begin, end in itertools.pairwise(bounds):
            number, first = divmod(code[begin], 10**6)
            assert len({*episode[begin:end]}) == 1 and begin // num_rows == (end - 1) // num_rows
            assert step[begin:end] == list(range(first, episodes[number])), "to the end of the episode"
            assert first == 0 or end % num_rows == 0, "only the last of a long row is cut"
            assert is_first[begin:end] == [t == 0 for t in range(first, episodes[number])]
            assert is_last[begin:end] == [t == episodes[number] - 1 for t in range(first, episodes[number])]
            for name, values in model.expected_rows(
                number, episodes[number], range(first, episodes[number]), "zero"
            ).items():
                np.testing.assert_array_equal(flat[name][begin:end], values)


@pytest.mark.parametrize("kind", ["ring", "mixture"])
def test_packed_episodes_are_as_likely_as_drawn(kind) -> None:
    lengths, counts = [1, 2, 3, 5, 8], Counter()
    with model.stored(kind, lengths) as dataset:
        for batch in itertools.islice(dataset.get_loader(4, pack=20, seed=2), 200):
            counts.update(code // 10**6 for code in batch["code"].flatten()[batch["cu_seqlens"][:-1].long()].tolist())
    weights = [1 / 5] * 5 if kind == "ring" else [1 / 6, 1 / 4, 1 / 6, 1 / 4, 1 / 6]
    assert tagged.chi_square_is_plausible(np.array([counts[n] for n in range(5)]), np.array(weights))


def test_packs_of_long_episodes_say_what_they_reach() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(30, 0))
    ring.add_episode(tagged.episode(10, 1))
    assert ReplayBuffer(ring, 2, pack=15).stats()["reachable"] == pytest.approx(25 / 40)
