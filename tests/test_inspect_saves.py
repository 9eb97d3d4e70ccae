"""What a user sees of saves: `inspect`, bars, and environments that begin anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from buffers import Recorder, ReplayBuffer
from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.fields import Vector
from buffers.sampler import PrioritizedSampler
from buffers.viewing.commands import main
from buffers.wrappers import RecordEpisodes, VectorRecordEpisodes
from tests import tagged
from tests.saving_helpers import contents


def saved(folder: Path) -> ReplayBuffer:
    """Two saves of a buffer with ten open steps."""
    buffer = ReplayBuffer(RingBufferDataset(100), 4, 3, num_envs=1, sampler=PrioritizedSampler(), seed=7)
    for step in range(40):
        buffer.add_step({"obs": float(step)}, step % 15 == 14)
        if step == 35:
            buffer.save(folder, keep=2)
    buffer.save(folder, keep=2, extra={"epoch": 3})
    return buffer


def test_inspect_shows_the_saves_and_what_is_in_the_newest(tmp_path, capsys) -> None:
    saved(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in (
        *("save  made", "headers whole", "Save 1", "0: RingBufferDataset, 2 episodes, 30 of 100 steps, ids 0 to 1"),
        *("obs       float32 ()  4", "priority  late field", "batches of 4 x 3, the next is number 0, seed 7"),
        *("to be passed again: sampler (PrioritizedSampler)", "10 steps in open episodes of 1 environments"),
        *("extra: epoch", "Needs the files of saves: 0"),
    ):
        assert text in out
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_inspect_says_that_the_newest_cannot_be_loaded_and_shows_the_one_before(tmp_path, capsys) -> None:
    saved(tmp_path)
    os.truncate(tmp_path / "save-0000000001.safetensors", 500)
    assert main(["inspect", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "cannot be loaded" in out and "Save 1: " in out and "Save 0\n" in out and "The newest 1 cannot" in err


def test_only_verify_finds_a_changed_row(tmp_path, capsys) -> None:
    saved(tmp_path)
    path = tmp_path / "save-0000000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert main(["inspect", str(tmp_path)]) == 0
    assert main(["inspect", "--verify", str(tmp_path)]) == 1
    assert "Save 1: " in capsys.readouterr().out


def test_inspect_names_the_late_fields_of_a_source_that_is_only_read(tmp_path, capsys) -> None:
    with IndividualFileDataset(100, directory=tmp_path / "demos", durability="rename") as files:
        files.add_episode(tagged.episode(3, 0))
    with IndividualFileDataset(directory=tmp_path / "demos", mode="r") as reader:
        reader.add_late_field("value", Vector(2))
        reader.save(tmp_path / "saves")
    assert main(["inspect", str(tmp_path / "saves")]) == 0
    assert f"in {tmp_path / 'demos'}; late fields that are saved: value\n" in capsys.readouterr().out


def test_inspect_draws_no_episode_of_a_save(tmp_path, capsys) -> None:
    saved(tmp_path)
    assert main(["inspect", "--episode", "0", str(tmp_path)]) == 1
    assert "no episode to print or draw" in capsys.readouterr().err


def test_progress_shows_a_bar_over_bytes(tmp_path, capsys) -> None:
    ring = RingBufferDataset(100)
    ring.add_episode(tagged.episode(50, 0))
    ring.save(tmp_path, progress=True)
    assert "saving: 100%" in capsys.readouterr().err
    RingBufferDataset.load(tmp_path, progress=True)
    assert "loading: 100%" in capsys.readouterr().err
    ring.save(tmp_path)
    assert not capsys.readouterr().err


# Environments.


@pytest.mark.parametrize("mode", ["keep", "truncate", "drop"])
def test_a_wrapped_environment_begins_with_a_reset_that_truncates_what_was_open(mode, tmp_path) -> None:
    def wrapped(buffer: ReplayBuffer) -> VectorRecordEpisodes:
        envs = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
        return VectorRecordEpisodes(envs, buffer)

    buffer = ReplayBuffer(RingBufferDataset(1000), 1)
    envs = wrapped(buffer)
    envs.reset(seed=0)
    for _ in range(5):
        envs.step(np.zeros(2, np.int64))
    buffer.save(tmp_path)
    resumed = ReplayBuffer.load(tmp_path, open_episodes=mode)
    again = wrapped(resumed)
    again.reset(seed=1)
    expected = [] if mode == "drop" else [6, 6]
    assert resumed.dataset.episode_lengths == expected
    assert all(episode["truncated"].tolist() == [False] * 5 + [True] for episode in resumed.dataset.episodes())
    again.step(np.zeros(2, np.int64))
    assert resumed.writer.num_open_rows == 4


def test_the_state_of_a_wrapper_is_that_of_its_recorder() -> None:
    buffer = ReplayBuffer(RingBufferDataset(1000), 1)
    env = RecordEpisodes(gymnasium.make("CartPole-v1"), buffer)
    env.reset(seed=0)
    state = env.state_dict()
    other = RecordEpisodes(gymnasium.make("CartPole-v1"), ReplayBuffer(RingBufferDataset(1000), 1))
    other.load_state_dict(state)
    assert str(other.state_dict()) == str(state) and state["is_pending"] == [True]


def test_a_recorder_of_another_kind_is_refused(tmp_path) -> None:
    buffer = ReplayBuffer(RingBufferDataset(10), 1)
    recorder = Recorder(buffer, 2, "next_step")
    recorder.reset(np.zeros((2, 1)))
    buffer.save(tmp_path)
    resumed = ReplayBuffer.load(tmp_path)
    with pytest.raises(ValueError, match=r"\('next_step', 2\), this is \('same_step', 2\). `ReplayBuffer.load"):
        Recorder(resumed, 2, "same_step")
    assert Recorder(resumed, 2, "next_step").state_dict()["is_pending"] == [True, True]


def test_the_number_of_environments_is_kept_where_the_save_does_not_know_it(tmp_path) -> None:
    ReplayBuffer(RingBufferDataset(10), 1).save(tmp_path)
    assert ReplayBuffer.load(tmp_path, num_envs=3).writer.num_envs == 3


def test_a_save_of_files_also_commits_their_late_values(tmp_path) -> None:
    files = IndividualFileDataset(100, directory=tmp_path / "episodes", durability="rename")
    files.add_episode(tagged.episode(5, 0))
    files.add_late_field("late", Vector(1))
    files.annotate(0, {"late": np.ones((5, 1), np.float32)})
    files.save(tmp_path / "saves")
    expected: Any = contents(files)
    files._directory.close()  # As the death of the process does.
    with IndividualFileDataset(100, directory=tmp_path / "episodes") as opened:
        assert contents(opened)[0][-1] == expected[0][-1]
