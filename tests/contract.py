"""What every EpisodeDataset must do. A storage's tests subclass `DatasetContract` and say how one is made."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from buffers.dataset import EpisodeDataset, MixtureDataset
from buffers.dataset.fields import Fields
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.sampler import UniformEpisodeSampler, UniformSampler
from tests import reading, tagged

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]
DTYPES += [torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]

# Each subclass runs the same property over a storage of its own.
PROPERTY = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow]
)


def fifo_model(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """(number, length) of the episodes that live after adding episodes of these lengths: the reference model."""
    live: list[tuple[int, int]] = []
    for number, length in enumerate(lengths):
        while sum(alive for _, alive in live) + length > capacity:
            live.pop(0)
        live.append((number, length))
    return live


def contiguous_starts(lengths: list[int], capacity: int) -> list[int]:
    """The step id of the first row of each episode, where step ids do not skip."""
    return np.cumsum([0, *lengths])[: len(lengths)].tolist()


class DatasetContract:
    """Subclass it, and x gives an empty dataset."""

    #: The reference model of what lives.
    model = staticmethod(fifo_model)
    #: The reference model of step ids.
    starts = staticmethod(contiguous_starts)

    def make(self, capacity: int, info: EpisodeDatasetInfo | None = None) -> EpisodeDataset:
        raise NotImplementedError

    def filled(self, lengths: list[int], capacity: int) -> EpisodeDataset:
        dataset = self.make(capacity)
        for number, length in enumerate(lengths):
            assert dataset.add_episode(tagged.episode(length, number)) == number
        return dataset

    # What lives.

    @given(st.lists(st.integers(1, 12), max_size=25), st.integers(12, 40))
    @example([12, 12, 12], 12)
    @PROPERTY
    def test_the_newest_episodes_that_fit_live_whole_and_in_order(self, lengths, capacity) -> None:
        dataset = self.filled(lengths, capacity)
        live = self.model(lengths, capacity)
        assert [tagged.number_and_length(episode) for episode in dataset.episodes()] == live
        assert dataset.episode_lengths == [length for _, length in live]
        assert dataset.num_episodes == len(live)
        assert len(dataset) == dataset.num_timesteps == sum(length for _, length in live) <= capacity
        assert dataset.is_empty is (not live)
        assert dataset.is_full is (len(live) < len(lengths) or dataset.num_timesteps == capacity)
        assert dataset.average_episode_length == (np.mean([length for _, length in live]) if live else 0.0)

    def test_evicting_the_oldest_makes_room(self) -> None:
        dataset = self.filled([3, 4, 2], 10)
        dataset.evict_episode(0)
        assert tagged.numbers(dataset) == [1, 2] and dataset.episode_lengths == [4, 2]
        assert not dataset.is_full and dataset.num_evicted == 1

    def test_what_goes_in_and_comes_out_is_copied(self) -> None:
        dataset, episode = self.make(10), tagged.episode(5, 0)
        dataset.add_episode(episode)
        for copied in (episode, dataset.get_episode(0), next(iter(dataset.get_loader(2, 5)))):
            for value in tagged.flatten(copied).values():
                value[...] = 0
        assert tagged.numbers(dataset) == [0]

    # What is drawn.

    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=20),
        st.integers(9, 25),
        st.integers(1, 9),
        st.integers(0, 1000),
    )
    @example([9, 9, 9], 9, 9, 0)
    @PROPERTY
    def test_sequences_are_contiguous_and_of_one_live_episode(self, lengths, capacity, length, seed) -> None:
        dataset = self.filled(lengths, capacity)
        windows = {
            (0, number, step, length)
            for number, rows in self.model(lengths, capacity)
            for step in range(rows - length + 1)
        }
        loader = dataset.get_loader(16, length, chunk_size=4, seed=seed)
        if not windows:
            with pytest.raises(RuntimeError, match=f"`sequence_length`={length} is longer than every stored episode"):
                next(iter(loader))
            return
        for batch in itertools.islice(loader, 3):
            assert set(tagged.origins(batch)) <= windows

    @pytest.mark.parametrize("sampler", [UniformSampler(), UniformEpisodeSampler()])
    def test_windows_are_as_likely_as_the_sampler_says(self, sampler) -> None:
        lengths = [5, 3, 9, 4, 2, 3, 1]
        dataset = self.filled(lengths, 24)
        counts = self.count_windows(dataset, 3, sampler, num_batches=40)
        live = [(number, rows) for number, rows in self.model(lengths, 24) if rows >= 3]
        is_uniform = isinstance(sampler, UniformSampler)
        shares = {
            (number, step): 1 / (1 if is_uniform else rows - 2) for number, rows in live for step in range(rows - 2)
        }
        assert counts.keys() == shares.keys()
        observed = np.array([counts[window] for window in shares])
        assert tagged.chi_square_is_plausible(observed, np.array(list(shares.values())))

    @staticmethod
    def count_windows(dataset: EpisodeDataset, length: int, sampler: Any, num_batches: int) -> dict[Any, int]:
        counts: dict[Any, int] = {}
        for batch in itertools.islice(dataset.get_loader(128, length, sampler=sampler, seed=3), num_batches):
            for _, number, first, _ in tagged.origins(batch):
                counts[number, first] = counts.get((number, first), 0) + 1
        return counts

    def test_whole_episodes_are_padded_with_zeros_and_masked(self) -> None:
        dataset = self.filled([5, 3, 9, 4, 2, 6], 22)
        live = self.model([5, 3, 9, 4, 2, 6], 22)
        seen = set()
        for batch in itertools.islice(dataset.get_loader(3, seed=0, include=("index", "is_first", "is_last")), 40):
            mask = batch["mask"]
            assert mask.dtype == torch.bool
            assert mask.shape[1] == int(mask.sum(1).max())
            found = tagged.origins(batch, mask)
            assert {(number, length) for _, number, _, length in found} <= set(live)
            seen.update(number for _, number, _, _ in found)
            assert all(first == 0 for _, _, first, _ in found)
            assert torch.equal(batch["index"] == -1, ~mask)
            assert torch.equal(batch["is_last"].sum(1), torch.ones(3, dtype=torch.int64))
            assert torch.equal(batch["is_last"].int().argmax(1), mask.sum(1) - 1)
            assert torch.equal(batch["is_first"].nonzero(), torch.tensor([[b, 0] for b in range(3)]))
        assert seen == {number for number, _ in live}

    def test_include_says_where_each_row_comes_from(self) -> None:
        lengths = [5, 3, 9, 4, 2, 6]
        dataset = self.filled(lengths, 22)
        starts = np.array(self.starts(lengths, 22))
        names = ("index", "episode", "step", "is_first", "is_last", "mask", "weight")
        for batch in itertools.islice(dataset.get_loader(16, 2, include=names, seed=0), 10):
            origins = np.array(tagged.origins(batch))
            number, step = origins[:, 1], origins[:, 2:3] + np.arange(2)
            np.testing.assert_array_equal(batch["episode"].numpy(), number, strict=True)
            np.testing.assert_array_equal(batch["step"].numpy(), step, strict=True)
            np.testing.assert_array_equal(batch["index"].numpy(), starts[number][:, None] + step, strict=True)
            np.testing.assert_array_equal(batch["is_first"].numpy(), step == 0, strict=True)
            last = np.array(lengths)[number][:, None] - 1
            np.testing.assert_array_equal(batch["is_last"].numpy(), step == last, strict=True)
            assert batch["mask"].all() and batch["mask"].shape == (16, 2)
            assert torch.equal(batch["weight"], torch.ones(16))

    def test_nothing_is_added_that_was_not_asked_for(self) -> None:
        batch = next(iter(self.filled([5], 10).get_loader(2, 3)))
        assert batch.keys() == tagged.episode(1, 0).keys()
        assert all(value.is_contiguous() for value in tagged.flatten(batch).values())

    def test_chunks_and_other_loaders_change_nothing_that_is_drawn(self) -> None:
        dataset = self.filled([5, 3, 9, 4], 30)
        other = iter(dataset.get_loader(5, 3, seed=8))
        for length in (2, None):
            expected = list(itertools.islice(dataset.get_loader(12, length, seed=5), 4))
            assert not all(torch.equal(expected[0]["code"], batch["code"]) for batch in expected[1:])
            for size in (1, 3, 12):
                loader = iter(dataset.get_loader(12, length, chunk_size=size, seed=5))
                for one in expected:
                    next(other)
                    assert_same_batch(one, next(loader))

    def test_some_of_the_fields_can_be_read_alone(self) -> None:
        mixture = MixtureDataset([self.filled([5, 3, 9, 4], 30)], [1], fields=("code", "obs/pixels"))
        batch = mixture.get_loader(6, 3, include=("episode", "step"), seed=0).stream.take()
        expected = tagged.rows(0, batch["episode"][:, None].numpy(), batch["step"].numpy())
        assert batch.keys() == {"obs", "code", "episode", "step"} and batch["obs"].keys() == {"pixels"}
        np.testing.assert_array_equal(batch["code"].numpy(), expected["code"])
        np.testing.assert_array_equal(batch["obs"]["pixels"].numpy(), expected["obs"]["pixels"])

    def test_a_plain_dataloader_iterates_single_sequences(self) -> None:
        dataset = self.filled([5, 3], 10)
        batch = next(iter(DataLoader(dataset, batch_size=8)))
        assert batch["obs"]["pixels"].shape == (8, 1, 4, 2, 3)
        tagged.origins(batch)
        batch = next(iter(DataLoader(dataset.sequences(3), batch_size=50)))
        assert {(number, first) for _, number, first, _ in tagged.origins(batch)} == {(0, 0), (0, 1), (0, 2), (1, 0)}
        with pytest.raises(TypeError, match="padded batches"):
            dataset.sequences(None)  # type: ignore[arg-type]

    # Bad input.

    @pytest.mark.parametrize(
        ("spoil", "error", "message"),
        [
            (lambda e: e.pop("reward"), ValueError, r"missing \['reward'\]"),
            (lambda e: e.update(reward=np.zeros(3, np.float32)), ValueError, "`reward` has 3 rows, `obs/state` has 4"),
            (lambda e: e.update(reward=np.zeros(4)), ValueError, "`reward` has dtype float64 .* expected float32"),
            (lambda e: e["obs"].update(state=np.zeros((4, 2), np.float32)), ValueError, "`obs/state` .* expected"),
            (lambda e: e.clear(), ValueError, "The fields differ: missing"),
            (lambda e: e.update(tagged.episode(0, 9)), ValueError, "no rows"),
            (lambda e: e.update(tagged.episode(13, 9)), ValueError, "13 steps does not fit a `capacity` of 12"),
        ],
    )
    def test_a_bad_episode_is_refused_and_changes_nothing(self, spoil, error, message) -> None:
        dataset = self.filled([4, 4, 4], 12)  # An addition lets the oldest go.
        before = dataset.get_loader(8, 2, seed=0).stream.batch(0)
        bad = tagged.episode(4, 9)
        spoil(bad)
        with pytest.raises(error, match=message):
            dataset.add_episode(bad)
        assert_same_batch(before, dataset.get_loader(8, 2, seed=0).stream.batch(0))
        assert tagged.numbers(dataset) == [0, 1, 2]
        dataset.add_episode(tagged.episode(4, 3))
        assert tagged.numbers(dataset) == [1, 2, 3]

    def test_a_refused_first_episode_does_not_settle_the_fields(self) -> None:
        dataset = self.make(10)
        with pytest.raises(TypeError, match="Expected a dict"):
            dataset.add_episode([1, 2])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="does not fit"):
            dataset.add_episode({"x": np.zeros(11)})
        assert dataset.fields is None
        dataset.add_episode(tagged.episode(3, 0))

    def test_fields_given_beforehand_bind_the_first_episode(self) -> None:
        fields = Fields.from_episode(tagged.episode(1, 0))
        dataset = self.make(10, info=EpisodeDatasetInfo(fields))
        assert dataset.fields is fields
        with pytest.raises(ValueError, match="unexpected"):
            dataset.add_episode({"x": np.zeros(2)})
        with pytest.raises(RuntimeError, match="dataset is empty"):
            next(iter(dataset.get_loader(2, 1)))
        dataset.add_episode(tagged.episode(3, 0))
        tagged.number_and_length(dataset.get_episode(0))

    def test_indices_count_from_both_ends_or_are_refused(self) -> None:
        dataset = self.filled([4, 5], 10)
        assert [tagged.number_and_length(dataset.get_episode(i))[0] for i in (0, 1, -1, -2)] == [0, 1, 1, 0]
        for index in (2, -3, 100):
            with pytest.raises(ValueError, match="`episode_index`"):
                dataset.get_episode(index)
            with pytest.raises(ValueError, match="`episode_index`"):
                dataset.evict_episode(index)
        with pytest.raises(TypeError, match="`episode_index` must be an integer, found float"):
            dataset.get_episode(0.5)  # type: ignore[arg-type]
        assert dataset.num_episodes == 2
        with pytest.raises(TypeError, match="Use `get_episode"):
            dataset[0]

    def test_drawing_from_nothing_says_so_and_works_once_there_is_something(self) -> None:
        dataset = self.make(10)
        batches = iter(dataset.get_loader(2, 3))
        with pytest.raises(RuntimeError, match="The dataset is empty"):
            next(batches)
        dataset.add_episode(tagged.episode(2, 0))
        with pytest.raises(RuntimeError, match=r"`sequence_length`=3 .* \(longest of 1: 2 steps\)"):
            next(batches)
        dataset.add_episode(tagged.episode(3, 1))
        assert set(tagged.origins(next(batches))) == {(0, 1, 0, 3)}

    # Data of all kinds.

    def test_every_dtype_and_shape_comes_back_bit_by_bit(self) -> None:
        dataset, episode = self.make(16), {"step": torch.arange(10)}
        for dtype, shape in itertools.product(DTYPES, [(), (1,), (0,), (3, 0, 2), (2, 3, 4, 5), (8,), (64,)]):
            size = (10, *shape, dtype.itemsize)
            bits = torch.randint(0, 2 if dtype == torch.bool else 256, size, dtype=torch.uint8)
            episode[f"{dtype} {shape}"] = bits.view(-1).view(dtype).view(10, *shape)
        for _ in range(2):  # The second overwrites the first.
            dataset.add_episode(episode)
        batch, whole = (next(iter(dataset.get_loader(16, length, seed=0))) for length in (4, None))
        for name, rows in episode.items():
            assert_same_bits(batch[name], rows[batch["step"]])
            assert_same_bits(whole[name][0], rows)
            assert_same_bits(dataset.get_episode(0)[name], rows)

    # Handing it around.

    def test_a_copy_goes_on_by_itself(self) -> None:
        dataset = self.filled([5, 3, 9], 18)
        dataset.get_loader(8, 2).stream.take()  # What was counted to draw must not be shared.
        copied = copy.deepcopy(dataset)
        copied.add_episode(tagged.episode(4, 3))
        live = [number for number, _ in self.model([5, 3, 9, 4], 18)]
        assert tagged.numbers(copied) == live and tagged.numbers(dataset) == [0, 1, 2]
        batch = copied.get_loader(64, 2, seed=0).stream.batch(0)
        assert {number for _, number, _, _ in tagged.origins(batch)} == set(live)
        clone = reading.reader_of(copied)
        assert_same_batch(batch, clone.get_loader(64, 2, seed=0).stream.batch(0))


def assert_same_batch(one: Any, two: Any) -> None:
    one, two = tagged.flatten(one), tagged.flatten(two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), (name, one[name], two[name])


def assert_same_bits(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one.dtype, one.shape) == (two.dtype, two.shape)
    assert torch.equal(one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8))
