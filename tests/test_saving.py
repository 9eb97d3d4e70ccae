"""What is saved comes back: every kind of source, whatever was done to it before and after, compared by value."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import Evictor
from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.fields import Fields, Scalar, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from tests import tagged
from tests.list_dataset import ListDataset
from tests.saving_helpers import KINDS, add, close, contents, hold_the_writer, loaded, make, opened_save, writable

PROPERTY = settings(max_examples=15, deadline=None)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "update", "evict", "save", "load"]), st.integers(0, 30)),
    min_size=3,
    max_size=25,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def change(source: Any, kind: str, number: int, count: int) -> None:
    """One operation, the same on every source of the same content."""
    dataset = writable(source)
    if kind == "add":
        add(dataset, count, 1 + number % 13)
    elif kind == "evict" and len(dataset.table) > 1:
        dataset.evict_episode(0)
    elif kind == "update" and len(dataset.table):
        if "label" not in dataset.late:
            dataset.add_late_field("label", Vector(2), 0.5)
        steps = dataset.table.starts[number % len(dataset.table)] + np.arange(2)
        dataset.update(steps, {"label": np.full((2, 2), number, np.float32)})


@pytest.mark.parametrize("kind", KINDS)
@given(operations=OPERATIONS)
@PROPERTY
def test_a_source_that_is_saved_and_loaded_again_and_again_is_as_one_that_is_not(kind, operations) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        kept, saved, at_save = make(kind, Path(one)), make(kind, Path(other)), None
        done: list[tuple[str, int, int]] = []
        for count, (operation, number) in enumerate(operations):
            if operation == "save":
                saved.save(Path(other) / "saves", keep=1 + number % 3, block=number % 2 == 0)
                at_save = len(done)
            elif operation == "load" and at_save is not None:
                for store in saved.stores:
                    store.wait_for_save()
                close(saved)
                saved = loaded(Path(other) / "saves", None if kind != "list" else make(kind, Path(other)))
                # Both go back to the moment of the save, and do the rest again.
                for again in done[at_save:]:
                    change(saved, *again)
                at_save = None
            elif operation not in ("save", "load"):
                done.append((operation, number, count))
                change(saved, *done[-1])
                change(kept, *done[-1])
        assert contents(saved) == contents(kept)
        for store in saved.stores:
            store.wait_for_save()
        close(saved)
        close(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_moment_of_the_call_whatever_is_done_before_it_is_written(kind, folder) -> None:
    source = make(kind, folder)
    for number in range(12):
        add(writable(source), number)
    change(source, "update", 1, 0)
    expected = contents(source)
    gate = threading.Event()
    hold_the_writer(source, gate)
    saving = source.save(folder / "saves", block=False)
    for number in range(12, 40):
        add(writable(source), number)
        change(source, "update", number % 5, number)
    assert not saving.done() and contents(source) != expected
    gate.set()
    saving.result()
    close(source)
    assert contents(loaded(folder / "saves", make(kind, folder))) == expected


def test_without_being_told_of_what_leaves_a_save_holds_what_came_after_the_call(folder, monkeypatch) -> None:
    """The mutant of the test above."""
    monkeypatch.setattr("buffers.dataset.saving.writing.Unsaved.leaving", lambda *_: None)
    with pytest.raises((AssertionError, RuntimeError)):
        test_what_is_saved_is_the_moment_of_the_call_whatever_is_done_before_it_is_written("ring", folder)


def test_a_save_writes_only_what_is_new(folder) -> None:
    ring = RingBufferDataset(100_000)
    for number in range(100):
        add(ring, number, 500)
    first = os.path.getsize(ring.save(folder).result())
    add(ring, 100, 500)
    second = os.path.getsize(ring.save(folder).result())
    assert second < first / 90
    assert sorted(name for name in os.listdir(folder) if name.endswith("s")) == [
        "save-0000000000.safetensors",
        "save-0000000001.safetensors",
    ]
    assert contents(RingBufferDataset.load(folder)) == contents(ring)


def test_files_that_hold_mostly_what_is_gone_are_packed_anew(folder, monkeypatch) -> None:
    monkeypatch.setattr("buffers.saving.places._SPARE_BYTES", 0)
    dataset = ListDataset(50_000)
    for number in range(100):
        add(dataset, number, 100)
    dataset.save(folder)
    for _ in range(60):
        dataset.evict_episode(int(np.random.default_rng(0).integers(len(dataset.table))))
    add(dataset, 100, 100)
    dataset.save(folder)
    assert [name for name in os.listdir(folder) if name.startswith("save")] == ["save-0000000001.safetensors"]
    assert contents(loaded(folder, ListDataset(50_000))) == contents(dataset)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_so_many_saves_can_be_loaded_as_are_kept(keep, folder) -> None:
    ring, expected = RingBufferDataset(60), {}
    for number in range(20):
        add(ring, number)
        ring.save(folder / "saves", keep=keep)
        expected[number] = contents(ring)
    for number in range(19, 19 - keep, -1):
        assert contents(RingBufferDataset.load(folder / "saves")) == expected[number]
        os.unlink(folder / "saves" / f"save-{number:010d}.safetensors")
    # A ring of 60 steps has at most nine episodes, each in the file of its save.
    assert len([name for name in os.listdir(folder / "saves") if name.startswith("save")]) <= 9


# Into another source.


def filled_ring(capacity: int = 60) -> RingBufferDataset:
    ring = RingBufferDataset(capacity)
    for number in range(15):
        add(ring, number)
    change(ring, "update", 3, 0)
    return ring


@pytest.mark.parametrize("capacity", [9, 20, 57, 61, 500])
def test_with_another_capacity_the_newest_episodes_stay(capacity, folder) -> None:
    ring = filled_ring()
    ring.save(folder)
    other = RingBufferDataset(capacity)
    loaded(folder, other)
    lengths = np.array(ring.episode_lengths)
    # A ring may leave rows at its end empty.
    most = int((lengths[::-1].cumsum() <= capacity).sum())
    assert most - 1 <= other.num_episodes <= most
    ids = other.table.ids.tolist()
    assert ids == ring.table.ids.tolist()[-len(ids) :] and other.table.next_id == ring.table.next_id
    for number in ids:
        tagged.assert_same_episode(other.episode_of_id(number), ring.episode_of_id(number))
        start, length, *_ = other.table.row_of(number)
        expected = ring.late["label"].rows(ring.table.row_of(number)[0] + np.arange(length))
        assert torch.equal(other.late["label"].rows(start + np.arange(length)), expected)


@pytest.mark.parametrize("kind", ["ring", "half", "files", "list"])
@pytest.mark.parametrize("other", ["ring", "half", "files", "list"])
def test_a_save_loads_into_another_kind_of_dataset(kind, other, folder) -> None:
    source = make(kind, folder)
    for number in range(9):
        add(writable(source), number)
    source.save(folder / "saves")
    target = loaded(folder / "saves", make(other, folder / "other", 100))
    assert [e["code"].tolist() for e in target.episodes()] == [e["code"].tolist() for e in source.episodes()]
    assert target.table.ids.tolist() == source.table.ids.tolist()
    assert [target.episode_info(n) for n in target.table.ids] == [source.episode_info(n) for n in source.table.ids]
    # What follows is a run of its own kind: everything is saved anew.
    add(writable(target), 9)
    target.save(folder / "saves")
    assert contents(loaded(folder / "saves", make(other, folder / "third", 100))) == contents(target)
    close(source)
    close(target)


def test_other_fields_are_refused_and_the_error_shows_both(folder) -> None:
    filled_ring().save(folder)
    other = RingBufferDataset(60, EpisodeDatasetInfo(Fields(obs=Vector(3), reward=Scalar())))
    with pytest.raises(ValueError, match=r"The save has Fields\(obs/state: .*, the dataset Fields\(obs: float32"):
        RingBufferDataset.load(folder, other)
    assert other.is_empty


def test_a_dataset_in_memory_that_holds_episodes_is_refused(folder) -> None:
    filled_ring().save(folder)
    other = filled_ring()
    before = contents(other)
    with pytest.raises(RuntimeError, match="holds 8 episodes: load into an empty one"):
        RingBufferDataset.load(folder, other)
    assert contents(other) == before


def test_episodes_of_a_later_run_are_set_aside_not_deleted(folder) -> None:
    files = IndividualFileDataset(1000, directory=folder / "episodes", durability="rename")
    for number in range(5):
        add(files, number)
    files.save(folder / "saves")
    for number in range(5, 9):
        add(files, number)
    files.close()
    with pytest.warns(UserWarning, match="4 episodes in .* were moved to its folder `after-save-0000000000`"):
        resumed = IndividualFileDataset.load(folder / "saves")
    assert resumed.table.ids.tolist() == [0, 1, 2, 3, 4]
    assert len(os.listdir(folder / "episodes" / "after-save-0000000000")) == 4
    assert resumed.add_episode(tagged.episode(3, 5)) == 5
    resumed.close()


def test_the_files_of_episodes_are_linked_not_copied_and_those_that_left_are_still_there(folder) -> None:
    files = IndividualFileDataset(40, directory=folder / "episodes", durability="rename")
    for number in range(5):
        add(files, number)
    files.save(folder / "saves")
    expected = contents(files)
    links = folder / "saves" / "save-0000000000-0.episodes"
    assert {os.stat(links / name).st_nlink for name in os.listdir(links)} == {2}
    for number in range(5, 20):
        add(files, number)
    files.close()
    assert contents(loaded(folder / "saves")) == expected


def test_another_source_than_was_saved_is_refused(folder) -> None:
    filled_ring().save(folder)
    with pytest.raises(ValueError, match=r"The save is of dataset 0, and cannot be loaded into a mixture of \(data"):
        MixtureDataset.load(folder, MixtureDataset([RingBufferDataset(9), RingBufferDataset(9)], [1, 1]))
    with pytest.raises(ValueError, match="The save is of a RingBufferDataset: call its `load`"):
        IndividualFileDataset.load(folder)


def test_a_directory_of_another_run_is_refused(folder) -> None:
    filled_ring().save(folder)
    with pytest.raises(RuntimeError, match="holds saves of another run, the newest has the number 0. Load it"):
        filled_ring().save(folder)
    assert opened_save(folder).number == 0


def test_where_there_is_no_save_the_error_says_so(folder) -> None:
    with pytest.raises(FileNotFoundError, match="is no directory of saves"):
        RingBufferDataset.load(folder)


def test_a_run_goes_on_saving_where_it_was_loaded_and_anew_where_its_files_are_gone(folder) -> None:
    ring = filled_ring()
    ring.save(folder)
    resumed = RingBufferDataset.load(folder)
    add(resumed, 15)
    resumed.save(folder)
    assert len(opened_save(folder).stamps) == 2
    for name in os.listdir(folder):
        os.unlink(folder / name)
    resumed.save(folder)
    assert len(opened_save(folder).stamps) == 1
    assert contents(RingBufferDataset.load(folder)) == contents(resumed)


def test_the_safetensors_library_reads_a_save(folder) -> None:
    ring = filled_ring()
    found = safetensors.torch.load_file(ring.save(folder).result())
    expected = np.concatenate([episode["code"].numpy() for episode in ring.episodes()])
    assert found["0/rows/code"].tolist() == expected.tolist()


class RandomEvictor(Evictor):
    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def evict(self, dataset: Any) -> int:
        return int(self.random.integers(dataset.num_episodes))

    def state_dict(self) -> dict[str, Any]:
        return self.random.bit_generator.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.bit_generator.state = state


def test_an_evictor_with_a_state_goes_on(folder) -> None:
    dataset = ListDataset(60, evictor=RandomEvictor())
    for number in range(20):
        add(dataset, number)
    dataset.save(folder)
    resumed = loaded(folder, ListDataset(60, evictor=RandomEvictor()))
    for number in range(20, 40):
        add(dataset, number)
        add(resumed, number)
    assert contents(resumed) == contents(dataset)
    with pytest.raises(ValueError, match="A FIFOEvictor has no state"):
        loaded(folder, ListDataset(60))
