from __future__ import annotations

import copy
import itertools
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import EpisodeDataset, RingBufferDataset
from buffers.dataset.fields import Fields, Scalar, TensorType, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.evictor import FIFOEvictor
from buffers.sampler import UniformEpisodeSampler, UniformSampler
from buffers.table import EpisodeTable, Windows
from tests import tagged
from tests.contract import DatasetContract


class RingModel:
    """The reference: episodes as (start, number, length), oldest first."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.live, self.next_start, self.num_evicted = capacity, [], 0, 0
        self.has_evicted = False

    def add(self, number: int, length: int) -> int:
        lap, place = divmod(self.next_start, self.capacity)
        start = self.next_start if place + length <= self.capacity else (lap + 1) * self.capacity
        self.next_start = start + length
        while self.live and self.live[0][0] < self.next_start - self.capacity:
            self.evict()
            self.has_evicted = True
        self.live.append((start, number, length))
        return start

    def evict(self) -> None:
        del self.live[0]
        self.num_evicted += 1

    def windows(self, length: int) -> set[tuple[int, int, int]]:
        """(step id, number, step) of each."""
        return {(start + t, number, t) for start, number, rows in self.live for t in range(rows - length + 1)}


def ring_model(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    model = RingModel(capacity)
    for number, length in enumerate(lengths):
        model.add(number, length)
    return [(number, length) for _, number, length in model.live]


def ring_starts(lengths: list[int], capacity: int) -> list[int]:
    model = RingModel(capacity)
    return [model.add(number, length) for number, length in enumerate(lengths)]


class TestRingBufferDataset(DatasetContract):
    model = staticmethod(ring_model)
    starts = staticmethod(ring_starts)

    def make(self, capacity: int, info: EpisodeDatasetInfo | None = None) -> EpisodeDataset:
        return RingBufferDataset(capacity, info)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestRingBufferDatasetOnTheGPU:
    def test_batches_are_made_on_the_device(self) -> None:
        dataset = RingBufferDataset(11, device="cuda")
        for number in range(5):
            dataset.add_episode(tagged.episode(4, number))
        batch = next(iter(dataset.get_loader(64, 3, include=("index", "is_last"), seed=0)))
        assert all(value.is_cuda for value in tagged.flatten(batch).values())
        on_cpu = {name: value.cpu() for name, value in tagged.flatten(batch).items()}
        on_cpu["obs"] = {"state": on_cpu.pop("obs/state"), "pixels": on_cpu.pop("obs/pixels")}
        assert {(number, first) for _, number, first, _ in tagged.origins(on_cpu)} == {(3, 0), (3, 1), (4, 0), (4, 1)}

    def test_half_precision_and_bfloat16_survive_the_device(self) -> None:
        dataset = RingBufferDataset(7, device="cuda", half_precision=True)
        episode = {"x": torch.arange(5.0), "y": torch.arange(5.0, dtype=torch.bfloat16, device="cuda")}
        dataset.add_episode(episode)
        dataset.add_episode(episode)
        found = dataset.get_episode(0)
        assert found["x"].dtype == torch.float32 and found["y"].dtype == torch.bfloat16
        assert found["x"].tolist() == found["y"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]

    def test_a_pickled_ring_draws_what_is_added_to_it_later(self) -> None:
        dataset = RingBufferDataset(10, device="cuda")
        dataset.add_episode({"x": torch.zeros(10), "y": torch.zeros(10, 8, dtype=torch.uint8)})
        next(iter(dataset.get_loader(4, 3)))
        clone = pickle.loads(pickle.dumps(dataset))
        clone.add_episode({"x": torch.ones(10), "y": torch.ones(10, 8, dtype=torch.uint8)})
        batch, before = next(iter(clone.get_loader(4, 3))), next(iter(dataset.get_loader(4, 3)))
        assert batch["x"].eq(1).all() and batch["y"].eq(1).all()
        assert before["x"].eq(0).all() and before["y"].eq(0).all()


KINDS = [
    TensorType(shape, dtype)
    for dtype in (torch.bool, torch.uint8, torch.uint16, torch.int64, torch.bfloat16, torch.float32, torch.complex64)
    for shape in ((), (3,), (8,), (0,), (2, 2), (300,))
]


def check_ring(ring: RingBufferDataset, model: RingModel) -> None:
    assert [
        (int(ring.table.starts[n]), *tagged.number_and_length(e)) for n, e in enumerate(ring.episodes())
    ] == model.live
    num_steps = sum(length for _, _, length in model.live)
    assert (len(ring), ring.num_evicted) == (num_steps, model.num_evicted)
    assert ring.is_full is (model.has_evicted or num_steps == model.capacity)


def drawn_windows(ring: RingBufferDataset, length: int, num: int) -> set[tuple[int, int, int]]:
    batch = ring.get_loader(num, length, include=("index",), seed=0).stream.batch(0)
    origins = tagged.origins(batch)
    assert batch["index"].diff().eq(1).all()
    return {(start, n, t) for start, (_, n, t, _) in zip(batch["index"][:, 0].tolist(), origins, strict=True)}


@given(
    st.integers(1, 16),
    st.lists(st.one_of(st.integers(1, 16), st.sampled_from(["evict", "copy"])), min_size=1, max_size=20),
    st.integers(1, 16),
)
@settings(max_examples=120)
def test_a_ring_agrees_with_its_model(capacity, operations, length) -> None:
    ring, model = RingBufferDataset(capacity, evictor=FIFOEvictor()), RingModel(capacity)
    for number, operation in enumerate(operations):
        if operation == "copy":
            ring = copy.deepcopy(ring)
        elif operation == "evict":
            if model.live:
                model.evict()
                ring.evict_episode(0)
        elif operation <= capacity:
            model.add(number, operation)
            ring.add_episode(tagged.episode(operation, number))
            # What was counted before an episode comes or leaves must still be right after it.
            windows = model.windows(min(length, capacity))
            if windows:
                assert drawn_windows(ring, min(length, capacity), 40 * len(windows)) == windows
        check_ring(ring, model)
    for length in range(1, capacity + 1):
        windows = model.windows(length)
        if windows:
            assert drawn_windows(ring, length, 40 * len(windows)) == windows


class LastWindowNeverDrawn(UniformSampler):
    """The mistake of many: starts below L - T instead of up to it."""

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        assert length is not None
        windows = super().draw(table, num_windows, length + 1, rng)
        return Windows(length, windows.start, windows.step, windows.episode, windows.episode_length)


@pytest.mark.parametrize(
    ("sampler", "is_uniform"),
    [(UniformSampler(), True), (LastWindowNeverDrawn(), False), (UniformEpisodeSampler(), False)],
)
def test_chi_square_over_windows_finds_the_mutants(sampler: UniformSampler, is_uniform: bool) -> None:
    lengths = [4, 12, 5, 9, 4, 3]
    dataset = RingBufferDataset(34)
    for number, length in enumerate(lengths):
        dataset.add_episode(tagged.episode(length, number))
    counts = DatasetContract.count_windows(dataset, 3, sampler, num_batches=60)
    windows = [(number, step) for number, rows in ring_model(lengths, 34) for step in range(rows - 2)]
    observed = np.array([counts.get(window, 0) for window in windows])
    assert tagged.chi_square_is_plausible(observed, np.ones(len(windows))) is is_uniform


class Stubborn(UniformSampler):
    """Always the same windows of the first episode: (number of them, steps, first step)."""

    def __init__(self, *windows: int) -> None:
        self.windows = windows

    def draw(self, table: EpisodeTable, num_windows: int, length: int | None, rng: np.random.Generator) -> Windows:
        if not self.windows:
            return None  # type: ignore[return-value]
        num, steps, first = self.windows
        return table.windows(np.zeros(num, np.int64), np.full(num, first), steps)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ((), "asked for 8 windows, found None"),
        ((7, 3, 0), "asked for 8 windows"),
        ((8, 4, 0), "asked for windows of 3 steps, found 4"),
        (
            (8, 3, 3),
            r"row 3 of 5. Choose `step` by `table.steps_to_draw\(position, 3\)`, .* `pad_before` and `pad_after`",
        ),
        ((8, 3, -1), "not within its episode: it begins at row -1 of 5"),
    ],
)
def test_bad_windows_of_a_users_sampler_are_refused(windows, message) -> None:
    dataset = RingBufferDataset(20)
    dataset.add_episode(tagged.episode(5, 0))
    dataset.add_episode(tagged.episode(5, 1))
    with pytest.raises(ValueError, match=message):
        dataset.get_loader(8, 3, sampler=Stubborn(*windows)).stream.take()
    with pytest.raises(ValueError, match="asked for whole episodes, which begin at `step` 0"):
        dataset.get_loader(8, sampler=Stubborn(8, 3, 2)).stream.take()
    assert set(tagged.origins(dataset.get_loader(8, 3, sampler=Stubborn(8, 3, 2)).stream.take())) == {(0, 0, 2, 3)}


def test_only_the_oldest_can_be_evicted() -> None:
    dataset = RingBufferDataset(10)
    for number in range(3):
        dataset.add_episode(tagged.episode(3, number))
    with pytest.raises(ValueError, match="can only evict its oldest"):
        dataset.evict_episode(1)
    assert dataset.episode_lengths == [3, 3, 3]


class Newest(FIFOEvictor):
    def evict(self, dataset: EpisodeDataset) -> int:
        return dataset.num_episodes - 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "`capacity` must be at least 1, found 0"),
        ({"capacity": 1e6}, TypeError, "`capacity` must be an integer, found float"),
        ({"device": "gpu"}, ValueError, "`device`='gpu' cannot be used"),
        ({"info": Fields(x=Scalar())}, TypeError, "`info` must be an EpisodeDatasetInfo"),
        ({"evictor": Newest()}, ValueError, "can only use FIFOEvictor, found Newest"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        RingBufferDataset(**{"capacity": 10, **arguments})


def test_memory_that_is_not_available_is_an_error_at_construction() -> None:
    info = EpisodeDatasetInfo(Fields(x=Vector(1_000_000)))
    with pytest.raises(MemoryError, match=r"`capacity` of 10000000000 steps needs 40000.0 TB on cpu"):
        RingBufferDataset(10_000_000_000, info)


def test_a_ring_larger_than_the_machines_memory_warns_once(monkeypatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get)
    ring = RingBufferDataset(1025)
    with pytest.warns(UserWarning, match="1025 steps needs 4.1 MB on cpu once it is full, which has 4.1 MB") as caught:
        ring.add_episode({"x": np.zeros((5, 1000), np.float32)})
    ring.add_episode({"x": np.zeros((5, 1000), np.float32)})
    assert len(caught) == 1
    RingBufferDataset(1024, EpisodeDatasetInfo(Fields(x=Vector(1000))))


def test_half_precision_stores_half_and_gives_float32_back() -> None:
    dataset = RingBufferDataset(7, half_precision=True)
    episode = {"x": np.linspace(-1, 1, 10, dtype=np.float32).reshape(5, 2), "y": np.arange(5.0), "z": np.arange(5)}
    dataset.add_episode(episode)
    dataset.add_episode(episode)
    assert "x      Vector  float32 as float16  (2,)   4             20 B" in repr(dataset)
    found = dataset.get_episode(0)
    assert [found[name].dtype for name in "xyz"] == [torch.float32, torch.float64, torch.int64]
    np.testing.assert_array_equal(found["x"].numpy(), episode["x"].astype(np.float16).astype(np.float32))
    for length in (1, 2):
        batch = next(iter(dataset.get_loader(32, length, seed=0)))
        assert batch["x"].dtype == torch.float32
        np.testing.assert_array_equal(batch["x"].numpy(), found["x"].numpy()[batch["z"].numpy()])
    with pytest.raises(ValueError, match="`x` holds numbers beyond 65504"):
        dataset.add_episode({**episode, "x": np.full((5, 2), 1e5, np.float32)})
    dataset.add_episode({**episode, "x": np.full((5, 2), np.inf, np.float32)})


# Small batches are read by numpy, rows of 4 MB by torch; the episode after 70 rows does not fit before the end.
@pytest.mark.parametrize("num_before", [0, 70])
def test_rows_of_every_kind_are_drawn_as_they_were_added(num_before, threads) -> None:
    kinds = {f"{t.dtype} {t.shape}": t for t in KINDS}
    rows = torch.arange(40)
    episode = {
        name: (rows.view(-1, *[1] * len(t.shape)).expand(40, *t.shape) % 2).to(t.dtype).contiguous()
        for name, t in kinds.items()
    }
    dataset = RingBufferDataset(100)
    if num_before:
        before = {name: values[:1].expand(num_before, *values.shape[1:]) for name, values in episode.items()}
        dataset.add_episode({**before, "row": torch.full((num_before,), -1)})
    dataset.add_episode({**episode, "row": rows})
    assert dataset.num_episodes == 1
    # More sizes than a ring remembers.
    sizes = [*itertools.product((1, 2, 8), (1, 2, 3)), (1024, 1), (1024, 2)]
    loaders = [(size, iter(dataset.get_loader(*size, seed=0))) for size in sizes]
    for (batch_size, length), batches in loaders * 2:
        batch = next(batches)
        assert batch["row"].diff().eq(1).all()
        for name, kind in kinds.items():
            assert batch[name].is_contiguous() and batch[name].shape == (batch_size, length, *kind.shape)
            assert torch.equal(batch[name], episode[name][batch["row"]])
