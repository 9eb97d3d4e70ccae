"""Windows that reach beyond their episodes, and rows at offsets: each once, with the right values and masks."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.loading import layout
from buffers.sampler import UniformEpisodeSampler, UniformSampler
from buffers.table import DrawContext, Selection, Windows
from buffers.writer import EpisodeWriter
from tests import tagged
from tests import windows_model as model
from tests.list_dataset import ListDataset
from tests.windows_model import EVERYTHING, LENGTHS, PROPERTY, live, padded, place


def check_a_pass(dataset: Any, batch_size: int, length: int, before: int, after: int, pad: str) -> None:
    """Every window comes once, with the rows, the mask and the ids that the model says."""
    episodes = live(dataset)
    expected = {
        (number, first) for number, num in episodes.items() for first in model.starts(length, num, before, after)
    }
    options: dict[str, Any] = {"pad_before": before, "pad_after": after, "pad": pad, "include": EVERYTHING}
    if length - before - after > dataset.longest_window:
        with pytest.raises(ValueError, match="exceeds the `capacity`"):
            dataset.get_loader(batch_size, length, epochs=1, **options)
        return
    loader = dataset.get_loader(batch_size, length, epochs=1, seed=0, **options)
    if not expected:
        with pytest.raises(RuntimeError, match="is longer than every stored episode"):
            next(iter(loader))
        return
    assert len(loader) == -(-len(expected) // batch_size)
    found: Counter[tuple[int, int]] = Counter()
    for batch in loader:
        for b in range(len(batch["step"])):
            number, first = place(batch, b)
            model.assert_sequence(batch, b, number, episodes[number], first, length, pad)
            found[number, first] += 1
    assert set(found) == expected and set(found.values()) == {1}


@given(st.sampled_from(model.KINDS), LENGTHS, st.integers(9, 30), padded(12), st.booleans(), st.integers(1, 9))
@example("ring", [9, 1], 9, (12, 11, 11), True, 3)
@example("list", [1, 9], 9, (12, 11, 11), False, 3)
@PROPERTY
def test_a_pass_has_every_window_once_and_padded_right(kind, lengths, capacity, shape, is_edge, batch_size) -> None:
    with model.stored(kind, lengths, capacity) as dataset:
        check_a_pass(dataset, batch_size, *shape, "edge" if is_edge else "zero")


MUTANTS = {
    "begins a row late": (Selection, "first_steps", lambda self, cut, length: 1 - self.pad_before),
    "begins a row early": (Selection, "first_steps", lambda self, cut, length: -1 - self.pad_before),
    "ends a row early": (Selection, "room", lambda self, cut: (self.pad_before, self.pad_after - 1)),
    "ends a row late": (Selection, "room", lambda self, cut: (self.pad_before, self.pad_after + 1)),
    "is real a row early": (Windows, "mask", property(lambda self: self.steps + 1 < self.episode_length[:, None])),
    "is real before": (Windows, "mask", property(lambda self: self.steps < self.episode_length[:, None])),
    "is real behind": (Windows, "mask", property(lambda self: self.steps >= 0)),
    "is not padded": (layout, "pad", lambda windows, rows, mask, with_edge: None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("pad", ["zero", "edge"])
def test_every_mutant_of_the_ends_is_found(mutant, pad, monkeypatch) -> None:
    with model.stored("ring", [5, 2, 7], 40) as ring:
        check_a_pass(ring, 4, 4, 2, 3, pad)
        monkeypatch.setattr(*MUTANTS[mutant])
        with pytest.raises((AssertionError, IndexError, RuntimeError)):
            check_a_pass(ring, 4, 4, 2, 3, pad)


OFFSETS = st.lists(st.integers(-6, 6), min_size=1, max_size=4).map(tuple) | st.tuples(
    st.integers(-5, 4), st.integers(1, 5)
).map(lambda run: tuple(range(run[0], run[0] + run[1])))


@given(
    st.sampled_from(model.KINDS),
    LENGTHS,
    st.integers(9, 30),
    st.fixed_dictionaries({}, optional={name: OFFSETS for name in ("obs", "obs/pixels", "reward", "flag")}),
    st.booleans(),
    st.integers(1, 9),
    st.sampled_from([None, 1, 3]),
)
@example("files", [9], 9, {"obs": (6,), "reward": (-6, -5)}, True, 2, None)
@PROPERTY
def test_offsets_read_each_field_at_its_own_rows(kind, lengths, capacity, offsets, is_edge, batch_size, chunk) -> None:
    pad = "edge" if is_edge else "zero"
    kind = ".safetensors" if kind == "files" else kind
    with model.stored(kind, lengths, capacity) as dataset:
        episodes = live(dataset)
        options: dict[str, Any] = {"offsets": offsets, "pad": pad, "include": EVERYTHING}
        if chunk is not None:
            batch_size, options["chunk_size"] = 6, chunk
        found = []
        for batch in dataset.get_loader(batch_size, epochs=1, seed=0, **options):
            flat, masks = tagged.flatten(batch), tagged.flatten(batch["mask"])
            for b in range(len(batch["step"])):
                number, step = divmod(int(batch["code"][b, 0]), 10**6)
                assert batch["step"][b].tolist() == [step]
                assert batch["is_first"][b].tolist() == [step == 0]
                assert batch["is_last"][b].tolist() == [step == episodes[number] - 1]
                for name in tagged.flatten(tagged.rows(0, 0, 0)):
                    at = offsets_of(name, offsets)
                    steps = [step + offset for offset in at]
                    expected = model.expected_rows(number, episodes[number], steps, pad)[name]
                    np.testing.assert_array_equal(flat[name][b].cpu().numpy(), expected, err_msg=name, strict=True)
                    assert masks[name][b].tolist() == model.real(episodes[number], steps).tolist()
                found.append((number, step))
        assert sorted(found) == sorted((number, step) for number, num in episodes.items() for step in range(num))


def offsets_of(name: str, offsets: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    keys = [key for key in offsets if f"{name}/".startswith(f"{key}/")]
    return offsets[max(keys, key=len)] if keys else (0,)


@pytest.mark.parametrize("sampler", [UniformSampler(), UniformEpisodeSampler()])
@pytest.mark.parametrize("kind", ["ring", "mixture"])
def test_padded_windows_are_as_likely_as_the_sampler_says(sampler, kind) -> None:
    lengths = [5, 5, 1, 3, 9, 2]
    counts: Counter[tuple[int, int]] = Counter()
    with model.stored(kind, lengths) as dataset:
        loader = dataset.get_loader(128, 4, pad_before=2, pad_after=3, sampler=sampler, seed=3, include=EVERYTHING)
        for batch in itertools.islice(loader, 60):
            counts.update(place(batch, b) for b in range(128))
    shares = {}
    for number, num in enumerate(lengths):
        windows = model.starts(4, num, 2, 3)
        of_member = [lengths[n] for n in range(len(lengths)) if kind == "ring" or n % 2 == number % 2]
        if isinstance(sampler, UniformSampler):
            whole = sum(len(model.starts(4, n, 2, 3)) for n in of_member)
            shares |= {(number, first): 1 / whole for first in windows}
        else:
            able = sum(len(model.starts(4, n, 2, 3)) > 0 for n in of_member)
            shares |= {(number, first): 1 / len(windows) / able for first in windows}
    assert counts.keys() == shares.keys()
    assert tagged.chi_square_is_plausible(
        np.array([counts[window] for window in shares]), np.array(list(shares.values()))
    )


def test_loaders_of_one_dataset_do_not_mix_up_their_windows() -> None:
    options: list[dict[str, Any]] = [
        {},
        {"pad_before": 2},
        {"pad_after": 2},
        {"split": ("train", 0.5, 0), "pad_before": 2},
    ]
    alone = []
    for each in options:
        with model.stored("ring", [5, 3, 9, 1, 4]) as ring:
            alone.append(list(itertools.islice(ring.get_loader(8, 3, seed=0, **each), 4)))
    with model.stored("ring", [5, 3, 9, 1, 4]) as ring:
        loaders = [iter(ring.get_loader(8, 3, seed=0, **each)) for each in options]
        for n in range(4):
            for loader, batches in zip(loaders, alone, strict=True):
                assert torch.equal(next(loader)["code"], batches[n]["code"])


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    padded(6),
)
@PROPERTY
def test_pieces_have_the_windows_of_their_stream_and_no_padding_at_cuts(lengths, cut, shape) -> None:
    length, before, after = shape
    ring = RingBufferDataset(1000)
    writer = EpisodeWriter(ring, 1, *cut)
    for number, num in enumerate(lengths):
        for step in range(num):
            writer.add_step(tagged.rows(0, number, step), step == num - 1)
    possible = {
        (number, first) for number, num in enumerate(lengths) for first in model.starts(length, num, before, after)
    }
    loader = ring.get_loader(8, length, epochs=1, pad_before=before, pad_after=after, pad="edge", include=EVERYTHING)
    found: Counter[tuple[int, int]] = Counter()
    for batch in loader if ring.table.reachable(length, Selection(before, after)) else []:
        for b in range(len(batch["step"])):
            t = int(batch["mask"][b].to(torch.int8).argmax())
            number, step = batch["obs"]["state"][b, t, 1:].long().tolist()
            first = step - t
            steps = range(first, first + length)
            # Real wherever the stream has a row.
            assert batch["mask"][b].tolist() == model.real(lengths[number], steps).tolist()
            rows = model.expected_rows(number, lengths[number], steps, "edge")
            np.testing.assert_array_equal(batch["code"][b].numpy(), rows["code"])
            found[number, first] += 1
    assert set(found) <= possible and set(found.values()) <= {1}
    if length <= cut[1] + 1:
        assert set(found) == possible


@pytest.mark.parametrize("kind", ["ring", ".safetensors", "mixture"])
@pytest.mark.parametrize(
    "options",
    [
        {"pad_before": 3, "pad_after": 2, "sequence_length": 5},
        {"offsets": {"obs": (-3, -1, 0), "code": range(4)}},
        {"pack": 11},
    ],
)
def test_workers_make_the_same_batches(kind, options) -> None:
    with model.stored(kind, [5, 3, 9, 1, 4]) as dataset:
        loaders = [dataset.get_loader(6, num_workers=n, seed=5, include=("index",), **options) for n in (0, 2)]
        for one, other in zip(*(itertools.islice(loader, 6) for loader in loaders), strict=True):
            one, other = tagged.flatten(one), tagged.flatten(other)
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_window_is_kept_as_long_as_its_rows_live() -> None:
    """The step id at which a padded window begins may be that of a row, of another episode, that is gone."""
    ring = RingBufferDataset(12)
    for number in range(4):
        ring.add_episode(tagged.episode(4, number))
    assert live(ring).keys() == {1, 2, 3}
    loader = ring.get_loader(256, 4, pad_before=3, seed=0, include=EVERYTHING)
    batches = iter(loader)
    counts = Counter(place(next(batches), b) for b in range(256))
    assert {first for number, first in counts if number == 1} == {-3, -2, -1, 0}
    # Evicted while they are read: what is left of the oldest is drawn again.
    rng, source = np.random.Generator(np.random.Philox(0)), loader.stream.source
    drawn = source.draw([UniformSampler()], 256, 4, rng, Selection(3), DrawContext())
    ring.add_episode(tagged.episode(4, 4))
    rows, was_read = ring.read(drawn)
    np.testing.assert_array_equal(was_read, drawn.episode != 1)
    assert was_read is not None and 0 < was_read.sum() < 256


def test_a_buffer_takes_the_options_of_windows_and_says_what_it_reaches() -> None:
    ring = RingBufferDataset(100)
    for number, length in enumerate([30, 8, 8]):
        ring.add_episode(tagged.episode(length, number))
    short = ReplayBuffer(ring, 4, 12, pad_before=3, seed=0)
    assert short.stats()["reachable"] == pytest.approx(30 / 46) and "65% of the stored steps" in repr(short)
    for number in range(3, 7):
        ring.add_episode(tagged.episode(8, number))
    with pytest.warns(UserWarning, match=r"Pad windows \(`pad_before`, `pad_after`\)"):
        short.sample()
    assert ReplayBuffer(ring, 4, 12, pad_before=4).stats()["reachable"] == 1.0
    padded_buffer = ReplayBuffer(ring, 4, 31, pad_before=30, pad_after=30, include=EVERYTHING, seed=0)
    assert padded_buffer.stats()["reachable"] == 1.0 and "padding" not in padded_buffer.stats()
    batch = padded_buffer.sample()
    assert padded_buffer.stats()["padding"] == pytest.approx(1 - float(batch["mask"].float().mean()))
    assert padded_buffer.stats()["newest_age"] == ring.table.num_steps_after(int(batch["index"].max()))
    with pytest.raises(ValueError, match="A buffer's batches have no end"):
        ReplayBuffer(ring, 4, 3, epochs=1)


def test_single_sequences_take_the_same_options() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(5, 0))
    sequence = next(iter(ring.sequences(4, pad_before=3, pad_after=3, pad="edge", seed=1, include=EVERYTHING)))
    assert sequence["mask"].shape == (4,) and sequence["obs"]["state"].shape == (4, 3)
    for options, message in (
        ({"pack": 8}, "use `get_loader`"),
        ({"epochs": 1}, "`epochs` makes batches: use `get_loader`"),
    ):
        with pytest.raises(ValueError, match=message):
            ring.sequences(**options)
    with pytest.raises(TypeError, match="There is no argument `num_workers`"):
        ring.sequences(3, num_workers=2)
    sequence = next(iter(ring.sequences(offsets={"obs": (-1, 0)}, seed=1)))
    assert sequence["mask"]["obs"]["state"].shape == (2,) and sequence["code"].shape == (1,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pad_before": 4, "sequence_length": 4}, ValueError, "`pad_before` must be at most 3, .* found 4"),
        ({"pad_after": -1, "sequence_length": 4}, ValueError, "`pad_after` must be at least 0, found -1"),
        ({"pad_after": 1}, ValueError, "Whole episodes are padded by themselves: leave out"),
        (
            {"pad": "mirror", "sequence_length": 4},
            ValueError,
            r"`pad` must be one of .*, found 'mirror'",
        ),
        ({"offsets": {"obs": (0,)}, "sequence_length": 4}, ValueError, "leave out `sequence_length`, found 4"),
        ({"offsets": {"obs": (0,)}, "pad_before": 1}, ValueError, "`pad_before` must be at most 0"),
        ({"offsets": {"obs": ()}}, ValueError, "`offsets` of `obs` are empty"),
        ({"offsets": {"obs": 3}}, TypeError, r"`offsets` of `obs` must be integers, such as \(-1, 0\), found 3"),
        ({"offsets": {"obs": (0.5,)}}, TypeError, "`offsets` of `obs` must be integers"),
        ({"offsets": [1]}, TypeError, "`offsets` must be a dict from fields to integers, found list"),
        ({"pack": 0}, ValueError, "`pack` must be at least 1, found 0"),
        ({"pack": 8, "sequence_length": 4}, ValueError, "`pack` says which rows are read: leave out `sequence_length`"),
        ({"pack": 8, "epochs": 1}, ValueError, "leave out `sampler` and `pack`"),
        ({"epochs": 1, "sampler": UniformEpisodeSampler()}, ValueError, "leave out `sampler` and `pack`"),
        ({"pack": 8, "offsets": {"obs": (0,)}}, ValueError, "leave out `offsets` and `pad`"),
        ({"stride": 2, "epochs": 1}, ValueError, "leave out `stride`"),
        ({"epochs": 1, "world_size": 2}, ValueError, "give the same to all"),
        ({"epochs": 1, "shuffle": "yes"}, TypeError, "`shuffle` must be a bool, found 'yes'"),
        ({"epochs": 1, "drop_last": 1}, TypeError, "`drop_last` must be a bool, found 1"),
        ({"offsets": {"obs": (2**40,)}}, ValueError, "`offsets` of `obs` must be within 2147483648 rows"),
        ({"pad_befor": 1}, TypeError, "There is no argument `pad_befor`"),
        ({"epochs": 0}, ValueError, "`epochs` must be at least 1, found 0"),
        ({"stride": 2, "sequence_length": 4}, ValueError, "`shuffle`, `drop_last` and `stride` need `epochs`"),
        ({"rank": 2, "world_size": 2}, ValueError, "`rank` must be less than `world_size`=2, found 2"),
        ({"split": "train"}, TypeError, r"`split` must be \(part, share, seed\), such as \('train', 0.9, 0\)"),
        ({"split": ("all", 0.5, 0)}, ValueError, r"`split` must be one of \['train', 'val'\]|\('train', 'val'\)"),
        ({"split": ("val", 90, 0)}, ValueError, "The share of `split` must be more than 0 and less than 1, found 90"),
    ],
)
def test_options_that_make_no_sense_say_so(options, error, message) -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(5, 0))
    with pytest.raises(error, match=message):
        ring.get_loader(4, **options)


def test_offsets_of_no_field_and_names_that_are_taken_say_so() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode({"obs": np.zeros(5), "episode": np.zeros(5), "mask": np.zeros(5)})
    with pytest.raises(ValueError, match=r"`offsets` names \['obs/image', 'action'\], which are no fields"):
        next(iter(ring.get_loader(4, offsets={"obs": (0,), "obs/image": (1,), "action": (0,)})))
    with pytest.raises(ValueError, match="'episode' of `include` is also a field"):
        next(iter(ring.get_loader(4, pack=10)))
    with pytest.raises(ValueError, match="'mask' of `include` .* is also a field"):
        next(iter(ring.get_loader(4, 3, pad_after=1)))


@pytest.mark.parametrize("pad", ["zero", "edge"])
def test_fields_of_any_dtype_and_no_bytes_are_padded(pad) -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.int8, torch.float64]
    dtypes += [torch.uint16, torch.uint32, torch.uint64] if hasattr(torch, "uint16") else []
    rows = torch.arange(1, 5)
    ring = RingBufferDataset(10)
    ring.add_episode({str(dtype): rows.to(dtype) for dtype in dtypes} | {"nothing": torch.zeros(4, 0), "x": rows})
    for batch in ring.get_loader(3, 9, epochs=1, pad_before=8, pad_after=8, pad=pad):
        for dtype in dtypes:
            assert torch.equal(batch[str(dtype)].to(torch.complex128), batch["x"].to(dtype).to(torch.complex128))
        assert batch["nothing"].shape[1:] == (9, 0) and bool((batch["x"] > 0).all()) is (pad == "edge")


def test_fields_of_no_bytes_are_padded_at_the_end_of_a_ring() -> None:
    ring = RingBufferDataset(20)
    for _ in range(2):
        ring.add_episode({"nothing": np.zeros((10, 0)), "x": np.arange(1, 11)})
    for batch in ring.get_loader(8, 4, epochs=1, pad_before=3, pad_after=3):
        assert batch["nothing"].shape[1:] == (4, 0) and torch.equal(batch["x"] > 0, batch["mask"])


def test_fields_of_no_bytes_are_packed_and_read_at_offsets() -> None:
    for dataset in (RingBufferDataset(10), ListDataset(10)):
        dataset.add_episode({"nothing": np.zeros((4, 0)), "x": np.arange(4)})
        assert next(iter(dataset.get_loader(2, pack=7)))["nothing"].shape == (2, 7, 0)
        assert next(iter(dataset.get_loader(3, offsets={"nothing": (-2, 0)})))["nothing"].shape == (3, 2, 0)


@pytest.mark.parametrize("pad", ["zero", "edge"])
@pytest.mark.parametrize("kind", ["ring", "list"])
def test_rows_of_many_bytes_are_padded(kind, pad) -> None:
    with model.stored(kind, []) as dataset:
        dataset.add_episode({"x": np.arange(1, 10)[:, None] * np.ones(10_000)})
        for batch in dataset.get_loader(5, 9, epochs=1, pad_before=8, pad_after=8, pad=pad, include=("step",)):
            steps = (
                batch["step"].max(1, keepdim=True).values - batch["mask"].cumsum(1).argmax(1, keepdim=True)
            ) + torch.arange(9)
            expected = steps.clamp(0, 8) + 1 if pad == "edge" else (batch["step"] + 1)
            assert torch.equal(batch["x"][..., 0], expected.double()) and torch.equal(
                batch["x"][..., -1], expected.double()
            )


def test_a_ring_of_half_precision_is_padded() -> None:
    ring = RingBufferDataset(10, half_precision=True)
    ring.add_episode({"x": np.arange(1, 5, dtype=np.float32)})
    (batch,) = ring.get_loader(9, 3, epochs=1, shuffle=False, pad_before=2, pad_after=2, pad="edge")
    assert batch["x"].tolist()[:2] == [[1, 1, 1], [1, 1, 2]] and batch["x"].tolist()[-1] == [4, 4, 4]
