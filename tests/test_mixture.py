"""A mixture's batches: exact shares, the right rows, whatever the members are and whoever reads."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.fields import Fields, Scalar, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.sampler import Sampler
from buffers.sharing.weights import SharedWeights, shares
from buffers.table import EpisodeTable, Windows
from tests import reading, tagged
from tests.forgetful import Forgetful
from tests.list_dataset import ListDataset


def member(number: int, dataset: EpisodeDataset, lengths: list[int]) -> EpisodeDataset:
    """A member whose rows say that they are of environment `number`."""
    for episode, length in enumerate(lengths):
        dataset.add_episode(tagged.episode(length, episode, env=number))
    return dataset


@pytest.fixture
def members(tmp_path) -> list[EpisodeDataset]:
    files = IndividualFileDataset(1000, directory=tmp_path, durability="rename")
    return [
        member(0, RingBufferDataset(40), [9, 11, 7, 12, 9]),
        member(1, files, [20, 6]),
        member(2, ListDataset(100), [5, 6, 7, 8]),
    ]


def sources(batch: dict[str, Any], mask: torch.Tensor | None = None) -> list[int]:
    """The member of each sequence, by its rows, which must agree with `source` where that is included."""
    found = [env for env, _, _, _ in tagged.origins(batch, mask)]
    if "source" in batch:
        assert batch["source"].dtype == torch.int64 and batch["source"].tolist() == found
    return found


# Shares.


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 10)), min_size=1, max_size=6).filter(any),
    st.integers(1, 200),
    st.integers(0, 10_000),
)
@example([0.1] * 10, 10, 0)  # Whole but for rounding errors.
@example([1.0, 2.0], 9, 1)
@settings(max_examples=150)
def test_shares_are_rounded_up_or_down(weights, num, seed) -> None:
    exact = np.array(weights) / sum(weights) * num
    found = shares(np.array(weights) / sum(weights), num, np.random.default_rng(seed))
    assert found.sum() == num and found.dtype == np.int64
    assert (np.abs(found - exact) < 1 + 1e-6).all()
    assert (found[np.array(weights) == 0] == 0).all()
    whole = np.abs(exact - np.rint(exact)) < 1e-12
    if whole.all():
        assert (found == np.rint(exact)).all()


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [1 / 3, 1 / 3, 1 / 3], [0.05, 0.05, 0.9], [0.1] * 10])
def test_shares_are_right_on_average(weights) -> None:
    rng, num, num_draws = np.random.default_rng(1), 7, 5_000
    counts = sum(shares(np.array(weights), num, rng) for _ in range(num_draws))
    exact = np.array(weights) * num
    # Each draw rounds up with a probability: the sum of roundings is binomial.
    up = exact % 1
    deviation = np.sqrt(num_draws * np.maximum(up * (1 - up), 1e-12))
    assert (np.abs(counts - exact * num_draws) <= 5 * deviation + 1e-6).all()


# Members of all kinds, all ways of drawing.


@given(
    st.lists(st.lists(st.integers(4, 12), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 16),
    st.sampled_from([1, 3, 4, None]),
    st.integers(0, 100),
)
@example([[4, 4], [12, 9, 12]], 16, None, 0)
@settings(max_examples=60)
def test_sequences_are_whole_and_of_their_member(lengths, batch_size, length, seed) -> None:
    # Some can hold no episode that is as long as those of others.
    datasets = [member(n, (RingBufferDataset, ListDataset)[n % 2](max(each)), each) for n, each in enumerate(lengths)]
    nested = MixtureDataset([datasets[0], MixtureDataset(datasets, [1] * len(datasets))], [1, 1])
    loader = nested.get_loader(batch_size, length, include=("source", "episode"), seed=seed)
    for batch in itertools.islice(loader, 3):
        mask = batch.get("mask")
        found = tagged.origins(batch, mask)
        assert batch["source"].tolist() == sorted(batch["source"].tolist())
        assert mask is None or mask.shape[1] == max(rows for _, _, _, rows in found)
        for (env, number, _, rows), source, episode in zip(found, batch["source"], batch["episode"], strict=True):
            assert (source == 1 or env == 0) and episode == number
            assert rows == (lengths[env][number] if length is None else length)


def test_a_mixture_may_be_a_member(members) -> None:
    mixture = MixtureDataset([members[0], MixtureDataset(members[1:], [1, 3])], [0.5, 0.5])
    batch = mixture.get_loader(16, 3, include=("source",)).stream.take()
    assert [env for env, _, _, _ in tagged.origins(batch)] == [0] * 8 + [1] * 2 + [2] * 6
    assert batch["source"].tolist() == [0] * 8 + [1] * 8, "the member of the outer mixture"


def test_chunks_and_seeds_do_as_with_any_dataset(members) -> None:
    mixture = MixtureDataset(members, [1, 2, 3])
    batches = [mixture.get_loader(12, 4, chunk_size=size, seed=5).stream.batch(3) for size in (None, 1, 2, 4)]
    for batch in batches[1:]:
        assert torch.equal(batch["code"], batches[0]["code"])
    assert not torch.equal(batches[0]["code"], mixture.get_loader(12, 4, seed=6).stream.batch(3)["code"])


class LastWindow(Sampler):
    """The last window of the newest episode, with a weight."""

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        assert length is not None
        position = np.full(num_windows, len(table) - 1)
        windows = table.windows(position, table.lengths[position] - length, length)
        windows.weight = np.full(num_windows, 2.0, np.float32)
        return windows


def test_the_sampler_draws_within_each_member(members) -> None:
    mixture = MixtureDataset(members, [1, 1, 1])
    batch = mixture.get_loader(6, 3, sampler=LastWindow(), include=("weight", "is_last")).stream.take()
    assert {(env, number) for env, number, _, _ in tagged.origins(batch)} == {(0, 4), (1, 1), (2, 3)}
    assert batch["is_last"][:, -1].all() and (batch["weight"] == 2).all()


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_see_new_episodes_and_weights(members, method, num_workers) -> None:
    mixture = MixtureDataset(members, [2, 1, 1])
    options = {"seed": 3, "include": ("source",)}
    alone = itertools.islice(mixture.get_loader(10, 4, **options), 6)
    loader = mixture.get_loader(10, 4, num_workers=num_workers, multiprocessing_context=method, **options)
    batches = iter(loader)
    for one in list(alone):
        two = next(batches)
        assert torch.equal(one["code"], two["code"]) and torch.equal(one["source"], two["source"])
    mixture.weights = [1, 0, 0]
    members[0].add_episode(tagged.episode(30, 9, env=0))
    ahead = 2 * num_workers + 1
    behind = list(itertools.islice(batches, ahead + 5))[ahead:]
    assert all(sources(batch) == [0] * 10 for batch in behind)
    assert 9 in {number for batch in behind for _, number, _, _ in tagged.origins(batch)}


def test_windows_that_are_gone_are_drawn_again_from_their_member(members) -> None:
    forgetful = Forgetful(100)
    member(1, forgetful, [9, 8])
    forgetful.gone = frozenset({0})
    mixture = MixtureDataset([members[0], forgetful], [0.5, 0.5])
    for batch in itertools.islice(mixture.get_loader(16, 3, include=("source",), seed=0), 6):
        assert sources(batch) == [0] * 8 + [1] * 8
        assert {number for env, number, _, _ in tagged.origins(batch) if env == 1} == {1}


def test_a_change_of_weights_is_seen_whole_or_not_at_all() -> None:
    weights, stop = SharedWeights(64), threading.Event()
    weights.set([1.0] * 64)

    def change() -> None:
        for n in itertools.cycle(range(64)):
            if stop.is_set():
                return
            weights.set([1.0] * 64 if n % 2 else [float(k == n) for k in range(64)])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(20_000):
            found = weights.get()
            assert found.max() == 1.0 or (found == 1 / 64).all()
    finally:
        stop.set()
        thread.join()


# What it holds.


def test_it_counts_all_members_together(members) -> None:
    mixture = MixtureDataset(members, [1, 1, 1])
    assert mixture.num_episodes == sum(dataset.num_episodes for dataset in members) == len(list(mixture.episodes()))
    assert len(mixture) == mixture.num_timesteps == sum(dataset.num_timesteps for dataset in members)
    assert mixture.episode_lengths == [length for dataset in members for length in dataset.episode_lengths]
    assert mixture.capacity == 40 + 1000 + 100
    assert not mixture.is_empty and not mixture.is_full
    assert mixture.num_evicted == sum(dataset.num_evicted for dataset in members) > 0
    for position, episode in enumerate(mixture.episodes()):
        tagged.assert_same_episode(mixture.get_episode(position), to_numpy(episode))
    with pytest.raises(ValueError, match="`episode_index`=99 is out of range"):
        mixture.get_episode(99)
    assert repr(mixture).splitlines()[1].startswith("  0: weight 0.333, RingBufferDataset: 4 episodes")
    assert mixture.datasets == tuple(members)


def to_numpy(tree: Any) -> Any:
    return {k: to_numpy(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.numpy()


def test_a_pickled_one_draws_the_same_and_a_copy_goes_on(members) -> None:
    mixture = MixtureDataset(members[::2], [1, 3])
    expected = mixture.get_loader(8, 3, seed=1).stream.batch(0)["code"]
    assert len(reading.handle_of(MixtureDataset(members[:2], [1, 1]))) < 65_536
    clone = reading.reader_of(mixture)
    assert clone.get_loader(8, 3, seed=1).stream.batch(0)["code"].equal(expected)
    copied = copy.deepcopy(mixture)
    mixture.weights = [1, 0]
    assert copied.weights.tolist() == [0.25, 0.75] and clone.weights.tolist() == [1, 0]
    for number in range(4, 30):  # It was drawn from before it was copied.
        copied.datasets[1].add_episode(tagged.episode(5, number, env=2))
    assert members[2].num_episodes == 4
    drawn = tagged.origins(copied.get_loader(2048, 3, seed=0).stream.take())
    assert len({number for env, number, _, _ in drawn if env == 2}) == copied.datasets[1].num_episodes


# Fields.


def ring_of(**fields: Any) -> RingBufferDataset:
    return RingBufferDataset(20, EpisodeDatasetInfo(Fields(fields)))


def test_fields_that_differ_are_named_with_both() -> None:
    one, two = ring_of(x=Vector(3), y=Scalar()), ring_of(x=Vector(4), y=Scalar())
    with pytest.raises(
        ValueError, match=r"member 1 differ .* member 0: field `x` is float32 \(4,\), expected float32 \(3,\)"
    ):
        MixtureDataset([one, two], [1, 1])
    three = ring_of(y=Scalar(), z=Scalar())
    with pytest.raises(ValueError, match=r"member 1 .* missing \['x'\], unexpected \['z'\]"):
        MixtureDataset([one, three], [1, 1])
    with pytest.raises(ValueError, match="no field in common"):
        MixtureDataset([ring_of(x=Scalar()), ring_of(y=Scalar())], [1, 1], fields="common")
    with pytest.raises(ValueError, match="Member 0 has no field `z`"):
        MixtureDataset([one, three], [1, 1], fields=("z",))
    with pytest.raises(ValueError, match="field `x` is"):
        MixtureDataset([one, two], [1, 1], fields=("x",))
    with pytest.raises(TypeError, match="`fields` must be None, 'common', or names"):
        MixtureDataset([one, two], [1, 1], fields=(3,))  # type: ignore[arg-type]


def test_batches_can_be_restricted_to_common_or_named_fields(tmp_path) -> None:
    def episode(value: float, **more: Any) -> dict[str, Any]:
        return {"obs": {"a": np.full((6, 2), value, np.float32), "b": np.full(6, value, np.float32)}, **more}

    ring, files = RingBufferDataset(20), IndividualFileDataset(50, directory=tmp_path, durability="rename")
    npz = ListDataset(50)
    ring.add_episode(episode(1, reward=np.ones(6)))
    files.add_episode(episode(2, reward=np.ones(6), extra=np.zeros((6, 700), np.int64)))
    npz.add_episode(episode(3, reward=np.ones(6, np.int64)))
    for fields, expected in (("common", {"obs/a", "obs/b"}), (("obs/a",), {"obs/a"}), (("obs",), {"obs/a", "obs/b"})):
        mixture = MixtureDataset([ring, files, npz], [1, 1, 1], fields=fields)
        batch = mixture.get_loader(9, 3, include=("source",)).stream.take()
        source = batch.pop("source")
        flat = tagged.flatten(batch)
        assert set(flat) == expected
        for value in flat.values():
            assert (value.reshape(9, -1) == source[:, None] + 1).all()
    restricted = MixtureDataset([MixtureDataset([files, npz], [1, 1], fields="common"), ring], [1, 1], fields="common")
    assert set(restricted.fields or ()) == {"obs/a", "obs/b"}
    assert (restricted.get_loader(4, 2).stream.take()["obs"]["b"][2:] == 1).all()


def test_a_member_without_fields_takes_those_of_the_others() -> None:
    full, empty = member(0, RingBufferDataset(40), [9]), RingBufferDataset(40)
    mixture = MixtureDataset([full, empty], [1, 0])
    assert empty.fields == full.fields == mixture.fields
    assert sources(mixture.get_loader(4, 3).stream.take()) == [0] * 4
    unsure = MixtureDataset([full, RingBufferDataset(40)], [1, 0], fields="common")
    for num_workers in (0, 1):
        with pytest.raises(RuntimeError, match=r"fields of members \[1\] are not known yet"):
            next(iter(unsure.get_loader(4, 3, num_workers=num_workers)))
    later = MixtureDataset([RingBufferDataset(40), RingBufferDataset(40)], [1, 1])
    assert later.fields is None
    batches = iter(later.get_loader(4, 3))
    with pytest.raises(RuntimeError, match="Member 0 .* empty"):
        next(batches)
    for number, dataset in enumerate(later.datasets):
        member(number, dataset, [5])
    assert sources(next(batches)) == [0, 0, 1, 1]


# Bad input.


def test_an_empty_or_short_member_is_an_error_in_every_batch(members) -> None:
    inner = MixtureDataset([members[0], RingBufferDataset(20)], [1, 1])
    mixture = MixtureDataset([members[2], inner], [0.999, 0.001])
    for _ in range(5):
        with pytest.raises(RuntimeError, match=r"Member 1\.1 \(RingBufferDataset\) of the mixture: .* is empty"):
            mixture.get_loader(4, 3).stream.take()
    mixture = MixtureDataset([members[0], members[2]], [1, 1])
    for num_workers in (0, 1):
        with pytest.raises(RuntimeError, match="Member 1 .* `sequence_length`=9 is longer than every stored episode"):
            next(iter(mixture.get_loader(4, 9, num_workers=num_workers)))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1], ValueError, r"`weights` must be 2 numbers, one a member, found shape \(1,\)"),
        ([1, 2, 3], ValueError, "must be 2 numbers"),
        ([1, -1], ValueError, "at least 0"),
        ([0, 0], ValueError, "not all 0"),
        ([1, float("nan")], ValueError, "finite"),
        ([1, float("inf")], ValueError, "finite"),
        (["a", "b"], TypeError, "`weights` must be numbers"),
        (None, (TypeError, ValueError), "`weights` must be"),
        (3, ValueError, r"found shape \(\)"),
    ],
)
def test_bad_weights_are_refused_and_change_nothing(members, weights, error, message) -> None:
    with pytest.raises(error, match=message):
        MixtureDataset(members[:2], weights)
    mixture = MixtureDataset(members[:2], [1, 3])
    with pytest.raises(error, match=message):
        mixture.weights = weights
    assert mixture.weights.tolist() == [0.25, 0.75]
    mixture.weights = [1e308, 1e308]
    assert mixture.weights.tolist() == [0.5, 0.5], "whatever their size"


def test_a_mixture_can_be_sampled_once_every_weighted_member_can(members) -> None:
    buffer = ReplayBuffer(mixture := MixtureDataset([RingBufferDataset(20), *members], [1, 1, 1, 1]), 4, 3)
    for action, expected in (
        (lambda: None, False),
        (lambda: mixture.datasets[0].add_episode(tagged.episode(2, 0)), False),
        (lambda: setattr(mixture, "weights", [0, 1, 1, 1]), True),
        (lambda: setattr(mixture, "weights", [1, 1, 1, 1]), False),
        (lambda: mixture.datasets[0].add_episode(tagged.episode(3, 1)), True),
    ):
        action()
        assert buffer.can_sample is expected


def test_a_mixture_of_readers_that_were_empty_can_be_sampled_once_each_has_an_episode(tmp_path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    readers = [IndividualFileDataset(directory=tmp_path / name, mode="r") for name in ("one", "other")]
    buffer = ReplayBuffer(MixtureDataset(readers, [1.0, 1.0]), batch_size=8, sequence_length=2)
    found = []
    for number, name in enumerate(("one", "other")):
        with IndividualFileDataset(100, directory=tmp_path / name) as writer:
            writer.add_episode(tagged.episode(5, number))
        end = time.monotonic() + 60 * number
        # A reader whose look at its directory took long does not look again at once.
        while not buffer.can_sample and time.monotonic() < end:
            time.sleep(0.01)
        found.append(buffer.can_sample)
    assert found == [False, True]
    assert buffer.sample()["code"].shape == (8, 2)


def test_ids_of_a_batch_are_those_of_the_dataset_that_holds_the_episode(members) -> None:
    mixture = MixtureDataset(members, [1, 1, 1])
    batch = mixture.get_loader(30, 3, include=("source", "episode", "index", "step"), seed=0).stream.take()
    for b, source in enumerate(batch["source"].tolist()):
        table, episode = members[source].table, int(batch["episode"][b])
        assert int(table.starts[table.position(episode)]) == int(batch["index"][b, 0] - batch["step"][b, 0])
        whole, step = members[source].episode_of_id(episode), int(batch["step"][b, 0])
        assert whole["code"][step : step + 3].equal(batch["code"][b])


def test_bad_members_and_includes_are_refused(members) -> None:
    with pytest.raises(ValueError, match="at least one member"):
        MixtureDataset([], [])
    with pytest.raises(TypeError, match="Members must be EpisodeDatasets, found str"):
        MixtureDataset(["ring"], [1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="'source' .* a RingBufferDataset has none"):
        members[0].get_loader(4, 3, include=("source",))


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"epochs": 1}])
def test_a_mixture_of_some_fields_is_drawn_once_a_reader_has_an_episode(tmp_path, options) -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(5, 0))
    with IndividualFileDataset(100, directory=tmp_path, durability="rename") as writer:
        reader = IndividualFileDataset(directory=tmp_path, mode="r")
        loader = MixtureDataset([ring, reader], [1, 1], fields="common").get_loader(4, 2, **options)
        writer.add_episode(tagged.episode(6, 1))
        time.sleep(0.1)
        assert len(next(iter(loader))["code"]) == 4
