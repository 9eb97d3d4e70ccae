"""Statistics of what is stored, against numpy over all of its rows at once."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import EpisodeDataset, MixtureDataset, RingBufferDataset
from buffers.dataset import statistics as module
from buffers.dataset.fields import Fields, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.statistics import FieldStatistics
from buffers.writer import EpisodeWriter
from tests import tagged
from tests.forgetful import Forgetful
from tests.list_dataset import ListDataset

DTYPES = [torch.bool, torch.uint8, torch.uint16, torch.int64, torch.float16, torch.bfloat16, torch.float32]
SHAPES: list[tuple[int, ...]] = [(), (3,), (2, 2), (0,)]


def assert_are_of(found: FieldStatistics, rows: np.ndarray) -> None:
    """The statistics are those of float64 rows `(n, *shape)`."""
    for index in np.ndindex(*rows.shape[1:]):
        values = rows[(slice(None), *index)]
        values = values[~np.isnan(values)]
        assert found.count[index] == len(values)
        expected = (values.mean(), values.std(), values.min(), values.max()) if len(values) else (np.nan,) * 4
        of_element = [tensor[index].item() for tensor in (found.mean, found.std, found.min, found.max)]
        np.testing.assert_allclose(of_element, expected, rtol=1e-12, atol=1e-12)
    assert found.count.dtype == torch.int64 and found.mean.dtype == found.std.dtype == torch.float64
    assert {tensor.shape for tensor in vars(found).values()} == {rows.shape[1:]}


def some_rows(data: st.DataObject, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 100, (length, *shape)).astype(np.float64)
    if dtype.is_floating_point:
        values = np.where(values < data.draw(st.sampled_from([0, 30, 100])), np.nan, values / 7)
    return torch.from_numpy(values).to(dtype)


@settings(max_examples=60)
@given(
    data=st.data(),
    capacity=st.sampled_from([15, 1000]),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=2, max_size=2),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=2),
    at_a_time=st.sampled_from([1, 6, 1 << 20]),
)
def test_statistics_are_those_of_all_rows_that_are_stored(
    data: st.DataObject, capacity: int, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], at_a_time: int
) -> None:
    dataset, names = RingBufferDataset(capacity), ["obs/state", "reward"]
    stored: dict[int, dict[str, np.ndarray]] = {}
    with mock.patch.object(module, "_NUMBERS_AT_A_TIME", at_a_time):
        for _ in range(data.draw(st.integers(1, 5))):
            for length in data.draw(st.lists(st.integers(1, 9), min_size=not stored, max_size=3)):
                state, reward = (some_rows(data, length, *kind) for kind in zip(shapes, dtypes, strict=True))
                episode_id = dataset.add_episode({"obs": {"state": state}, "reward": reward})
                stored[episode_id] = {"obs/state": state.double().numpy(), "reward": reward.double().numpy()}
            if dataset.num_episodes > 1 and data.draw(st.booleans()):
                dataset.evict_episode(0)
            found = dataset.statistics()
            assert list(found) == names
            for name in names:
                assert_are_of(found[name], np.concatenate([stored[n][name] for n in dataset.table.ids.tolist()]))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    cut=st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
)
def test_rows_that_pieces_repeat_count_once(lengths: list[int], cut: tuple[int, int]) -> None:
    dataset = RingBufferDataset(1000)
    writer = EpisodeWriter(dataset, 1, *cut)
    for number, length in enumerate(lengths):
        for step in range(length):
            writer.add_step(tagged.rows(0, number, step), step == length - 1)
    found = dataset.statistics()
    expected = [tagged.flatten(tagged.episode(length, number)) for number, length in enumerate(lengths)]
    for name in ("obs/state", "obs/pixels", "reward", "flag", "code"):
        assert_are_of(found[name], np.concatenate([episode[name] for episode in expected]).astype(np.float64))


@pytest.mark.parametrize("shape", [(), (2,)])
def test_large_offsets_lose_no_precision(shape: tuple[int, ...]) -> None:
    dataset, rng = ListDataset(100_000), np.random.default_rng(0)
    episodes = [rng.normal(1e9, 1e-3, (length, *shape)) for length in (1, 50_000, 7, 300)]
    for episode in episodes:
        dataset.add_episode({"obs": episode})
    rows = np.concatenate(episodes) - 1e9  # Exact: both are close.
    found = dataset.statistics()["obs"]
    np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-6)
    np.testing.assert_allclose(found.mean - 1e9, rows.mean(0), rtol=0, atol=2e-7)


def test_a_later_call_reads_what_was_added_and_all_if_an_episode_has_left() -> None:
    dataset = Forgetful(100)

    def num_reads() -> int:
        before, rows = dataset.num_reads, [episode["code"] for episode in dataset.episodes()]
        of_rows, before = dataset.num_reads - before, dataset.num_reads
        assert_are_of(dataset.statistics()["code"], torch.cat(rows).double().numpy())
        assert of_rows == dataset.num_episodes
        return dataset.num_reads - before

    for number in range(4):
        dataset.add_episode(tagged.episode(10, number))
    assert num_reads() == 4
    assert num_reads() == 0
    dataset.add_episode(tagged.episode(10, 4))
    dataset.add_episode(tagged.episode(5, 5))
    assert num_reads() == 2
    dataset.evict_episode(-1)
    assert num_reads() == 5
    dataset.evict_episode(0)
    dataset.add_episode(tagged.episode(3, 6))
    assert num_reads() == 5


def test_an_episode_that_could_not_be_read_counts_once_it_can() -> None:
    dataset = Forgetful(100)
    episodes = [tagged.episode(length, number) for number, length in enumerate((3, 4, 5))]
    ids = [dataset.add_episode(episode) for episode in episodes]
    dataset.gone = frozenset(ids[1:2])
    assert_are_of(dataset.statistics()["reward"], np.concatenate([episodes[n]["reward"] for n in (0, 2)]).astype(float))
    dataset.gone = frozenset()
    assert_are_of(dataset.statistics()["reward"], np.concatenate([e["reward"] for e in episodes]).astype(float))
    assert dataset.num_reads == 4


class Leaving(ListDataset):
    """The oldest episode leaves while the last one is read."""

    is_complete = True

    def rows_of_id(self, episode_id: int) -> Any:
        if self.is_complete and episode_id == self.table.next_id - 1:
            self.is_complete = False
            self.evict_episode(0)
        return super().rows_of_id(episode_id)


def test_an_episode_that_leaves_after_it_was_counted_is_not_in_later_statistics() -> None:
    dataset = Leaving(100)
    for number in range(3):
        dataset.add_episode(tagged.episode(4, number))
    assert dataset.statistics()["code"].count == 12 and dataset.num_episodes == 2
    rows = np.concatenate([tagged.episode(4, number)["code"] for number in (1, 2)])
    assert_are_of(dataset.statistics()["code"], rows.astype(np.float64))


def test_an_error_while_reading_counts_no_episode_in_part() -> None:
    dataset = ListDataset(100)
    dataset.add_episode({"a": np.arange(3.0), "b": np.arange(3.0)})
    dataset.add_episode({"a": np.arange(4.0), "b": np.arange(4.0)})
    fails_at_the_last = [*map(module._moments, (np.arange(3.0), np.arange(3.0), np.arange(4.0))), MemoryError()]
    with mock.patch.object(module, "_moments", side_effect=fails_at_the_last), pytest.raises(MemoryError):
        dataset.statistics()
    for name in ("a", "b"):
        assert_are_of(dataset.statistics()[name], np.array([0.0, 1, 2, 0, 1, 2, 3]))


def test_a_mixture_has_the_statistics_of_all_members_whatever_their_weights() -> None:
    members: list[EpisodeDataset] = [RingBufferDataset(100), ListDataset(100), RingBufferDataset(100)]
    info = EpisodeDatasetInfo(Fields(x=Vector(2)))
    rows = [np.random.default_rng(n).normal(size=(n + 3, 2)).astype(np.float32) for n in range(3)]
    for member, values in zip(members, rows, strict=True):
        member.add_episode({"x": values, "own" if member is members[1] else "other": values})
    empty = RingBufferDataset(100, info)
    nested = MixtureDataset([members[1], empty], [0, 1], fields="common")
    mixture = MixtureDataset([members[0], nested, members[2]], [0.9, 0.1, 0], fields="common")
    for _ in range(2):
        found = mixture.statistics()
        assert list(found) == ["x"]
        assert_are_of(found["x"], np.concatenate(rows).astype(np.float64))
        rows.append(np.full((2, 2), 5, np.float32))
        members[2].add_episode({"x": rows[-1], "other": rows[-1]})


def test_statistics_of_an_empty_dataset_are_an_error() -> None:
    declared = RingBufferDataset(100, EpisodeDatasetInfo(Fields(x=Vector(2))))
    for dataset in (
        RingBufferDataset(100),
        declared,
        MixtureDataset([declared], [1]),
        MixtureDataset([RingBufferDataset(9)], [1]),
    ):
        with pytest.raises(RuntimeError, match="The dataset is empty, so it has no statistics. Add a complete episode"):
            dataset.statistics()


def test_infinite_values_show_and_complex_fields_are_left_out() -> None:
    dataset = ListDataset(100)
    for end in (-np.inf, 1.0, np.inf):
        dataset.add_episode({"x": np.array([[0.0, 1.0], [end, 2.0]]), "z": np.ones(2, np.complex64)})
    found = dataset.statistics()
    assert list(found) == ["x"]
    assert found["x"].mean.isnan().tolist() == found["x"].std.isnan().tolist() == [True, False]
    assert found["x"].min.tolist() == [-np.inf, 1] and found["x"].max.tolist() == [np.inf, 2]


def test_results_are_the_callers_own() -> None:
    dataset = ListDataset(100)
    dataset.add_episode({"x": np.arange(6.0).reshape(3, 2)})
    for tensor in vars(dataset.statistics()["x"]).values():
        tensor.zero_()
    assert_are_of(dataset.statistics()["x"], np.arange(6.0).reshape(3, 2))


class Following(ListDataset):
    """Finds out what another process has written when it is asked to, as readers do."""

    written: tuple[dict[str, Any], ...] = ()

    def _refresh(self) -> None:
        for episode in self.written:
            self.add_episode(episode)
        self.written = ()


def test_a_reader_takes_in_what_was_written_before() -> None:
    dataset = Following(100)
    for number in range(2):
        dataset.written = (tagged.episode(5, number),)
        assert dataset.statistics()["code"].count == 5 * (number + 1)


def test_a_bar_counts_the_episodes_that_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = ListDataset(100)
    for number in range(3):
        dataset.add_episode(tagged.episode(5, number))
    dataset.statistics()
    assert capsys.readouterr().err == ""
    dataset.add_episode(tagged.episode(5, 3))
    dataset.add_episode(tagged.episode(5, 4))
    dataset.statistics(progress=True)
    assert "statistics" in (shown := capsys.readouterr().err) and "2/2" in shown


def test_a_bar_without_tqdm_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ListDataset(100)
    dataset.add_episode(tagged.episode(5, 0))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"`progress=True` needs tqdm .*episode-buffers\[demo\]"):
        dataset.statistics(progress=True)
    assert dataset.statistics()["code"].count == 5
