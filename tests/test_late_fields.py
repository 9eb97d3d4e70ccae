"""Late fields: batches hold what was given last, for every dtype and shape, wherever the rows are stored."""

from __future__ import annotations

import copy
import itertools
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.fields import Scalar, TensorType, Vector
from tests import samplers_model
from tests.late_model import TYPES, LateModel, live
from tests.list_dataset import ListDataset
from tests.samplers_model import add, stored

KINDS = ["ring", "list", "list, any evicted", "mixture"]
ACTIONS = st.sampled_from(["add", "add", "evict", "update", "update", "update", "annotate", "check"])


def act(model: LateModel, actions: list[str]) -> None:
    for action in actions:
        if action == "add":
            model.add(int(model.rng.integers(1, 16)))
        elif action == "check":
            model.check_all()
        else:
            getattr(model, action)()
    model.check_all()


@given(
    st.sampled_from(KINDS),
    st.lists(st.sampled_from(list(TYPES)), min_size=1, max_size=4, unique=True),
    st.integers(0, 10**6),
    st.lists(ACTIONS, max_size=25),
)
@settings(max_examples=150)
def test_rows_hold_what_was_given_last(kind, names, seed, actions) -> None:
    with stored(kind, None, [5, 12, 1], 40) as source:  # type: ignore[arg-type]
        act(LateModel(source, names, seed), actions)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_files_hold_what_was_given_last(seed, tmp_path) -> None:
    with stored(["files", "files, any evicted"][seed % 2], tmp_path, [5, 12, 1], 40) as source:
        model = LateModel(source, list(TYPES)[seed : seed + 4], seed)
        act(model, ["add", "update", "annotate", "evict", "update", "add", "add", "update", "add"] * 4)


@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.booleans(), st.sampled_from([None, 1, 4]))
@settings(max_examples=60)
def test_padding_of_batches_is_zero_or_the_nearest_row(kind, seed, is_edge, chunk) -> None:
    with stored(kind, None, [5, 12, 1], 40) as source:  # type: ignore[arg-type]
        model = LateModel(source, ["half", "flag", "complex", "pages"], seed)
        act(model, ["update", "add", "update"] * 3)
        include = ("index", "source") if kind == "mixture" else ("index",)
        rng, pad = np.random.default_rng(seed), "edge" if is_edge else "zero"
        length = int(rng.integers(1, 9))
        before, after = rng.integers(0, length, 2).tolist()
        options: dict[str, Any] = {
            "pad_before": before,
            "pad_after": after,
            "pad": pad,
            "include": include,
            "seed": seed,
        }
        try:
            model.check(source.get_loader(8, length, chunk, **options).stream.take(), is_edge)
        except RuntimeError as error:
            assert "longer than every stored episode" in str(error)
        model.check(source.get_loader(8, None, include=include, seed=seed).stream.take())


def labelled(dataset: Any) -> Any:
    """Each row of `label` is its step id, and the double."""
    dataset.add_late_field("label", Vector(2), -1.0)
    label(dataset)
    return dataset


def label(dataset: Any) -> None:
    ids = np.array(live(dataset))
    assert dataset.update(ids, {"label": np.stack([ids, 2 * ids], -1).astype(np.float32)}) == 0


@pytest.mark.parametrize("kind", ["ring", "list", "files"])
def test_offsets_and_packed_episodes_have_late_fields(kind, tmp_path) -> None:
    with stored(kind, tmp_path) as dataset:
        labelled(dataset)
        offsets = {"label": (-3, 0, 2), "x": (0, 1)}
        batch = dataset.get_loader(64, offsets=offsets, include=("index",), seed=0).stream.take()
        assert batch["label"].shape == (64, 3, 2) and batch["x"].shape == (64, 2)
        expected = (batch["index"] + torch.tensor([-3, 0, 2])) * batch["mask"]["label"]
        torch.testing.assert_close(batch["label"][..., 0], expected.float())
        torch.testing.assert_close(batch["label"][..., 1], 2 * expected.float())
        packed = dataset.get_loader(4, None, pack=32, include=("index",), seed=0).stream.take()
        expected = packed["index"].clamp(min=0)
        torch.testing.assert_close(packed["label"][..., 0], expected.float())


@pytest.mark.parametrize("kind", ["ring", "files", "list", "mixture"])
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.filterwarnings("ignore:This process .* multi-threaded")
def test_workers_see_updates_in_time(kind, num_workers, tmp_path) -> None:
    with stored(kind, tmp_path) as source:
        if kind == "list":
            source = MixtureDataset([RingBufferDataset(100), source], [1, 0])  # Workers cannot read a plain one.
            add(source.datasets[0], 20)
        source.add_late_field("label", Vector(3), 7)
        include = ("index", "source") if source.has_members else ("index",)
        loader = source.get_loader(16, 3, num_workers=num_workers, include=include, seed=0)
        batches = iter(loader)
        batch = next(batches)
        assert (batch["label"] == 7).all()
        for number in (1.0, 2.0):
            for member in getattr(source, "datasets", [source]):
                ids = np.array(live(member)).reshape(-1, 1)
                member.update(ids, {"label": np.full((len(ids), 1, 3), number, np.float32)})
            batch = list(itertools.islice(batches, 2 * num_workers + 1))[-1]
            assert (batch["label"] == number).all()


def test_priorities_are_a_field_of_batches_only_if_it_was_added() -> None:
    ring = RingBufferDataset(100)
    add(ring, 9)
    stream = ring.get_loader(4, 2, sampler=samplers_model.build(("prioritized", 1.0, 0.5)), include=("index",)).stream
    assert "priority" not in stream.take()
    ring.add_late_field("priority", Scalar(), 1.0)
    ring.update(np.arange(9), {"priority": np.arange(1, 10, dtype=np.float32)})
    batch = stream.take()
    torch.testing.assert_close(batch["priority"], batch["index"] + 1.0)


def test_values_may_be_lists_tensors_and_wider_numbers() -> None:
    ring = RingBufferDataset(100)
    add(ring, 9)
    ring.add_late_field("v", Vector(2), 0)
    for values in ([[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]]), np.array([[1.0, 2.0], [3.0, 4.0]])):
        ring.update([0, 1], {"v": np.zeros((2, 2), np.float32)})
        assert ring.update([0, 1], {"v": values}) == 0
        assert ring.late["v"].column.array[:2].tolist() == [[1, 2], [3, 4]]
    assert ring.update(3, {"v": torch.ones(2, requires_grad=True)}) == 0
    for shape in ((0,), (0, 5), (5, 0)):
        assert ring.update(np.zeros(shape, np.int64), {"v": np.zeros((*shape, 2), np.float32)}) == 0


# Errors change nothing.

WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "shape": (
        [0, 1],
        {"v": np.ones((2, 2)), "w": np.ones(3)},
        ValueError,
        r"`w` takes values torch.float32 \(.,\), found",
    ),
    "number": ([0, 1], {"v": np.ones((3, 2)), "w": np.ones(2)}, ValueError, r"`v` takes values .* found .* \(3, 2\)"),
    "dtype": ([0, 1], {"v": np.ones((2, 2)), "w": np.ones(2, complex)}, ValueError, "`w` takes values .*complex128"),
    "integers": ([0, 1], {"v": np.ones((2, 2)), "n": np.array([0.5, 1])}, ValueError, "`n` takes values torch.int64"),
    "overflow": ([0, 1], {"v": np.ones((2, 2)), "w": np.array([0, 1e300])}, ValueError, "`w` takes values .*float64"),
    "nan": ([0, 1], {"v": np.ones((2, 2)), "priority": [1.0, np.nan]}, ValueError, "finite, not negative .* found nan"),
    "negative": ([0, 1], {"v": np.ones((2, 2)), "priority": [1.0, -2.0]}, ValueError, "not negative .* found -2.0"),
    "name": ([0, 1], {"v": np.ones((2, 2)), "x": np.ones(2)}, ValueError, r"\['x'\] is no late field. There are"),
    "nothing": ([0, 1], {}, ValueError, "Nothing is no late field. There are"),
    "index": ([0.0, 1.0], {"v": np.ones((2, 2))}, TypeError, "`index` must be step ids, .* found float32"),
    "object": ([0, 1], {"v": np.ones((2, 2)), "w": "ab"}, TypeError, "`w` must be a tensor, an array or a number"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("is_mixture", [False, True])
def test_a_wrong_value_leaves_all_as_it_was(wrong, is_mixture) -> None:
    members = [RingBufferDataset(100), ListDataset(100)]
    for member in members:
        add(member, 9)
    source: Any = MixtureDataset(members, [1, 1]) if is_mixture else members[0]
    for name, kind in {"v": Vector(2), "w": Scalar(), "n": Scalar(dtype=torch.int64), "priority": Scalar()}.items():
        source.add_late_field(name, kind, 1)
    index, values, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        source.update(index, values, **({"source": [0, 1]} if is_mixture else {}))
    for member in members[: 1 + is_mixture]:
        batch = member.get_loader(16, 1, epochs=1, seed=0).stream
        batch.begin()
        assert all((value == 1).all() for name, value in batch.take().items() if name != "x")


def test_errors_of_a_mixture_say_what_is_missing() -> None:
    members = [RingBufferDataset(100), RingBufferDataset(100)]
    for member in members:
        add(member, 9)
    mixture = MixtureDataset(members, [1, 1])
    mixture.add_late_field("v", Scalar())
    values = {"v": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="`include` 'source', and pass it on"):
        mixture.update([0, 1], values)
    for source in ([0, 2], [0], [0, -1]):
        with pytest.raises(ValueError, match=r"`source` must be \(2,\) numbers of members, 0 to 1, found"):
            mixture.update([0, 1], values, source)
    with pytest.raises(ValueError, match="whose members `source` does not tell apart"):
        MixtureDataset([mixture, members[0]], [1, 1]).update([0, 1], values, [0, 1])
    assert mixture.update([0, 50], values, [0, 1]) == 1


BAD_FIELDS: list[tuple[Any, Any, Any, type[Exception], str]] = [
    ("x", Scalar(), 0, ValueError, "x"),
    ("v", Scalar(), 1, ValueError, "There is a late field `v` already"),
    ("mask", Scalar(), 0, ValueError, "`mask` cannot name a late field"),
    ("a/b", Scalar(), 0, ValueError, "`a/b` cannot name a late field"),
    ("w", Vector(2), np.zeros(3, np.float32), ValueError, "default of late field `w` must be a number or"),
    ("w", Scalar(dtype=torch.int64), np.float32(0.5), ValueError, "default of late field `w` must be"),
    ("w", 3, 0, TypeError, "A late field is a name and a TensorType, found 'w' and 3"),
    (3, Scalar(), 0, TypeError, "A late field is a name and a TensorType, found 3"),
    ("priority", Vector(2), 0, ValueError, r"`priority` .* must be a float32 Scalar\(\)"),
]


@pytest.mark.parametrize(("name", "kind", "default", "error", "message"), BAD_FIELDS)
def test_a_field_that_cannot_be_is_refused(name, kind, default, error, message) -> None:
    ring = RingBufferDataset(100)
    add(ring, 9)
    ring.add_late_field("v", Scalar())
    with pytest.raises(error, match=message):
        ring.add_late_field(name, kind, default)
    assert list(ring.late) == ["v"] and set(ring.get_loader(2, 1).stream.take()) == {"x", "v"}


def test_steps_may_not_bring_a_field_that_is_late() -> None:
    ring = RingBufferDataset(100)
    ring.add_late_field("x", Scalar())
    with pytest.raises(ValueError, match="x"):
        add(ring, 9)
    assert ring.is_empty


def test_annotate_takes_whole_episodes_that_live() -> None:
    ring = RingBufferDataset(20)
    for length in (9, 9, 9):
        add(ring, length)
    ring.add_late_field("v", Scalar())
    ring.annotate(2, {"v": np.arange(9, dtype=np.float32)})
    for episode_id in (0, 3):
        with pytest.raises(ValueError, match=f"There is no episode {episode_id}. Those that live have the ids"):
            ring.annotate(episode_id, {"v": np.zeros(9, np.float32)})
    with pytest.raises(ValueError, match=r"takes values .* \(9,\), found .* \(8,\)"):
        ring.annotate(2, {"v": np.zeros(8, np.float32)})
    batch = next(iter(ring.get_loader(64, 9, include=("episode",), seed=0)))
    assert (batch["v"][batch["episode"] == 2] == torch.arange(9)).all() and (
        batch["v"][batch["episode"] == 1] == 0
    ).all()


# Memory.


def test_evicted_episodes_give_back_their_memory() -> None:
    dataset = ListDataset(300)
    dataset.add_late_field("pages", TensorType((2048,), torch.float64), 1.0)
    memory = dataset.late["pages"].memory
    sizes = []
    for n in range(60):
        add(dataset, 50)
        if n >= 10:
            sizes.append(os.fstat(memory._descriptor).st_blocks * 512)
    row = 2048 * 8
    assert max(sizes) <= 300 * row + 2**20 and max(sizes) == max(sizes[:10])
    while not dataset.is_empty:
        dataset.evict_episode(0)
    assert os.fstat(memory._descriptor).st_blocks * 512 <= 2**18


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_late_fields_live_where_their_rows_do() -> None:
    ring = RingBufferDataset(100, device="cuda")
    add(ring, 60)
    labelled(ring)
    batch = ring.get_loader(32, 4, pad_after=3, include=("index",), seed=0).stream.take()
    assert batch["label"].is_cuda
    torch.testing.assert_close(batch["label"][..., 0], batch["index"].clamp(min=0).float())
    assert ring.update(batch["index"], {"label": batch["label"] + 1}) == 0


@pytest.mark.parametrize("kind", [RingBufferDataset, ListDataset])
def test_a_copy_has_late_fields_of_its_own(kind) -> None:
    dataset = kind(100)
    add(dataset, 9)
    labelled(dataset)
    dataset.get_loader(4, 1, sampler=samplers_model.build(("prioritized", 1.0, 0.5)), seed=0).stream.take()
    copied = copy.deepcopy(dataset)
    assert list(copied.late) == list(dataset.late) == ["label", "priority"]
    copied.update([0, 1], {"label": np.zeros((2, 2), np.float32), "priority": [5.0, 6.0]})
    add(copied, 4)
    rows = {name: each.late["label"].column.array[:4, 0].tolist() for name, each in (("old", dataset), ("new", copied))}
    assert rows == {"old": [0, 1, 2, 3], "new": [0, 0, 2, 3]}
    assert dataset.late["priority"].largest == 1 and copied.late["priority"].largest == 6


def test_rows_that_another_process_has_added_hold_the_default(tmp_path) -> None:
    writer = IndividualFileDataset(1000, directory=tmp_path, durability="rename")
    add(writer, 10)
    reader = IndividualFileDataset(1000, directory=tmp_path, mode="r")
    reader.add_late_field("v", Scalar(), 7.0)
    for _ in range(30):
        add(writer, 10)
    reader.refresh()
    for part in ("train", "val"):
        batch = next(iter(reader.get_loader(256, 1, split=(part, 0.5, 0), seed=0)))
        assert (batch["v"] == 7).all(), part
