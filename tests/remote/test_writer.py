"""What a writer says when shards are slow, gone, or of other fields; and what travels."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import threading
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers import Recorder
from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset
from buffers.fields import Fields
from buffers.remote import RemoteWriter, Shards
from buffers.remote.shard import Shard, local_ids, remote_ids
from buffers.remote.sink import RemoteSink
from buffers.writer import EpisodeWriter
from tests.remote.simulated import Simulated, episode

FIELDS = Fields.from_episode(episode(0))


def made(world: Simulated, **options: Any) -> RemoteSink:
    return RemoteSink(handle(world), has_thread=False, **options)


def handle(world: Simulated) -> Shards:
    shard = world.shards[0]
    assert shard is not None
    return Shards(world, shard.describe())


def test_a_full_window_is_an_error_that_names_the_shard_and_takes_nothing(tmp_path: Path) -> None:
    world = Simulated(1, tmp_path)
    sink = made(world, window_bytes=500, deadline=5.0)
    sink.settle_fields(FIELDS)
    world.stop(0)
    added = 0
    with pytest.raises(RuntimeError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while added < 100:
            sink.add(episode(added))
            added += 1
    text = str(error.value)
    assert text.startswith(
        "The writer's window of 500 B had no room for an episode within 5 s: shard 0 has not answered"
    )
    assert text.endswith("The episode was not taken.") and 1 < added < 20
    world.go_on(0)
    sink.wait(60.0, until_saved=True)
    assert world.numbers() == [list(range(added))]


def test_a_full_disk_is_warned_of_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = Simulated(1, tmp_path)
    sink = made(world)
    sink.settle_fields(FIELDS)

    def add(numbers: range) -> None:
        for number in numbers:
            sink.add(episode(number))
            world.time += 0.1
            world.finish_saves()

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning) as caught:
        patch.setattr(os, "fsync", failing)
        warnings.filterwarnings("ignore", "A save failed")
        add(range(60))
    # There are no others, and it takes new ones as before.
    (text,) = [str(warning.message) for warning in caught if "Shard 0" in str(warning.message)]
    assert "No space left on device" in text and "others" not in text
    assert text.endswith("kept by this writer until it is well; new ones go to shards that take them.")
    assert sink.stats()["num_unsaved"] == 60
    add(range(60, 120))
    sink.wait(60.0, until_saved=True)
    world.kill(0)
    world.start(0)
    assert world.numbers() == [list(range(120))] and sink.troubles == {}


def failing(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_episode_larger_than_the_window_has_it_to_itself(tmp_path: Path) -> None:
    world = Simulated(2, tmp_path)
    sink = made(world, window_bytes=10)
    sink.settle_fields(FIELDS)
    for number in range(5):
        sink.add(episode(number))
    sink.wait(60.0, until_saved=False)
    assert sorted(n for shard in world.numbers() for n in shard) == [0, 1, 2, 3, 4]


def test_rows_without_bytes_are_stored() -> None:
    world = Simulated(2)
    sink = made(world)
    rows = {"nothing": np.zeros((3, 0), np.float32)}
    sink.settle_fields(Fields.from_episode(rows))
    sink.add(rows)
    sink.wait(5.0, until_saved=False)
    assert [shard.dataset.num_timesteps for shard in world.shards if shard is not None] == [3, 0]


def test_waiting_for_a_shard_that_hangs_is_an_error_that_names_it(tmp_path: Path) -> None:
    world = Simulated(1, tmp_path)
    sink = made(world)
    sink.settle_fields(FIELDS)
    world.stop(0)
    sink.add(episode(0))
    with pytest.raises(RuntimeError, match="1 episodes were not stored within 20 s: shard 0 has not answered for 20 s"):
        sink.wait(20.0, until_saved=False)
    world.go_on(0)
    sink.wait(20.0, until_saved=False)


def test_what_a_shard_refuses_is_said_once_and_the_writer_goes_on(tmp_path: Path) -> None:
    world = Simulated(1, tmp_path)
    sink = made(world)
    sink.settle_fields(FIELDS)
    sink.add(episode(0), 0, {"text": "x" * 5_000})
    shard = world.shards[0]
    assert shard is not None
    shard.dataset.check_info = _too_large  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="Shard 0 cannot store an episode: too large It was left out. Go on"):
        sink.wait(5.0, until_saved=False)
    sink.add(episode(1))
    sink.wait(5.0, until_saved=False)
    assert world.numbers() == [[1]] and handle(world).stats()["num_refused"] in (0, 1)


def _too_large(info: dict[str, Any]) -> None:
    if info:
        raise ValueError("too large")


def test_fields_of_another_writer_are_an_error_at_the_first_step() -> None:
    world = Simulated(2)
    made(world).settle_fields(FIELDS)
    with pytest.raises(ValueError, match="The fields differ from those of the shards"):
        made(world).settle_fields(Fields.from_episode({"other": np.zeros(3)}))
    with pytest.raises(ValueError, match="The fields differ"):
        EpisodeWriter(made(world), 1).add_step({"other": 3.0}, True)


def test_a_shard_that_hangs_when_fields_are_settled_is_told_with_its_first_episode() -> None:
    world = Simulated(2)
    world.stop(1)
    sink = made(world, deadline=2.0)
    sink.settle_fields(FIELDS)
    world.go_on(1)
    for number in range(4):
        sink.add(episode(number))
    sink.wait(20.0, until_saved=False)
    assert [len(numbers) for numbers in world.numbers()] == [2, 2]


def test_writers_split_steps_and_recorders_record_as_into_a_buffer() -> None:
    world = Simulated(1)
    writer = EpisodeWriter(made(world), num_envs=2, max_episode_length=3)
    recorder = Recorder(writer, 2, "disabled")
    recorder.reset(np.zeros(2, np.int64))
    for step in range(7):
        recorder.step(np.full(2, step), np.full(2, step), np.ones(2), np.array([step == 6, False]), np.zeros(2, bool))
    writer.flush()
    writer.sink.wait(10.0, until_saved=False)  # type: ignore[attr-defined]
    dataset = RingBufferDataset(1_000)
    local = EpisodeWriter(dataset, num_envs=2, max_episode_length=3)
    recorder = Recorder(local, 2, "disabled")
    recorder.reset(np.zeros(2, np.int64))
    for step in range(7):
        recorder.step(np.full(2, step), np.full(2, step), np.ones(2), np.array([step == 6, False]), np.zeros(2, bool))
    local.flush()
    shard = world.shards[0]
    assert shard is not None
    assert shard.dataset.episode_lengths == dataset.episode_lengths
    assert shard.dataset.table.rows.tolist() == dataset.table.rows.tolist()  # Cuts, too.
    # Rows with which a piece repeats the one before are not added twice.
    assert shard.stats()["num_added"] == 16


def test_infos_arrive_and_survive_a_restart(tmp_path: Path) -> None:
    world = Simulated(1, tmp_path)
    sink = made(world)
    sink.settle_fields(FIELDS)
    sink.add(episode(0), 0, {"task": "lift"})
    sink.wait(10.0, until_saved=True)
    world.kill(0)
    world.start(0)
    shard = world.shards[0]
    assert shard is not None
    assert shard.dataset.episode_info(0) == {"task": "lift"}


def test_a_copy_of_the_caller_s_arrays_is_sent() -> None:
    world = Simulated(1)
    sink = made(world)
    rows = episode(4)
    sink.settle_fields(FIELDS)
    sink.add(rows)
    rows["step"][:] = 99
    sink.wait(10.0, until_saved=False)
    assert world.numbers() == [[4]]


class Prompt(Simulated):
    """Answers at once, and takes calls of several threads, in real time."""

    lock = threading.Lock()

    def submit(self, shard: int, method: str, *arguments: Any) -> int:
        with self.lock:
            self.num_calls += 1
            self.execute(self.num_calls, shard, method, arguments)
            return self.num_calls

    def done(self, calls: Collection[Any], seconds: float) -> set[Any]:
        time.sleep(min(seconds, 0.001))
        return {call for call in calls if call in self.results}

    def now(self) -> float:
        return time.monotonic()


def test_a_thread_takes_the_answers_that_others_wait_for() -> None:
    world = Prompt(2)
    with RemoteWriter(handle(world), num_envs=1, window_bytes=2_000, pack_bytes=200) as writer:
        for number in range(200):
            writer.add_episode(episode(number))
        writer.wait_until_stored()
        assert sorted(n for shard in world.numbers() for n in shard) == list(range(200))


def test_memory_of_large_episodes_is_used_again_once_nobody_keeps_them() -> None:
    world = Simulated(1, make_dataset=lambda number: RingBufferDataset(200))
    sink = made(world)
    rows: dict[str, np.ndarray] = {"number": np.zeros((5, 8_192), np.int64), "step": np.zeros(5, np.int32)}
    sink.settle_fields(Fields.from_episode(rows))
    for first in (0, 6, 12):
        world.stop(0)
        for number in range(first, first + 6):
            rows["number"][:], rows["step"][:] = number, range(5)
            sink.add(rows)
        rows["number"][:] = -1
        world.go_on(0)
        sink.wait(10.0, until_saved=False)
        assert len(sink._memory._free) == 6
    shard = world.shards[0]
    assert shard is not None
    for number, stored in enumerate(shard.episodes()):
        assert (stored["number"] == number).all() and (stored["step"] == range(5)).all()
    assert number == 17


@pytest.mark.parametrize("is_saved", [False, True])
def test_files_need_a_directory_of_saves_and_go_on_from_it(is_saved: bool, tmp_path: Path) -> None:
    def make_files(number: int) -> EpisodeDataset:
        return IndividualFileDataset(10_000, directory=tmp_path / f"files-{number}")

    if not is_saved:
        with pytest.raises(ValueError, match="need a `directory`"):
            Simulated(1, make_dataset=make_files)
        return
    world = Simulated(1, tmp_path / "saves", make_dataset=make_files, save_every=1e9)
    sink = made(world)
    sink.settle_fields(FIELDS)
    for number in range(5):
        sink.add(episode(number))
    sink.wait(10.0, until_saved=True)
    for number in range(5, 9):
        sink.add(episode(number))
    sink.wait(10.0, until_saved=False)
    shard = world.shards[0]
    assert shard is not None
    shard.dataset.close()  # type: ignore[attr-defined]  # As the end of its process does.
    world.kill(0)
    with pytest.warns(UserWarning, match="4 episodes in .* are not those of save"):
        world.start(0)
    assert world.numbers() == [[0, 1, 2, 3, 4]]
    # The next question whether they are saved finds out that the shard has forgotten them.
    while world.numbers() != [list(range(9))]:
        world.time += 0.5
        sink.step()
        assert world.time < 60


def test_files_that_no_save_knows_yet_are_not_taken_for_others(tmp_path: Path) -> None:
    def make_files(number: int) -> EpisodeDataset:
        return IndividualFileDataset(10_000, directory=tmp_path / f"files-{number}")

    world = Simulated(1, tmp_path / "saves", make_dataset=make_files, save_every=1e9)
    sink = made(world)
    sink.settle_fields(FIELDS)
    sink.add(episode(3))
    sink.wait(10.0, until_saved=False)
    shard = world.shards[0]
    assert shard is not None
    shard.dataset.close()  # type: ignore[attr-defined]
    world.kill(0)
    with pytest.warns(UserWarning, match="1 episodes in .* are not those of save"):
        world.start(0)
    sink.wait(60.0, until_saved=True)
    assert world.numbers() == [[3]]


def test_a_new_run_with_the_same_directory_goes_on_and_other_writers_begin_with_0(tmp_path: Path) -> None:
    for run in range(3):
        world = Simulated(2, tmp_path)
        sink = made(world, name="actor-0")
        sink.settle_fields(FIELDS)
        for number in range(10 * run, 10 * run + 10):
            sink.add(episode(number))
        sink.wait(60.0, until_saved=False)
        handle(world).close()
        assert sorted(n for shard in world.numbers() for n in shard) == list(range(10 * run + 10))


def test_episodes_of_a_save_that_is_lost_are_counted_and_nothing_is_held_up(tmp_path: Path) -> None:
    world = Simulated(1, tmp_path)
    sink = made(world)
    sink.settle_fields(FIELDS)
    for number in range(10):
        sink.add(episode(number))
    sink.wait(60.0, until_saved=True)
    world.kill(0)
    for path in (tmp_path / "shard-0000").glob("*"):
        path.unlink()
    world.start(0)
    for number in range(10, 20):
        sink.add(episode(number))
    sink.wait(60.0, until_saved=True)
    assert world.numbers() == [list(range(10, 20))]
    assert handle(world).stats()["num_missing"] == 10


def test_the_save_before_a_damaged_one_is_gone_on_from(tmp_path: Path) -> None:
    world = Simulated(1, tmp_path, save_every=1e9)
    sink = made(world)
    sink.settle_fields(FIELDS)
    for first in (0, 5):
        for number in range(first, first + 5):
            sink.add(episode(number))
        sink.wait(60.0, until_saved=True)
    world.kill(0)
    newest = max((tmp_path / "shard-0000").glob("save-*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-8] ^= 255
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="is passed over"):
        world.start(0)
    sink.add(episode(10))
    sink.wait(60.0, until_saved=True)
    assert world.numbers() == [[0, 1, 2, 3, 4, 10]]
    assert handle(world).stats()["num_missing"] == 5


def test_a_shard_whose_saves_fail_says_so_and_goes_on_storing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = Simulated(1, tmp_path, save_every=0.1)
    sink = made(world)
    sink.settle_fields(FIELDS)
    shard = world.shards[0]
    assert shard is not None

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard.dataset, "save_with", fail)
    for number in range(5):
        world.time += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sink.add(episode(number))
    sink.wait(10.0, until_saved=False)
    world.time += 1
    sink.step()
    sink.step()
    assert "shard 0 says: [Errno 28] No space left on device" in sink.troubles[0]
    assert world.numbers() == [[0, 1, 2, 3, 4]]
    monkeypatch.undo()
    sink.wait(60.0, until_saved=True)
    assert sink.troubles == {}


def test_step_ids_say_which_life_they_are_of() -> None:
    ids = np.array([[-1, 0, 7], [2**43, 5, -1]])
    there = remote_ids(ids, 2**18 - 1)
    assert (there[ids >= 0] > 2**43).all() and (there[ids < 0] == -1).all()
    assert (local_ids(there, 2**18 - 1) == ids).all()
    assert (local_ids(there, 3)[ids >= 0] == -2).all() and (local_ids(there, 3)[ids < 0] == -1).all()


def test_a_writer_is_no_handle_and_shards_are_one() -> None:
    world = Simulated(1)
    shards = handle(world)
    assert repr(shards) == "Shards: 1, each of up to 100,000 steps an episode"
    with pytest.raises(TypeError, match="pass the Shards"):
        copy.copy(RemoteWriter(shards))
    with pytest.raises(TypeError, match="must be what `start_shards` returns, found Simulated"):
        RemoteWriter(world)  # type: ignore[arg-type]
    assert len(pickle.loads(pickle.dumps(Shards(None, shards.description))).description) == 5  # type: ignore[arg-type]


def test_make_dataset_must_make_one() -> None:
    with pytest.raises(TypeError, match="must return an EpisodeDataset, found int"):
        Shard(0, lambda number: number)  # type: ignore[arg-type,return-value]
