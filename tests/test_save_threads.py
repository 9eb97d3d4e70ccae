"""Saves beside threads, forks, failures and other runs: none takes part of another, or harms what is on the disk."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers import Recorder, ReplayBuffer, SamplesPerInsert
from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.fields import Vector
from buffers.sampler import PrioritizedSampler
from buffers.saving import Snapshot, packed_file
from tests import tagged
from tests.faults import in_child, status_of
from tests.list_dataset import ListDataset
from tests.saving_helpers import contents, loaded


def filled(dataset: Any, num_episodes: int = 8, length: int = 7) -> Any:
    for number in range(num_episodes):
        dataset.add_episode(tagged.episode(length, number))
    return dataset


def save_slowly(dataset: Any, folder: Path, patch: pytest.MonkeyPatch) -> tuple[Future[str], threading.Event]:
    """Begin to save; the thread stops before its first piece until the event is set."""
    gate = threading.Event()
    write = packed_file.PackedWriter.put

    def put(self: Any, *arguments: Any) -> None:
        if threading.current_thread().name == "buffers-save":
            gate.wait()
        write(self, *arguments)

    patch.setattr(packed_file.PackedWriter, "put", put)
    return dataset.save(folder, block=False), gate


def test_what_waits_for_a_save_to_begin_does_not_fail_it(tmp_path, monkeypatch) -> None:
    """A thread evicts as soon as the locks are free, before the thread of the save has run."""
    ring = filled(RingBufferDataset(60))
    expected = contents(ring)
    adder, original = threading.Thread(target=lambda: filled(ring)), Snapshot.prepare

    def late(self: Any, file: Any) -> None:
        adder.start()
        adder.join(0.2)
        original(self, file)

    monkeypatch.setattr(Snapshot, "prepare", late)
    ring.save(tmp_path)
    adder.join()
    assert contents(RingBufferDataset.load(tmp_path)) == expected


def test_after_a_save_has_failed_nobody_writes_to_its_file(tmp_path, monkeypatch) -> None:
    ring = filled(RingBufferDataset(60))
    original, other = Snapshot.end, tmp_path / "other"

    def end_late(self: Any) -> None:
        with open(other, "wb+") as file:  # It gets the number of the descriptor that was closed.
            file.write(b"x" * 100_000)
            file.flush()
            filled(ring)
        original(self)

    monkeypatch.setattr(Snapshot, "end", end_late)
    monkeypatch.setattr(Snapshot, "write", lambda self: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="Make room or permission, and save again"):
        ring.save(tmp_path / "saves")
    assert other.read_bytes() == b"x" * 100_000


def test_where_an_old_file_was_damaged_a_save_removes_nothing(tmp_path) -> None:
    ring = RingBufferDataset(1000)
    for number in range(4):
        ring.add_episode(tagged.episode(7, number))
        ring.save(tmp_path, keep=3)
    oldest = tmp_path / "save-0000000000.safetensors"
    oldest.write_bytes(bytes([1]) + oldest.read_bytes()[1:])
    before = {name for name in os.listdir(tmp_path) if name.startswith("save")}
    ring.add_episode(tagged.episode(7, 4))
    path = ring.save(tmp_path, keep=1).result()
    assert os.path.exists(path) and before < set(os.listdir(tmp_path))


def test_states_whose_names_look_alike_are_kept_apart(tmp_path) -> None:
    buffer = ReplayBuffer(RingBufferDataset(10), 1)
    extra = {"a/b": torch.zeros(2), "a": {"b": torch.ones(2)}, 0: (1, [torch.full((1,), 2.0)]), "0": np.arange(3)}
    buffer.save(tmp_path, extra=extra)
    found = ReplayBuffer.load(tmp_path).extra
    assert found["a/b"].tolist() == [0, 0] and found["a"]["b"].tolist() == [1, 1]
    assert found[0][0] == 1 and isinstance(found[0], tuple) and found["0"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "value", [object(), np.array(["a"]), b"bytes", {1.5: 2}, torch.nn.Linear(1, 1), np.datetime64("2020-01-01")]
)
def test_what_a_save_cannot_hold_is_refused_by_name_and_changes_nothing(value, tmp_path) -> None:
    buffer = ReplayBuffer(RingBufferDataset(10), 1)
    with pytest.raises(TypeError, match="extra0/mine"):
        buffer.save(tmp_path, extra={"mine": value})
    assert not [name for name in os.listdir(tmp_path) if name != ".lock"]


def test_states_that_are_too_large_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packed_file, "_MAX_HEADER", 10_000)
    buffer = ReplayBuffer(RingBufferDataset(10), 1)
    with pytest.raises(ValueError, match="The states take"):
        buffer.save(tmp_path, extra={"log": "x" * 20_000})


def test_a_save_in_the_middle_of_a_recorders_call_is_of_before_or_after(tmp_path, monkeypatch) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 1)
    recorder = Recorder(buffer, 2, "next_step")
    recorder.reset(np.zeros((2, 1), np.float32))
    states: list[Any] = []
    take = type(buffer.writer).take

    def taken(self: Any, *arguments: Any, **options: Any) -> None:
        take(self, *arguments, **options)
        saver = threading.Thread(target=lambda: states.append(buffer.save(tmp_path, keep=9).result()))
        saver.start()
        savers.append(saver)
        saver.join(0.05)

    savers: list[threading.Thread] = []
    monkeypatch.setattr(type(buffer.writer), "take", taken)
    flags = np.zeros(2, np.bool_)
    recorder.step(np.zeros(2, np.int64), np.ones((2, 1), np.float32), np.zeros(2, np.float32), flags, flags)
    for saver in savers:
        saver.join()
    for _ in savers:
        resumed = ReplayBuffer.load(tmp_path)
        again = Recorder(resumed, 2, "next_step")
        state = resumed.writer.num_open_rows, again.state_dict()["is_pending"]
        assert state in ((0, [True, True]), (4, None))
        os.unlink(tmp_path / max(name for name in os.listdir(tmp_path) if name.startswith("save")))
    assert len(savers) == 2 and buffer.writer.num_open_rows == 4


def test_a_ring_that_only_reads_along_does_not_save(tmp_path) -> None:
    ring = filled(RingBufferDataset(60))

    def save() -> None:
        with pytest.raises(RuntimeError, match="Only the process that made a RingBufferDataset"):
            ring.save(tmp_path)

    assert status_of(in_child(save)) == 0


def test_a_fork_does_not_write_to_the_save_of_its_parent_nor_wait_for_it(tmp_path, monkeypatch) -> None:
    dataset = filled(ListDataset(60))
    dataset.add_late_field("late", Vector(2))
    expected = contents(dataset)
    saving, gate = save_slowly(dataset, tmp_path, monkeypatch)

    def evict() -> None:
        dataset.evict_episode(0)
        dataset.wait_for_save()

    assert status_of(in_child(evict)) == 0
    gate.set()
    saving.result()
    assert contents(loaded(tmp_path, ListDataset(60))) == expected


def test_nobody_can_cancel_a_save(tmp_path, monkeypatch) -> None:
    ring = filled(RingBufferDataset(60))
    saving, gate = save_slowly(ring, tmp_path, monkeypatch)
    assert not saving.cancel()
    gate.set()
    saving.result()
    ring.save(tmp_path)


def test_without_a_thread_a_save_is_written_at_once(tmp_path, monkeypatch) -> None:
    ring = filled(RingBufferDataset(60))
    monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start")))
    assert ring.save(tmp_path, block=False).done()
    assert contents(RingBufferDataset.load(tmp_path)) == contents(ring)


def test_another_run_with_the_same_number_is_noticed(tmp_path) -> None:
    one = filled(RingBufferDataset(60))
    one.save(tmp_path, keep=2)
    other = RingBufferDataset.load(tmp_path)
    one.save(tmp_path, keep=2)
    os.unlink(tmp_path / "save-0000000001.safetensors")
    other.save(tmp_path, keep=2)
    filled(one, 1)
    with pytest.raises(RuntimeError, match="holds saves of another run"):
        one.save(tmp_path, keep=2)


@pytest.mark.parametrize("mode", ["keep", "truncate"])
def test_open_episodes_that_are_too_long_here_are_refused(mode, tmp_path) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 1, num_envs=1)
    for step in range(90):
        buffer.add_step({"obs": float(step)}, False)
    buffer.save(tmp_path)
    with pytest.raises(ValueError, match="has 90 steps, more than the 30 that it may have"):
        ReplayBuffer.load(tmp_path, RingBufferDataset(30), open_episodes=mode)
    assert ReplayBuffer.load(tmp_path, RingBufferDataset(30), open_episodes="drop").writer.num_open_rows == 0


def test_late_fields_that_differ_are_refused_before_anything_is_loaded(tmp_path) -> None:
    ring = filled(RingBufferDataset(60))
    ring.add_late_field("late", Vector(2), 5.0)
    ring.save(tmp_path)
    other = RingBufferDataset(60)
    other.add_late_field("late", Vector(2), 1.0)
    with pytest.raises(ValueError, match="There is a late field `late` already"):
        RingBufferDataset.load(tmp_path, other)
    assert other.is_empty


def test_buffers_beside_must_record_into_the_source(tmp_path) -> None:
    ring = RingBufferDataset(10)
    learner = ReplayBuffer(MixtureDataset([ring], [1.0]), 1)
    stranger = ReplayBuffer(RingBufferDataset(10), 1)
    with pytest.raises(TypeError, match="`also` must be a list of ReplayBuffers, found ReplayBuffer"):
        learner.save(tmp_path, also=stranger)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be others that record into members"):
        learner.save(tmp_path, also=[stranger])


def test_samplers_and_limiters_can_be_left_out(tmp_path) -> None:
    ring = filled(RingBufferDataset(60))
    ReplayBuffer(ring, 2, sampler=PrioritizedSampler(), limiter=SamplesPerInsert(1)).save(tmp_path)
    resumed = ReplayBuffer.load(tmp_path, sampler=None, limiter=None)
    assert resumed.limiter is None and resumed.sample()["reward"].shape == (2, 1)


def test_a_reader_whose_directory_has_changed_since_is_reported(tmp_path) -> None:
    with IndividualFileDataset(100, directory=tmp_path / "demos", durability="rename") as files:
        filled(files, 3)
        reader = IndividualFileDataset(directory=tmp_path / "demos", mode="r")
        reader.save(tmp_path / "saves")
        filled(files, 1)
    with pytest.warns(UserWarning, match="has other episodes .*: of 3, 3 are there .* and 1 others.*have come\\.$"):
        IndividualFileDataset.load(tmp_path / "saves")


def test_the_late_values_of_a_reader_are_saved_by_episode(tmp_path) -> None:
    with IndividualFileDataset(100, directory=tmp_path / "demos", durability="rename") as files:
        filled(files, 3)
        with IndividualFileDataset(directory=tmp_path / "demos", mode="r") as reader:
            reader.add_late_field("value", Vector(2))
            reader.update(np.arange(21), {"value": np.arange(42, dtype=np.float32).reshape(21, 2)})
            reader.save(tmp_path / "saves")
            expected = contents(reader)
        with IndividualFileDataset.load(tmp_path / "saves") as same:
            assert contents(same) == expected
        files.evict_episode(0)
        filled(files, 1)
    with pytest.warns(UserWarning, match="of 3, 2 are there .*Late fields of those that are gone, .* are dropped"):
        changed = IndividualFileDataset.load(tmp_path / "saves")
    assert changed.table.ids.tolist() == [1, 2, 3]
    assert (
        changed.late["value"].rows(np.arange(7, 28)).tolist()
        == [[2.0 * s, 2.0 * s + 1] for s in range(7, 21)] + [[0.0, 0.0]] * 7
    )
    changed.close()


def test_a_late_field_of_a_reader_that_is_another_here_is_refused(tmp_path) -> None:
    filled(IndividualFileDataset(100, directory=tmp_path / "demos", durability="rename"), 3).close()
    with IndividualFileDataset(directory=tmp_path / "demos", mode="r") as reader:
        reader.add_late_field("value", Vector(2))
        reader.save(tmp_path / "saves")
    with IndividualFileDataset(directory=tmp_path / "demos", mode="r") as other:
        other.add_late_field("value", Vector(3))
        with pytest.raises(ValueError, match="There is a late field `value` already"):
            IndividualFileDataset.load(tmp_path / "saves", other)


def test_more_saves_than_a_process_may_open_files_load(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("buffers.saving.places._MOST_FILES", 10)
    ring = RingBufferDataset(10_000)
    for number in range(60):
        ring.add_episode(tagged.episode(3, number))
        ring.save(tmp_path)
        assert len([name for name in os.listdir(tmp_path) if name.startswith("save")]) <= 11
    assert contents(RingBufferDataset.load(tmp_path)) == contents(ring)
