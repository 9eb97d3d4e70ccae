"""What every EpisodeDataset must do. A storage's tests subclass `DatasetContract` and say how one is made."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from buffers.dataset import EpisodeDataset
from buffers.dataset.fields import Fields
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.verification import VerificationMode
from buffers.sampler import UniformEpisodeSampler, UniformSampler
from tests import tagged

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
            dataset.add_episode(tagged.episode(length, number))
        return dataset

    # What lives.

    @given(st.lists(st.integers(1, 12), max_size=25), st.integers(12, 40))
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

    def test_ids_count_up_and_get_episode_counts_from_both_ends(self) -> None:
        dataset = self.make(10)
        assert [dataset.add_episode(tagged.episode(4, number)) for number in range(4)] == [0, 1, 2, 3]
        numbers = [tagged.number_and_length(dataset.get_episode(i))[0] for i in (0, 1, -1, -2)]
        assert numbers == [2, 3, 3, 2]

    def test_an_episode_as_long_as_the_capacity_fits_again_and_again(self) -> None:
        dataset = self.make(7)
        for number in range(3):
            dataset.add_episode(tagged.episode(7, number))
            assert [tagged.number_and_length(episode) for episode in dataset.episodes()] == [(number, 7)]
            batch = next(iter(dataset.get_loader(4, 7)))
            assert set(tagged.origins(batch)) == {(0, number, 0, 7)}

    def test_evicting_the_oldest_makes_room(self) -> None:
        dataset = self.filled([3, 4, 2], 10)
        dataset.evict_episode(0)
        assert dataset.episode_lengths == [4, 2]
        assert [tagged.number_and_length(episode) for episode in dataset.episodes()] == [(1, 4), (2, 2)]
        assert not dataset.is_full

    def test_what_comes_out_is_a_copy(self) -> None:
        dataset = self.filled([5], 10)
        batch = next(iter(dataset.get_loader(2, 5)))
        for found in (dataset.get_episode(0), batch):
            for value in tagged.flatten(found).values():
                value.zero_()
        tagged.number_and_length(dataset.get_episode(0))

    def test_what_goes_in_is_copied(self) -> None:
        dataset = self.make(10)
        episode = tagged.episode(4, 0)
        dataset.add_episode(episode)
        for value in tagged.flatten(episode).values():
            value[...] = 0
        tagged.number_and_length(dataset.get_episode(0))

    # What is drawn.

    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=20),
        st.integers(9, 25),
        st.integers(1, 9),
        st.integers(0, 1000),
    )
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

    def test_every_window_is_equally_likely(self) -> None:
        dataset = self.filled([5, 3, 9, 4, 2, 3, 1], 24)
        counts = self.count_windows(dataset, 3, UniformSampler(), num_batches=40)
        windows = {
            (number, step): 1.0 for number, rows in self.model([5, 3, 9, 4, 2, 3, 1], 24) for step in range(rows - 2)
        }
        assert counts.keys() == windows.keys()
        assert tagged.chi_square_is_plausible(np.array([counts[key] for key in windows]), np.ones(len(windows)))

    def test_the_episode_sampler_gives_every_episode_the_same_share(self) -> None:
        dataset = self.filled([5, 3, 9, 4, 2, 3, 1], 24)
        counts = self.count_windows(dataset, 3, UniformEpisodeSampler(), num_batches=40)
        live = [(number, rows) for number, rows in self.model([5, 3, 9, 4, 2, 3, 1], 24) if rows >= 3]
        shares = {(number, step): 1 / (rows - 2) for number, rows in live for step in range(rows - 2)}
        assert counts.keys() == shares.keys()
        assert tagged.chi_square_is_plausible(
            np.array([counts[key] for key in shares]), np.array(list(shares.values()))
        )

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

    def test_chunks_change_nothing_that_is_drawn(self) -> None:
        dataset = self.filled([5, 3, 9, 4], 30)
        for length in (2, None):
            batches = [next(iter(dataset.get_loader(12, length, chunk_size=size, seed=5))) for size in (None, 1, 3, 12)]
            for other in batches[1:]:
                assert_same_batch(batches[0], other)

    def test_the_same_seed_gives_the_same_batches_whatever_else_is_drawn(self) -> None:
        dataset = self.filled([5, 3, 9, 4], 30)
        alone = list(itertools.islice(dataset.get_loader(4, 2, seed=7), 5))
        loader, other = iter(dataset.get_loader(4, 2, seed=7)), iter(dataset.get_loader(5, 3, seed=8))
        disturbed = []
        for _ in range(5):
            next(other)
            disturbed.append(next(loader))
        for one, two in zip(alone, disturbed, strict=True):
            assert_same_batch(one, two)
        assert not all(torch.equal(alone[0]["code"], batch["code"]) for batch in alone[1:])

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
            (lambda e: e.update(extra=np.zeros(4)), ValueError, r"unexpected \['extra'\]"),
            (lambda e: e.update(reward=np.zeros(3, np.float32)), ValueError, "`reward` has 3 rows, `obs/state` has 4"),
            (lambda e: e.update(reward=np.zeros(4)), ValueError, "`reward` has dtype float64 .* expected float32"),
            (lambda e: e.update(reward=["a"] * 4), TypeError, "`reward` has dtype <U1"),
            (lambda e: e.update(reward="abcd"), TypeError, "`reward` must be .* found str"),
            (lambda e: e.update(code=[[1], [2, 3], [4], [5]]), ValueError, "`code` is a ragged list"),
            (lambda e: e.update(code=np.array([None] * 4)), ValueError, "`code` has dtype object .* expected int64"),
            (lambda e: e["obs"].update(state=np.zeros((4, 2), np.float32)), ValueError, "`obs/state` .* expected"),
            (lambda e: e.update({3: np.zeros(4)}), TypeError, "must be strings, found 3"),
        ],
    )
    def test_a_bad_episode_is_refused_and_changes_nothing(self, spoil, error, message) -> None:
        for num_before in (1, 3):
            dataset = self.filled([4] * num_before, 12)
            before = list(dataset.get_loader(8, 2, seed=0).stream.batch(n) for n in range(2))
            bad = tagged.episode(4, 9)
            spoil(bad)
            with pytest.raises(error, match=message):
                dataset.add_episode(bad)
            after = list(dataset.get_loader(8, 2, seed=0).stream.batch(n) for n in range(2))
            for one, two in zip(before, after, strict=True):
                assert_same_batch(one, two)
            assert dataset.episode_lengths == [4] * num_before
            dataset.add_episode(tagged.episode(4, num_before))
            tagged.number_and_length(dataset.get_episode(-1))

    def test_empty_and_too_long_episodes_are_refused(self) -> None:
        dataset = self.filled([4, 5], 10)
        with pytest.raises(ValueError, match="no rows"):
            dataset.add_episode(tagged.episode(0, 2))
        with pytest.raises(ValueError, match="11 steps does not fit a `capacity` of 10"):
            dataset.add_episode(tagged.episode(11, 2))
        with pytest.raises(TypeError, match="Expected a dict"):
            dataset.add_episode([1, 2])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="The fields differ: missing"):
            dataset.add_episode({})
        assert dataset.episode_lengths == [4, 5]

    def test_a_refused_first_episode_does_not_settle_the_fields(self) -> None:
        dataset = self.make(10)
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

    def test_indices_out_of_range_are_refused(self) -> None:
        dataset = self.filled([4, 5], 10)
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

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, found 0"),
            ({"batch_size": -1}, ValueError, "`batch_size` must be at least 1"),
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
    def test_bad_arguments_of_a_loader_are_refused(self, arguments, error, message) -> None:
        with pytest.raises(error, match=message):
            self.make(10).get_loader(**{"batch_size": 4, "sequence_length": 2, **arguments})

    def test_include_does_not_overwrite_a_field(self) -> None:
        dataset = self.make(10)
        dataset.add_episode({"mask": np.zeros(4)})
        with pytest.raises(ValueError, match="'mask' of `include` .* is also a field"):
            next(iter(dataset.get_loader(2, 2, include=("mask",))))

    # Data of all kinds.

    @pytest.mark.parametrize(
        "dtype",
        ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
        + ["float16", "bfloat16", "float32", "float64", "complex64"],
    )
    def test_every_dtype_comes_back_bit_by_bit(self, dtype) -> None:
        dataset = self.make(16)
        torch_dtype = getattr(torch, dtype)
        bits = torch.randint(0, 256, (10, 3 * torch_dtype.itemsize), dtype=torch.uint8)
        if dtype == "bool":
            bits %= 2
        for _ in range(2):  # The second wraps.
            dataset.add_episode({"x": bits.view(torch_dtype)})
        batch = next(iter(dataset.get_loader(16, 4, include=("step",), seed=0)))
        assert batch["x"].dtype == torch_dtype
        for b in range(16):
            assert torch.equal(batch["x"][b].view(torch.uint8), bits[batch["step"][b]])
        assert torch.equal(dataset.get_episode(0)["x"].view(torch.uint8), bits)
        whole = next(iter(dataset.get_loader(2)))
        assert torch.equal(whole["x"][0].view(torch.uint8), bits)

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4, 5), (8,), (64,)])
    def test_every_shape_comes_back(self, shape) -> None:
        dataset = self.make(9)
        episode = {"x": np.random.default_rng(0).integers(0, 255, (7, *shape)).astype(np.uint8), "t": np.arange(7)}
        dataset.add_episode(episode)
        dataset.add_episode(episode)
        batch = next(iter(dataset.get_loader(8, 3)))
        assert batch["x"].shape == (8, 3, *shape)
        np.testing.assert_array_equal(batch["x"].numpy(), episode["x"][batch["t"].numpy()])

    def test_views_of_all_kinds_are_taken_in(self) -> None:
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
            dataset = self.make(8)
            dataset.add_episode({"x": kind})
            expected = [[float(value) for value in row] for row in to_plain(kind)]
            assert dataset.get_episode(0)["x"].tolist() == expected
            assert dataset.get_episode(0)["x"].dtype == torch.float32

    def test_a_transform_is_applied_to_the_batch(self) -> None:
        dataset = self.filled([5], 10)
        loader = dataset.get_loader(4, 2, transform=lambda batch: (batch["reward"].sum(), batch))
        total, batch = next(iter(loader))
        assert total == batch["reward"].sum()
        single = next(iter(dataset.sequences(2, transform=lambda sequence: sequence["reward"].shape)))
        assert single == (2,)

    def test_verification_does_what_its_level_says(self) -> None:
        nan = {"x": np.full(3, np.nan, np.float32)}
        for mode, refused in (
            (VerificationMode.NO_CHECKS, False),
            (VerificationMode.BASIC_CHECKS, False),
            (VerificationMode.ALL_CHECKS, True),
        ):
            dataset = self.make(10, info=EpisodeDatasetInfo(verification_mode=mode))
            dataset.add_episode({"x": np.zeros(3, np.float32)})
            if refused:
                with pytest.raises(ValueError, match="`x` holds NaN"):
                    dataset.add_episode(nan)
            else:
                dataset.add_episode(nan)
        dataset = self.make(10, info=EpisodeDatasetInfo(verification_mode=VerificationMode.NO_CHECKS))
        dataset.add_episode({"x": np.zeros((3, 2), np.float32)})
        dataset.add_episode({"x": np.ones((3, 2), np.float64)})  # The caller vouches; it is cast.
        assert dataset.get_episode(1)["x"].dtype == torch.float32
        dataset = self.make(10, info=EpisodeDatasetInfo(verification_mode=VerificationMode.NO_CHECKS))
        dataset.add_episode({"x": np.zeros(3), "y": np.zeros(3)})
        for y, found in ((np.zeros(4), "4"), (np.zeros(()), "no")):
            with pytest.raises(ValueError, match=f"`y` has {found} rows, `x` has 3"):
                dataset.add_episode({"x": np.zeros(3), "y": y})
        assert dataset.episode_lengths == [3]

    # Handing it around.

    def test_a_copy_goes_on_by_itself(self) -> None:
        dataset = self.filled([5, 3, 9], 18)
        copied = copy.deepcopy(dataset)
        copied.add_episode(tagged.episode(4, 3))
        live = self.model([5, 3, 9, 4], 18)
        assert [tagged.number_and_length(episode) for episode in copied.episodes()] == live
        batch = copied.get_loader(64, 2, seed=0).stream.batch(0)
        assert {number for _, number, _, _ in tagged.origins(batch)} == {number for number, _ in live}
        assert [tagged.number_and_length(episode) for episode in dataset.episodes()] == [(0, 5), (1, 3), (2, 9)]

    def test_a_pickled_dataset_draws_the_same(self) -> None:
        dataset = self.filled([5, 3, 9, 4], 18)
        clone = pickle.loads(pickle.dumps(dataset))
        assert_same_batch(
            dataset.get_loader(8, 2, seed=1).stream.batch(0), clone.get_loader(8, 2, seed=1).stream.batch(0)
        )

    def test_the_table_names_every_field(self) -> None:
        dataset = self.make(10)
        assert "no fields yet" in repr(dataset)
        dataset.add_episode(tagged.episode(4, 0))
        table = repr(dataset)
        assert "1 episodes, 4 of 10 steps (40%), length 4 to 4, mean 4.0" in table
        for line in ("obs/pixels  ColorImage  uint8    (4, 2, 3)  24", "reward      Scalar      float32  ()         4"):
            assert line in table


def to_plain(kind: Any) -> Any:
    return kind.detach() if isinstance(kind, torch.Tensor) else kind


def assert_same_batch(one: Any, two: Any) -> None:
    one, two = tagged.flatten(one), tagged.flatten(two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), (name, one[name], two[name])
