"""Streams that `max_episode_length` cuts into pieces that overlap: no window is lost or doubled, no end is made up."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import Recorder, ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.sampler import UniformEpisodeSampler
from buffers.transforms import to_transitions
from buffers.writer import EpisodeWriter
from tests import tagged
from tests.list_dataset import ListDataset

STREAM, PIECE, OVERLAP = 23, 7, 3


def write(dataset: EpisodeDataset, lengths: list[int], cut_after: int, overlap: int) -> None:
    """Play episodes of some lengths, each cut into pieces."""
    writer = EpisodeWriter(dataset, 1, cut_after, overlap)
    for number, length in enumerate(lengths):
        for step in range(length):
            writer.add_step(tagged.rows(0, number, step), step == length - 1)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_window_up_to_the_overlap_exists_once(lengths, cut, length) -> None:
    ring = RingBufferDataset(1000)
    write(ring, lengths, *cut)
    windows = ring.table.count_windows(length)
    found: Counter[tuple[int, int]] = Counter()
    if windows.num:
        drawn = ring.table.windows_of(windows, np.arange(windows.num), length)
        rows, _ = ring.read(drawn)
        batch = ring.fields.unflatten(rows)  # type: ignore[union-attr]
        found.update((number, first) for _, number, first, _ in tagged.origins(batch))
    possible = {(number, first) for number, num in enumerate(lengths) for first in range(num - length + 1)}
    assert set(found.values()) <= {1} and set(found) <= possible
    if length <= cut[1] + 1:
        assert set(found) == possible


def storages(path: Path) -> dict[str, EpisodeDataset]:
    small, large = RingBufferDataset(100), ListDataset(1000)
    small.extend(large, seed=0)
    return {
        "ring": RingBufferDataset(100),
        "list": ListDataset(100),
        "files": IndividualFileDataset(100, directory=path / "files", durability="rename"),
        "extended": small,
    }


def ends(source: EpisodeDataset | MixtureDataset, **options: object) -> set[tuple[int, bool, bool]]:
    """(step of the stream, is_first, is_last) of many rows."""
    loader = source.get_loader(64, 2, include=("is_first", "is_last"), seed=0, **options)
    found = set()
    for _, batch in zip(range(8), loader, strict=False):
        columns = (batch["obs"]["state"][..., 2].long(), batch["is_first"], batch["is_last"])
        found |= set(zip(*(column.flatten().tolist() for column in columns), strict=True))
    return found


EXPECTED = {(step, step == 0, step == STREAM - 1) for step in range(STREAM)}


@pytest.mark.parametrize("kind", ["ring", "list", "files", "extended"])
def test_only_the_true_ends_of_a_stream_are_marked(kind: str, tmp_path: Path) -> None:
    dataset = storages(tmp_path)[kind]
    write(dataset, [STREAM], PIECE, OVERLAP)
    assert ends(dataset) == EXPECTED
    assert ends(dataset, num_workers=1) == EXPECTED
    assert ends(dataset, sampler=UniformEpisodeSampler()) == EXPECTED
    assert ends(MixtureDataset([dataset], [1.0])) == EXPECTED
    if kind == "extended":
        assert dataset.extension is not None and ends(dataset.extension.other) == EXPECTED
        other = RingBufferDataset(100)
        other.extend(dataset.extension.other)
        assert other.refill() == len(dataset.table) and ends(other) == EXPECTED
    elif kind == "files":
        for mode in ("r", "a"):
            dataset.close()
            dataset = IndividualFileDataset(100, directory=tmp_path / "files", mode=mode, durability="rename")
            assert ends(dataset) == EXPECTED
        dataset.evict_episode(0)
        assert dataset.num_episodes == 4
    else:
        assert ends(copy.deepcopy(dataset)) == EXPECTED


def test_a_recorder_loses_no_transition_across_a_cut() -> None:
    ring = RingBufferDataset(1000)
    buffer = ReplayBuffer(ring, 64, 2, max_episode_length=5, num_envs=1, seed=0)
    recorder = Recorder(buffer, None, "disabled")
    recorder.reset(np.float32(0))
    for step in range(1, 24):
        recorder.step(step, np.float32(step), float(step), step == 23, False)
    assert ring.episode_lengths == [5] * 5 + [4]
    seen = Counter()
    windows = ring.table.count_windows(2)
    rows, _ = ring.read(ring.table.windows_of(windows, np.arange(windows.num), 2))
    batch = to_transitions(rows)
    for obs, action, next_obs in zip(
        *(batch[name][:, 0].tolist() for name in ("obs", "action", "next_obs")), strict=True
    ):
        assert next_obs == obs + 1 == action
        seen[obs] += 1
    assert seen == dict.fromkeys(range(23), 1)


def test_returns_and_lengths_in_stats_are_those_of_whole_episodes() -> None:
    buffer = ReplayBuffer(RingBufferDataset(1000), 4, 2, max_episode_length=6, overlap=2)
    for step in range(20):  # Two environments; the first ends with its tenth row, when it has been cut once.
        done = np.array([step == 10, False])
        buffer.add_step({"reward": np.array([1.0, 100.0])}, done)
    buffer.flush()
    stats = buffer.stats()
    assert (stats["mean_episode_return"], stats["mean_episode_length"]) == ((10 + 10 + 2000) / 3, 40 / 3)
    assert stats["num_timesteps"] > 40 == stats["mean_episode_length"] * 3


def test_what_windows_do_not_reach_is_told_and_warned_of_once() -> None:
    buffer = ReplayBuffer(RingBufferDataset(1000), 4, 65, num_envs=1)
    for length in (28, 28, 28, 28, 70):
        buffer.add_episode({"x": torch.zeros(length)})
    assert buffer.stats()["reachable"] == 70 / 182 and ", 38% of the stored steps can be drawn\n" in repr(buffer)
    with pytest.warns(
        UserWarning, match=r"Only 38% .* `sequence_length`=65 steps\. .* `sequence_length=None`"
    ) as caught:
        for _ in range(70):
            buffer.sample()
    assert len(caught) == 1


@pytest.mark.parametrize(("cut", "overlap"), [(None, 1), (4, 4), (1, 1)])
def test_an_overlap_of_a_whole_piece_is_refused(cut: int | None, overlap: int) -> None:
    with pytest.raises(ValueError, match=rf"`overlap`={overlap} must be less than `max_episode_length`, found {cut}"):
        ReplayBuffer(RingBufferDataset(100), 4, max_episode_length=cut, overlap=overlap)
